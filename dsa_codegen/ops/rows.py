"""What the operations share that work on rows of channels, each row by itself: quantise, store, gather.

Their sizes, tuning parameters and the values a thread may hold; bf16 rows as arguments and as test inputs; exact comparison.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..problem import checks, compare, quantization
from ..problem.draw import Draw
from ..problem.op import Accuracy, Config, Outputs, Parameter, Violation, exceeds
from ..problem.values import Scalar, Sizes

PARAMETERS = (
    Parameter("block_t", (1, 2, 4, 8, 16, 32, 64), "rows per block"),
    Parameter("num_warps", (1, 2, 4, 8), "warps per block"),
)
_ALIGNMENT = 16  # elements; rows are read 16 bytes at a time


@dataclass(frozen=True)
class RowSizes(Sizes):
    """What varies from call to call."""

    tokens: int


def values_per_thread(config: Config, width: int) -> Iterable[Violation]:
    """A row's values, exact and quantised, lie in registers together with their addresses."""
    yield from exceeds("values per thread", config["block_t"] * width / (32 * config["num_warps"]), 32)


def limits() -> dict[str, Scalar]:
    """The constants of the quantisation, for templates."""
    return {"e4m3_max": repr(quantization.E4M3_MAX), "smallest_amax": repr(quantization.SMALLEST_AMAX)}


def check_rows(name: str, rows: object, like: Tensor | None = None) -> Tensor:
    """Check bf16 rows [tokens, channels], possibly a part of wider ones."""
    rows = checks.tensor(name, rows, (None, None), torch.bfloat16, like=like, inner_contiguous=True)
    if rows.shape[0] > 1 and rows.stride(0) % _ALIGNMENT:
        raise InputError(name, f"rows {rows.stride(0)} elements apart", f"a multiple of {_ALIGNMENT} elements")
    return rows


def draw_rows(draw: Draw, tokens: int, *shape: int) -> Tensor:
    """bf16 rows of very different magnitudes; some of zeros, below the smallest scale, and near the largest number."""
    rows = draw.normal(tokens, *shape) * draw.normal(tokens, *(1 for _ in shape), scale=4.0).exp()
    if tokens > 3:
        rows[1] = 0
        rows[2] *= 1e-9
        rows[3, ..., 0] = 3e38
    return rows.bfloat16()


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes, for exact comparison."""
    return tensor.contiguous().view(torch.uint8)


def same_bytes(outputs: Outputs, reference: Outputs) -> Accuracy:
    """Whether every output agrees with the reference bit for bit, NaNs and the sign of zero included."""
    return compare.worst(*(compare.equal(name, as_bytes(outputs[name]), as_bytes(reference[name])) for name in reference))
