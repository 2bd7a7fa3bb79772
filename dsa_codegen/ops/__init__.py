"""The operations, one file each; every module here that defines ``OP`` is an operation of the package."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from ..errors import UnknownName
from ..op import Op


@functools.cache
def all_ops() -> dict[str, Op]:
    """The operations by name, in the order of the alphabet."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return {module.OP.name: module.OP for module in modules if hasattr(module, "OP")}


def get(name: str) -> Op:
    """The operation of that name.

    Raises:
        UnknownName: there is no such operation; the message lists them.
    """
    ops = all_ops()
    if name not in ops:
        raise UnknownName("operation", name, ops)
    return ops[name]
