"""Tuning parameters of each backend's template, and what a design of the CUDA template leaves as it is."""

from __future__ import annotations

from collections.abc import Iterable

from ...problem.op import Config, Parameter, Violation
from ...problem.values import Scalar

LINE = 128
"""Bytes that the L2 may bring at a time, in place of 256."""
SPECIALISED_THREADS = 384
"""One group of 128 gathers, one scores, one adds up."""

_TILE = (
    Parameter("block_h", (16, 32, 64), "heads per block, padded up to it"),
    Parameter("block_n", (32, 64), "tokens gathered per step"),
)
PARAMETERS: dict[str, tuple[Parameter, ...]] = {
    "cuda": (
        Parameter(
            "num_stages",
            (2, 3, 4, 5, 6, 7, 8, 9, 11, 13),
            "tiles of 64 tokens in flight, 2 one for each group that multiplies; with few heads, parts of them",
        ),
        Parameter("turns", (True, False), "whether the two groups that multiply take turns"),
        Parameter(
            "interleave",
            (False, True),
            "whether the other group's values come between the scores of a tile's halves, not behind them",
            before=False,
        ),
        Parameter(
            "l2_prefetch",
            (256, LINE),
            "bytes that the L2 brings at a time; of rows of 1152 that memory has, 256 bring a ninth more",
            before=256,
        ),
        Parameter(
            "sweep",
            (False, True),
            "whether lists are sorted first and all blocks go through the cache together, so that one read serves many",
            before=False,
        ),
        Parameter(
            "value_tokens",
            (64, 32, 16),
            "tokens of its own tile whose values a group adds up at a time, under the exponentials of the next ones",
            before=64,
        ),
        Parameter("consumer_registers", (168, 216, 224, 232), "per thread that multiplies; one that gathers has the rest"),
    ),
    "tilelang": (
        *_TILE,
        Parameter("num_stages", (2, 3, 4, 5, 6), "tiles in flight"),
        Parameter("threads", (128, 256, SPECIALISED_THREADS), "threads per block"),
        Parameter(
            "pipeline", ("specialised", "multistage"), "warp groups with roles of their own, or all threads doing everything"
        ),
    ),
    "triton": (
        *_TILE,
        Parameter("num_stages", (2, 3, 5, 7), "stages of the loop: a tile in flight takes two, for indices and rows"),
        Parameter("num_warps", (4, 8), "warps per block"),
    ),
}
_PLAIN: dict[str, Scalar] = {"turns": False, "interleave": False, "l2_prefetch": 256, "sweep": False, "value_tokens": 64}


def cuda(**values: Scalar) -> Config:
    """A config of the CUDA template; what is not named is as most designs have it."""
    return Config.of("cuda", **{**_PLAIN, **values})


def no_choice(config: Config, *names: str) -> Iterable[Violation]:
    """Violations of a design that leaves these as they are."""
    for name in names:
        if config[name] != _PLAIN[name]:
            yield Violation(name, 1.0, f"{name}: this design has no choice")
