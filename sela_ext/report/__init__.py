"""The page that a run ends with."""

from __future__ import annotations

from sela_ext.report.metrics import Metrics, columns, read_metrics
from sela_ext.report.page import write_report

__all__ = ["Metrics", "columns", "read_metrics", "write_report"]
