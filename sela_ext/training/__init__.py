"""Training runs."""

from sela_ext.training.loop import train
from sela_ext.training.options import Options
from sela_ext.training.outcome import TrainResult
from sela_ext.training.plan import RunPlan
from sela_ext.training.watch import RunInfo

__all__ = ["Options", "RunInfo", "RunPlan", "TrainResult", "train"]
