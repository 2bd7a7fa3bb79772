"""Lookup: which config serves a call, in one documented order.

1. a measured record in ``DSA_TUNED_DIR``, 2. a measured record of the package's ``tuned/``, both for exactly this spec and
GPU (its id, architecture, SMs and shared memory) and for a bucket that contains the call's; 3. ("kin") the same of a spec that
differs in minor fields only (``Op.minor``); 4. ("borrowed") a measured record of another GPU of the same architecture;
5. ("modelled") a record that ranked without a GPU; 6. the operation's default.

A record is passed over, with a note, when its config is no longer one, breaks a constraint of this spec and GPU, does not reach
all sizes of the call's bucket, renders to another source than the one that was tuned, needs a compiler that is not installed,
or was slower than another backend's default beside it. Of several buckets the tightest is taken; a record that was timed inside
the call's bucket counts as one for exactly it, however far its own reaches, since its time compares. Of several backends the
fastest is taken, or the one that the operation prefers where noise cannot tell them apart. Nothing here touches a GPU,
compiles, or depends on anything but its arguments, the files and the installed compilers: all ranks that read the same files
choose the same config.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import paths
from ..errors import DsaError, InputError, NoConfig, ToolMissing
from ..gpu import Gpu
from ..kernels import backends
from ..kernels.render import render
from ..problem.op import Config, Op
from ..problem.values import Bucket, Sizes, Spec, contains, holds, octaves
from ..proof.timing import TIE
from .files import path_of, read, read_all
from .record import MEASURED, MODELLED, GpuKey, Record

ORIGINS = ("user", "tuned", "kin", "borrowed", "modelled", "default")
"""Where a config can come from, in the order of lookup."""


@dataclass(frozen=True)
class Found:
    """The config that serves a call."""

    config: Config
    origin: str
    """One of ``ORIGINS``."""
    record: Record | None = None
    stale: bool = False
    """The record was tuned with other compilers than those installed: used, and said so."""
    notes: tuple[str, ...] = ()
    """What was passed over and why; that the record is borrowed or stale."""


_followed: dict[str, Path] = {}


def follow(folders: Mapping[str, Path]) -> None:
    """Look records up in these folders, by origin, for the rest of the process; in none: in the usual ones again."""
    _followed.clear()
    _followed.update(folders)


def search_path() -> dict[str, Path]:
    """The folders of records by origin, first come first served."""
    if _followed:
        return dict(_followed)
    user = paths.user_records()
    return {**({"user": user} if user else {}), "tuned": paths.shipped_records()}


def lookup(op: Op, spec: Spec, sizes: Sizes, gpu: Gpu, folders: Mapping[str, Path] | None = None) -> Found:
    """The config for a call of these sizes; see the module's first lines.

    Args:
        folders: where to look, by origin ("user", "tuned"); by default ``search_path()``.

    Raises:
        NoConfig: not even a default fits this GPU.
    """
    notes: list[str] = []
    bucket = sizes.bucket()
    for origin, record in _candidates(op, spec, bucket, gpu, search_path() if folders is None else folders):
        reason = unusable(op, spec, gpu, record, bucket) or _beaten(op, spec, sizes, gpu, record)
        if reason:
            notes.append(f"{label(record)} passed over: {reason}")
            continue
        difference = toolchain_difference(record)
        if difference and _ignores_stale():
            notes.append(f"{label(record)} passed over: tuned with {difference}, and DSA_STALE is ignore")
            continue
        if origin == "borrowed":
            notes.append(f"borrowed from {_board(record, gpu)}: no record for {gpu.id}")
        if difference:
            notes.append(f"stale: tuned with {difference}")
        return Found(record.config_for(op), origin, record, bool(difference), tuple(notes))
    return _default(op, spec, sizes, gpu, notes)


def _ignores_stale() -> bool:
    """Whether records of other versions are to be passed over; by default they serve, and are said to be stale."""
    wish = os.environ.get("DSA_STALE", "") or "use"
    if wish not in ("use", "ignore"):
        raise InputError("DSA_STALE", wish, "use (as where it is unset) or ignore")
    return wish == "ignore"


def _ranked(op: Op, records: Iterable[Record], bucket: Bucket) -> list[Record]:
    """Those of the tightest bucket first."""
    groups: dict[float, list[Record]] = {}
    for record in records:
        exact = record.bucket == bucket or holds(bucket, record.sizes)
        groups.setdefault(0.0 if exact else octaves(record.bucket), []).append(record)
    return [record for width in sorted(groups) for record in _fastest_first(op, groups[width])]


def _fastest_first(op: Op, records: Sequence[Record]) -> list[Record]:
    """Fastest first, those tied with it in the operation's order of backends, the tighter bucket first."""
    tied = (1 + TIE) * min((r.time_us.median for r in records), default=0.0)

    def rank(record: Record) -> tuple[float, int, float]:
        place = op.backends.index(record.backend) if record.backend in op.backends else len(op.backends)
        return max(record.time_us.median, tied), place, octaves(record.bucket)

    return sorted(records, key=rank)


def _candidates(op: Op, spec: Spec, bucket: Bucket, gpu: Gpu, folders: Mapping[str, Path]) -> Iterator[tuple[str, Record]]:
    wanted = spec.to_dict()

    def matching(records: Iterable[Record], evidence: str, kin: bool = False) -> list[Record]:
        found = [r for r in records if r.evidence == evidence and contains(r.bucket, bucket)]
        stated = [(r, op.completed(r.spec)) for r in found]
        found = [r for r, there in stated if (op.kin(spec, there) if kin else there == wanted)]
        return _ranked(op, found, bucket)

    own = {origin: read(path_of(folder, gpu.id, op.name)) for origin, folder in folders.items()}
    key = GpuKey.of(gpu)  # a slice of a GPU, named as the whole, has other SMs: it borrows
    own = {origin: tuple(r for r in records if r.gpu == key) for origin, records in own.items()}
    for origin, records in own.items():
        for record in matching(records, MEASURED):
            yield origin, record
    for records in own.values():
        for record in matching(records, MEASURED, kin=True):
            yield "kin", record
    for folder in folders.values():
        others = [r for r in read_all(folder, op.name) if r.gpu.arch == gpu.arch and r.gpu != key]
        # The most similar GPU first; `sorted` keeps the order among equals.
        for record in sorted(matching(others, MEASURED), key=lambda r: (abs(r.gpu.sms - gpu.sms), r.gpu.id)):
            yield "borrowed", record
    for records in own.values():
        for record in matching(records, MODELLED):
            yield "modelled", record


def _board(record: Record, gpu: Gpu) -> str:
    return f"{record.gpu.id} of {record.gpu.sms} SMs" if record.gpu.id == gpu.id else record.gpu.id


def _stand_in(op: Op, spec: Spec, sizes: Sizes) -> Sizes:
    """The workload of the same bucket, else what is typical of it: a default must not depend on which call came first."""
    bucket, workloads = sizes.bucket(), [case.sizes for case in op.workloads(spec)]
    return next((each for each in workloads if each.bucket() == bucket), sizes.typical(workloads[0]))


def _default(op: Op, spec: Spec, sizes: Sizes, gpu: Gpu, notes: list[str]) -> Found:
    config = op.default_config(spec, _stand_in(op, spec, sizes), gpu)
    missing = missing_tool(config.backend)
    for backend in op.backends if missing else ():
        if missing_tool(backend):
            continue
        try:
            config = op.default_config(spec, _stand_in(op, spec, sizes), gpu, backend)
        except NoConfig:
            continue
        notes.append(f"the default needs {missing}; {backend} stands in")
        break
    broken = op.violations(spec, config, gpu, sizes.bucket())
    if broken:
        raise NoConfig(op.name, gpu.name, [violation.reason for violation in broken])
    return Found(config, "default", notes=tuple(notes))


def stand_ins(op: Op, spec: Spec, sizes: Sizes, gpu: Gpu) -> Iterator[Config]:
    """What may take the place of a config that does not build here: the default, other guesses, the first of each backend."""
    able = [backend for backend in op.backends if not missing_tool(backend)]
    sizes = _stand_in(op, spec, sizes)
    for config in op.guesses(spec, sizes, gpu):
        if config.backend in able and not op.violations(spec, config, gpu, sizes.bucket()):
            yield config
    for backend in able:
        with contextlib.suppress(NoConfig):
            yield op.seed_config(spec, backend, gpu, sizes.bucket())


def unusable(op: Op, spec: Spec, gpu: Gpu, record: Record, bucket: Bucket) -> str | None:
    """Why a record whose spec and bucket match cannot be used on this GPU today for a call's bucket; None where it can."""
    try:
        config, own = record.config_for(op), op.spec_type.from_dict(record.spec)
    except DsaError as error:
        return str(error)
    broken = op.violations(spec, config, gpu, bucket)
    if broken:
        return "; ".join(violation.reason for violation in broken)
    if _source_sha(op, own, config, record.toolchain.get("triton", "")) != record.source_sha:
        return "the template renders to another source now; tune again"
    return missing_tool(record.backend)


def _beaten(op: Op, spec: Spec, sizes: Sizes, gpu: Gpu, record: Record) -> str | None:
    """Why the default serves rather than a record that was slower than the default timed beside it.

    So it is where one backend's records are gone and another's, which never served, are left. Where the default's compiler is
    missing such a record is the best there is.
    """
    beside = record.default_time_us
    if record.evidence != MEASURED or beside is None or record.time_us.median <= (1 + TIE) * beside:
        return None
    try:
        default = op.default_config(spec, _stand_in(op, spec, sizes), gpu)
    except NoConfig:
        return None
    if default.backend == record.backend or missing_tool(default.backend):
        return None
    return f"slower than the default that was timed beside it ({record.time_us.median:.4g} and {beside:.4g} µs)"


@functools.lru_cache(maxsize=4096)
def _source_sha(op: Op, spec: Spec, config: Config, triton: str) -> str:
    """Of the text for the Triton that a record was measured with."""
    return render(op, spec, config, triton).sha


@functools.cache
def missing_tool(backend: str) -> str | None:
    """What a backend lacks on this machine; None where it can compile."""
    try:
        backends.get(backend).toolchain()
    except ToolMissing as error:
        return f"{backend} ({error})"
    return None


def toolchain_difference(record: Record) -> str:
    """The compilers whose versions differ from those that the record was tuned with; empty where none does.

    Only what a build depends on counts: a newer driver or torch changes no machine code.
    """
    return ", ".join(
        f"{name} {record.toolchain.get(name, 'unknown')} (installed: {version})"
        for name, version in _installed(record.backend).items()
        if record.toolchain.get(name) != version
    )


@functools.cache
def _installed(backend: str) -> Mapping[str, str]:
    """Asked once: a compiler is started for it, and a warmup looks up dozens of records."""
    return backends.get(backend).toolchain()


def label(record: Record) -> str:
    """A record for people: ``indexer.triton of h200 (measured)``."""
    return f"{record.op}.{record.backend} of {record.gpu.id} ({record.evidence})"
