"""Launching a compiled Triton kernel: through the code that Triton compiles for its signature, and as little else as can be.

Triton's own launcher goes around that code twice: once to ask for scratch memory, which most kernels do not need, and once to
encode a descriptor for every argument of which TMA loads tiles. A descriptor is a value: of the same view it is the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.compiler import CompiledKernel

_VIEW = re.compile(r"tensordesc<[^[>]*\[([^]]*)\]")


class TritonKernel:
    """A ``Launchable``; its device is the one that is current when it is made."""

    takes_addresses = True
    """Tensors may come as their addresses: those are not looked up in the driver once more."""

    def __init__(self, kernel: CompiledKernel) -> None:
        run = kernel.run
        self._device = torch.cuda.current_device()
        self._stream = torch._C._cuda_getCurrentRawStream  # what Triton's own launcher reads; ~0.1 us
        self._views: tuple[tuple[int, Mapping[str, Any]], ...] = ()
        self._launch: Callable[..., None] = run
        self._fixed: tuple[Any, ...] = (kernel.function, kernel.packed_metadata, None, None, None)
        if run.global_scratch_size or run.profile_scratch_size:
            return
        self._launch = run.launch
        self._fixed = (kernel.function, run.launch_cooperative_grid, run.launch_pdl, None, None, *self._fixed[1:])
        places = [place for place, kind in enumerate(kernel.src.signature.values()) if _VIEW.match(kind)]
        described = getattr(kernel.metadata, "tensordesc_meta", None) or []
        if places and len(described) == len(places) and all(described):
            self._views = tuple(zip(places, described, strict=True))
            self._launch = _launcher_of_descriptors(kernel)

    def __call__(self, grid: tuple[int, int, int], args: Sequence[Any]) -> None:
        x, y, z = grid
        if self._views:
            args = self._with_descriptors(args)
        self._launch(x, y, z, self._stream(self._device), *self._fixed, *args)

    def _with_descriptors(self, args: Sequence[Any]) -> list[Any]:
        row: list[Any] = []
        last = 0
        for place, described in self._views:
            view = args[place]
            encoded = view.encoded
            if encoded is None or encoded[0] is not described:  # as another kernel's tiles want it
                encoded = view.encoded = described, make_tensordesc_arg(view, described)
            row += args[last:place]
            row += encoded[1]
            last = place + 1
        row += args[last:]
        return row


def _launcher_of_descriptors(kernel: CompiledKernel) -> Callable[..., None]:
    """The same compiled code, given encoded descriptors, shapes and strides where Triton's wrapper takes the views."""
    kinds: list[str] = []
    for kind in kernel.src.signature.values():
        view = _VIEW.match(kind)
        rank = 1 + view[1].count(",") if view else 0
        kinds += ["nvTmaDesc", *["i32"] * rank, *["i64"] * rank] if view else [kind]
    source = SimpleNamespace(signature=dict(enumerate(kinds)))
    launch: Callable[..., None] = type(kernel.run)(source, kernel.metadata._replace(tensordesc_meta=None)).launch
    return launch
