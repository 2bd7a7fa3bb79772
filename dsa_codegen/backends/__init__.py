"""The compilers behind the templates; a further backend is one more file here and one more line in this table."""

from __future__ import annotations

import functools
import importlib

from ..errors import UnknownName
from .base import Backend, Launchable, Resources

__all__ = ["NAMES", "Backend", "Launchable", "Resources", "get"]

NAMES = ("triton", "gluon", "tilelang")


@functools.cache
def get(name: str) -> Backend:
    """The backend of that name; its compiler is imported only when it is used.

    Raises:
        UnknownName: there is no such backend.
    """
    if name not in NAMES:
        raise UnknownName("backend", name, NAMES)
    return importlib.import_module(f".{name}", __package__).BACKEND
