"""DeepSeek Sparse Attention as torch modules, for inference: projections, caches and the stages between them.

>>> from dsa_codegen import nn
>>> layer = nn.SparseAttention(model, nn.Shape(hidden=7168, q_rank=1536))
>>> caches = nn.PagedCache(model, nn.rotary_table(163840, 64), layers=1, blocks=2560, batch=1)
>>> out = layer(hidden, caches.layers[0], caches.prefill((len(hidden),)))
"""

from __future__ import annotations

from .attention import SparseAttention
from .cache import LayerCache, PagedCache
from .indexer import Indexer
from .rotary import rotary_table
from .shape import Shape
from .step import Step

__all__ = ["Indexer", "LayerCache", "PagedCache", "Shape", "SparseAttention", "Step", "rotary_table"]
