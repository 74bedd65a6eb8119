"""Images: sources, augmentation and the loader."""

from sela_ext.data.digits import digits_split
from sela_ext.data.opening import find_eval_source, open_source
from sela_ext.data.source import Source
from sela_ext.kernels.augment import Augment

__all__ = ["Augment", "Source", "digits_split", "find_eval_source", "open_source"]
