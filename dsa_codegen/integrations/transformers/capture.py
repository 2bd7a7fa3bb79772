"""capture: what one layer's attention and its indexer compute with while a prompt is read, for ``dsa_codegen.quality``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...quality import Activations
from . import attend, choose, families, switch


@torch.no_grad()
def capture(model: nn.Module, input_ids: Tensor, layer: int = -1) -> Activations:
    """Read a prompt with an enabled model, and keep what a layer's queries, latents and indexer are.

    While it runs, no other thread may run an enabled model: the attention function that all share is replaced for that time.

    Args:
        model: that ``enable`` has switched.
        input_ids: int64 [1, tokens], one sequence without padding.
        layer: which of the layers that have an indexer of their own; the last one by default.

    Returns:
        Activations of all the prompt's queries: ``quality.measure(found.until(4096, 64), [512, 1024, 2048])``.

    Raises:
        InputError: names the argument, what came and what is allowed.
    """
    if not switch.is_enabled(model):
        raise InputError("model", "one that is not enabled", "a model that enable() has switched")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or len(input_ids) != 1:
        raise InputError("input_ids", list(getattr(input_ids, "shape", ())), "one sequence, [1, tokens]")
    own = [each for each in switch.layers(model) if each.indexer is not None and families.family_of(each)]
    if not -len(own) <= layer < len(own):
        raise InputError("layer", layer, f"one of the {len(own)} layers with an indexer of their own")
    found: dict[str, Any] = {}
    attention, forward = own[layer], own[layer].indexer.forward
    attention.indexer.forward = functools.partial(_indexed, attention, forward, found)
    try:
        with switch.attending_by(functools.partial(_attended, attention, found)):
            model(input_ids, use_cache=False)
    finally:
        attention.indexer.forward = forward
    number = getattr(attention, "layer_idx", layer)
    return Activations(**found, name=f"{type(model).__name__}, layer {number}")


def _indexed(attention: Any, forward: Any, found: dict[str, Any], hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
    """Keep the indexer's queries, keys and weights, and do what it does."""
    indexer, family = attention.indexer, families.family_of(attention)
    assert family is not None
    given = choose.named_arguments(family, args, named)
    rotation, position = given["position_embeddings"], given.get("position_ids")
    queries = families.queries(family, indexer, hidden_states, given.get("q_resid"), rotation, position)
    found["index_q"], found["index_k"] = queries[0], families.keys(family, indexer, hidden_states, rotation)[0]
    unfolded = (indexer.n_heads * indexer.head_dim) ** 0.5
    found["index_weights"] = families.weights(indexer, hidden_states)[0] * unfolded
    chosen: Tensor = forward(hidden_states, *args, **named)
    return chosen


def _attended(
    attention: Any,
    found: dict[str, Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **others: Any,
) -> tuple[Tensor, None]:
    """Keep the attention's queries and latents, and attend."""
    if module is attention:
        found["q"] = attend.absorbed(query, attend.halves(module, query.shape[1])[0])[0]
        found["kv"] = attend.whole_rows(key, value)[0].transpose(0, 1).contiguous()
        windows = attention_mask.expand(1, 1, query.shape[2], 2)[0, 0]
        found["starts"], found["ends"] = (each.clone() for each in windows.unbind(-1))
        sink = others.get("s_aux")
        found |= {"sm_scale": scaling, "sink": None if sink is None else sink.float()}
    return attend.forward(module, query, key, value, attention_mask, scaling, **others)
