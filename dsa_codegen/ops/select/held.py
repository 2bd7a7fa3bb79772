"""The selection in CUDA C++ for many rows: blocks that stay, rows that come through rings, half of each in shared memory."""

from __future__ import annotations

from collections.abc import Iterable

from ...gpu import Gpu
from ...problem.op import Config, Violation, exceeds
from ...problem.values import Scalar
from .problem import SelectSpec
from .shared_memory import size_of

_ITEMS = 32  # scores of a thread in registers
_HELD = 32  # and in shared memory
_RUN = 8  # of these come at once
_BINS = 1024
_LISTED = 1024  # scores of the k-th score's bin that are listed; of normal ones it holds some ten of 32768
_SECOND, _FEW = 256, 128


def constraints(spec: SelectSpec, config: Config, gpu: Gpu) -> Iterable[Violation]:
    """What the template cannot do, whatever the sizes."""
    threads, blocks = config["threads"], config["blocks_per_sm"]
    if spec.scores != "fp32":
        yield Violation("scores", 1.0, f"scores: rings bring fp32, not {spec.scores}")
    if config["items"] != _ITEMS:
        yield Violation("items", 1.0, f"items: {_ITEMS} of a thread where rings bring them")
    if config["digit_bits"] != 12:
        yield Violation("digit_bits", 1.0, "digit_bits: 12 where rings bring scores")
    yield from exceeds("blocks that stay for a row", config["cluster"], 1)
    yield from exceeds("scores loaded before their window", int(config["early"]), 0)
    yield from exceeds("tokens that are kept whatever they score", spec.keep_first + spec.keep_recent, spec.topk - 1)
    yield from exceeds("threads per SM", threads * blocks, gpu.threads_per_sm)
    yield from exceeds("registers", (_ITEMS + 24) * threads * blocks, gpu.regs_per_sm)
    smem = _smem(spec, config)
    yield from exceeds("smem", smem, gpu.smem_per_block, " B")
    yield from exceeds("smem per SM", (smem + 1024) * blocks, gpu.smem_per_sm, " B")


def derived(spec: SelectSpec, config: Config) -> dict[str, Scalar]:
    """Names for the template."""
    return {
        "across": False,
        "slots": spec.output == "slots",
        "warps": config["threads"] // 32,
        "held": _HELD,
        "reach": reach(config),
        "listed": _LISTED,
        "few": _FEW,
        "room": _room(spec, config),
        "smem": _smem(spec, config),
    }


def reach(config: Config) -> int:
    """Columns that a block holds."""
    return int(config["threads"] * (_ITEMS + _HELD))


def _room(spec: SelectSpec, config: Config) -> int:
    return max(_BINS + 4 + (spec.topk + 7 & ~7) // 2, reach(config) // 32, _SECOND + 2 * _LISTED)


def _smem(spec: SelectSpec, config: Config) -> int:
    """sizeof of the template's ``Shared``."""
    threads, warps, ring = config["threads"], config["threads"] // 32, config["ring"]
    members = [(128, 4 * warps * ring * 32 * _RUN), (128, 4 * warps * 32 * _HELD), (16, reach(config) // 8), (8, 8 * _FEW)]
    members += [(16, 4 * _room(spec, config)), (4, 4 * threads), (4, 128), (8, 16 * warps), (4, 24)]
    members += [(4, 4 * warps), (4, 4 * warps), (4, 12), (4, 12), (4, 8), (4, 12), (4, 8), (4, 8)]
    return -(-size_of(members) // 128) * 128
