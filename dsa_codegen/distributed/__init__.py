"""The layer's stages over several GPUs, by ``torch.distributed``: what each rank does alone, and how results are joined.

Tensor parallelism: ``index_select_by_rows`` deals the indexer's rows out and gathers choices. Decode context parallelism:
``index_select_by_position`` and ``sparse_attention_by_position`` work on caches that are sharded by position. The rest is what
these are made of, for engines whose collectives are their own.
"""

from .by_position import index_select_by_position, sparse_attention_by_position
from .by_rows import index_select_by_rows
from .candidates import merge_choices
from .outputs import merge_attention
from .rows import balanced_bounds, keys_seen
from .shard import Shard, localise

__all__ = [
    "Shard",
    "balanced_bounds",
    "index_select_by_position",
    "index_select_by_rows",
    "keys_seen",
    "localise",
    "merge_attention",
    "merge_choices",
    "sparse_attention_by_position",
]
