"""A trained network at work: evaluation, labels and features of new images."""

from __future__ import annotations

from sela_ext.inference.apply import embed, predict
from sela_ext.inference.protocols import evaluate

__all__ = ["embed", "evaluate", "predict"]
