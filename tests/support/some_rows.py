"""Calls on some rows of a call: what batch invariance is about; inputs of the operations that sum, cut by rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsa_codegen.problem.compare import same_bits
from dsa_codegen.problem.op import Inputs, Op, Outputs

BY_ROW = {
    "indexer": ("q", "weights", "starts", "ends"),
    "indexer_paged": ("q", "weights", "lengths", "page_table"),
    "attention": ("q", "indices", "lengths"),
    "attention_gqa": ("q", "indices", "ends", "lengths", "page_table"),
    "attention_paged": ("q", "indices", "lengths", "extra_indices", "extra_lengths"),
    "index_prologue": ("q", "weights", "k", "positions", "slots"),
    "latent_prologue": ("latent", "positions", "slots"),
}
"""Inputs that have a row for each query (decode: for each sequence)."""
POISON = 0x5A
"""What ``poison`` leaves in every byte."""
Run = Callable[[Inputs], Outputs]


def rows_of(op: Op, inputs: Inputs) -> int:
    """Queries, tokens or sequences of a call."""
    return len(inputs[BY_ROW[op.name][0]])


def parts(rows: int, sizes: Sequence[int]) -> Iterator[slice]:
    """All rows, so many at a time, in turns."""
    first = 0
    for size in itertools.cycle(sizes):
        if first >= rows:
            return
        yield slice(first, min(first + size, rows))
        first += size


def taken(op: Op, inputs: Inputs, rows: slice) -> dict[str, Any]:
    """The inputs of a call on some rows."""
    whole = rows_of(op, inputs)
    given = dict(inputs)
    for name in BY_ROW[op.name]:
        if inputs.get(name) is not None:
            each = len(inputs[name]) // whole  # weights of decode have a row for each new query
            given[name] = inputs[name][rows.start * each : rows.stop * each].clone()
    return given


def outputs_of(op: Op, inputs: Inputs, run: Run, sizes: Sequence[int]) -> dict[str, Tensor]:
    """The outputs of all rows, computed some at a time.

    A cache that is written was all ``POISON`` before: what the calls left there together is given.
    """
    found: dict[str, list[Tensor]] = {}
    for rows in parts(rows_of(op, inputs), sizes):
        given = taken(op, inputs, rows)
        if op.name.endswith("prologue"):
            given["cache"] = inputs["cache"].clone()
        for name, value in run(given).items():
            found.setdefault(name, []).append(value)
    joined = {name: values for name, values in found.items() if name != "cache"}
    caches = {"cache": functools.reduce(_laid_over, found["cache"])} if "cache" in found else {}
    return {**{name: torch.cat(values) for name, values in joined.items()}, **caches}


def _laid_over(below: Tensor, above: Tensor) -> Tensor:
    below, above = (each.view(torch.uint8) for each in (below, above))
    return torch.where(above == POISON, below, above)


def assert_same(op: Op, found: Outputs, expected: Outputs, what: object) -> None:
    """Bit for bit."""
    for name, value in expected.items():
        assert same_bits(found[name], value), (op.name, name, what)
