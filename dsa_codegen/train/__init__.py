"""The operations with gradients: what a model calls while it is trained (DeepSeek-V3.2 report, section 2)."""

from .dense import dense_attention
from .indexer import indexer_loss
from .sparse import sparse_attention

__all__ = ["dense_attention", "indexer_loss", "sparse_attention"]
