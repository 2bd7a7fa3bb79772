"""Kernels for DeepSeek Sparse Attention: generated from a spec, verified against a reference, tuned per GPU.

>>> import dsa_codegen as dsa
>>> layer = dsa.Layer(dsa.preset("deepseek-v3.2"))

The operations are functions (``indexer_logits``, ``select``, ``sparse_attention``, …); ``Layer`` chains them.
"""

from . import ops, quality, train
from .adaptive import Adaptive
from .candidates import index_select_candidates
from .choice import index_select, index_select_paged
from .errors import DsaError
from .functions import (
    adapt,
    expand_blocks,
    gather_index_k,
    gather_kv,
    index_prologue,
    indexer_logits,
    indexer_logits_chunks,
    indexer_logits_paged,
    pool_index_k,
    quantize_index_k,
    quantize_index_q,
    quantize_latents,
    resolve,
    select,
    sparse_attention,
    sparse_attention_gqa,
    sparse_attention_gqa_paged,
    sparse_attention_paged,
    store_index_k,
    store_kv,
    store_latent,
)
from .invariance import use_batch_invariant
from .layer import Attended, Layer
from .pooled import index_select_pooled, index_select_pooled_paged
from .problem.presets import Model, load, preset
from .runtime.dispatch import Untuned, call, chosen, override, reset, stats, warmup

__all__ = [
    "Adaptive",
    "Attended",
    "DsaError",
    "Layer",
    "Model",
    "Untuned",
    "adapt",
    "call",
    "chosen",
    "expand_blocks",
    "gather_index_k",
    "gather_kv",
    "index_prologue",
    "index_select",
    "index_select_candidates",
    "index_select_paged",
    "index_select_pooled",
    "index_select_pooled_paged",
    "indexer_logits",
    "indexer_logits_chunks",
    "indexer_logits_paged",
    "load",
    "ops",
    "override",
    "pool_index_k",
    "preset",
    "quality",
    "quantize_index_k",
    "quantize_index_q",
    "quantize_latents",
    "reset",
    "resolve",
    "select",
    "sparse_attention",
    "sparse_attention_gqa",
    "sparse_attention_gqa_paged",
    "sparse_attention_paged",
    "stats",
    "store_index_k",
    "store_kv",
    "store_latent",
    "train",
    "use_batch_invariant",
    "warmup",
]
__version__ = "0.1.0"
