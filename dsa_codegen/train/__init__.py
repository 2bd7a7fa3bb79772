"""The operations with gradients and a layer made of them: what training calls (DeepSeek-V3.2 report, section 2)."""

from .dense import dense_attention
from .indexer import indexer_loss
from .layer import Trained, Windows, run_layer
from .sparse import sparse_attention

__all__ = ["Trained", "Windows", "dense_attention", "indexer_loss", "run_layer", "sparse_attention"]
