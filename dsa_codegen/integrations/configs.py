"""A Hugging Face ``config.json`` as a ``Model``: what its attention is, in the fields that kernels are generated from.

The file is data: nothing of transformers is imported. What it leaves out is what the class of transformers 5.24 has by default.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import SpecError, UnknownName
from ..problem.presets import GQA, NO_CACHE, PLAIN_CACHE, Model

_KEYS = {
    "heads": "num_attention_heads",
    "d_nope": "kv_lora_rank",
    "d_rope": "qk_rope_head_dim",
    "index_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "topk": "index_topk",
}
"""The fields of latent attention, and how configs call them."""
_LATENTS = {
    "deepseek_v32": (128, 512, 64, 64, 128, 2048),
    "glm_moe_dsa": (64, 512, 64, 32, 128, 2048),
    "hy_v4": (32, 512, 64, 16, 128, 2048),
    "hy_v4_vl": (64, 512, 64, 32, 128, 2048),
    "axk2": (32, 128, 32, 16, 128, 2048),
    "mistral_large4": (64, 512, 64, 32, 128, 2048),
    "dots3_note": (128, 512, 64, 64, 128, 2048),
    "glm5_next": (64, 512, 0, 32, 128, 2048),
    "longcat": (None, 512, 64, None, 128, None),
}
"""By model_type the values of those fields where a config does not state them; None where it has to."""
_SINKS = ("hy_v4", "hy_v4_vl")
_OTHER_NAMES = {
    "minimax_m3_vl": "minimax_m3",
    "longcat2": "longcat",
    "longcat_flash_pro": "longcat",
    "longcat_flash": "longcat",
}
_V32 = 512, 64


def read(path: str | Path, name: str = "") -> Model:
    """The model of a ``config.json``.

    Args:
        path: the file as it lies in a checkpoint; of a model with vision or audio its ``text_config`` counts.
        name: the model's name; its ``model_type`` where absent.

    Raises:
        SpecError: the file is no JSON mapping, a value is missing or no number, or one that no kernel serves.
        UnknownName: a ``model_type`` that is not known; the message lists those that are.
    """
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise SpecError("config file", str(path), f"a readable JSON file ({error})") from error
    if not isinstance(config, Mapping):
        raise SpecError("config file", str(path), "a JSON mapping, as in a checkpoint of transformers")
    return model_of(config, name)


def model_of(config: Mapping[str, Any], name: str = "") -> Model:
    """``read`` of what such a file holds."""
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else config
    kind = str(inner.get("model_type") or config.get("model_type"))
    family = kind.removesuffix("_text")
    family = _OTHER_NAMES.get(family, family)
    if family not in _FAMILIES:
        raise UnknownName("model_type", kind, sorted({*_FAMILIES, *_OTHER_NAMES}))
    return Model.from_dict({"name": name or family, **_FAMILIES[family](inner, family)})


def _number(config: Mapping[str, Any], key: str, default: float | None = None, whole: bool = True) -> Any:
    """A number of a config."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise SpecError(f"config.{key}", value, "a whole number" if whole else "a number")
    return value


def _latent(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """One latent per token and a lightning indexer beside it."""
    defaults = dict(zip(_KEYS, _LATENTS[family], strict=True))
    fields = {field: _number(config, key, defaults[field]) for field, key in _KEYS.items()}
    layout = "v32" if (fields["d_nope"], fields["d_rope"]) == _V32 else PLAIN_CACHE
    kept = {"keep_first": _number(config, "index_init_tokens", 0), "keep_recent": _number(config, "index_local_tokens", 0)}
    return {**fields, **kept, "d_v": fields["d_nope"], "kv_layout": layout, "attn_sink": family in _SINKS}


def _pooled(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Latents without position, and an indexer whose keys stand for blocks of tokens."""
    return {**_latent(config, family), "pool": _number(config, "index_kpool", 16), "kv_layout": NO_CACHE}


def _deepseek_v4(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Rotary channels inside of a latent that is all value, sinks, and rows of 584 bytes."""
    width = _number(config, "head_dim", 512)
    rotary = _number(config, "qk_rope_head_dim", round(width * _number(config, "partial_rotary_factor", 64 / 512, whole=False)))
    return {
        "heads": _number(config, "num_attention_heads", 64),
        "d_nope": width - rotary,
        "d_rope": rotary,
        "index_heads": _number(config, "index_n_heads", 64),
        "index_head_dim": _number(config, "index_head_dim", 128),
        "topk": _number(config, "index_topk", 512),
        "d_v": width,
        "kv_layout": "v4",
        "attn_sink": True,
    }


def _deepseek_v41(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The same in rows of 528 bytes, all of them e4m3: rotary position is applied before a token is stored."""
    width = _number(config, "head_dim", 512)
    indexer = {"index_n_heads": _number(config, "index_n_heads", 32)}
    return {**_deepseek_v4({**config, **indexer}, family), "d_nope": width, "d_rope": 0, "kv_layout": "v41"}


def _minimax_m3(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Grouped queries; every KV head has its blocks, of which the query's own is one."""
    older = config.get("sparse_attention_config") or {}
    if not isinstance(older, Mapping):
        raise SpecError("config.sparse_attention_config", older, "a mapping")

    def indexer(key: str, before: str, default: int) -> int:
        return int(_number(older, before, _number(config, key, default)))

    block = indexer("index_block_size", "sparse_block_size", 128)
    return {
        **_grouped(config, 64, 4, 128, _number(config, "rotary_dim", 64)),
        "topk": block * indexer("index_topk_blocks", "sparse_topk_blocks", 16),
        "block": block,
        "keep_recent": block * indexer("index_local_blocks", "sparse_local_block", 1),
        "page": block,
        "index_heads": indexer("index_n_heads", "sparse_num_index_heads", 4),
        "index_head_dim": indexer("index_head_dim", "sparse_index_dim", 128),
    }


def _qwen4_exp(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Grouped queries over whole blocks, and the tokens behind the last one, which are a block as well."""
    rotary = config.get("rope_parameters") or config
    if not isinstance(rotary, Mapping):
        raise SpecError("config.rope_parameters", rotary, "a mapping")
    width = _number(config, "head_dim", 256)
    block = _number(config, "indexer_compress_ratio")
    return {
        **_grouped(config, 16, 2, 256, round(width * _number(rotary, "partial_rotary_factor", 1.0, whole=False))),
        "topk": _number(config, "indexer_budget") + block,
        "block": block,
        "keep_recent": block,
        "index_heads": _number(config, "indexer_n_heads"),
        "index_head_dim": _number(config, "indexer_head_dim"),
    }


def _grouped(config: Mapping[str, Any], heads: int, kv_heads: int, width: int, rotary: int) -> dict[str, Any]:
    """What grouped queries have in common."""
    width = _number(config, "head_dim", width)
    return {
        "attention": GQA,
        "heads": _number(config, "num_attention_heads", heads),
        "kv_heads": _number(config, "num_key_value_heads", kv_heads),
        "d_nope": width - rotary,
        "d_v": width,
        "d_rope": rotary,
        "kv_layout": PLAIN_CACHE,
        "index_scores": "bf16",
    }


_FAMILIES: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    **dict.fromkeys(_LATENTS, _latent),
    "deepseek_v4": _deepseek_v4,
    "deepseek_v41": _deepseek_v41,
    "glm5_next": _pooled,
    "minimax_m3": _minimax_m3,
    "qwen4_exp": _qwen4_exp,
}
