"""The operators that the functions call: the registered ones, or the way around them for a call like an earlier one.

What runs in every step of decoding gives them its arguments one by one: a row that is unpacked into a call (``*options``) is
copied three times, which takes the host as long as the rest of the function.
"""

from __future__ import annotations

from ..runtime.torch_ops import direct

indexer_logits = direct("indexer_logits")
indexer_logits_paged = direct("indexer_logits_paged")
select = direct("select")
select_into = direct("select_into")
sparse_attention = direct("sparse_attention")
sparse_attention_into = direct("sparse_attention_into")
sparse_attention_paged = direct("sparse_attention_paged")
sparse_attention_paged_into = direct("sparse_attention_paged_into")
sparse_attention_gqa = direct("sparse_attention_gqa")
sparse_attention_gqa_into = direct("sparse_attention_gqa_into")
sparse_attention_gqa_paged = direct("sparse_attention_gqa", k="k_cache", v="v_cache")
sparse_attention_gqa_paged_into = direct("sparse_attention_gqa_into", k="k_cache", v="v_cache")
quantize_q = direct("quantize", source="q")
quantize_k = direct("quantize", source="k")
quantize_latents = direct("quantize", source="latents")
store_k = direct("quantize_paged", source="k")
store_kv = direct("quantize_paged", source="nope")
gather_paged = direct("gather_paged")
index_prologue = direct("index_prologue")
store_latent = direct("store_latent")
resolve = direct("resolve")
adapt = direct("adapt")
expand_blocks = direct("expand_blocks")
pool_index_k = direct("pool_index_k")
candidates_of = direct("candidates_of")
merge_candidates = direct("merge_candidates")
merge_attention = direct("merge_attention")
