"""What people run today, one adapter a file; each is used only where its library is there."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from .base import Peer

_HELPERS = ("base", "dense", "libraries", "listed_pages")


def sources() -> tuple[str, ...]:
    """The modules of this package that state ``PEERS``."""
    return tuple(f"{__name__}.{found.name}" for found in pkgutil.iter_modules(__path__) if found.name not in _HELPERS)


def load(modules: Sequence[str]) -> list[Peer]:
    """The peers of some modules, by import path (a child process loads its own)."""
    return [peer for module in modules for peer in importlib.import_module(module).PEERS]


__all__ = ["Peer", "load", "sources"]
