"""Launching a compiled Triton kernel: through the C code that Triton launches it with, and as little else as can be.

Triton's own launcher goes around that code twice: once to ask for scratch memory, which most kernels do not need, and once to
encode a descriptor for every argument of which TMA loads tiles. A descriptor is a value: of the same view it is the same.
Up to 3.6 Triton compiles that code for each signature; from 3.7 on there is one for all, which reads a description of the
signature. Of a version that is not known here, the launcher is Triton's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel

from ..render import release
from .cubin import SCRATCH, parameters
from .descriptors import Views, places_of, rank_of
from .driver import Parameters, Recipe

_RELEASE = release(triton.__version__)
_ONE_FOR_ALL = (3, 7) <= _RELEASE <= (3, 9)
_KNOWN = (3, 6) <= _RELEASE <= (3, 9)


class TritonKernel:
    """A ``Launchable``; its device is the one that is current when it is made."""

    takes_addresses = True
    """Tensors may come as their addresses: those are not looked up in the driver once more."""

    def __init__(self, kernel: CompiledKernel) -> None:
        run = kernel.run
        self._kernel = kernel  # from 3.8 on its end takes the code off the GPU
        self._device = torch.cuda.current_device()
        self._stream = torch._C._cuda_getCurrentRawStream  # what Triton's own launcher reads; ~0.1 us
        self._views: Views | None = None
        self._launch: Callable[..., None] = run
        self._fixed: tuple[Any, ...] = (kernel.function, kernel.packed_metadata, None, None, None)
        self._together = False
        self.recipe: Recipe | None = None
        if not _KNOWN or run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
            return
        self._launch = run.launch
        self._together = _ONE_FOR_ALL
        head, hooks, scratch = (kernel.function, run.launch_cooperative_grid, run.launch_pdl), self._fixed[1:], (None, None)
        if _ONE_FOR_ALL:
            self._fixed = (*head, *hooks, *scratch, run.arg_annotations, run.kernel_signature)
        else:
            self._fixed = (*head, *scratch, *hooks)
        places = places_of(tuple(kernel.src.signature.values()))
        views = Views(places, getattr(kernel.metadata, "tensordesc_meta", None) or (), _encode)
        if views:
            self._views = views
            self._launch = _launcher_of_descriptors(kernel)
        if views.known and not run.launch_cooperative_grid:
            self.recipe = _recipe(kernel)

    def __call__(self, grid: tuple[int, int, int], args: Sequence[Any]) -> None:
        x, y, z = grid
        if self._views:
            args = self._views(args)
        if self._together:
            self._launch(x, y, z, self._stream(self._device), *self._fixed, args)
        else:
            self._launch(x, y, z, self._stream(self._device), *self._fixed, *args)

    def bound(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        """What launches with this grid again and again, given the arguments one by one, tensors as their addresses."""
        (x, y, z), launch, stream, device, fixed, views = (
            grid,
            self._launch,
            self._stream,
            self._device,
            self._fixed,
            self._views,
        )
        if self._together:
            return lambda *args: launch(x, y, z, stream(device), *fixed, views(args) if views else args)
        if views:
            return lambda *args: launch(x, y, z, stream(device), *fixed, *views(args))
        return lambda *args: launch(x, y, z, stream(device), *fixed, *args)


def _recipe(kernel: CompiledKernel) -> Recipe | None:
    """How the driver launches the kernel; None where Triton's launcher does more to it than this package knows."""
    about = kernel.metadata
    if about.num_ctas != 1:
        return None
    taken = Parameters(parameters(tuple(kernel.src.signature.values())))
    described = tuple(getattr(about, "tensordesc_meta", None) or ())
    shape = about.num_warps * 32, about.shared, 1, bool(about.launch_pdl)
    return Recipe(kernel, about.name, kernel.function, taken, *shape, described, SCRATCH)


def _encode(view: Any, described: Mapping[str, Any]) -> list[Any]:
    """The view's descriptor, shape and strides."""
    past = () if _RELEASE < (3, 8) else (None,)  # 3.8 hands on what precedes a launch's arguments, for other GPUs' sake
    encoded: list[Any] = nvidia.make_tensordesc_arg(view, described, *past)
    return encoded


def _launcher_of_descriptors(kernel: CompiledKernel) -> Callable[..., None]:
    """The same code, given encoded descriptors, shapes and strides where Triton's wrapper takes the views."""
    if _ONE_FOR_ALL:
        code: Callable[..., None] = triton.runtime.driver.active.utils.launch
        return code
    kinds: list[str] = []
    for kind in kernel.src.signature.values():
        rank = rank_of(kind)
        kinds += ["nvTmaDesc", *["i32"] * rank, *["i64"] * rank] if rank else [kind]
    source = SimpleNamespace(signature=dict(enumerate(kinds)))
    launch: Callable[..., None] = type(kernel.run)(source, kernel.metadata._replace(tensordesc_meta=None)).launch
    return launch
