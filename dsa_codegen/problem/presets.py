"""The models people run, as one dataclass from which every operation derives its spec; also read from YAML files."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import invariance
from ..errors import SpecError, UnknownName
from .caches import kv_layout
from .values import Value

KV_LAYOUTS = ("v32", "v4")
NO_CACHE = "none"
"""The layout of a model that has no paged KV cache: it prefills, and does not decode."""
SCORES = ("weighted_relu", "relu_bias")
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
    """Query heads of the sparse MLA."""
    d_nope: int
    """Channels of the latent vector without position."""
    d_rope: int
    """Channels with rotary position; 0 for none."""
    index_heads: int
    """Heads of the lightning indexer."""
    index_head_dim: int
    topk: int
    """Tokens that each query attends to."""
    kv_layout: str = "v32"
    """Layout of the paged FP8 KV cache: "v32" (656 B a token, 512 + 64 channels), "v4" (584 B, 448 + 64), or "none"."""
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
    """KV heads of grouped-query attention; d_nope + d_rope are the channels of each of their keys, and of their values."""
    block: int = 1
    """Tokens that an entry of a list stands for: a query of "gqa" attends to topk / block blocks of neighbouring tokens."""
    batch_invariant: bool = False
    """Whether a row's results have the same bits whatever other rows, chunks, ranks and records there are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in("attention", (MLA, GQA))
        if self.attention == GQA:
            self._require_groups()
            return
        self.require_in("kv_heads", (1,))
        self.require_in("block", (1,))
        self.require_range("heads", 1, 128)
        self.require_in("d_nope", (448, 512))
        self.require_in("d_rope", (0, 64))
        self.require_in("index_heads", (8, 16, 32, 64))
        self.require_in("index_head_dim", (32, 64, 128))
        self.require_range("topk", 64, 4096)
        self.require_in("kv_layout", (*KV_LAYOUTS, NO_CACHE))
        self.require_in("page", (16, 32, 64, 128, 256))
        self.require_in("score", SCORES)
        self.require_in("index_scores", PRECISIONS)
        self._require_channels()

    def _require_groups(self) -> None:
        """What grouped-query attention serves. Its indexer is the model's own: no kernel here makes scores of blocks."""
        self.require_range("heads", 1, 128)
        self.require_range("kv_heads", 1, self.heads)
        if self.heads % self.kv_heads:
            raise SpecError("Model.kv_heads", self.kv_heads, f"a divisor of {self.heads} heads")
        self.require_range("d_rope", 0, 256)
        self.require_range("d_nope", 0, 256)
        if self.d_nope + self.d_rope not in range(16, 257, 16):
            raise SpecError("Model.d_nope", self.d_nope, "with d_rope 16 to 256 in steps of 16, the channels of a key")
        self.require_range("index_heads", 1, 64)
        self.require_range("index_head_dim", 16, 256)
        self.require_in("block", BLOCKS)
        self.require_range("topk", self.block, 1 << 20, self.block)
        self.require_in("kv_layout", (PLAIN_CACHE, NO_CACHE))
        self.require_range("page", 1, 1024)
        self.require_in("score", SCORES)
        self.require_in("index_scores", PRECISIONS)

    @property
    def invariant(self) -> bool:
        """Whether its specs are batch invariant: because it says so, or because all calls of the process are."""
        return self.batch_invariant or invariance.always()

    def _require_channels(self) -> None:
        """Fields that are possible one by one and contradict each other together are refused here, not at the first call."""
        if self.kv_layout == NO_CACHE:
            if self.d_nope + self.d_rope not in (512, 576):
                raise SpecError("Model.d_rope", self.d_rope, "64, where d_nope is 448: attention takes 512 or 576 channels")
            return
        layout = kv_layout(self.kv_layout)
        for field, stored in (("d_nope", layout.d_nope), ("d_rope", layout.d_rope)):
            if getattr(self, field) != stored:
                others = f"with kv_layout: {self.kv_layout}; kv_layout: {NO_CACHE} is a model without a paged KV cache"
                raise SpecError(f"Model.{field}", getattr(self, field), f"{stored} {others}")


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


def _shipped() -> dict[str, Model]:
    text = importlib.resources.files(__package__).joinpath("presets.yaml").read_text()
    presets: dict[str, Any] = yaml.load(text, _Loader)
    return {name: Model.from_dict({"name": name, **fields}) for name, fields in presets.items()}
