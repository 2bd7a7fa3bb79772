"""The operations with gradients: what a model calls while it is trained (DeepSeek-V3.2 report, section 2)."""

from .sparse import sparse_attention

__all__ = ["sparse_attention"]
