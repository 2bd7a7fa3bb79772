"""Gluon: Triton's dialect with explicit layouts, barriers and asynchronous copies; a module looks like a Triton one.

Its kernels are written for one architecture (Hopper's wgmma, say) and cannot be interpreted: they are verified on the GPU.
"""

from __future__ import annotations

from triton.experimental.gluon._runtime import GluonASTSource

from .triton import TritonBackend


class GluonBackend(TritonBackend):
    """See the module's first lines."""

    name = "gluon"
    source_type = GluonASTSource


BACKEND = GluonBackend()
