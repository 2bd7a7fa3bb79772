"""Results: the rows of ``benchmarks/results/<gpu>.json``, merged one by one, and what is measured of the machine beside them.

A row stays until its problem is measured again, and says which commit it was measured at. ``benchmarks/machine/<gpu>.json``
holds what is not a row: ceilings, the host's cost of a call, the sweep of contexts, each with its commit and date.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock

from ..errors import RecordError
from ..invocation import command
from ..records.publish import publish
from .cases import STAGES, BenchCase

Row = dict[str, Any]
FOLDER = Path("benchmarks")
REQUIRED = (
    "stage",
    "shape",
    "distribution",
    "ours_us",
    "ours_variant",
    "peers",
    "best_peer",
    "ratio",
    "limit_us",
    "similarity",
    "date",
    "commit",
    "toolchain",
)
SETTLED, MIXED, ALTERNATING = "settled", "mixed", "alternating"
"""How a row's contestants took turns: behind untimed calls of their own; sharing one clock; each behind the same neighbours."""
_LOCK_TIMEOUT_S = 60
_GROUP = re.compile(r"[a-z0-9]x\d+$")


def rows_path(folder: Path, gpu_id: str) -> Path:
    """Where the rows of a GPU lie."""
    return folder / "results" / f"{gpu_id}.json"


def machine_path(folder: Path, gpu_id: str) -> Path:
    """Where the rest lies."""
    return folder / "machine" / f"{gpu_id}.json"


def gpus_in(folder: Path) -> list[str]:
    """The GPUs that have rows."""
    return sorted(path.stem for path in (folder / "results").glob("*.json") if not _GROUP.search(path.stem))


def groups_in(folder: Path, gpu_id: str = "*") -> list[str]:
    """The groups of several GPUs, of one kind or of any, that have rows of their own: ``h100x2`` are two H100s."""
    names = {path.stem for path in (folder / "results").glob(f"{gpu_id}x*.json") if _GROUP.search(path.stem)}
    return sorted(names, key=lambda name: (name.rpartition("x")[0], int(name.rpartition("x")[2])))


def now() -> str:
    """The date and time, as rows state it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def latest_gpu(folder: Path) -> str:
    """The GPU with the newest row.

    Raises:
        RecordError: there are no rows.
    """
    dated = {gpu: max((row["date"] for row in read_rows(rows_path(folder, gpu))), default="") for gpu in gpus_in(folder)}
    if not dated:
        raise RecordError(f"there are no results in {folder / 'results'}; {command()} bench --against all makes some")
    return max(dated, key=lambda gpu: dated[gpu])


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two rows those of the same problem; equal to ``BenchCase.key``."""
    return row["stage"], tuple(sorted(row["shape"].items())), row["distribution"]


def turns_of(row: Mapping[str, Any]) -> str:
    """How its contestants took turns; rows that do not say are of before there was a choice."""
    return row.get("turns", ALTERNATING)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none where it is missing.

    Raises:
        RecordError: the file is no list of rows; it is not touched.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
        complete = all(name in row for row in rows for name in REQUIRED)
    except (OSError, ValueError, TypeError) as error:
        raise RecordError(f"{path} is not a list of results ({type(error).__name__}: {error}); it is left as it is") from error
    if not isinstance(rows, list) or not complete:
        raise RecordError(f"{path} holds something else than results; it is left as it is")
    return rows


def merge_rows(path: Path, fresh: Iterable[Row]) -> list[Row]:
    """Put fresh rows in the place of those of the same problems, keep all others, and return what the file now holds."""
    fresh = list(fresh)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_TIMEOUT_S):
        rows = {key_of(row): row for row in (*read_rows(path), *fresh)}
        ordered = sorted(rows.values(), key=_order)
        publish(path, "[\n" + ",\n".join(json.dumps(row) for row in ordered) + "\n]\n")
    return ordered


def settled(rows: Iterable[Row], commit: str, against: Iterable[str]) -> set[tuple[Any, ...]]:
    """The problems, by key, whose rows need not be measured again: ours has a time at this commit, against the same peers.

    Nothing is settled at a commit that files differ from, or that is unknown.
    """
    if commit == "unknown" or commit.endswith("+"):
        return set()
    asked = list(against)
    same = (row for row in rows if row["commit"] == commit and row.get("against") == asked)
    return {key_of(row) for row in same if row["ours_us"] is not None}


def _order(row: Row) -> tuple[Any, ...]:
    stage = row["stage"]
    return STAGES.index(stage) if stage in STAGES else len(STAGES), stage, list(row["shape"].items()), row["distribution"]


def read_machine(path: Path) -> dict[str, Any]:
    """What was measured of the machine; empty where nothing was, or the file cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def merge_machine(path: Path, fresh: Mapping[str, Any]) -> None:
    """Replace some entries, keep the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_TIMEOUT_S):
        publish(path, json.dumps({**read_machine(path), **fresh}, indent=1) + "\n")


def row_of(case: BenchCase, measured: Mapping[str, Any], facts: Mapping[str, Any]) -> Row:
    """One row.

    Args:
        measured: what ``summary`` says of the case.
        facts: date, commit, toolchain.
    """
    return {"stage": case.stage, "shape": dict(case.shape), "distribution": case.distribution, **measured, **facts}


def commit() -> str:
    """``DSA_COMMIT``, or the checkout's commit with ``+`` where files differ from it, or "unknown"."""
    named = os.environ.get("DSA_COMMIT")
    if named:
        return named
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "dsa_codegen", "templates", "tuned")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
