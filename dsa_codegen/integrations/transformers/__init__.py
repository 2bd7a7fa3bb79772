"""Hugging Face transformers: sparse attention of its models by these kernels, switched on and off by one call.

>>> from dsa_codegen.integrations.transformers import enable
>>> enable(model).generate(**inputs)

What stays the model's: weights, projections, rotations, gates, caches, ``generate``. What is ours: the scores and the choice of
the indexer (``choose``), attention over the cached latents, which are never expanded (``attend``), and masks of two numbers a
query (``windows``); in training, attention with gradients and the indexers' losses (``learn``).
"""

from .capture import capture
from .learn import indexer_loss, indexer_parameters
from .switch import disable, enable

__all__ = ["capture", "disable", "enable", "indexer_loss", "indexer_parameters"]
