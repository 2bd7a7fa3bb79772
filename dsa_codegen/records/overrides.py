"""Overrides by hand: the file that ``DSA_OVERRIDES`` names pins configs, before kernels built ahead and all records.

A YAML list; the first entry that matches a call serves it::

    - op: select
      backend: triton
      config: {scheme: row, …}      # every tuning parameter of the backend, as `explain` prints them
      spec: {topk: 2048}            # optional: only specs with these fields
      sizes: {rows: [1, 8]}         # optional: only buckets of sizes inside these ranges, both ends included; null: no end

An entry that says what cannot be is an error at the first call, never a silent fallback: who pins a config wants that config.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import paths
from ..errors import DsaError, OverrideError
from ..gpu import Gpu
from ..ops import get
from ..problem.op import Config, Op
from ..problem.values import Bucket, Scalar, Spec

_FIELDS = ("op", "backend", "config", "spec", "sizes")
_NEEDED = _FIELDS[:3]
Range = tuple[int, int | None]


@dataclass(frozen=True)
class Override:
    """One entry of the file."""

    op: str
    config: Config
    spec: Mapping[str, Scalar]
    sizes: Mapping[str, Range]

    def serves(self, op: Op, spec: Spec, bucket: Bucket) -> bool:
        """Whether a call of this operation, spec and bucket is meant."""
        stated = spec.to_dict()
        return (
            self.op == op.name
            and all(stated[name] == value for name, value in self.spec.items())
            and all(_inside(low, high, self.sizes.get(name)) for name, low, high in bucket)
        )


def find(op: Op, spec: Spec, bucket: Bucket, gpu: Gpu) -> Config | None:
    """The config that the file pins for a call; None where it pins none.

    Raises:
        OverrideError: the file or an entry of it is no such thing, or the config breaks a constraint of this spec and GPU.
    """
    path = paths.overrides()
    for number, entry in enumerate(read(path) if path else (), 1):
        if entry.serves(op, spec, bucket):
            broken = op.violations(spec, entry.config, gpu, bucket)
            if broken:
                raise OverrideError(path, number, "; ".join(violation.reason for violation in broken))
            return entry.config
    return None


@functools.cache
def read(path: Path) -> tuple[Override, ...]:
    """The entries of a file, read once a process (``read.cache_clear`` forgets them).

    Raises:
        OverrideError: it cannot be read, or an entry is none.
    """
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OverrideError(path, 0, f"cannot be read ({error})") from error
    if not isinstance(entries, list):
        raise OverrideError(path, 0, "is no list of entries")
    return tuple(_entry(path, number, entry) for number, entry in enumerate(entries, 1))


def _entry(path: Path, number: int, stated: Any) -> Override:
    if not isinstance(stated, dict) or not set(_NEEDED) <= set(stated) <= set(_FIELDS):
        raise OverrideError(path, number, f"needs {', '.join(_NEEDED)} and may have spec and sizes")
    try:
        op = get(stated["op"])
        config = op.config(stated["backend"], dict(stated["config"]))
        spec, sizes = dict(stated.get("spec") or {}), dict(stated.get("sizes") or {})
        _check_names(spec, op.spec_type, "spec")
        _check_names(sizes, op.sizes_type, "sizes")
        return Override(op.name, config, spec, {name: _range(name, value) for name, value in sizes.items()})
    except (DsaError, TypeError, ValueError) as error:
        raise OverrideError(path, number, str(error)) from error


def _check_names(stated: Mapping[str, Any], kind: type[Any], what: str) -> None:
    known = kind.__dataclass_fields__
    for name in stated.keys() - known.keys():
        raise ValueError(f"{what}.{name} is no field; the fields are {', '.join(known)}")


def _range(name: str, stated: Any) -> Range:
    kinds = [type(end) for end in stated] if isinstance(stated, list) else []
    if kinds not in ([int, int], [int, type(None)]):
        raise ValueError(f"sizes.{name} = {stated!r}; expected [lowest, highest], or [lowest, null] for no end")
    return stated[0], stated[1]


def _inside(low: int, high: int | None, allowed: Range | None) -> bool:
    """Whether a bucket's range lies in an entry's."""
    if allowed is None:
        return True
    return allowed[0] <= low and (allowed[1] is None or (high is not None and high <= allowed[1]))
