"""Explain: how far a record is from a problem, and field by field what keeps it from serving a call."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..gpu import Gpu
from ..problem.op import Op
from ..problem.values import Bucket, Scalar, Sizes, Spec, contains
from .files import read_all
from .lookup import search_path, unusable
from .record import GpuKey, Record


def distance(record: Record, spec: Spec, sizes: Sizes, gpu: Gpu) -> float:
    """How far a record is from a problem: octaves between the sizes and the spec's numbers, more for what is not a number."""
    total = 0.0 if record.gpu == GpuKey.of(gpu) else 2.0 if record.gpu.arch == gpu.arch else 8.0
    for wanted, there in ((spec.to_dict(), record.spec), (sizes.to_dict(), record.sizes)):
        total += sum(_octaves(value, there.get(name)) for name, value in wanted.items())
    return total


def _octaves(wanted: Scalar, there: Scalar | None) -> float:
    if type(wanted) is int and type(there) is int:
        return abs(math.log2((1 + max(wanted, 0)) / (1 + max(there, 0))))
    return 0.0 if wanted == there else 4.0


def nearest(records: Iterable[Record], spec: Spec, sizes: Sizes, gpu: Gpu, limit: int = 3) -> list[Record]:
    """The records nearest to a problem, the seeds of a search; an exact one has distance 0."""
    return sorted(records, key=lambda record: (distance(record, spec, sizes, gpu), record.time_us.median))[:limit]


@dataclass(frozen=True)
class Difference:
    """A field in which a record does not fit the wanted key."""

    field: str
    wanted: str
    there: str


def differences(op: Op, spec: Spec, sizes: Sizes, gpu: Gpu, record: Record) -> list[Difference]:
    """Field by field, why a record does not serve a call; empty where it does."""
    bucket = sizes.bucket()
    wanted = {**_board(GpuKey.of(gpu)), **_flat(spec.to_dict(), bucket)}
    there = {**_board(record.gpu), **_flat(op.completed(record.spec), _stretched(record.bucket, bucket))}
    names = [*wanted, *(name for name in there if name not in wanted)]
    found = [
        Difference(name, str(wanted.get(name, "no such field")), str(there.get(name, "no such field")))
        for name in names
        if wanted.get(name) != there.get(name)
    ]
    reason = None if found else unusable(op, spec, gpu, record, bucket)
    return [Difference("config", "usable", reason)] if reason else found


def _board(gpu: GpuKey) -> dict[str, object]:
    return {"gpu": gpu.id, "arch": gpu.arch, "gpu.sms": gpu.sms, "gpu.smem": gpu.smem}


def _stretched(there: Bucket, wanted: Bucket) -> Bucket:
    """A record's ranges, those that contain the wanted one taken for it: they are no reason to be passed over."""
    own = {each[0]: each for each in there}
    serves = {each[0] for each in wanted if contains((own.get(each[0], (each[0], 0, None)),), (each,))}
    kept = [each for each in there if each[0] not in serves]
    return (*(each for each in wanted if each[0] in serves), *kept)


def _flat(spec: Mapping[str, Scalar], bucket: Bucket) -> dict[str, object]:
    return {
        **{f"spec.{name}": value for name, value in spec.items()},
        **{f"bucket.{name}": [low, high] for name, low, high in bucket},
    }


def explain(
    op: Op, spec: Spec, sizes: Sizes, gpu: Gpu, folders: Mapping[str, Path] | None = None
) -> list[tuple[Record, list[Difference]]]:
    """Every record of the operation with what keeps it from serving the call, the nearest first."""
    folders = search_path() if folders is None else folders
    records = [record for folder in folders.values() for record in read_all(folder, op.name)]
    compared = [(record, differences(op, spec, sizes, gpu, record)) for record in records]
    return sorted(compared, key=lambda pair: (len(pair[1]), distance(pair[0], spec, sizes, gpu)))
