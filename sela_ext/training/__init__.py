"""Training runs."""

from sela_ext.training.loop import train
from sela_ext.training.options import Options
from sela_ext.training.outcome import TrainResult

__all__ = ["Options", "TrainResult", "train"]
