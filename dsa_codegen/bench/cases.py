"""Cases: the problems that the benchmark times, by stage; the one list that names shapes, distributions and suites."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import SpecError, UnknownName

STAGES = (
    "index_prologue",
    "latent_prologue",
    "indexer_prefill",
    "indexer_decode",
    "select",
    "index_select_prefill",
    "index_select_decode",
    "attention_prefill",
    "attention_prefill_paged",
    "attention_decode",
    "gqa_prefill",
    "gqa_decode",
    "model_prefill",
    "model_decode",
    "layer_prefill",
    "layer_decode",
    "engine_prefill",
    "engine_decode",
    "attention_backward",
    "indexer_backward",
)
KEYS = (
    "tokens",
    "rows",
    "queries",
    "batch",
    "next_n",
    "context",
    "heads",
    "kv_heads",
    "head_dim",
    "k",
    "extra_k",
    "block",
    "page",
)
"""The keys of a shape, in the order in which they are shown."""
SUITES = ("core", "distributions", "flashmla", "deepgemm")
"""core: the shapes that people serve; distributions: selections of scores that are not normal; the others: the shapes with
which those libraries time themselves."""
ASKED = "asked"
"""The suite of a shape that somebody asked for."""
INDEXED = "indexed"
"""The distribution of scores that an indexer gave."""
LOCAL = "local"
"""Lists of which neighbouring queries share 80 %."""
FP8_PRODUCTS = "fp8"
"""Random lists, and products in FP8 are allowed: those who make them take part in such rows only."""
IN_ORDER = "in order"
"""Causal lists, and the tokens' gradient is added up in a fixed order: the same bits in every run."""
PLACED = "placed"
"""Every row has a slot of its own, as in serving."""
V4_WINDOW, V4_SELECTION = 128, 512
"""Entries of the two pools that DeepSeek-V4 attends to at once; `extra_k` of a shape are those of the second."""
V4_K = V4_WINDOW + V4_SELECTION
"""As many of one."""


@dataclass(frozen=True)
class BenchCase:
    """One problem. ``heads`` are the indexer's in the indexer's stages, the attention's elsewhere."""

    stage: str
    shape: tuple[tuple[str, int], ...]
    distribution: str
    suite: str = "core"

    @property
    def id(self) -> str:
        """Readable and unique: ``select-rows64-context8192-k2048-normal``."""
        return "-".join((self.stage, *(f"{name}{value}" for name, value in self.shape), self.distribution))

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two results those of the same problem."""
        return self.stage, tuple(sorted(self.shape)), self.distribution

    def __getitem__(self, name: str) -> int:
        return dict(self.shape)[name]


def case(stage: str, distribution: str, shape: Mapping[str, int], suite: str = "core") -> BenchCase:
    """A case with its shape in the order of ``KEYS``."""
    return BenchCase(stage, tuple((name, shape[name]) for name in KEYS if name in shape), distribution, suite)


def _prologues() -> Iterator[BenchCase]:
    for tokens in (4096, 64, 1):
        yield case("index_prologue", PLACED, {"tokens": tokens, "heads": 64, "head_dim": 128, "page": 64})
        yield case("latent_prologue", PLACED, {"tokens": tokens, "head_dim": 576, "page": 64})


def _indexer_prefill() -> Iterator[BenchCase]:
    def one(queries: int, context: int, heads: int = 64, suite: str = "core") -> BenchCase:
        shape = {"queries": queries, "context": context, "heads": heads, "head_dim": 128}
        return case("indexer_prefill", "causal", shape, suite)

    for queries, context in ((4096, 32768), (4096, 4096), (2048, 8192), (4096, 131072)):
        yield one(queries, context)
    for heads in (32, 16, 8):
        yield one(4096, 32768, heads)
    for queries, context in ((2048, 4096), (4096, 8192), (2048, 65536), (8192, 8192), (8192, 65536)):
        yield one(queries, context, suite="deepgemm")


def _indexer_decode() -> Iterator[BenchCase]:
    def one(batch: int, context: int, next_n: int = 1, suite: str = "core") -> BenchCase:
        shape = {"batch": batch, "next_n": next_n, "context": context, "heads": 64, "head_dim": 128, "page": 64}
        return case("indexer_decode", "full", shape, suite)

    for batch in (64, 8, 1):
        yield one(batch, 65536)
        yield one(batch, 8192)
    yield one(1, 131072)
    for next_n in (2, 3, 4, 6):
        yield one(64, 65536, next_n)
    for batch, next_n in ((64, 1), (64, 2), (128, 1)):
        yield one(batch, 32768, next_n, "deepgemm")
    yield one(128, 8192, 1, "deepgemm")
    yield one(64, 8192, 2, "deepgemm")
    for context in (8192, 65536):
        for next_n in (1, 2):
            yield one(256, context, next_n, "deepgemm")


def _select() -> Iterator[BenchCase]:
    contexts = {
        1: (65536, 8192, 32768, 131072),
        8: (65536, 8192, 131072),
        64: (8192, 32768, 65536, 131072),
        128: (8192, 32768, 65536),
        4096: (32768, 8192, 131072),
    }
    for rows, widths in contexts.items():
        for context in widths:
            yield case("select", "normal", {"rows": rows, "context": context, "k": 2048})
    for distribution in ("relu", "equal", "up", "down", "few", INDEXED):
        for rows, context in ((64, 32768), (4096, 32768)):
            yield case("select", distribution, {"rows": rows, "context": context, "k": 2048}, "distributions")


def _index_select() -> Iterator[BenchCase]:
    for queries, context in ((4096, 32768), (4096, 131072), (1024, 1 << 20)):
        shape = {"queries": queries, "context": context, "heads": 64, "head_dim": 128, "k": 2048}
        yield case("index_select_prefill", "causal", shape)
    for batch in (64, 8, 1):
        shape = {"batch": batch, "next_n": 1, "context": 65536, "heads": 64, "head_dim": 128, "k": 2048, "page": 64}
        yield case("index_select_decode", "full", shape)


def _attention_prefill() -> Iterator[BenchCase]:
    def one(queries: int, context: int, heads: int, indices: str = "random", suite: str = "core", **other: int) -> BenchCase:
        shape = {"queries": queries, "context": context, "heads": heads, "head_dim": 576, "k": 2048, **other}
        return case("attention_prefill", indices, shape, suite)

    yield one(4096, 32768, 128)
    yield one(4096, 8192, 128)
    yield one(4096, 131072, 128)
    yield one(4096, 1 << 20, 128)
    yield one(512, 32768, 128)
    for heads in (64, 32, 16, 8):
        yield one(4096, 32768, heads)
    for heads in (16, 8):
        yield one(4096, 32768, heads, LOCAL)
    for context in (8192, 131072):
        yield one(4096, context, 64)
    for heads in (128, 16):
        yield one(4096, 131072, heads, LOCAL)
    yield one(4096, 32768, 128, FP8_PRODUCTS)
    for context in (65536, 98304):
        yield one(4096, context, 128, suite="flashmla")
    for heads, k in ((64, 512), (128, 1024)):
        for context in (8192, 32768, 49152, 65536):
            yield one(4096, context, heads, suite="flashmla", head_dim=512, k=k)


def _attention_prefill_paged() -> Iterator[BenchCase]:
    def one(heads: int, indices: str = "random", queries: int = 4096) -> BenchCase:
        shape = {"queries": queries, "context": 32768, "heads": heads, "head_dim": 576, "k": 2048, "page": 64}
        return case("attention_prefill_paged", indices, shape)

    yield one(128)
    yield one(128, queries=512)
    yield one(64)
    for heads in (16, 8):
        yield one(heads)
        yield one(heads, LOCAL)


def _attention_decode() -> Iterator[BenchCase]:
    def one(batch: int, next_n: int, heads: int, suite: str = "core", indices: str = "random", **other: int) -> BenchCase:
        shape = {"batch": batch, "next_n": next_n, "context": 32768, "heads": heads, "head_dim": 576, "k": 2048, "page": 64}
        return case("attention_decode", indices, {**shape, **other}, suite)

    for batch in (64, 1, 8, 128):
        yield one(batch, 1, 128)
    yield one(128, 2, 128)
    yield one(128, 1, 64)
    for heads in (128, 64):
        for batch in (64, 1, 8, 128):
            yield one(batch, 1, heads, head_dim=512, k=V4_K)
        for batch in (64, 1, 128):
            yield one(batch, 1, heads, head_dim=512, k=V4_WINDOW, extra_k=V4_SELECTION)
    for heads in (16, 8):
        for indices in ("random", LOCAL):
            yield one(64, 4, heads, indices=indices)
    for heads in (64, 32, 16, 8):
        for batch in (64, 8, 1):
            yield one(batch, 1, heads)
    for batch in (2, 64, 74):
        yield one(batch, 2, 128, "flashmla")
    for heads in (64, 128):
        for head_dim in (576, 512):
            yield one(148, 2, heads, "flashmla", k=16384, head_dim=head_dim)


def _grouped() -> Iterator[BenchCase]:
    minimax = {"heads": 64, "kv_heads": 4, "head_dim": 128, "k": 2048, "block": 128}
    qwen = {"heads": 16, "kv_heads": 2, "head_dim": 256, "k": 2048, "block": 4}

    def prefill(model: Mapping[str, int], queries: int, context: int, lists: str = "random") -> BenchCase:
        return case("gqa_prefill", lists, {"queries": queries, "context": context, **model})

    def decode(model: Mapping[str, int], batch: int, page: int) -> BenchCase:
        return case("gqa_decode", "random", {"batch": batch, "next_n": 1, "context": 32768, "page": page, **model})

    for lists in ("random", LOCAL):
        yield prefill(minimax, 4096, 32768, lists)
    yield prefill(minimax, 4096, 131072)
    yield prefill(minimax, 512, 32768)
    yield prefill(qwen, 4096, 32768)
    for batch in (64, 8, 1):
        yield decode(minimax, batch, 128)
    yield decode(qwen, 64, 64)


def _models() -> Iterator[BenchCase]:
    """One or two of each shape that differs; the distribution names the preset."""
    for name, shape in {
        "ax-k2": {"heads": 32, "head_dim": 160, "k": 2048},
        "hy4": {"heads": 32, "head_dim": 576, "k": 2048},
        "glm-5.3-flash": {"heads": 64, "head_dim": 512, "k": 2063},
    }.items():
        yield case("model_prefill", name, {"queries": 4096, "context": 32768, **shape})
    for name, shape in {
        "deepseek-v3.2-bf16": {"heads": 128, "head_dim": 576, "k": 2048},
        "ax-k2": {"heads": 32, "head_dim": 160, "k": 2048},
        "deepseek-v4.1": {"heads": 64, "head_dim": 512, "k": 512},
        "hy4": {"heads": 32, "head_dim": 576, "k": 2048},
    }.items():
        yield case("model_decode", name, {"batch": 64, "next_n": 1, "context": 32768, "page": 64, **shape})


def _layer() -> Iterator[BenchCase]:
    for heads in (128, 16):
        prefill = {"queries": 4096, "context": 32768, "heads": heads, "head_dim": 576, "k": 2048}
        yield case("layer_prefill", "real", prefill)
        yield case("engine_prefill", "real", prefill)
        for batch in (64, 1):
            shape = {"batch": batch, "next_n": 1, "context": 65536, "heads": heads, "head_dim": 576, "k": 2048, "page": 64}
            yield case("layer_decode", "real", shape)
            yield case("engine_decode", "real", shape)


def _training() -> Iterator[BenchCase]:
    shape = {"head_dim": 576, "k": 2048}
    for heads in (128, 64, 16):
        for queries in (4096, 8192):
            yield case("attention_backward", "causal", {**shape, "queries": queries, "context": 8192, "heads": heads})
        yield case("attention_backward", IN_ORDER, {**shape, "queries": 4096, "context": 8192, "heads": heads})
    for heads in (128, 64, 16):
        for queries in (4096, 8192):
            of = {"queries": queries, "context": 8192, "heads": heads, "head_dim": 576}
            yield case("indexer_backward", "causal", {**of, "k": 2048})
            yield case("indexer_backward", "whole windows", of)


def all_cases() -> list[BenchCase]:
    """Every case, stage by stage, the headline of a stage first."""
    attention = (_attention_prefill, _attention_prefill_paged, _attention_decode, _grouped, _models)
    makers = (_prologues, _indexer_prefill, _indexer_decode, _select, _index_select, *attention, _layer, _training)
    found = [each for maker in makers for each in maker()]
    return sorted(found, key=lambda each: STAGES.index(each.stage))


def asked(stage: str, text: str) -> BenchCase:
    """A shape of somebody's own: a stage's headline but for what ``batch=96,heads=64`` says, ``distribution=local`` too.

    Raises:
        UnknownName: a stage that does not exist; a key or a distribution that none of its cases has.
        SpecError: what is no such list; a number below one.
    """
    listed = chosen([stage], SUITES)
    shape, distribution = dict(listed[0].shape), listed[0].distribution
    keys = [name for name in KEYS if any(name in dict(each.shape) for each in listed)]
    for word in text.split(","):
        name, equals, value = (each.strip() for each in word.partition("="))
        if not equals:
            raise SpecError("--shape", text, "key=number, separated by commas: batch=96,heads=64")
        if name == "distribution":
            distribution = value
        elif name not in keys:
            raise UnknownName(f"key of {stage}", name, (*keys, "distribution"))
        elif not value.isdecimal() or not int(value):
            raise SpecError(f"--shape {name}", value, "a whole number from 1 on")
        else:
            shape[name] = int(value)
    known = tuple(dict.fromkeys(each.distribution for each in listed))
    if distribution not in known:
        raise UnknownName(f"distribution of {stage}", distribution, known)
    return case(stage, distribution, shape, ASKED)


def headlines_first(cases: Iterable[BenchCase]) -> list[BenchCase]:
    """The first case of every stage, the others that people serve, then other suites: a run that is cut short says most."""
    seen: set[str] = set()
    heads: list[BenchCase] = []
    others: list[BenchCase] = []
    for each in cases:
        (others if each.stage in seen else heads).append(each)
        seen.add(each.stage)
    return heads + sorted(others, key=lambda each: each.suite != SUITES[0])


def chosen(stages: Sequence[str] = (), suites: Iterable[str] = ("core",), per_stage: int = 0) -> list[BenchCase]:
    """The cases of some stages (all by default) and suites; ``per_stage`` > 0 keeps so many of each stage.

    Raises:
        UnknownName: a stage or suite that does not exist.
    """
    suites = tuple(suites)
    for kind, names, known in (("stage", stages, STAGES), ("suite", suites, SUITES)):
        for name in names:
            if name not in known:
                raise UnknownName(kind, name, known)
    left = dict.fromkeys(STAGES, per_stage or len(all_cases()))
    found = []
    for each in all_cases():
        if each.suite in suites and each.stage in (stages or STAGES) and left[each.stage]:
            left[each.stage] -= 1
            found.append(each)
    return found
