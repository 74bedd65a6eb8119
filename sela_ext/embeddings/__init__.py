"""SeLa on feature vectors: balanced clustering of embeddings by heads alone, without a network behind them."""

from __future__ import annotations

from sela_ext.embeddings.estimator import SelfLabelling

__all__ = ["SelfLabelling"]
