"""What to tell a user to type: how this package's command line is called here, and how an extra of it is installed here."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

from . import paths

_NAME = "dsa-codegen"
_OF_EXTRA = re.compile(r"""^(.*?)\s*;.*extra\s*==\s*['"]([\w-]+)['"]""")


def command() -> str:
    """``dsa``, ``python -m dsa_codegen`` or, from a checkout, ``python cli.py``: as it was called, or else as it can be."""
    called = Path(sys.argv[0]).name if sys.argv else ""
    if called == "__main__.py" and Path(sys.argv[0]).parent.name == __package__:
        return "python -m dsa_codegen"
    if called in ("dsa", "cli.py"):
        return "dsa" if called == "dsa" else "python cli.py"
    return "python cli.py" if paths.is_checkout() else "dsa"


def install(extra: str) -> str:
    """The pip command that brings what an extra brings: by its name from a checkout, else by what the extra asks for."""
    if paths.is_checkout():
        return f"pip install -e '.[{extra}]'"
    wanted = " ".join(f"'{requirement}'" for requirement in _requirements(extra))
    return f"pip install {wanted}" if wanted else f"install {_NAME} with its extra {extra}"


def _requirements(extra: str) -> list[str]:
    """What an extra asks for, extras of this package that it names resolved."""
    try:
        stated = importlib.metadata.requires(_NAME) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found: list[str] = []
    for requirement, of in (match.groups() for match in map(_OF_EXTRA.match, stated) if match):
        if of != extra:
            continue
        inner = re.match(rf"{_NAME}\[([\w,-]+)\]", requirement)
        found += [each for name in inner[1].split(",") for each in _requirements(name)] if inner else [requirement]
    return found
