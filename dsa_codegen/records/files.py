"""Records: what tuning found, one readable JSON file per GPU and operation (``tuned/<gpu>/<op>.json``).

A key is (op, backend, spec, bucket, gpu). Evidence ranks inside a key: a measured record replaces whatever is there; a
modelled one replaces a modelled one, and gives way to a measured record of the same template. Beside a measured record of
another template (which no lookup would use any more, but which still seeds a search) it stands on its own.

Files are data from anywhere: whatever cannot be read is a miss with a warning, never an exception, never overwritten.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock

from ..errors import RecordError
from .publish import publish
from .record import MEASURED, GpuKey, Record, entry, parse, parse_gpu, pretty

SCHEMA = 1
_LOCK_TIMEOUT_S = 60
_REMEDY = "it is left as it is: repair it, move it away, or tune into another --folder"


class RecordWarning(UserWarning):
    """A record, or a file of records, that cannot be used."""


def path_of(folder: Path, gpu_id: str, op_name: str) -> Path:
    """``<folder>/<gpu>/<op>.json``."""
    return folder / gpu_id / f"{op_name}.json"


def read(path: Path) -> tuple[Record, ...]:
    """The records of a file; none where it is missing, and none where it cannot be read.

    What cannot be read is told by one RecordWarning, however often and by whomever this version of the file is read.
    """
    version = _version(path)
    if version is None:
        return ()
    records, complaints = _read(*version)
    if complaints and version not in _told:
        _told.add(version)
        for complaint in complaints:
            warnings.warn(complaint, RecordWarning, stacklevel=2)
    return records


def complaints(path: Path) -> tuple[str, ...]:
    """What of a file cannot be read, and why."""
    version = _version(path)
    return _read(*version)[1] if version else ()


_told: set[tuple[Path, int, int]] = set()


def _version(path: Path) -> tuple[Path, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return path, status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=256)
def _read(path: Path, mtime_ns: int, size: int) -> tuple[tuple[Record, ...], tuple[str, ...]]:
    try:
        gpu, entries = _load(path)
    except RecordError as error:
        return (), (str(error),)
    records, complaints = [], []
    for number, raw in enumerate(entries):
        try:
            records.append(parse(raw, path.stem, gpu))
        except RecordError as error:
            complaints.append(f"{path}, record {number}: {error}")
    return tuple(records), tuple(complaints)


def _load(path: Path) -> tuple[GpuKey, list[Any]]:
    """The GPU and the entries, unparsed, of a file.

    Raises:
        RecordError: unreadable, of another schema, or a file that speaks of another GPU or operation than its place.
    """
    try:
        content = json.loads(path.read_text())
        schema, op_name = content["schema"], content["op"]
        gpu = parse_gpu(content["gpu"])
        entries = content["records"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(f"{path} is not a file of records ({type(error).__name__}: {error}); {_REMEDY}") from error
    if schema != SCHEMA:
        raise RecordError(f"{path} has schema {schema!r}, this version reads {SCHEMA}; {_REMEDY}")
    if (gpu.id, op_name) != (path.parent.name, path.stem) or not isinstance(entries, list):
        raise RecordError(f"{path} speaks of {op_name} on {gpu.id}; a file belongs at <gpu>/<op>.json; {_REMEDY}")
    return gpu, entries


def require_readable(path: Path, gpu: GpuKey) -> None:
    """Make sure that ``merge`` will be able to write a file, before hours are spent on what it should hold.

    Raises:
        RecordError: the file is there and cannot be read, or is of another board of that name.
    """
    if path.exists():
        _require_of(path, _load(path)[0], gpu)


def _require_of(path: Path, there: GpuKey, gpu: GpuKey) -> None:
    if there != gpu:
        boards = [f"a {each.id} ({each.arch}) of {each.sms} SMs and {each.smem} B a block" for each in (there, gpu)]
        raise RecordError(f"{path} speaks of {boards[0]}, not of {boards[1]}; {_REMEDY}")


def read_all(folder: Path, op_name: str) -> tuple[Record, ...]:
    """The records of an operation for every GPU of a folder, by the GPU's name."""
    return tuple(record for path in sorted(folder.glob(f"*/{op_name}.json")) for record in read(path))


def merge(folder: Path, records: Iterable[Record], gone: Iterable[Record] = ()) -> list[Path]:
    """Write records into the files of ``folder``, keeping all others there; returns the files.

    Safe when several processes write at once: a lock, a temporary file, fsync and an atomic rename.

    Args:
        gone: records as ``read`` gave them, to be left out from now on; one that was replaced meanwhile stays. A file
            without any entry is removed.

    Raises:
        RecordError: a record states what no reader would accept (a time of NaN), a file that is there cannot be read, or
            another process keeps its lock; it is not touched.
    """
    by_file: dict[Path, tuple[list[Record], list[Record]]] = {}
    for record in records:
        parse(entry(record), record.op, record.gpu)
        by_file.setdefault(path_of(folder, record.gpu.id, record.op), ([], []))[0].append(record)
    for record in gone:
        by_file.setdefault(path_of(folder, record.gpu.id, record.op), ([], []))[1].append(record)
    for path, (fresh, left_out) in by_file.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_TIMEOUT_S):
                _merge_file(path, fresh, left_out)
        except filelock.Timeout as error:
            reason = f"another process has held {error.lock_file} for {_LOCK_TIMEOUT_S} s"
            raise RecordError(f"{path} cannot be written: {reason}; end it and run this again") from error
    return list(by_file)


def _merge_file(path: Path, fresh: list[Record], gone: list[Record]) -> None:
    gpu = (fresh or gone)[0].gpu
    kept: list[Record] = []
    foreign: list[Any] = []  # entries that this version cannot parse: others' work, kept as they are
    there, entries = _load(path) if path.exists() else (gpu, [])
    _require_of(path, there, gpu)
    for raw in entries:
        try:
            kept.append(parse(raw, path.stem, gpu))
        except RecordError:
            foreign.append(raw)
    kept = [record for record in kept if record not in gone]
    for record in fresh:
        kept = _ranked(kept, record)
    kept.sort(key=_order)
    whole = [*map(entry, kept), *foreign]
    if not whole:
        path.unlink(missing_ok=True)
        return
    content = {"schema": SCHEMA, "op": path.stem, "gpu": asdict(gpu), "records": whole}
    publish(path, pretty(content) + "\n")


def _ranked(records: list[Record], fresh: Record) -> list[Record]:
    """``records`` with ``fresh`` in the place that its evidence gives it (see the module's first lines)."""
    rivals = [record for record in records if record.key == fresh.key]
    others = [record for record in records if record.key != fresh.key]
    if fresh.evidence == MEASURED:
        return [*others, fresh]
    measured = [record for record in rivals if record.evidence == MEASURED]
    if any(record.template == fresh.template for record in measured):
        return [*others, *measured]
    return [*others, *measured, fresh]


def outranked(path: Path, record: Record) -> Record | None:
    """The measured record of a file that ``merge`` keeps instead of a modelled one; None where the latter stands."""
    if record.evidence == MEASURED:
        return None
    rivals = (rival for rival in read(path) if rival.key == record.key and rival.template == record.template)
    return next((rival for rival in rivals if rival.evidence == MEASURED), None)


def _order(record: Record) -> tuple[object, ...]:
    spec = tuple((name, str(type(value)), value) for name, value in sorted(record.spec.items()))
    bucket = tuple((name, low, high is None, high or 0) for name, low, high in record.bucket)
    return spec, bucket, record.backend, record.evidence
