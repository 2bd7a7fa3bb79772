"""Which kernel texts are run: those of small models, and of designs that small models alone do not bring."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsa_codegen import ops
from dsa_codegen.command import verification
from dsa_codegen.command.verification import Subject
from dsa_codegen.gpu import Gpu
from dsa_codegen.kernels.render import Rendered, code_values, render
from dsa_codegen.problem.op import Config
from dsa_codegen.problem.presets import Model, preset

MODELS = ("tiny", "tiny-gqa")
_PAGED = ops.get("attention_paged").config("cuda", {"splits": 0, "sharers": 0, "flat": False, "interleave": False})
_SORTED = ops.get("attention").config("cuda", {"num_stages": 2, "turns": False, "consumer_registers": 216, "sweep": True})
_HELD = ops.get("select").config(
    "cuda",
    {
        **{"cluster": 1, "threads": 256, "items": 32, "blocks_per_sm": 3, "digit_bits": 12},
        **{"early": False, "persistent": True, "stages": 0, "ring": 2},
    },
)
_HALVES = ops.get("indexer").config(
    "cuda", {"relu": "halves", "block_n": 128, "num_stages": 6, "groups": 3, "blocks_per_sm": 1}
)
_IN_TURN = ops.get("indexer_paged").config(
    "cuda", {"groups": 2, "accumulators": 1, "producers": 2, "num_stages": 8, "gathered": 0}
)
_STREAMED = _IN_TURN.replace(halved=0, segments=3)
_SOME_OPTIONS = (0, 3, -1)
"""For designs that FURTHER names, of attention: nothing, lengths and a sink, and both with a second pool."""
_V4 = {"kv_layout": "v4", "d_nope": 448}
_V41 = {"kv_layout": "v41", "d_rope": 0}

_PAIRS = "\nCLUSTER = 2\n"
_BY_OWN_WAYS = "DEVICE void block_sync()"
_ARRIVE, _WAIT = '"barrier.cluster.arrive.relaxed.aligned;"', '"barrier.cluster.wait.acquire.aligned;"'
_IN_STEP = (
    (f'DEVICE void cluster_arrive() {{ asm volatile({_ARRIVE} ::: "memory"); }}', "DEVICE void cluster_arrive() {}"),
    (_WAIT, f"{_ARRIVE[:-1]}\\n{_WAIT[1:]}"),
)
"""What is changed in a text whose groups of warps come to the barriers of a block and of its cluster by ways of their own."""
_ABREAST = re.compile(r"^ *if \(thread < [^\n]*\{\n *barrier_init\([^\n]*\bthread\b", re.MULTILINE)
"""How threads of a block make a barrier each by one instruction."""


@dataclass(frozen=True)
class Further:
    """Texts of one operation of a small model with some fields changed."""

    op: str
    changes: Mapping[str, Any]
    config: Config | None = None
    """The design that is meant; by default those that the model's own calls would have."""
    backends: Sequence[str] = ("cuda",)
    model: str = "tiny"


FURTHER = (
    # Two blocks of 64 heads, and pairs of tiles over a list that is long enough to be cut in two.
    Further("attention", {"heads": 64, "topk": 1024}),
    # Lists that are sorted, and blocks that wait for each other's steps.
    Further("attention", {"heads": 64, "topk": 1024}, _SORTED),
    # Many rows: blocks that stay, to which rows come through rings.
    Further("select", {}, _HELD),
    # Half of each ReLU by a product, in groups that share a block's keys; and a maximum for each product.
    Further("indexer", {"index_heads": 64, "index_head_dim": 128}),
    Further("indexer", {"index_heads": 8, "index_head_dim": 128}, _HALVES.replace(relu="max")),
    Further("indexer", {"index_heads": 32, "index_head_dim": 128}, _HALVES.replace(num_stages=2, groups=1, blocks_per_sm=3)),
    # The same over pages: two groups take tiles in turn, whose logits are written as they come or together.
    *(
        Further("indexer_paged", {"index_heads": 64, "index_head_dim": 128}, _IN_TURN.replace(gathered=held))
        for held in (0, 16)
    ),
    # Short rows, of several of which queries and weights come by TMA.
    *(
        Further("indexer_paged", {"index_heads": 64, "index_head_dim": 128}, _STREAMED.replace(gathered=held))
        for held in (0, 16)
    ),
    # Many heads add their gradients up in another way than few.
    *(Further("attention_backward", {"heads": heads}, backends=("triton",)) for heads in (64, 128)),
    # Keys of blocks.
    *(Further(op, {"pool": 4, "topk": 256}, backends=("triton",)) for op in ("expand", "pool")),
    # What prompts take: marked, read back, spread, listed anew, then prefill's kernels.
    *(Further("attention_paged", {"heads": heads}, _PAGED.replace(flat=True)) for heads in (16, 128)),
    Further("attention_paged", {"kv_layout": "bf16"}, _PAGED.replace(flat=True)),
    Further("attention_paged", {"heads": 16}, _PAGED.replace(flat=True, sweep=True)),
    # Few rows: clusters whose blocks share a row's entries, one block for heads or two, over both layouts and two pools.
    Further("attention_paged", {"heads": 128}, _PAGED.replace(sharers=4)),
    Further("attention_paged", {"heads": 64}, _PAGED.replace(sharers=2)),
    Further("attention_paged", {"heads": 16, **_V4}, _PAGED.replace(sharers=2)),
    Further("attention_paged", {"heads": 128, **_V4}, _PAGED.replace(sharers=8)),
    Further("attention_paged", {"heads": 64, **_V41}, _PAGED.replace(sharers=2)),
    # Many rows: a block takes all entries.
    *(Further("attention_paged", {"heads": 128, **layout}, _PAGED.replace(sharers=1)) for layout in ({}, _V4, _V41)),
    # Heads as columns: shares of one tile and of several.
    Further("attention_paged", {"heads": 128}, _PAGED.replace(sharers=4, columns=32)),
    Further("attention_paged", {"heads": 16, "topk": 1024, **_V4}, _PAGED.replace(sharers=3, columns=16)),
    Further("attention_paged", {"heads": 64, "topk": 1024}, _PAGED.replace(sharers=2, columns=32)),
    # Blocks through which tokens stream: several tiles each, and parts that a kernel joins.
    Further("attention_paged", {"heads": 16, "topk": 1024}, _PAGED.replace(columns=16)),
    Further("attention_paged", {"heads": 64, "topk": 1024}, _PAGED.replace(columns=32, splits=2)),
    # And with roles: warps that place tiles of several, places and tokens' slots again and again.
    Further("attention_paged", {"heads": 16, "topk": 2048}, _PAGED.replace(columns=16, splits=2, placers=16)),
    Further("attention_paged", {"heads": 32, "topk": 2048}, _PAGED.replace(columns=32, splits=2, placers=8)),
    # Blocks that load a tile at once: one for two rounds of heads, several for a row; parts that a kernel joins.
    *(Further("attention_paged", {"heads": 128, **layout}, _PAGED.replace(head_rounds=2)) for layout in ({}, _V4)),
    Further("attention_paged", {"heads": 16, "topk": 1024, **_V4}, _PAGED.replace(head_rounds=1)),
    Further("attention_paged", {"heads": 32, "topk": 2048}, _PAGED.replace(head_rounds=1, tile_tokens=64)),
    Further("attention_paged", {"heads": 128, "topk": 2048}, _PAGED.replace(head_rounds=2, tile_tokens=96)),
    Further("attention_paged", {"heads": 64, "topk": 2048}, _PAGED.replace(head_rounds=1, tile_tokens=64)),
    # Clusters that split the channels, over the other layouts.
    Further("attention_paged", {"heads": 128, **_V4}, _PAGED),
    # Lists that are long enough to be cut, and joined by another kernel.
    Further("attention_paged", {"heads": 128, "topk": 1024}, _PAGED),
    Further("attention_paged", {"heads": 64, "topk": 1024, "kv_layout": "bf16"}, _PAGED.replace(flat=True)),
    Further("attention_paged", {"heads": 128, "topk": 1024}, backends=("gluon",)),
    Further("attention_paged", {"topk": 1024}, backends=("triton",)),
    Further("attention_gqa", {"topk": 2048}, backends=("triton",), model="tiny-gqa"),
    Further("attention_paged", {"heads": 64, **_V41}, _PAGED),
)


def sources(models: Sequence[str], gpu: Gpu, names: Sequence[str] = ()) -> list[Subject]:
    """The models' rendered sources of the named operations (by default all, of training too), each once.

    In CUDA C++, whose designs for many heads are others, those of 128 heads besides; and what ``FURTHER`` names of the models.
    """
    served = [name for name, op in ops.all_ops().items() if gpu.capability >= op.min_capability]
    wanted = list(names or served)
    found = [each for model in map(preset, models) for each in _of_model(model, gpu, wanted)]
    found += [each for one in FURTHER if one.model in models and one.op in wanted for each in further(one, gpu)]
    return list({(each.op.name, each.spec, each.config): each for each in found}.values())


def _of_model(model: Model, gpu: Gpu, names: Sequence[str]) -> list[Subject]:
    names = [name for name in names if ops.get(name).specs(model)]
    if not names:
        return []
    own = verification.subjects(model, gpu, names)
    known = {(each.op.name, each.spec) for each in own}
    wide = verification.subjects(replace(model, heads=128), gpu, names)
    return [*own, *(each for each in wide if each.config.backend == "cuda" and (each.op.name, each.spec) not in known)]


def further(one: Further, gpu: Gpu) -> list[Subject]:
    """The sources of an entry of ``FURTHER`` that the GPU has."""
    model = replace(preset(one.model), **one.changes)
    if one.config is None:
        return [each for each in verification.subjects(model, gpu, [one.op]) if each.config.backend in one.backends]
    op = ops.get(one.op)
    specs = [options[place] for options in map(op.options, op.specs(model)) for place in _SOME_OPTIONS if place < len(options)]
    return [Subject(op, spec, one.config) for spec in specs if not op.violations(spec, one.config, gpu)]


def of(subjects: Iterable[Subject], op: str, backend: str) -> list[Subject]:
    """Those of one operation and backend."""
    return [each for each in subjects if (each.op.name, each.config.backend) == (op, backend)]


@functools.lru_cache(maxsize=1 << 12)
def rendered(subject: Subject) -> Rendered:
    """Its text."""
    return render(subject.op, subject.spec, subject.config)


def are_pairs(subject: Subject) -> bool:
    """Whether two blocks are a cluster."""
    return _PAIRS in rendered(subject).code


def comes_by_own_ways(subject: Subject) -> bool:
    """Whether groups of its warps do so to barriers of all of them."""
    return _BY_OWN_WAYS in rendered(subject).code


def makes_barriers_abreast(subject: Subject) -> bool:
    """Whether threads of a block make a barrier each by one instruction, which the compiler counts as one barrier."""
    return bool(_ABREAST.search(rendered(subject).code))


@functools.lru_cache(maxsize=1 << 12)
def run_in_place(subject: Subject) -> Rendered:
    """The text that runs: its own, but for groups of warps that come to barriers of all of them by ways of their own.

    Under the tools a warp that arrives at a cluster's barrier goes on when all of its block have arrived, those that wait for
    what it brings among them: 150 s of memcheck were not enough for a row that takes 9 s so. Such a text runs with each arrival
    directly before its wait; memory, copies, products and the order of all others are the same. That no arrival comes too early
    is not seen so.
    """
    text = rendered(subject)
    if not comes_by_own_ways(subject):
        return text
    return replace(text, code=functools.reduce(lambda code, change: code.replace(*change), _IN_STEP, text.code))


@functools.lru_cache(maxsize=1 << 12)
def label(subject: Subject) -> str:
    """Twelve digits of its text's hash, and the values that only its launches depend on, where there are any."""
    text = code_values(subject.op, subject.config)
    launched = [f"{name}={value}" for name, value in subject.config.values if name not in text]
    return " ".join([rendered(subject).sha[:12], *launched])
