"""The operations as functions: what a model calls. CUDA tensors run tuned kernels, CPU tensors the reference.

By stage: ``indexer`` scores, ``selection`` makes lists, ``attention`` attends to them, ``caches`` is what they point into.

Every function raises InputError, naming the argument, before anything is launched, or SpecError, naming the field, where a
size or option is one that no kernel serves (65 heads of the indexer, topk 5000). "No token" is -1 or any index at or beyond
the number of tokens, anywhere in a row. All may be captured in a CUDA graph once they have run (or ``warmup`` was called) for
the sizes in question, and all are traced by ``torch.compile`` (a loop over ``indexer_logits_chunks`` is unrolled). Surroundings
change nothing: neither the default dtype nor autocast. There is no backward: an input that requires a gradient, where gradients
are on, is an InputError on every device.
Queries, keys, latents, weights, lists and caches may be parts of wider rows, strided in all but the last dimension.
NaN stays where it is: a NaN key or scale gives NaN scores of its token, which ``select`` takes only where nothing else is left;
a NaN in a chosen token, or in a query, gives NaN in the rows of ``out`` and ``lse`` that it takes part in; a query without a
token gives 0 and -inf, whatever it holds.

Five functions take ``sms``: the SMs that the call's grid is made for, all of the GPU's where it is None. Kernels whose blocks
stay until all is done then leave the other SMs to whatever runs beside them (a collective on another stream); kernels with a
block for each piece of work only share it out for so many. It changes no result but the rounding of sums that are split
otherwise.

Functions whose results hold rounded sums take ``batch_invariant``: whether a row's results have the same bits whatever other
rows, chunks, splits, ranks and records there are. Kernels are excluded that add up in another order than their spec's one; it
costs what docs/performance.md says. ``select``, quantising, storing and gathering are so in any case: nothing they sum is
rounded. ``use_batch_invariant`` and DSA_BATCH_INVARIANT=1 say it for all calls of a process.
"""

from __future__ import annotations

from .attention import as_int32, sparse_attention, sparse_attention_gqa, sparse_attention_gqa_paged, sparse_attention_paged
from .caches import (
    gather_index_k,
    gather_kv,
    index_prologue,
    quantize_index_k,
    quantize_index_q,
    quantize_latents,
    store_index_k,
    store_kv,
    store_latent,
)
from .indexer import indexer_logits, indexer_logits_chunks, indexer_logits_paged, pool_index_k
from .selection import adapt, candidates_of, expand_blocks, merge_candidates, resolve, resolve_own, select

__all__ = [
    "adapt",
    "as_int32",
    "candidates_of",
    "expand_blocks",
    "gather_index_k",
    "gather_kv",
    "index_prologue",
    "indexer_logits",
    "indexer_logits_chunks",
    "indexer_logits_paged",
    "merge_candidates",
    "pool_index_k",
    "quantize_index_k",
    "quantize_index_q",
    "quantize_latents",
    "resolve",
    "resolve_own",
    "select",
    "sparse_attention",
    "sparse_attention_gqa",
    "sparse_attention_gqa_paged",
    "sparse_attention_paged",
    "store_index_k",
    "store_kv",
    "store_latent",
]
