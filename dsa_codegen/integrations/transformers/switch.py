"""enable, disable: a model of transformers attends sparsely by these kernels, or by its own code again.

Only attributes of this one model's modules and the name of an attention function in its config change. The class keeps its
``forward``: it projects, rotates, updates the cache and gates as before, and calls what stands in for its indexer, for the
expansion of latents and for the attention function.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ...errors import InputError, SpecError, ToolMissing, UnknownName
from ...ops.attention import AttentionSpec
from ...ops.indexer import IndexerSpec
from ...ops.select import SelectSpec
from ...problem import checks
from ...problem.channels import D_V
from ...problem.presets import PRECISIONS
from ...train.layer import STAGES
from . import attend, choose, families, grouped, learn, windows

NAME = "dsa_codegen"
"""The attention function's name in a config."""
_OLDEST, _ROTARY = (5, 17), 64
_ABSENT = object()


def enable(
    model: nn.Module,
    *,
    scores: str = "bf16",
    dense_below: int | None = None,
    stage: str | None = None,
    indexer_weight: float = 1.0,
) -> nn.Module:
    """Let every layer of DeepSeek Sparse Attention of a transformers model score, choose and attend by these kernels.

    Serves ``deepseek_v32``, ``glm_moe_dsa``, ``hy_v4``, ``axk2``, ``mistral_large4`` and ``dots3_note`` with their own caches,
    dynamic or static, padded on either side; layers that share another's choice reuse it. On CUDA the model has to be bf16,
    or to be trained; on the CPU, which runs the references, it may be fp32 and fp64 too. Without a ``stage`` nothing here has a
    backward. A cache that was filled before stays good with transformers 5.24, where the model keeps latents too, and does not
    with 5.17. Of ``minimax_m3_vl``, whose grouped queries choose blocks, attention is ours; its indexer stays the model's.

    Args:
        model: as ``from_pretrained`` gives it.
        scores: "bf16" scores what the model would, unquantised; "fp8" quantises queries and keys first, which is how
            DeepSeek serves (without its Hadamard rotation, which these models leave out).
        dense_below: steps whose keys (a static cache's capacity) number no more than this expand keys and values and
            attend by ``scaled_dot_product_attention`` instead, where at least half of the keys are new: windows of up to topk
            tokens are taken whole, so that nothing else comes out, and heads of 192 channels are cheaper than latents of
            576. Default, and at most: ``index_topk``; 0 never does. Calls with gradients never do.
        stage: trains the model, by ``transformers.Trainer`` or any other loop (DeepSeek-V3.2 report, section 2). "dense"
            attends to all tokens and leaves the indexers alone; in the "warm-up" they learn from that (freeze what else has
            gradients); "sparse" attends to the chosen tokens, which the indexers learn from. None, the default, only serves.
        indexer_weight: of the indexers' losses (``indexer_loss``) beside the model's own, which stays what the model returns.
            Whoever adds up the gradients of several batches divides by their number.

    Returns:
        The model.

    Raises:
        ToolMissing: no transformers, or one that is too old.
        UnknownName: no layer is of a class that is served; the message lists those that are.
        SpecError: heads, channels or topk that no kernel serves.
        InputError: a wrong argument, or ``kv_b_proj`` is no plain projection.
    """
    checks.one_of("scores", scores, PRECISIONS)
    checks.check_kind("dense_below", dense_below, "Optional[int]")
    lesson = None
    if stage is not None:
        checks.one_of("stage", stage, STAGES)
        lesson = learn.Lesson(stage, float(indexer_weight), scores)
    _register()
    found = list(layers(model))
    for layer in found:
        _check(layer, stage)
    disable(model)
    for layer in found:
        _enable(layer, scores, dense_below, lesson)
    return model


def disable(model: nn.Module) -> nn.Module:
    """Undo ``enable``: the model computes by its own code again. A model that is not enabled stays as it is."""
    for layer in model.modules():
        before = layer.__dict__.pop("dsa_before", None)
        if before is None:
            continue
        del layer.dsa_dense_below, layer.dsa_lesson
        learn.forget(layer)
        for owner, name, value in before:
            owner.__dict__[name] = value
            if value is _ABSENT:
                del owner.__dict__[name]
    return model


def layers(model: nn.Module) -> Iterator[Any]:
    """The attention modules that choose tokens, or reuse another's choice."""
    found = [module for module in model.modules() if _is_known(module) and _is_sparse(module)]
    if not found:
        own = next((type(each).__name__ for each in model.modules() if type(each).__name__.endswith("Attention")), None)
        raise UnknownName("attention class", own or type(model).__name__, sorted((*families.FAMILIES, *grouped.CLASSES)))
    yield from found


def _is_known(module: nn.Module) -> bool:
    return families.family_of(module) is not None or grouped.is_grouped(module)


def _is_sparse(attention: Any) -> bool:
    """Whether a layer attends to chosen tokens; those with a sliding window have no indexer and share none."""
    return attention.indexer is not None or getattr(attention, "skip_topk", False)


def _check(layer: Any, stage: str | None) -> None:
    """Refuse what no kernel serves before anything is changed."""
    if grouped.is_grouped(layer):
        if stage is not None:
            raise InputError("stage", stage, "None: attention of grouped queries has no backward")
        grouped.check(layer)
        return
    rotary = layer.qk_rope_head_dim
    if layer.kv_lora_rank > D_V:
        raise SpecError("kv_lora_rank", layer.kv_lora_rank, f"at most {D_V}")
    if rotary > _ROTARY:
        raise SpecError("qk_rope_head_dim", rotary, f"at most {_ROTARY}")
    AttentionSpec(layer.num_heads, D_V + _ROTARY, 64)
    if layer.indexer is not None:
        IndexerSpec(layer.indexer.n_heads, layer.indexer.head_dim)
        SelectSpec(layer.indexer.index_topk)
    if type(layer.kv_b_proj) is not nn.Linear or layer.kv_b_proj.bias is not None:
        raise InputError("kv_b_proj", type(layer.kv_b_proj).__name__, "torch.nn.Linear without bias: its halves are absorbed")
    if not callable(getattr(layer, "expand_kv", None)):
        raise ToolMissing("expand_kv of the model's attention", "install transformers 5.17 to 5.24")


def _enable(layer: Any, scores: str, dense_below: int | None, lesson: learn.Lesson | None) -> None:
    """Put what stands in on the instances, and remember what was there."""
    indexer, latent = layer.indexer, not grouped.is_grouped(layer)
    replaced = [(layer, "expand_kv"), *([] if indexer is None else [(indexer, "forward")])] if latent else []
    if layer.config._attn_implementation != NAME:  # layers share their config
        replaced.append((layer.config, "_attn_implementation_internal"))
    layer.dsa_before = [(owner, name, owner.__dict__.get(name, _ABSENT)) for owner, name in replaced]
    layer.config._attn_implementation_internal = NAME
    layer.dsa_dense_below, layer.dsa_lesson = None, lesson
    if latent:
        topk = layer.config.index_topk
        layer.dsa_dense_below = topk if dense_below is None else min(dense_below, topk)
        layer.expand_kv = attend.latents
        if indexer is not None:
            family = families.family_of(layer)
            assert family is not None
            indexer.forward = functools.partial(choose.forward, indexer, choose.Rule(family, topk, scores, lesson))


def _register() -> None:
    """Tell transformers of the attention function and of its masks.

    Raises:
        ToolMissing: see ``enable``.
    """
    remedy = "pip install 'transformers>=5.17'"
    try:
        import transformers
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise ToolMissing("transformers", remedy) from error
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < _OLDEST:
        raise ToolMissing(f"transformers 5.17 or newer (this is {transformers.__version__})", remedy)
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend.forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, windows.windows)


@contextlib.contextmanager
def attending_by(function: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, enabled models attend by another function than ``attend.forward``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, function)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend.forward)


def is_enabled(model: nn.Module) -> bool:
    """Whether a layer of the model computes by these kernels."""
    return any("dsa_before" in module.__dict__ for module in model.modules())
