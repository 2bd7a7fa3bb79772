"""The selection in CUDA C++: a row in the registers of a block or a cluster of blocks; how far they reach, and which when.

Longer rows, or many of them, stream through shared memory (``streamed``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ...errors import InputError
from ...gpu import Gpu
from ...problem.op import Case, Config, Inputs, Launch, Outputs, Parameter, Violation, exceeds
from ...problem.values import Bucket, Scalar, upper
from . import held, streamed
from .problem import SCORES, SelectSizes, SelectSpec
from .shared_memory import size_of

PARAMETERS = (
    Parameter("cluster", (1, 2, 4, 8, 16), "blocks per row"),
    Parameter("threads", (1024, 512, 256, 128), "threads per block"),
    Parameter("items", (8, 4, 16, 32, 64), "scores per thread"),
    Parameter("blocks_per_sm", (1, 2, 3, 4, 6), "blocks whose registers must fit an SM"),
    Parameter("digit_bits", (12, 11), "bits of the first two digits"),
    Parameter("early", (False, True), "whether scores are loaded before the window is known"),
    Parameter("persistent", (False, True), "whether blocks stay for many rows and fetch the next one ahead"),
    Parameter(
        "stages",
        (0, 2, 3, 4, 5, 6),
        "rounds of scores in flight where a row streams through shared memory; 0: its registers hold it",
        before=0,
    ),
    Parameter(
        "ring",
        (0, 2),
        "chunks of a warp's scores on their way where half of a row stays in shared memory; 0: none does",
        before=0,
    ),
    Parameter("longest", streamed.LONGEST, "columns of the longest row that streams", before=streamed.REACH),
)
_LONGEST_PART = 32768  # scores of a block; a warp's counts take 16 bits
_FEWEST_THREADS = 256
_EARLY_ROWS = 256  # as rows are read whole, whatever their windows: with more of them the bytes would count
_PAGED_AHEAD = 16  # tokens; of shorter pages a block has too many to fetch them all before it knows its tokens


class _Guess(NamedTuple):
    """The config that was the fastest for up to so many columns and rows."""

    columns: float
    rows: float
    cluster: int
    threads: int
    items: int
    blocks_per_sm: int = 1
    persistent: bool = False
    ring: int = 0
    early: bool = True
    """As far as rows are few enough."""


# Measured at 2048 of fp32 scores: on an H200 what rings bring and 5 to 16 rows of 16384 to 65536, on an H100 the others.
_GUESSES = (
    _Guess(8192, 16, 1, 512, 16),
    _Guess(8192, 256, 1, 1024, 8),
    _Guess(8192, 1024, 1, 256, 32, 4),
    _Guess(8192, math.inf, 1, 128, 32, 6, persistent=True, ring=2),
    _Guess(8192, math.inf, 1, 256, 32, 4),  # 2-byte scores, which no rings bring
    _Guess(16384, 4, 4, 512, 8),
    _Guess(16384, 16, 4, 1024, 4),
    _Guess(16384, 64, 2, 1024, 8),
    _Guess(16384, 256, 1, 1024, 16),
    _Guess(16384, math.inf, 1, 256, 32, 3, persistent=True, ring=2),
    _Guess(16384, math.inf, 1, 512, 32, 2),  # the same
    _Guess(32768, 4, 8, 512, 8),
    _Guess(32768, 8, 8, 1024, 4),
    _Guess(32768, 16, 4, 1024, 8),
    _Guess(32768, 64, 2, 1024, 16),
    _Guess(32768, 256, 2, 512, 32, 2, early=False),
    _Guess(32768, math.inf, 1, 512, 32, 2, persistent=True, ring=2),
    _Guess(32768, math.inf, 1, 1024, 32, persistent=True),
    _Guess(65536, 8, 8, 512, 16),
    _Guess(65536, 16, 4, 1024, 16),
    _Guess(65536, math.inf, 2, 512, 64),
    _Guess(131072, 4, 16, 512, 16),
    _Guess(131072, 8, 8, 512, 32),
    _Guess(131072, math.inf, 8, 512, 32, 2),
)


def reach_of(config: Config) -> int:
    """Columns of the longest row that the registers hold, or whose chosen tokens a bitmap in shared memory holds."""
    if config["stages"]:
        return int(config["longest"])
    if config["ring"]:
        return held.reach(config)
    return config["cluster"] * config["threads"] * config["items"]


def reach(config: Config, bucket: Bucket) -> Iterable[Violation]:
    """What of a bucket's sizes a config cannot serve."""
    yield from exceeds("columns", upper(bucket, "columns"), reach_of(config))
    if config["early"]:
        yield from exceeds("rows read whole", upper(bucket, "rows"), _EARLY_ROWS)


def within_reach(config: Config, case: Case[SelectSizes]) -> Case[SelectSizes]:
    """The case with rows no longer than the registers hold."""
    return replace(case, sizes=replace(case.sizes, columns=min(case.sizes.columns, reach_of(config))))


def constraints(spec: SelectSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    """What the template cannot do, whatever the sizes."""
    if gpu.capability != 90:
        reason = f"capability: written for clusters of sm_90, {gpu.name} is sm_{gpu.capability}"
        yield Violation("capability", 1.0, reason)
    if not config["ring"]:
        yield from exceeds("threads that a block lacks where no ring brings scores", _FEWEST_THREADS - config["threads"], 0)
    if config["stages"]:
        yield from streamed.constraints(spec, config, gpu)
        return
    yield from exceeds("columns of a row that does not stream", config["longest"], streamed.REACH)
    if config["ring"]:
        yield from exceeds("blocks that do not stay", 1 - int(config["persistent"]), 0)
        yield from held.constraints(spec, config, gpu)
        return
    threads, blocks = config["threads"], config["blocks_per_sm"]
    yield from exceeds("scores of a block", threads * config["items"], _LONGEST_PART)
    yield from exceeds("warps for the cluster's bins", config["cluster"], threads // 32)
    if config["persistent"]:  # 4096 rows of 131072: clusters that stay 1203 us, TileLang's blocks 973 us
        yield from exceeds("blocks that stay for a row", config["cluster"], 1)
        yield from exceeds("scores loaded before their window", int(config["early"]), 0)
    yield from exceeds("threads per SM", threads * blocks, gpu.threads_per_sm)
    # Keys, and what ptxas needs beside them.
    yield from exceeds("registers", (config["items"] + 24) * threads * blocks, gpu.regs_per_sm)
    smem = _smem(spec, config)
    yield from exceeds("smem", smem, gpu.smem_per_block, " B")
    yield from exceeds("smem per SM", (smem + 1024) * blocks, gpu.smem_per_sm, " B")


def guesses(sizes: SelectSizes) -> Iterator[Config]:
    """Configs by judgement for these sizes' bucket, whose rows registers hold; none where rows are longer than any reaches."""
    rows, columns = (upper(sizes.bucket(), name) for name in ("rows", "columns"))
    reached = [each for each in _GUESSES if columns <= each.columns and rows <= each.rows]
    for each in reached:
        if (each.columns, each.rows) == (reached[0].columns, reached[0].rows):
            names = ("cluster", "threads", "items", "blocks_per_sm", "persistent", "ring")
            values = {name: getattr(each, name) for name in names}
            values |= {"digit_bits": 12, "early": each.early and rows <= _EARLY_ROWS, "stages": 0, "longest": streamed.REACH}
            yield Config.of("cuda", **values)


def is_first_choice(sizes: SelectSizes) -> bool:
    """Whether a row in registers is the fastest; many long ones are sampled in less time (64 of 131072: 25 us, 32)."""
    rows, columns = (upper(sizes.bucket(), name) for name in ("rows", "columns"))
    return rows <= (16 if columns > 65536 else 64 if columns > 32768 else math.inf)


def derived(spec: SelectSpec, config: Config) -> dict[str, Scalar]:
    """Names for the template."""
    if config["stages"]:
        return streamed.derived(spec, config)
    if config["ring"]:
        return held.derived(spec, config)
    items, cluster, threads = config["items"], config["cluster"], config["threads"]
    slots = spec.output == "slots"
    ahead = slots and _pages(spec, config) > 1
    return {
        "across": cluster > 1,
        "plateaus": cluster == 1 and items >= 32,  # where many rows make it count: a branch more for normal scores, 0.4 %
        "slots": slots,
        "paged_ahead": ahead,
        "page_steps": -(-_pages(spec, config) // threads),
        "pages": _pages(spec, config),
        "warps": threads // 32,
        "chunk": threads * items,
        "reach": reach_of(config),
        "low_bits": 32 - 2 * config["digit_bits"],
        "halves": 2 if items > 32 else 1,
        "at_once": 2 if items >= 32 else min(cluster, 8),
        "candidates": _candidates(cluster),
        "smem": _smem(spec, config),
    }


def launches(spec: SelectSpec, config: Config, inputs: Inputs, outputs: Outputs, limit: int, gpu: Gpu) -> Sequence[Launch]:
    """The one launch.

    Raises:
        InputError: the config was forced on rows that it does not reach.
    """
    scores, table = inputs["scores"], inputs["page_table"]
    rows, longest = len(scores), reach_of(config)
    if limit > longest:
        raise InputError("scores", f"{limit} columns", f"at most {longest} for {config}")
    groups = min(rows, gpu.sms * config["blocks_per_sm"]) if config["persistent"] else rows
    window = (scores, scores.stride(0), _or_null(inputs["starts"]), inputs["ends"])
    paged = (0, 0, 1) if table is None else (table, table.stride(0), rows // len(table))
    args = (*window, *paged, outputs["chosen"], limit, rows)
    return (Launch("select_row", (groups * config["cluster"], 1, 1), args),)


def _or_null(tensor: object) -> object:
    return 0 if tensor is None else tensor


def _pages(spec: SelectSpec, config: Config) -> int:
    """Entries of the page table that a block keeps; 1 where it looks each token's up by itself."""
    ahead = spec.output == "slots" and spec.page >= _PAGED_AHEAD and not config["persistent"]
    return config["threads"] * config["items"] // spec.page + 2 if ahead else 1


def _candidates(cluster: int) -> int:
    """Keys that a block sends to the others: all of them together lie in the shared memory of each."""
    return 1 if cluster == 1 else (2048 if cluster == 16 else 2560) // cluster // 32 * 32


def _smem(spec: SelectSpec, config: Config) -> int:
    """sizeof of the template's ``Shared``: (alignment, bytes) of its members in order."""
    digit, cluster, warps = 1 << config["digit_bits"], config["cluster"], config["threads"] // 32
    candidates = 4 * _candidates(cluster)
    fine = 4 if cluster == 1 else digit // 32
    members = [(16, 4 * digit), (16, 4 * digit), (16, 4 << (32 - 2 * config["digit_bits"]))]
    members += [(16, cluster * candidates), (16, candidates), (16, 4 * cluster * fine)]
    members += [(4, 4 * (3 * cluster * 32 + 32 + 2 * cluster + 32))]
    members += [(16, 4 * warps * config["items"]), (8, 32), (4, 4 * _pages(spec, config)), (16, 4 * spec.topk), (4, 4)]
    if config["persistent"]:
        members += [(16, config["threads"] * config["items"] * SCORES[spec.scores].itemsize), (8, 8 * warps)]
    return size_of([*members, (4, 24)])
