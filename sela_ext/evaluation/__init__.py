"""How good labels and features are: clustering metrics, nearest neighbours, linear probes."""

from __future__ import annotations

from sela_ext.evaluation.clustering import cluster_metrics, label_change, label_statistics, mutual_information
from sela_ext.evaluation.knn import weighted_knn
from sela_ext.evaluation.linear import linear_probe

__all__ = ["cluster_metrics", "label_change", "label_statistics", "linear_probe", "mutual_information", "weighted_knn"]
