"""Where commands print: tables or one JSON document to stdout, all else to stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rich.console import Console

out = Console()
err = Console(stderr=True)


def show(as_json: bool, table: Callable[[Console], None], rows: list[Any]) -> None:
    """A command's answer: for a person a table, for a program its rows."""
    if as_json:
        print(json.dumps(rows, indent=1, default=str))
    else:
        table(out)
