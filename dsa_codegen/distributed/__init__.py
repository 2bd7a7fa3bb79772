"""The layer's stages over several GPUs, by ``torch.distributed``: what each rank does alone, and how results are joined.

Tensor parallelism: ``index_select_by_rows`` and ``index_select_paged_by_rows`` deal the indexer's rows out and gather choices.
Context parallelism: ``prefill_by_context`` has some rows of a step and gathers keys and latents; ``index_select_by_position``
and ``sparse_attention_by_position`` decode over caches that are sharded by position. ``TensorParallel``, ``ContextParallel``
and ``DataParallel`` are the same as options of ``Layer``. The rest is what these are made of, for engines whose collectives
are their own.
"""

from .by_context import prefill_by_context
from .by_position import index_select_by_position, sparse_attention_by_position
from .by_rows import index_select_by_rows, index_select_paged_by_rows
from .candidates import merge_choices
from .deal import Deal
from .gather import gather_rows
from .modes import ContextParallel, DataParallel, TensorParallel
from .outputs import merge_attention
from .rows import balanced_bounds, keys_seen
from .shard import Shard, localise

__all__ = [
    "ContextParallel",
    "DataParallel",
    "Deal",
    "Shard",
    "TensorParallel",
    "balanced_bounds",
    "gather_rows",
    "index_select_by_position",
    "index_select_by_rows",
    "index_select_paged_by_rows",
    "keys_seen",
    "localise",
    "merge_attention",
    "merge_choices",
    "prefill_by_context",
    "sparse_attention_by_position",
]
