"""Listing: every record of the folders that lookup searches, and whether it serves calls of its own sizes, or what does."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DsaError
from ..gpu import GPUS, Gpu
from ..ops import all_ops
from ..problem.op import Op
from ..problem.values import Sizes, holds
from .files import read_all
from .lookup import Found, lookup, search_path, unusable
from .record import GpuKey, Record

SERVES, SHADOWED, UNUSABLE = "serves", "shadowed", "unusable"


@dataclass(frozen=True)
class Listed:
    """A record with its part in lookup."""

    record: Record
    folder: Path
    status: str
    """SERVES calls of its spec, sizes and GPU; SHADOWED by another that does; UNUSABLE today."""
    why: str = ""


def listing(gpu_id: str = "", folders: Mapping[str, Path] | None = None) -> Iterator[Listed]:
    """All records, or one GPU's, by operation, GPU and folder; a file that cannot be read is warned about."""
    folders = search_path() if folders is None else folders
    for op in all_ops().values():
        for folder in folders.values():
            for record in read_all(folder, op.name):
                if gpu_id in ("", record.gpu.id):
                    yield Listed(record, folder, *_part(op, record, folders))


def _part(op: Op, record: Record, folders: Mapping[str, Path]) -> tuple[str, str]:
    gpu = _gpu_of(record.gpu)
    if gpu is None:
        return UNUSABLE, f"no GPU of {record.gpu.arch} is known"
    try:
        spec, sizes = op.spec_type.from_dict(record.spec), op.sizes_type.from_dict(record.sizes)
        reason = unusable(op, spec, gpu, record, sizes.bucket())
        found = [lookup(op, spec, each, gpu, folders) for each in _calls(record, sizes)]
    except DsaError as error:
        return UNUSABLE, str(error)
    if reason:
        return UNUSABLE, reason
    # Of equal records in two folders one serves: files are parsed once, so that it is one object.
    return (SERVES, "") if any(each.record is record for each in found) else (SHADOWED, _by(found[0]))


def _calls(record: Record, sizes: Sizes) -> list[Sizes]:
    """What a record may serve: the sizes that it was timed at, then some of every bucket in its own."""
    ranges = [
        [
            (name, first)
            for first in (0, *edges)
            if holds(tuple(each for each in record.bucket if each[0] == name), {name: first})
        ]
        for name, edges in type(sizes).EDGES.items()
    ]
    return [sizes, *(replace(sizes, **dict(chosen)) for chosen in itertools.product(*ranges))]


def _by(found: Found) -> str:
    if found.record is None:
        return f"the {found.origin} serves: {found.config}"
    of = " of DSA_TUNED_DIR" if found.origin == "user" else ""
    return f"by {found.record.backend}{of}"


def _gpu_of(key: GpuKey) -> Gpu | None:
    """The GPU that a record speaks of: a listed one, or one of its architecture with the record's own limits."""
    models = [gpu for gpu in GPUS.values() if gpu.arch == key.arch]
    model = next((gpu for gpu in models if gpu.id == key.id), models[0] if models else None)
    return model and dataclasses.replace(model, id=key.id, sms=key.sms, smem_per_block=key.smem)
