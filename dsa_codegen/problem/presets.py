"""The models people run, as one dataclass from which every operation derives its spec; also read from YAML files."""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import invariance
from ..errors import SpecError, UnknownName
from . import channels
from .kv_layouts import KV_LAYOUTS, AnyKvLayout, kv_layout, require_kv_channels
from .values import Value

NO_CACHE = "none"
"""The layout of a model that has no paged KV cache: it prefills, and does not decode."""
SCORES = ("weighted_relu", "relu_bias")
POOLS = (1, 2, 4, 8, 16, 32, 64)
"""Tokens of a block that has one key of the indexer."""
PRECISIONS = ("fp8", "bf16")
"""What an indexer scores: e4m3 with scales, or its queries and keys as they are."""
MLA, GQA = "mla", "gqa"
PLAIN_CACHE = "bf16"
"""The layout of pages of keys and values as they are, which grouped-query attention reads."""
BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Of how many tokens an entry of a list may stand for."""


@dataclass(frozen=True)
class Model(Value):
    """The sparse attention of one model (or of one tensor-parallel rank of it)."""

    name: str
    heads: int
    """Query heads."""
    d_nope: int
    """Channels of the latent vector without position; of grouped queries those of a key."""
    d_rope: int
    """Channels with rotary position; 0 for none."""
    index_heads: int
    """Heads of the lightning indexer."""
    index_head_dim: int
    topk: int
    """Tokens that each query attends to."""
    kv_layout: str = "v32"
    """Layout of the paged KV cache: "v32" (656 B a token, 512 + 64 channels), "v4" (584 B, 448 + 64), "bf16", one of the FP8
    rows that hold any channels ("fp8_ue8m0_64": see ``kv_layouts.KvRowsLayout``), or "none"."""
    page: int = 64
    """Tokens per page of the paged caches."""
    score: str = "weighted_relu"
    """Form of the indexer's score."""
    attn_sink: bool = False
    """Whether a learned sink logit per head joins the softmax."""
    index_scores: str = "fp8"
    """What the indexer multiplies: "fp8", or "bf16" where nothing is quantised."""
    attention: str = "mla"
    """ "mla": one latent per token is key and value of all heads; "gqa": several KV heads, keys and values apart."""
    kv_heads: int = 1
    """KV heads of grouped-query attention; d_nope + d_rope are the channels of each of their keys, d_v those of a value."""
    block: int = 1
    """Tokens that an entry of a list stands for: a query of "gqa" attends to topk / block blocks of neighbouring tokens."""
    pool: int = 1
    """Tokens that share a pooled key of the indexer: a query attends to topk / pool blocks of them and to the tokens behind."""
    batch_invariant: bool = False
    """Whether a row's results have the same bits whatever other rows, chunks, ranks and records there are."""
    d_v: int = channels.D_V
    """Channels of a token that are its value: ``d_nope`` of them, or all (rotary position inside the value, DeepSeek-V4); of
    grouped queries those of a value of its own."""
    keep_first: int = 0
    """So many tokens at a window's start are always chosen (attention sinks; LongCat); they count among the ``topk``."""
    keep_recent: int = 0
    """So many tokens at a window's end are always chosen; of pooled keys whole blocks."""
    next_n: int = 2
    """Queries of a sequence in a decode step where tokens are drafted (multi-token prediction); 1 where none are. Kernels for
    one query are tuned and verified beside those for so many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in("attention", (MLA, GQA))
        self.require_range("next_n", 1, 8)
        if self.attention == GQA:
            self._require_groups()
            return
        self.require_in("kv_heads", (1,))
        self.require_in("block", (1,))
        self.require_range("heads", 1, 128)
        self.require_range("d_nope", channels.STEP, channels.MOST, channels.STEP)
        self.require_range("d_rope", 0, channels.MOST_TAIL, channels.STEP)
        self.require_range("index_heads", 1, channels.MOST_INDEX_HEADS)
        self.require_in("index_head_dim", channels.INDEX_WIDTHS)
        self.require_range("topk", 64, 4096)
        self.require_in("kv_layout", (*KV_LAYOUTS, NO_CACHE))
        self.require_in("page", (16, 32, 64, 128, 256))
        self.require_in("score", SCORES)
        self.require_in("index_scores", PRECISIONS)
        self.require_in("pool", POOLS)
        if self.topk % self.pool or self.topk // self.pool < 64:
            raise SpecError("Model.pool", self.pool, f"a divisor of topk {self.topk}, 64 blocks or more")
        self.require_range("keep_first", 0, self.topk, self.pool)  # whole blocks, where these are chosen
        self.require_range("keep_recent", 0, self.topk - self.keep_first, self.pool)
        self._require_channels()

    def _require_groups(self) -> None:
        """What grouped-query attention serves. Its indexer is the model's own: no kernel here makes scores of blocks."""
        self.require_range("heads", 1, 128)
        self.require_range("kv_heads", 1, self.heads)
        if self.heads % self.kv_heads:
            raise SpecError("Model.kv_heads", self.kv_heads, f"a divisor of {self.heads} heads")
        self.require_in("pool", (1,))
        self.require_range("d_rope", 0, 256)
        self.require_range("d_nope", 0, 256)
        if self.d_nope + self.d_rope not in range(16, 257, 16):
            raise SpecError("Model.d_nope", self.d_nope, "with d_rope 16 to 256 in steps of 16, the channels of a key")
        self.require_range("d_v", 16, 256, 16)
        self.require_range("index_heads", 1, 64)
        self.require_range("index_head_dim", 16, 256)
        self.require_in("block", BLOCKS)
        self.require_range("topk", self.block, 1 << 20, self.block)
        self.require_range("keep_first", 0, self.topk, self.block)
        self.require_range("keep_recent", 0, self.topk - self.keep_first, self.block)
        self.require_in("kv_layout", (PLAIN_CACHE, NO_CACHE))
        self.require_range("page", 1, 1024)
        self.require_in("score", SCORES)
        self.require_in("index_scores", PRECISIONS)

    @property
    def invariant(self) -> bool:
        """Whether its specs are batch invariant: because it says so, or because all calls of the process are."""
        return self.batch_invariant or invariance.always()

    @property
    def d_qk(self) -> int:
        """Channels of queries and tokens."""
        return self.d_nope + self.d_rope

    @property
    def rope_in_value(self) -> bool:
        """Whether the rotary channels are part of the value."""
        return self.d_rope > 0 and self.d_v == self.d_qk

    @property
    def cache(self) -> AnyKvLayout:
        """How a block of the KV cache is laid out.

        Raises:
            UnknownName: the model has none.
        """
        return kv_layout(self.kv_layout, self.page, self.d_nope, self.d_rope, self.d_v)

    @property
    def entries(self) -> int:
        """Entries of attention's lists: topk tokens, and of pooled keys those behind the last whole block."""
        return self.topk + self.pool - 1

    def _require_channels(self) -> None:
        """Fields that are possible one by one and contradict each other together are refused here, not at the first call."""
        if self.kv_layout != NO_CACHE:
            try:
                require_kv_channels(self.kv_layout, self.d_nope, self.d_rope)
            except SpecError as error:
                raise error.inside("Model", f"kv_layout: {NO_CACHE} is a model without a paged KV cache") from None
        self.require_range("d_v", channels.LEAST, channels.MOST, channels.STEP)
        if self.d_v not in (self.d_nope, self.d_qk):
            allowed = f"{self.d_nope}, the channels without position, or {self.d_qk}, all of a token's"
            raise SpecError("Model.d_v", self.d_v, allowed)


class _Loader(yaml.SafeLoader):
    """Plain values only, and no key twice: of two, the last would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class, after a look at the keys."""
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            name = key.tag, str(key.value)
            if key.tag != "tag:yaml.org,2002:merge" and name in lines:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is stated in line {lines[name]} and again in line {line}"
                )
            lines[name] = line
        return super().construct_mapping(node, deep)


def names() -> list[str]:
    """The presets that come with the package."""
    return sorted(_shipped())


def preset(name: str) -> Model:
    """The model of that name.

    Raises:
        UnknownName: there is no such preset; the message lists them.
    """
    shipped = _shipped()
    if name not in shipped:
        raise UnknownName("preset", name, sorted(shipped))
    return shipped[name]


def load(path: str | Path) -> Model:
    """Read a model from a YAML file of the fields of ``Model``; ``name`` defaults to the file's, as far as it can be one.

    Raises:
        SpecError: not a mapping, an unknown field or one that is stated twice, a value that no kernel can serve, or fields
            that contradict each other.
    """
    path = Path(path)
    try:
        mapping = yaml.load(path.read_text(), _Loader)
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise SpecError("spec file", str(path), f"a readable YAML file ({error})") from error
    if not isinstance(mapping, Mapping):
        raise SpecError("spec file", str(path), "a YAML mapping of the fields of Model")
    name = re.sub(r"^[^A-Za-z]+|[^A-Za-z0-9_.\-]", "", path.stem) or "model"
    return Model.from_dict({"name": name, **mapping})


def dump(model: Model) -> str:
    """The YAML text that ``load`` reads back to an equal model."""
    return yaml.safe_dump(model.to_dict(), sort_keys=False)


@functools.cache
def _shipped() -> dict[str, Model]:
    """Read once: 20 ms of YAML, which tests and commands ask for hundreds of times."""
    text = importlib.resources.files(__package__).joinpath("presets.yaml").read_text()
    presets: dict[str, Any] = yaml.load(text, _Loader)
    return {name: Model.from_dict({"name": name, **fields}) for name, fields in presets.items()}
