"""Serving: every kernel that a layer, and the engine that fills its caches, can ask for within stated limits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import ops
from ..errors import InputError
from ..ops.quantize.problem import WEIGHTS
from ..problem.op import Op
from ..problem.paged import SLOTS
from ..problem.presets import Model
from ..problem.values import Sizes, Spec, typical


@dataclass(frozen=True)
class Limits:
    """What an engine sends at most; None where nothing is known."""

    max_queries: int | None = None
    """Tokens of a prefill step; 0 for an engine that only decodes."""
    max_batch: int | None = None
    """Sequences of a decode step; 0 for an engine that only prefills."""
    max_context: int | None = None
    """Tokens of the longest sequence (decode), or of all sequences of a step together (prefill)."""
    next_n: Sequence[int] = (1, 2)
    """Queries per sequence of a decode step: 1, and what speculative decoding makes of it."""

    def __post_init__(self) -> None:
        for name in ("max_queries", "max_batch", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(name, str(value), "0 or more, or None where nothing is known")
        if not self.next_n:
            raise InputError("next_n", repr(self.next_n), "at least one number of queries per sequence")

    def highest(self) -> Mapping[str, Mapping[str, int | None]]:
        """For each stage of a layer the largest of the sizes that decide which record serves it."""
        decoded = None if self.max_batch is None else self.max_batch * max(self.next_n)
        rows = None if self.max_queries is None or decoded is None else max(self.max_queries, decoded)
        return {
            "quantize": {"tokens": rows},
            "quantize_paged": {"tokens": rows},
            "gather_paged": {"tokens": 0 if self.max_queries == 0 else self.max_context},
            "indexer": {"queries": self.max_queries, "context": self.max_context},
            "select-tokens": {"rows": self.max_queries, "columns": self.max_context},
            "attention": {"queries": self.max_queries, "tokens": self.max_context},
            "indexer_paged": {"batch": self.max_batch, "context": self.max_context},
            "select-slots": {"rows": decoded, "columns": self.max_context},
            "attention_paged": {"batch": self.max_batch, "next_n": max(self.next_n)},
            "attention_gqa": {"rows": rows},
            "resolve": {"rows": decoded},
        }


def calls(model: Model, limits: Limits) -> Iterator[tuple[Op, Spec, Sizes]]:
    """One call for each variant: every operation of a layer, spec and bucket of sizes that the limits allow."""
    highest = limits.highest()
    for op in (op for op in ops.all_ops().values() if not op.training):
        for spec in dict.fromkeys(each for plain in op.specs(model) for each in _alternatives(plain, limits)):
            largest = highest.get(_stage(op, spec))
            if largest is not None and 0 not in largest.values():
                yield from ((op, spec, sizes) for sizes in buckets(op, spec, largest))


def _stage(op: Op, spec: Any) -> str:
    """Selection is two stages: prefill chooses token numbers, decode slots."""
    return f"{op.name}-{spec.output}" if op.name == "select" else op.name


def _alternatives(spec: Any, limits: Limits) -> Iterator[Spec]:
    """The specs that calls may state instead of the model's: dtypes of weights and slots, forms of scales, queries."""
    options: dict[str, Sequence[Any]] = {}
    if getattr(spec, "weights", "none") != "none":
        options["weights"] = tuple(WEIGHTS)
    elif getattr(spec, "power_of_two", True) is False:  # "v4" has no other scales, rows as they are have none
        options["power_of_two"] = getattr(spec, "roundings", (False, True))
    if hasattr(spec, "slots"):
        options["slots"] = tuple(SLOTS)
    if hasattr(spec, "next_n"):
        options["next_n"] = tuple(limits.next_n)
    for values in itertools.product(*options.values()):
        yield replace(spec, **dict(zip(options, values, strict=True)))


def buckets(op: Op, spec: Spec, largest: Mapping[str, int | None]) -> Iterator[Sizes]:
    """Sizes in each bucket: those of a workload where there is one, as records and defaults are made for those."""
    workloads = [case.sizes for case in op.workloads(spec)]
    known = {sizes.bucket(): sizes for sizes in workloads}
    ranges = [
        [(name, _below(largest.get(name), typical(low, high))) for low, high in _ranges(edges, largest.get(name))]
        for name, edges in op.sizes_type.EDGES.items()
    ]
    for chosen in itertools.product(*ranges):
        sizes = replace(workloads[0], **dict(chosen))
        yield known.get(sizes.bucket(), sizes)


def _ranges(edges: Sequence[int], limit: int | None) -> list[tuple[int, int | None]]:
    """[low, high) between neighbouring edges, as far as sizes up to ``limit`` reach."""
    ranges = zip((0, *edges), (*edges, None), strict=True)
    return [(low, high) for low, high in ranges if limit is None or low <= limit]


def _below(limit: int | None, size: int) -> int:
    return size if limit is None else min(size, limit)
