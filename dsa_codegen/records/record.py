"""Record: one tuned config, how it came about, and its form in JSON; every value read from a file is checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import RecordError
from ..gpu import Gpu
from ..ops import all_ops
from ..problem.op import Config, Op
from ..problem.values import Bucket, Scalar, bucket_to_json
from ..proof.timing import Policy, Timing

MEASURED, MODELLED = "measured", "modelled"
_WIDTH = 128


@dataclass(frozen=True)
class GpuKey:
    """The GPU that a record speaks of; ``smem`` is the shared memory a block may use, in bytes."""

    id: str
    arch: str
    sms: int
    smem: int

    @classmethod
    def of(cls, gpu: Gpu) -> GpuKey:
        """The identifying facts of a GPU."""
        return cls(gpu.id, gpu.arch, gpu.sms, gpu.smem_per_block)


@dataclass(frozen=True)
class RunnerUp:
    """A config that was nearly as fast, and its median in microseconds."""

    config: Mapping[str, Scalar]
    time_us: float


@dataclass(frozen=True)
class Record:
    """One tuned config and how it came about."""

    # What it is for.
    op: str
    gpu: GpuKey
    backend: str
    spec: Mapping[str, Scalar]
    bucket: Bucket
    # What was found.
    config: Mapping[str, Scalar]
    evidence: str
    time_us: Timing
    default_time_us: float | None
    limit_us: float
    """The roofline of the timed case."""
    # How it was found.
    sizes: Mapping[str, int]
    """The case that was timed or modelled."""
    distribution: str
    template: str
    """The template's hash; another template renders another source."""
    source_sha: str
    """sha256 of the rendered code, its header aside: of where the template lies, and of fields that changed no code."""
    toolchain: Mapping[str, str]
    policy: Policy | None
    """None where nothing was timed."""
    accuracy: Mapping[str, float] | None
    """``max_abs`` and ``similarity`` of the winner against the reference; None where nothing ran."""
    search: Mapping[str, float] = field(default_factory=dict)
    """Counts of outcomes, trials, wall seconds and the seed."""
    runners_up: tuple[RunnerUp, ...] = ()
    measured_at: str = ""
    card: str = ""
    """The board it was measured on, by its own name; empty where nobody noted it."""
    eager_us: Timing | None = None
    """Launched one by one, the host's work included, where that says something else than ``time_us``."""
    default_sha: str = ""
    """Of the default that ``default_time_us`` speaks of (``records.default``); empty where nobody noted which it was."""

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for records that would serve the same calls by the same backend on the same GPU."""
        ops = all_ops()  # a record of an operation that this version does not know is known by what it states
        spec = ops[self.op].completed(self.spec) if self.op in ops else self.spec
        return self.op, self.backend, tuple(sorted(spec.items())), self.bucket, self.gpu.id

    def config_for(self, op: Op) -> Config:
        """The config, checked against the operation's parameters.

        Raises:
            SpecError, UnknownName: the operation has changed its parameters, or the record is nonsense.
        """
        return op.config(self.backend, self.config)


def entry(record: Record) -> dict[str, Any]:
    """The record's entry in its file, which itself names op and GPU; ``parse`` reads it back."""
    fields = {**asdict(record), "bucket": bucket_to_json(record.bucket)}
    for name in ("op", "gpu", *(name for name in _LATER if not fields[name])):
        del fields[name]
    return _rounded(fields)


def parse(entry: Any, op: str, gpu: GpuKey) -> Record:
    """Read an entry of a file.

    Raises:
        RecordError: a field is missing, unknown, or has a value that it cannot have.
    """
    unknown = sorted(set(entry) - _FIELDS.keys() - _LATER.keys()) if isinstance(entry, dict) else [f"a {type(entry).__name__}"]
    if unknown:
        raise RecordError(f"unknown: {', '.join(unknown)}")
    try:
        known = {name: read(entry[name]) for name, read in _FIELDS.items()}
        known |= {name: read(entry[name]) for name, read in _LATER.items() if name in entry}
    except KeyError as error:
        raise RecordError(f"the field {error} is missing") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RecordError(f"a field has a value that it cannot have ({error})") from error
    return Record(op=op, gpu=gpu, **known)


def parse_gpu(entry: Any) -> GpuKey:
    """Read the GPU of a file; raises KeyError, TypeError or ValueError."""
    return GpuKey(_text(entry["id"]), _text(entry["arch"]), _integer(entry["sms"]), _integer(entry["smem"]))


def pretty(value: Any, indent: int = 0) -> str:
    """JSON that people can read and diff: whatever fits in a line stays on one."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (dict, list)) or (len(line) + indent <= _WIDTH and _depth(value) <= 2):
        return line
    inner = " " * (indent + 1)
    if isinstance(value, dict):
        parts = [f"{inner}{json.dumps(name)}: {pretty(item, indent + 1)}" for name, item in value.items()]
    else:
        parts = [inner + pretty(item, indent + 1) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{(',' + chr(10)).join(parts)}\n{' ' * indent}{closing}"


def _depth(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if items is None else 1 + max(map(_depth, items), default=0)


def _rounded(value: Any) -> Any:
    """Floats to six digits: more is noise that only makes diffs longer."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is not an integer")
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):  # JSON as Python reads it knows NaN and Infinity
        raise TypeError(f"{value!r} is not a finite number")
    return value


def _time(value: Any) -> float:
    if _number(value) <= 0:  # nothing would ever be faster
        raise ValueError(f"{value!r} is not a time: a positive number of microseconds is expected")
    return value


def _scalar(value: Any) -> Scalar:
    if type(value) not in (int, str, bool):
        raise TypeError(f"{value!r} is not an integer, a flag or a name")
    return value


def _mapping(of: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {_text(name): of(item) for name, item in value.items()}


def _optional(of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else of(value)


def _bucket(value: Any) -> Bucket:
    bounds = _optional(_integer)
    return tuple((_text(name), _integer(low), bounds(high)) for name, (low, high) in value.items())


def _evidence(value: Any) -> str:
    if value not in (MEASURED, MODELLED):
        raise ValueError(f"evidence {value!r} is neither {MEASURED} nor {MODELLED}")
    return value


def _timing(value: Any) -> Timing:
    return Timing(_time(value["median"]), _number(value["p20"]), _number(value["p80"]), _integer(value["n"]))


def _policy(value: Any) -> Policy:
    return Policy(
        _flag(value["graph"]),
        _flag(value["cold_l2"]),
        _integer(value["reps"]),
        _integer(value["rounds"]),
        _number(value["warmup_ms"]),
    )


def _runners_up(value: Any) -> tuple[RunnerUp, ...]:
    return tuple(RunnerUp(_mapping(_scalar)(item["config"]), _time(item["time_us"])) for item in value)


_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "backend": _text,
    "spec": _mapping(_scalar),
    "bucket": _bucket,
    "config": _mapping(_scalar),
    "evidence": _evidence,
    "time_us": _timing,
    "default_time_us": _optional(_time),
    "limit_us": _number,
    "sizes": _mapping(_integer),
    "distribution": _text,
    "template": _text,
    "source_sha": _text,
    "toolchain": _mapping(_text),
    "policy": _optional(_policy),
    "accuracy": _optional(_mapping(_number)),
    "search": _mapping(_number),
    "runners_up": _runners_up,
    "measured_at": _text,
}
_LATER: Mapping[str, Callable[[Any], Any]] = {"card": _text, "eager_us": _timing, "default_sha": _text}
"""Fields that older records lack, and that are left out where there is nothing to say."""
