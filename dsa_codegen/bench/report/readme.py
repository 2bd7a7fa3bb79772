"""The README's tables: what stands between ``<!-- bench: NAME -->`` and ``<!-- /bench -->`` is written anew."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ...errors import UnknownName

_BLOCK = re.compile(r"(<!-- bench: ([\w.]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def update(path: Path, tables: Mapping[str, str]) -> list[str]:
    """Fill the marked places of a file; returns the names of those that changed.

    A known table that has not been measured yet leaves its place as it is.

    Raises:
        UnknownName: a marker asks for a table that does not exist.
    """
    text = path.read_text()
    changed = []

    def filled(found: re.Match[str]) -> str:
        name = found[2]
        if name not in tables:
            raise UnknownName("benchmark table", name, tables)
        fresh = f"{found[1]}{tables[name]}\n{found[3]}" if tables[name] else found[0]
        if fresh != found[0]:
            changed.append(name)
        return fresh

    fresh = _BLOCK.sub(filled, text)
    if fresh != text:
        path.write_text(fresh)
    return changed
