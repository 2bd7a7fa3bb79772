"""Frozen values that state a problem: specs (what changes the code) and sizes (what varies at run time)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ..errors import SpecError

Scalar = int | str | bool
_Value = TypeVar("_Value", bound="Value")
_Sizes = TypeVar("_Sizes", bound="Sizes")
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_.\-]*\Z")


def next_power_of_two(n: int) -> int:
    """The least one that is not below ``n`` >= 1: sizes of a kernel's blocks are powers of two."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Value:
    """A frozen dataclass of integers, booleans and identifiers that reads and writes plain mappings."""

    def to_dict(self) -> dict[str, Scalar]:
        """All fields by name; what ``from_dict`` reads back to an equal value."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def id(self) -> str:
        """Readable and unique among values of its class: ``heads64-head_dim128-weighted_relu``."""
        fields = self.to_dict().items()
        return "-".join(value if isinstance(value, str) else f"{name}{int(value)}" for name, value in fields)

    @classmethod
    def from_dict(cls: type[_Value], mapping: Mapping[str, Any]) -> _Value:
        """Build from a mapping of untrusted origin.

        Raises:
            SpecError: an unknown or missing field, a value of the wrong type, or one that the class refuses.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in mapping:
            if name not in known:
                raise SpecError(f"{cls.__name__}.{name}", mapping[name], f"one of the fields {', '.join(known)}")
        for name, field in known.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in mapping:
                raise SpecError(f"{cls.__name__}.{name}", "nothing", f"a value; the fields are {', '.join(known)}")
        return cls(**mapping)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, expected = getattr(self, field.name), str(field.type)
            if type(value).__name__ != expected:
                self._take_symbolic(field.name, value, expected)
            if isinstance(value, str) and not _IDENTIFIER.match(value):
                raise SpecError(self._qualified(field.name), value, "an identifier of letters, digits, '_', '.', '-'")

    def _take_symbolic(self, field: str, value: object, expected: str) -> None:
        """Let pass a size that ``torch.compile`` traces as a symbol; any other value of the wrong type is refused."""
        if (type(value).__name__, expected) != ("SymInt", "int"):
            raise SpecError(self._qualified(field), value, f"a value of type {expected}")

    def _qualified(self, field: str) -> str:
        return f"{type(self).__name__}.{field}"

    def require_in(self, field: str, allowed: Iterable[Scalar]) -> None:
        """Raise SpecError unless the field has one of the allowed values."""
        allowed = tuple(allowed)
        if getattr(self, field) not in allowed:
            raise SpecError(self._qualified(field), getattr(self, field), ", ".join(map(str, allowed)))

    def require_range(self, field: str, low: int, high: int, multiple: int = 1) -> None:
        """Raise SpecError unless low <= field <= high and the field is a multiple of ``multiple``."""
        value = getattr(self, field)
        if not low <= value <= high or value % multiple:
            steps = f" in steps of {multiple}" if multiple > 1 else ""
            raise SpecError(self._qualified(field), value, f"{low} to {high}{steps}")


@dataclass(frozen=True)
class Spec(Value):
    """What changes the generated code: heads, dims, dtypes, layout, k, options. Subclassed by every operation."""

    def _take_symbolic(self, field: str, value: Any, expected: str) -> None:
        super()._take_symbolic(field, value, expected)
        object.__setattr__(self, field, int(value))  # code is generated for it: the trace holds for this number only


Bucket = tuple[tuple[str, int, int | None], ...]
"""Half-open size ranges ``(field, low, high)``, high None = unbounded: the sizes that one tuned record serves."""


@dataclass(frozen=True)
class Sizes(Value):
    """What varies at run time: rows, context, batch. Every field is an integer >= 0."""

    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    """For each field that a record depends on, the first size of each further range, ascending."""

    def bucket(self) -> Bucket:
        """The ranges of the sizes that share a record with these."""
        return tuple((name, *_range(getattr(self, name), edges)) for name, edges in self.EDGES.items())

    def typical(self: _Sizes, other: _Sizes) -> _Sizes:
        """The sizes that stand for all of this bucket; what the bucket does not state is as in ``other``."""
        stated: Mapping[str, Any] = {name: typical(low, high) for name, low, high in self.bucket() if name in self.EDGES}
        return dataclasses.replace(other, **stated)

    def point(self) -> Bucket:
        """The ranges that hold these sizes and no others."""
        return tuple((name, getattr(self, name), getattr(self, name) + 1) for name in self.EDGES)


def _range(value: int, edges: tuple[int, ...]) -> tuple[int, int | None]:
    low = max((edge for edge in edges if edge <= value), default=0)
    high = min((edge for edge in edges if edge > value), default=None)
    return low, high


def typical(low: int, high: int | None) -> int:
    """The size that stands for a range: its largest, as what is best for that costs the smaller ones little."""
    return 4 * low if high is None else high - 1


def contains(outer: Bucket, inner: Bucket) -> bool:
    """Whether all sizes of ``inner`` lie in ``outer``; a field that ``outer`` does not state may have any value."""
    ranges = {name: (low, high) for name, low, high in inner}
    return all(
        name in ranges and low <= ranges[name][0] and (high is None or high >= (ranges[name][1] or math.inf))
        for name, low, high in outer
    )


def holds(bucket: Bucket, sizes: Mapping[str, int]) -> bool:
    """Whether these sizes lie in the bucket."""
    return all(low <= sizes.get(name, -1) and (high is None or sizes[name] < high) for name, low, high in bucket)


def octaves(bucket: Bucket) -> float:
    """How wide a bucket is: the factors between its bounds, in octaves; sizes end at 2^31."""
    return sum(math.log2((high or 1 << 31) / max(low, 1)) for _, low, high in bucket)


def lower(bucket: Bucket, name: str) -> int:
    """The smallest size of a field that a bucket holds; 0 where it does not state the field."""
    return next((low for field, low, _ in bucket if field == name), 0)


def upper(bucket: Bucket, name: str) -> float:
    """The largest size of a field that a bucket holds; infinite where it has no bound, or does not state the field."""
    return next((high - 1 for field, _, high in bucket if field == name and high is not None), math.inf)


def bucket_to_json(bucket: Bucket) -> dict[str, list[int | None]]:
    """``{"rows": [1, 9], "context": [32769, None]}``: low included, high excluded."""
    return {name: [low, high] for name, low, high in bucket}


def describe(bucket: Bucket) -> str:
    """A bucket for people: ``rows 0-8, context 32768+``."""
    return ", ".join(f"{name} {low}{'+' if high is None else f'-{high - 1}'}" for name, low, high in bucket) or "all sizes"
