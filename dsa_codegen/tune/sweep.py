"""Sweep: every config of a search space with times that were taken again and again: what a search can be judged by.

A file holds one operation, spec and backend on one GPU, and one or more cases; a row of it is a config. It states the
parameters itself, and which configs are the same code, so that it stays of use when templates and tables change.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import ops
from ..errors import DsaError, InputError
from ..gpu import GPUS, Gpu
from ..kernels.backends import Resources
from ..problem.op import Case, Config, Op, Parameter
from ..problem.values import Scalar, Spec
from ..records.record import GpuKey

SCHEMA = 1
Times = tuple[float, ...]


@dataclass(frozen=True)
class Source:
    """What configs with the same text share: a build."""

    compile_s: float
    """Seconds that the compiler took, beside others that ran at once."""
    resources: Mapping[str, Resources] = field(default_factory=dict)
    """By kernel; empty where it does not compile."""
    mix: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By kernel: how many instructions of which kind (``kernels.anatomy``)."""
    failure: str = ""
    """The kind of failure, where there is no build."""


@dataclass(frozen=True)
class Entry:
    """A config, and the number of its source."""

    config: Config
    source: int


@dataclass(frozen=True)
class SweptCase:
    """A case, and for each entry its visits in µs, the kind of its failure, or None where it cannot serve the case."""

    case: Case
    default: Config
    results: tuple[Times | str | None, ...]

    def time_us(self, number: int) -> float | None:
        """The median over an entry's visits; None where it was not timed."""
        found = self.results[number]
        return statistics.median(found) if isinstance(found, tuple) else None


@dataclass(frozen=True)
class Sweep:
    """See the module's first lines."""

    op: Op
    backend: str
    spec: Spec
    gpu: GpuKey
    toolchain: Mapping[str, str]
    measured_at: str
    table: tuple[Parameter, ...]
    sources: tuple[Source, ...]
    entries: tuple[Entry, ...]
    cases: tuple[SweptCase, ...]

    @cached_property
    def number(self) -> Mapping[Config, int]:
        """The number of each config's entry."""
        return {entry.config: number for number, entry in enumerate(self.entries)}

    def today(self, config: Config) -> Config:
        """A config with what it stands for in parameters that the template has got since the sweep.

        Raises:
            SpecError: the template has lost one.
        """
        return self.op.config(self.backend, config.to_dict())

    def write(self, path: Path) -> None:
        """One config a line, the same bytes for the same sweep."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_text(self))


def gpu_of(sweep: Sweep) -> Gpu:
    """The GPU of a sweep; one that is not listed has the limits that the sweep tells, and another's roofs."""
    gpu, key = GPUS.get(sweep.gpu.id, GPUS["h100"]), sweep.gpu
    return replace(gpu, id=key.id, sms=key.sms, smem_per_block=key.smem)


def read(path: Path) -> Sweep:
    """The sweep in a file.

    Raises:
        InputError: it cannot be read, or is no sweep of this schema.
    """
    try:
        values = json.loads(path.read_text())
        if values["schema"] != SCHEMA:
            raise ValueError(f"schema {values['schema']}")
        return _parse(values)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, DsaError) as error:
        raise InputError("sweep", str(path), f"a file that scripts/sweep.py wrote ({type(error).__name__}: {error})") from error


def _text(sweep: Sweep) -> str:
    head = {
        "schema": SCHEMA,
        "op": sweep.op.name,
        "backend": sweep.backend,
        "spec": sweep.spec.to_dict(),
        "gpu": asdict(sweep.gpu),
        "toolchain": dict(sweep.toolchain),
        "measured_at": sweep.measured_at,
        "mix": next((list(mix) for source in sweep.sources for mix in source.mix.values()), []),
    }
    table = [{"name": p.name, "choices": list(p.choices), "launch_only": p.launch_only} for p in sweep.table]
    cases = [
        {
            "sizes": each.case.sizes.to_dict(),
            "distribution": each.case.distribution,
            "default": _indices(sweep.table, each.default),
        }
        for each in sweep.cases
    ]
    rows = [
        [*_indices(sweep.table, entry.config), entry.source, *(_plain(each.results[number]) for each in sweep.cases)]
        for number, entry in enumerate(sweep.entries)
    ]
    sources = [_source_row(each) for each in sweep.sources]
    lines = [json.dumps(head)[1:-1], *(f'"{name}": {_lines(value)}' for name, value in
             (("table", table), ("cases", cases), ("sources", sources), ("rows", rows)))]  # fmt: skip
    return "{" + ",\n".join(lines) + "}\n"


def _lines(rows: Sequence[Any]) -> str:
    return "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]"


def _indices(table: Sequence[Parameter], config: Config) -> list[int]:
    return [p.choices.index(config[p.name]) for p in table]


def _plain(result: Times | str | None) -> list[float] | str | None:
    return [float(f"{each:.4g}") for each in result] if isinstance(result, tuple) else result


def _source_row(source: Source) -> list[Any]:
    kernels = {
        name: [usage.registers, usage.spills, usage.smem, usage.threads, *source.mix.get(name, {}).values()]
        for name, usage in source.resources.items()
    }
    return [round(source.compile_s, 2), source.failure or kernels]


def _parse(values: Mapping[str, Any]) -> Sweep:
    op = ops.get(values["op"])
    swept = tuple(Parameter(p["name"], tuple(p["choices"]), "", p["launch_only"]) for p in values["table"])
    width, later = len(swept), _later(op, values["backend"], swept)
    table = (*swept, *later)

    def config(indices: Sequence[int]) -> Config:
        chosen: dict[str, Scalar] = {
            p.name: p.choices[index] for p, index in zip(table, [*indices, *(0 for _ in later)], strict=True)
        }
        return Config.of(values["backend"], **chosen)

    rows = values["rows"]
    cases = tuple(
        SweptCase(
            Case(op.sizes_type.from_dict(each["sizes"]), each["distribution"]),
            config(each["default"]),
            tuple(tuple(row[width + 1 + n]) if isinstance(row[width + 1 + n], list) else row[width + 1 + n] for row in rows),
        )
        for n, each in enumerate(values["cases"])
    )
    return Sweep(
        op,
        values["backend"],
        op.spec_type.from_dict(values["spec"]),
        GpuKey(**values["gpu"]),
        values["toolchain"],
        values["measured_at"],
        table,
        tuple(_source(row, values["mix"]) for row in values["sources"]),
        tuple(Entry(config(row[:width]), row[width]) for row in rows),
        cases,
    )


def _later(op: Op, backend: str, swept: Sequence[Parameter]) -> list[Parameter]:
    """Parameters that the template has got since, with the one value that it had in effect when it was swept."""
    known = {each.name for each in swept}
    found = [each for each in op.parameters(backend) if each.name not in known]
    return [Parameter(each.name, (each.before,), each.meaning, each.launch_only) for each in found if each.before is not None]


def _source(row: Sequence[Any], mix: Sequence[str]) -> Source:
    seconds, kernels = row
    if isinstance(kernels, str):
        return Source(seconds, failure=kernels)
    resources = {name: Resources(*values[:4]) for name, values in kernels.items()}
    return Source(seconds, resources, {name: dict(zip(mix, values[4:], strict=False)) for name, values in kernels.items()})
