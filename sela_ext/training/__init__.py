"""Training runs."""

from sela_ext.training.loop import TrainResult, train
from sela_ext.training.options import Options

__all__ = ["Options", "TrainResult", "train"]
