"""Build a model's kernels ahead into a folder that the dispatcher loads (``runtime/prebuilt.py``); no GPU is needed for it."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import paths
from ..errors import BuildError, SpecError
from ..gpu import Gpu
from ..kernels import backends
from ..kernels.build import Built, build, build_all, whole
from ..kernels.render import render
from ..ops.needs import needs, specs
from ..problem.op import Config, Op
from ..problem.presets import Model
from ..problem.values import Sizes, Spec, bucket_to_json
from ..records.lookup import lookup, stand_ins
from ..records.publish import publish
from ..records.record import GpuKey, pretty
from ..runtime import compiled, prebuilt, serving

STAND_IN = "stand-in"


@dataclass(frozen=True)
class Prebuilt:
    """One call that the folder serves."""

    op: Op
    spec: Spec
    sizes: Sizes
    config: Config
    origin: str
    """Of the config: one of ``lookup.ORIGINS``, or that it stands in for one that does not build."""
    built: Built


Call = tuple[Op, Spec, Sizes]


def calls(model: Model, gpu: Gpu, names: Sequence[str] = ()) -> list[Call]:
    """One call for every variant that serving the model can ask for, as ``warmup`` without limits does.

    Raises:
        UnknownName: a name is no operation.
        NoConfig: ``gpu`` is too old for an operation that was named.
    """
    able = {op.name for op, _ in specs(model, names, gpu)}
    found: dict[str, Call] = {}
    served = [*serving.calls(model, serving.Limits()), *((n.op, n.spec, n.case.sizes) for n in needs(model, names, gpu))]
    for op, spec, sizes in served:
        if op.name in able:
            found.setdefault(prebuilt.key_of(op.name, spec, sizes.bucket()), (op, spec, sizes))
    return list(found.values())


def prebuild(wanted: Sequence[Call], gpu: Gpu, folder: Path, processes: int | None = None) -> list[Prebuilt]:
    """Build what the dispatcher would choose for each call, and write the folder; its index last, so that it is whole.

    What an earlier run left in the folder makes way. Configs come from the records at hand (``DSA_TUNED_DIR`` included).

    Args:
        processes: compilers that run at once; by default one per core.

    Raises:
        NoConfig: no config fits a call on this GPU.
        BuildError: neither a chosen config nor any that stands in for it compiles.
        ToolMissing: a compiler is not installed.
        SpecError: the folder cannot be written, or is the build cache.
    """
    _check(folder)
    chosen = [(op, spec, sizes, lookup(op, spec, sizes, gpu)) for op, spec, sizes in wanted]
    build_all((render(op, spec, found.config) for op, spec, _, found in chosen), gpu, processes)
    done = []
    for op, spec, sizes, found in chosen:
        config, built = _built(op, spec, sizes, gpu, found.config)
        done.append(Prebuilt(op, spec, sizes, config, found.origin if config == found.config else STAND_IN, built))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / prebuilt.INDEX).unlink(missing_ok=True)
    kept = {each.built.folder for each in done}
    for source in kept:
        _copy(source, folder / source.name)
    for left in _entries(folder):
        if left.name not in {source.name for source in kept}:
            shutil.rmtree(left)
    compiled.copy_into(folder)
    publish(folder / prebuilt.INDEX, pretty(_index(done, gpu)) + "\n")
    return done


def _check(folder: Path) -> None:
    """Refuse, before minutes of compiling, a folder that cannot be written or whose entries others need."""
    reason = paths.unwritable(folder)
    if not reason and folder.resolve() == paths.cache().resolve():
        reason = "this is the build cache"
    if reason:
        raise SpecError("--out", str(folder), f"a folder of its own that can be written ({reason})")


def _built(op: Op, spec: Spec, sizes: Sizes, gpu: Gpu, config: Config) -> tuple[Config, Built]:
    """The build of a config, or where there is none, of the first that the dispatcher would take in its place."""
    try:
        return config, build(render(op, spec, config), gpu)
    except BuildError as error:
        reason = error
    for other in stand_ins(op, spec, sizes, gpu):
        with contextlib.suppress(BuildError):
            return other, build(render(op, spec, other), gpu)
    raise reason


def _entries(folder: Path) -> Iterator[Path]:
    """What builds left in a folder; nothing else in it is touched."""
    for path in folder.iterdir():
        if prebuilt.FOLDER.fullmatch(path.name) and (path / "build.json").is_file():
            yield path


def _copy(source: Path, target: Path) -> None:
    if target.exists() and whole(target) is not None:
        return
    staging = target.with_name(f".staging-{uuid.uuid4().hex}")
    try:
        shutil.copytree(source, staging, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _index(done: Sequence[Prebuilt], gpu: Gpu) -> dict[str, Any]:
    names = sorted({each.config.backend for each in done})
    return {
        "schema": prebuilt.SCHEMA,
        "gpu": asdict(GpuKey.of(gpu)),
        "sources": prebuilt.sources_sha(),
        "loaded_by": prebuilt.loaders(names),
        "toolchain": {tool: version for name in names for tool, version in backends.get(name).toolchain().items()},
        "entries": [_entry(each) for each in done],
    }


def _entry(each: Prebuilt) -> dict[str, Any]:
    return {
        "op": each.op.name,
        "spec": each.spec.to_dict(),
        "bucket": bucket_to_json(each.sizes.bucket()),
        "backend": each.config.backend,
        "config": each.config.to_dict(),
        "origin": each.origin,
        "source_sha": each.built.rendered.sha,
        "build": each.built.folder.name,
    }
