"""How good labels and features are: clustering metrics, nearest neighbours, linear probes."""

from __future__ import annotations

from sela_ext.evaluation.clustering import (
    cluster_metrics,
    cluster_table,
    label_change,
    label_statistics,
    mutual_information,
)
from sela_ext.evaluation.crops import ten_crops
from sela_ext.evaluation.few_shot import few_shot_rows
from sela_ext.evaluation.knn import knn_scores, weighted_knn
from sela_ext.evaluation.linear import linear_probe, linear_scores
from sela_ext.evaluation.probes import Pooled, Viewing, fine_tune_scores, sgd_scores, stage_scores
from sela_ext.evaluation.schedule import ProbeSchedule
from sela_ext.evaluation.stability import agreement, stability
from sela_ext.evaluation.stages import Stages, fold_batch_norm

__all__ = [
    "Pooled",
    "ProbeSchedule",
    "Stages",
    "Viewing",
    "agreement",
    "cluster_metrics",
    "cluster_table",
    "few_shot_rows",
    "fine_tune_scores",
    "fold_batch_norm",
    "knn_scores",
    "label_change",
    "label_statistics",
    "linear_probe",
    "linear_scores",
    "mutual_information",
    "sgd_scores",
    "stability",
    "stage_scores",
    "ten_crops",
    "weighted_knn",
]
