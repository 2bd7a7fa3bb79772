"""What has ended: a line for each piece as it ends; of all lines, one for each operation and tool is kept in the repository."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .cases import Check
from .pieces import Piece
from .reports import CLEAN
from .sources import label

_ORDERED = re.compile(rf"{CLEAN} but for (\d+) reports.*")
Key = tuple[str, str, str]
"""Of a check: tool, label of the text, id of the case."""


def line(piece: Piece, verdict: str, ended: int, seconds: float) -> dict[str, Any]:
    """What the ledger says of a piece whose first ``ended`` checks are done."""
    head = {"piece": piece.name, "tool": piece.tool, "op": piece.op, "backend": piece.backend}
    return {**head, "verdict": verdict, "seconds": round(seconds, 1), "ended": _grouped(piece.checks[:ended])}


def _grouped(checks: Iterable[Check]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for check in checks:
        found.setdefault(label(check.subject), []).append(check.id)
    return found


def append(file: Path, entry: Mapping[str, Any]) -> None:
    """Behind the others, at once: what is cut off keeps what has ended."""
    with file.open("a") as written:
        written.write(as_line(entry))


def as_line(entry: Mapping[str, Any]) -> str:
    """As a ledger holds it."""
    return json.dumps(entry) + "\n"


def read(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The lines of those ledgers that are there; one that was being written when its process was stopped is left out."""
    return [entry for file in files if file.exists() for entry in _lines(file.read_text())]


def _lines(text: str) -> Iterator[dict[str, Any]]:
    for each in text.splitlines():
        try:
            yield json.loads(each)
        except ValueError:
            continue


def is_clean(entry: Mapping[str, Any]) -> bool:
    """Whether all of its checks that ended were clean, or reported what is in order."""
    return str(entry["verdict"]).startswith(CLEAN)


def ended_clean(entries: Sequence[Mapping[str, Any]]) -> set[Key]:
    """Checks that need not be run again: those that ended clean once, and in no piece that had errors."""
    clean, wrong = (
        {
            (entry["tool"], text, case)
            for entry in entries
            if chosen(entry)
            for text, cases in entry["ended"].items()
            for case in cases
        }
        for chosen in (is_clean, _is_wrong)
    )
    return clean - wrong


def _is_wrong(entry: Mapping[str, Any]) -> bool:
    return str(entry["verdict"]).endswith("errors")


def latest(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last line of every piece of one ledger: a judgement stands behind what was said before it."""
    return list({entry["piece"]: dict(entry) for entry in entries}.values())


def merged(entries: Sequence[Mapping[str, Any]], wanted: Iterable[Check], name: str) -> list[dict[str, Any]]:
    """Of what is wanted today and has ended clean, a line for each tool, operation and backend: a ledger that is kept."""
    clean = ended_clean(entries)
    kinds: dict[tuple[str, str, str], list[Check]] = {}
    for check in wanted:
        if check.key in clean:
            kinds.setdefault((check.tool, check.subject.op.name, check.subject.config.backend), []).append(check)
    return [
        {
            **{"piece": f"{name}-{tool}-{op}-{backend}", "tool": tool, "op": op, "backend": backend},
            **{"verdict": CLEAN, "ended": _grouped(own)},
        }
        for (tool, op, backend), own in sorted(kinds.items())
    ]


def summary(wanted: Sequence[Check], entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each operation, backend and tool of the checks that were wanted: how far it is, and what was found."""
    clean = ended_clean(entries)
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in wanted:
        groups.setdefault((check.subject.op.name, check.subject.config.backend, check.tool), []).append(check)
    return [" ".join(kind) + ": " + _state(kind, own, clean, entries) for kind, own in sorted(groups.items())]


def _state(kind: Key, own: Sequence[Check], clean: set[Key], entries: Sequence[Mapping[str, Any]]) -> str:
    texts = _grouped(own)
    done = [check for check in own if check.key in clean]
    said = [f"{len(done)} of {len(own)} cases of {len(_grouped(done))} of {len(texts)} texts clean"]
    others = [str(each["verdict"]) for each in latest(entries) if (each["op"], each["backend"], each["tool"]) == kind]
    ordered = [int(number[1]) for verdict in others if (number := _ORDERED.fullmatch(verdict))]
    if ordered:
        said.append(f"{len(ordered)} pieces but for {sum(ordered)} reports of what is in order")
    left = Counter(verdict for verdict in others if not verdict.startswith(CLEAN))
    said += [f"{count} x {verdict}" for verdict, count in left.items()]
    return ", ".join(said)
