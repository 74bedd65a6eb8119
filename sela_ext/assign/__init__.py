"""Label assignment: balanced labels from logits.

`assign` is the entry. solve.py holds it; problem.py checks what it is given and runs the fused pass; sinkhorn.py,
anderson.py and official.py are the iterations; marginals.py, ties.py and balance.py deal with cluster sizes;
shards.py joins the ranks that rows are spread over; certificate.py judges results by the logits alone; batch.py is the
online form for one batch.
"""

from __future__ import annotations

from sela_ext.assign.batch import assign_batch as assign_batch
from sela_ext.assign.certificate import Certificate as Certificate
from sela_ext.assign.certificate import verify as verify
from sela_ext.assign.features import FeatureLogits as FeatureLogits
from sela_ext.assign.heads import assign_heads as assign_heads
from sela_ext.assign.plan import MemoryPlan as MemoryPlan
from sela_ext.assign.plan import memory_plan as memory_plan
from sela_ext.assign.result import Assignment as Assignment
from sela_ext.assign.shards import shard_rows as shard_rows
from sela_ext.assign.solve import assign as assign
from sela_ext.assign.ties import UnbalancedLabelsWarning as UnbalancedLabelsWarning
