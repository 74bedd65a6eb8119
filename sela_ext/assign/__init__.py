"""Label assignment: balanced labels from logits.

`assign` is the entry. solve.py holds it; problem.py runs the fused pass at a potential; newton.py (with
continuation.py), anderson.py, sinkhorn.py and official.py are the methods; marginals.py, relaxed.py, ties.py and
balance.py deal with cluster sizes. sources.py reads logits wherever they are: in arrays, in mapped.py's files, in
features.py's products, which heads.py shares among several heads; storage.py makes 16-bit copies, and plan.py counts
the memory. shards.py joins the ranks that rows are spread over; certificate.py judges results by the logits alone;
batch.py is the online form for one batch, and ops.py that form in compiled functions.
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
