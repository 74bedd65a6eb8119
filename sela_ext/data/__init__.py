"""Images and feature vectors: sources, augmentation and the loaders."""

from sela_ext.data.digits import digits_split
from sela_ext.data.loader import Batch, Loader
from sela_ext.data.opening import find_eval_source, open_source
from sela_ext.data.pack import pack
from sela_ext.data.shards import PackReport, PackSource, verify_pack
from sela_ext.data.source import Source
from sela_ext.data.vector_loader import VectorLoader
from sela_ext.data.vectors import VectorSource
from sela_ext.kernels import Augment

__all__ = [
    "Augment",
    "Batch",
    "Loader",
    "PackReport",
    "PackSource",
    "Source",
    "VectorLoader",
    "VectorSource",
    "digits_split",
    "find_eval_source",
    "open_source",
    "pack",
    "verify_pack",
]
