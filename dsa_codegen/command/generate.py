"""Write the rendered kernels of a model to a folder, as ordinary Python modules that people read, step through or ship."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import NoConfig, UnknownName
from ..gpu import Gpu
from ..kernels import backends
from ..kernels.render import render
from ..ops.needs import Need, needs
from ..problem.op import Config
from ..problem.presets import Model
from ..runtime import dispatch


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
    written = []
    for need in needs(model, names, gpu):
        try:
            config, origin = _choose(need, gpu, backend)
        except NoConfig:  # this backend's template does not serve the spec
            continue
        rendered = render(need.op, need.spec, config)
        path = folder / f"{rendered.module_name}.py"
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(rendered.text)
        written.append(Generated(path, need, config, origin))
    if not written:
        raise NoConfig(f"{', '.join(names) or model.name}{f' ({backend})' if backend else ''}", gpu.name, ["no template of it"])
    return written


def _choose(need: Need, gpu: Gpu, backend: str) -> tuple[Config, str]:
    found = dispatch.chosen(need.op, need.spec, need.case.sizes, gpu)
    if backend in ("", found.config.backend):
        return found.config, found.origin
    if backend not in need.op.backends:
        raise NoConfig(f"{need.op.name} ({backend})", gpu.name, [])
    return need.op.default_config(need.spec, need.case.sizes, gpu, backend), "default"
