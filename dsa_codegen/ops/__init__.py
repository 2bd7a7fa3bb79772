"""The operations, one folder each: what is asked (``problem``), how it is computed (``kernels``). The files are shared."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from ..errors import UnknownName
from ..problem.op import Op


@functools.cache
def all_ops() -> dict[str, Op]:
    """The operations by name, in the order of the alphabet."""
    folders = [info.name for info in pkgutil.iter_modules(__path__) if info.ispkg]
    return {name: importlib.import_module(f"{__name__}.{name}").OP for name in folders}


def get(name: str) -> Op:
    """The operation of that name.

    Raises:
        UnknownName: there is no such operation; the message lists them.
    """
    ops = all_ops()
    if name not in ops:
        raise UnknownName("operation", name, ops)
    return ops[name]
