"""Files of measured quality: one for each kind of activations, which the report draws beside time and memory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RecordError
from ..quality import Row
from ..records.publish import publish

_DIGITS = 5
_FIELDS = ("data", "context", "k", "choice", "recall", "hits", "mass", "error", "overlap")


def path_of(folder: Path, data: str) -> Path:
    """Where the rows of activations of this name lie."""
    return folder / "quality" / f"{re.sub('[^a-z0-9.]+', '-', data.lower()).strip('-')}.json"


def write(folder: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> Path:
    """Write rows of one name in place of earlier ones, with the facts (date, commit, device) about them."""
    path = path_of(folder, rows[0].data)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = [{name: _short(value) for name, value in row.to_dict().items()} for row in rows]
    body = ",\n  ".join(json.dumps(each) for each in plain)
    publish(path, f'{{\n "facts": {json.dumps(dict(facts))},\n "rows": [\n  {body}\n ]\n}}\n')
    return path


def read(folder: Path) -> list[dict[str, Any]]:
    """``{"facts", "rows"}`` of every kind of activations, by name.

    Raises:
        RecordError: a file holds something else.
    """
    found = []
    for path in sorted((folder / "quality").glob("*.json")):
        try:
            each = json.loads(path.read_text())
            whole = bool(each["rows"]) and all(name in row for row in each["rows"] for name in _FIELDS)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RecordError(f"{path} is no file of measured quality ({type(error).__name__}); it is left as it is") from error
        if not whole:
            raise RecordError(f"{path} holds something else than measured quality; it is left as it is")
        found.append(each)
    return found


def _short(value: Any) -> Any:
    return round(value, _DIGITS) if isinstance(value, float) else value
