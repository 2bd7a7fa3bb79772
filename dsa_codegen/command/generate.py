"""Write the rendered kernels of a model to a folder, as ordinary Python modules that people read, step through or ship.

Beside them lie ``index.json`` (what each module computes, for which sizes, and how a call launches it) and ``launch.py``, which
launches them without this package, on a GPU or in Triton's interpreter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import NoConfig, UnknownName
from ..gpu import Gpu
from ..kernels import backends
from ..kernels.render import code_values, render
from ..ops.needs import Need, needs
from ..problem.op import Config
from ..problem.presets import Model
from ..problem.values import describe
from ..records.publish import publish
from ..records.record import pretty
from ..runtime import dispatch
from . import standalone
from .calls import small_call

_INTERPRETER = "kernels/backends/interpreter.py"  # it imports nothing of this package


@dataclass(frozen=True)
class Generated:
    """A file that was written, what it is for, and where its config comes from."""

    path: Path
    need: Need
    config: Config
    origin: str


def generate(model: Model, gpu: Gpu, folder: Path, names: Sequence[str] = (), backend: str = "") -> list[Generated]:
    """Render what the dispatcher would choose for each call of a model into ``folder``.

    Args:
        names: only these operations.
        backend: only this backend, with its first config that fits where the dispatcher would choose another.

    Raises:
        UnknownName: there is no such operation or backend.
        NoConfig: no template serves any of the calls.
    """
    if backend and backend not in backends.NAMES:
        raise UnknownName("backend", backend, backends.NAMES)
    written: list[Generated] = []
    reasons: list[str] = []
    for need in needs(model, names, gpu):
        try:
            config, origin = _choose(need, gpu, backend)
        except NoConfig as error:  # this backend's template does not serve the spec
            reasons += error.reasons
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{module_name(need, config)}.py"
        path.write_text(render(need.op, need.spec, config).text)
        written.append(Generated(path, need, config, origin))
    if not written:
        asked = f"{', '.join(names) or model.name}{f' ({backend})' if backend else ''}"
        raise NoConfig(asked, gpu.name, dict.fromkeys(reasons))
    publish(folder / "index.json", pretty(_index(written, gpu)) + "\n")
    publish(folder / "launch.py", Path(standalone.__file__).read_text())
    publish(folder / "interpreter.py", Path(standalone.__file__).parents[1].joinpath(_INTERPRETER).read_text())
    return written


def module_name(need: Need, config: Config) -> str:
    """Operation, backend, spec and config, as far as the code depends on it: ``select_triton_topk64_tokens__block_n4096``."""
    parts = (_values(need.spec.to_dict()), _values(code_values(need.op, config)))
    return f"{need.op.name}_{config.backend}_{'__'.join(filter(None, parts))}"


def _values(values: Mapping[str, object]) -> str:
    """What is off or none is left out; a name stands for itself, a flag for its being set."""
    told = {name: value for name, value in values.items() if value is not False and value != "none"}
    parts = (
        value if isinstance(value, str) else name if value is True else _number(name, value) for name, value in told.items()
    )
    return re.sub(r"[^A-Za-z0-9_]+", "_", "_".join(parts))


def _number(name: str, value: object) -> str:
    return f"{name}_{value}" if name[-1].isdigit() else f"{name}{value}"  # bins_log2_10


def _index(written: Sequence[Generated], gpu: Gpu) -> list[dict[str, Any]]:
    """An entry for each module, with all the sizes that it serves."""
    entries: dict[str, dict[str, Any]] = {}
    for each in written:
        op, spec, config = each.need.op, each.need.spec, each.config
        known = {
            "module": each.path.stem,
            "op": op.name,
            "summary": op.summary,
            "function": op.function,
            "gpu": gpu.id,
            "backend": config.backend,
            "spec": spec.to_dict(),
        }
        if each.path.stem not in entries:
            entries[each.path.stem] = {**known, "serves": [], "call": small_call(op, spec, config, gpu)}
        sizes = describe(each.need.case.sizes.bucket())
        entries[each.path.stem]["serves"].append({"sizes": sizes, "config": config.to_dict(), "from": each.origin})
    return list(entries.values())


def _choose(need: Need, gpu: Gpu, backend: str) -> tuple[Config, str]:
    found = dispatch.chosen(need.op, need.spec, need.case.sizes, gpu)
    if backend in ("", found.config.backend):
        return found.config, found.origin
    if backend not in need.op.backends:
        raise NoConfig(f"{need.op.name} ({backend})", gpu.name, ["no template of it"])
    return need.op.default_config(need.spec, need.case.sizes, gpu, backend), "default"
