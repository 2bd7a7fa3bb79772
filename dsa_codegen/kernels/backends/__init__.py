"""The compilers behind the templates; a further backend is one more file here and one more line in this table."""

from __future__ import annotations

import functools
import importlib

from ...errors import ToolBroken, ToolMissing, UnknownName
from ...invocation import install
from .base import Backend, Launchable, Resources

__all__ = ["NAMES", "Backend", "Launchable", "Resources", "get"]

NAMES = ("triton", "gluon", "tilelang", "cuda")
_PACKAGES = {
    "triton": ("triton", ""),
    "gluon": ("triton", ""),
    "tilelang": ("tilelang", "tilelang"),
    "cuda": ("nvidia-cuda-nvcc", "tilelang"),
}
"""The compiler's package, and the extra of this one that brings it; "" where this package needs it anyway."""


@functools.cache
def get(name: str) -> Backend:
    """The backend of that name; its compiler is imported only when it is used.

    Raises:
        UnknownName: there is no such backend.
        ToolMissing: its compiler is not installed.
        ToolBroken: its compiler cannot be imported.
    """
    if name not in NAMES:
        raise UnknownName("backend", name, NAMES)
    package, extra = _PACKAGES[name]
    try:
        return importlib.import_module(f".{name}", __package__).BACKEND
    except Exception as error:  # a compiler that loads libraries of its own while it is imported may raise whatever it likes
        remedy = install(extra) if extra else f"pip install {package}"
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise ToolMissing(package, remedy) from error
        reason = f"{type(error).__name__}: {error}"
        raise ToolBroken(package, reason, f"pip install --force-reinstall {package}, or {remedy}") from error
