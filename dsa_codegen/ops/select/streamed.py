"""The selection in CUDA C++ for long rows: scores stream through shared memory, what a sample says may be chosen is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from ...gpu import Gpu
from ...problem.op import Config, Violation, exceeds
from ...problem.values import Scalar, upper
from .problem import SCORES, SelectSizes, SelectSpec
from .shared_memory import size_of

REACH = 131072  # columns
FAR = 1048576  # columns that a bitmap of the whole ring reaches, with a sample that grows with the row
LONGEST = (REACH, FAR // 2, FAR)
_MARGIN = 5  # of independent scores, 4 standard deviations fail once in 30 000 rows; neighbours are alike, though
_SAMPLE = 16384  # scores of a row of FAR, so that 64 stand for one as in a row of REACH
_FEW = 128  # scores of a bin that are compared with each other
# Rows at most, blocks of a row's cluster, threads, scores of a thread and round. H200, 2048 of fp32 scores: 8 rows of 262144
# 17.8 us, 16 of 1M 44, 64 of 262144 and 1M 27.7 and 82, 1024 of 1M 1060.
_FAR_CLUSTERS = ((8, 8, 512, 32), (16, 4, 512, 32), (64, 2, 1024, 16), (math.inf, 1, 512, 32))
_PAGED_AHEAD = 32  # tokens; shorter pages are too many to keep


def constraints(spec: SelectSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    """What the template cannot do, whatever the sizes."""
    threads, items, blocks = config["threads"], config["items"], config["blocks_per_sm"]
    yield from exceeds("scores loaded before their window", int(config["early"]), 0)
    if config["persistent"]:
        yield from exceeds("blocks that stay for a row", config["cluster"], 1)
        yield from exceeds("columns of a row whose block stays", config["longest"], REACH)
    yield from exceeds("chunks beside rounds", config["ring"], 0)
    yield from exceeds("scores of a vector", _vector(spec), items)
    yield from exceeds("scores of a thread", items, 32)
    yield from exceeds("threads for a sample", 512 if config["longest"] == REACH else 256, threads)
    yield from exceeds("threads per SM", threads * blocks, gpu.threads_per_sm)
    yield from exceeds("registers", (items + 40) * threads * blocks, gpu.regs_per_sm)
    yield from exceeds("bitmap", _bitmap(config), config["stages"] * threads * items * SCORES[spec.scores].itemsize, " B")
    smem = _smem(spec, config)
    yield from exceeds("smem", smem, gpu.smem_per_block, " B")
    yield from exceeds("smem per SM", (smem + 1024) * blocks, gpu.smem_per_sm, " B")


def guesses(sizes: SelectSizes) -> Iterator[Config]:
    """Configs by judgement for long rows that are many; none for others."""
    rows, columns = (upper(sizes.bucket(), name) for name in ("rows", "columns"))
    if not 32768 < columns <= FAR:
        return
    if columns > REACH:
        yield from _far(rows)
        return
    if rows > 256 and columns <= 65536:  # one block's beginning and end beside another's stream: 4096 of 65536 329 us, 430
        yield _config(cluster=1, threads=512, items=16, blocks_per_sm=2, stages=2, longest=FAR // 2)
    if rows > 256 and columns > 65536:  # the next row comes while this one's tokens are written: 4096 of 131072 566 us, 626
        yield _config(cluster=1, threads=512, items=32, blocks_per_sm=1, stages=2, longest=REACH, persistent=True)
    # Rounds of 16384 scores: what a warp does beside comparing takes as long for few as for many.
    yield _config(cluster=2 if rows <= 64 else 1, threads=512, items=32, blocks_per_sm=1, stages=2, longest=REACH)
    yield _config(
        cluster=1, threads=1024, items=8, blocks_per_sm=1, stages=3, longest=REACH
    )  # what a larger pool leaves room for


def _far(rows: float) -> Iterator[Config]:
    """For rows longer than REACH; none for a single one, which 32 blocks of TileLang's read in less time (1M: 20 us)."""
    for most, cluster, threads, items in _FAR_CLUSTERS:
        if 1 < rows <= most:
            yield _config(cluster=cluster, threads=threads, items=items, blocks_per_sm=1, stages=2, longest=FAR)
            yield _config(
                cluster=cluster, threads=threads, items=items, blocks_per_sm=1, stages=4, longest=FAR
            )  # 2-byte scores
            return


def _config(persistent: bool = False, **values: Scalar) -> Config:
    return Config.of("cuda", digit_bits=11, early=False, persistent=persistent, ring=0, **values)


def derived(spec: SelectSpec, config: Config) -> dict[str, Scalar]:
    """Names for the template."""
    threads, capacity = config["threads"], _capacity(spec, config)
    return {
        "across": config["cluster"] > 1,
        "slots": spec.output == "slots",
        "paged_ahead": _pages(spec, config) > 1,
        "pages": _pages(spec, config),
        "page_steps": -(-_pages(spec, config) // threads),
        "warps": threads // 32,
        "threads_log2": threads.bit_length() - 1,
        "chunk": threads * config["items"],
        "reach": config["longest"],
        "far": config["longest"] > REACH,
        "samples_log2": (_SAMPLE // (_vector(spec) * threads)).bit_length() - 1,
        "vector": _vector(spec),
        "capacity": capacity,
        "margin": _MARGIN,
        "balance": math.isqrt(spec.topk * capacity),
        "bitmap_words": _bitmap(config) // 4,
        "smem": _smem(spec, config),
    }


def _bitmap(config: Config) -> int:
    """Bytes: from a multiple of 32 tokens on, in whole groups of 32 words; of long rows no token is beyond the ring's bits."""
    return (config["longest"] + (1056 if config["longest"] == REACH else 0)) // 8


def _pages(spec: SelectSpec, config: Config) -> int:
    """Entries of the page table that a block keeps; 1 where it looks each token's up by itself."""
    kept = spec.output == "slots" and spec.page >= _PAGED_AHEAD and config["longest"] == REACH
    return REACH // spec.page + 2 if kept and not config["persistent"] else 1


def _vector(spec: SelectSpec) -> int:
    return 16 // SCORES[spec.scores].itemsize


def _capacity(spec: SelectSpec, config: Config) -> int:
    """Scores that the pool holds: three times what is wanted, to be sure of a sample's guess, and a histogram's bins.

    Less where two blocks share an SM, whose samples may be larger.
    """
    threads, quarters = config["threads"], 9 if config["blocks_per_sm"] > 1 and config["longest"] > REACH else 12
    return max(-(-quarters * spec.topk // (4 * threads)) * threads, 4096)


def _smem(spec: SelectSpec, config: Config) -> int:
    """sizeof of the template's ``Shared``."""
    stages, capacity = config["stages"], 4 * _capacity(spec, config)
    stage = config["threads"] * config["items"] * SCORES[spec.scores].itemsize
    members = [(16, stages * stage), (16, capacity), (16, capacity), (16, 4 << config["digit_bits"])]
    members += [(16, _bitmap(config))] if config["persistent"] else []
    members += [(8, 8 * _FEW)]
    members += [(8, 8 * stages), (8, 8), (4, 3 * 128), (4, 16), (4, 12), (4, 8), (4, 4 * _pages(spec, config)), (4, 12)]
    return size_of(members)
