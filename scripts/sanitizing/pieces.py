"""Pieces: a few checks of one operation, backend and tool in a process of its own, about as long as each other."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from dsa_codegen.command.verification import Subject

from .cases import Check
from .sources import comes_by_own_ways, label

SECONDS = {"memcheck": 0.8, "racecheck": 1.0, "synccheck": 0.8}
"""Of a check, at a guess; a long case takes several times that."""
_LONG = 4.0
_TEXT = 0.5  # seconds to load one more text
BUDGET = 9.0
"""Seconds of checks in a piece, about ten short ones: as long as torch, the tool and the context take to start."""


@dataclass(frozen=True)
class Piece:
    """What one process checks with one tool."""

    tool: str
    op: str
    backend: str
    checks: tuple[Check, ...]

    @property
    def name(self) -> str:
        """As its report is called: by what it checks."""
        keys = "\n".join(map(str, (check.key for check in self.checks)))
        return f"{self.tool}-{self.op}-{self.backend}-{hashlib.sha256(keys.encode()).hexdigest()[:8]}"

    @property
    def subjects(self) -> list[Subject]:
        """Its texts, each once."""
        return list({label(check.subject): check.subject for check in self.checks}.values())


def cost(checks: Iterable[Check]) -> float:
    """Seconds of checks in one process, its start aside."""
    found = list(checks)
    own = sum(SECONDS[check.tool] * (_LONG if check.long else 1) for check in found)
    return own + _TEXT * len({label(check.subject) for check in found})


def pieces(wanted: Iterable[Check], ended: Collection[tuple[str, str, str]] = ()) -> list[Piece]:
    """The checks in pieces, without those that have ended clean.

    Operations, backends and tools take turns, so that a text's pieces come together and a run that is cut off has seen of all.
    What may not end is in no piece with others: of one that is stopped nothing counts.
    """
    kinds: dict[tuple[str, str, str, bool], list[Check]] = {}
    for check in wanted:
        if check.key not in ended:
            kind = (check.tool, check.subject.op.name, check.subject.config.backend)
            kinds.setdefault((*kind, may_not_end(check)), []).append(check)
    found = []
    for (tool, op, backend, _), own in kinds.items():
        groups = together(own)
        found += [(nth / len(groups), Piece(tool, op, backend, tuple(group))) for nth, group in enumerate(groups)]
    return [piece for _, piece in sorted(found, key=lambda each: each[0])]


def may_not_end(check: Check) -> bool:
    """Long cases, and texts that hang under the tools as they are."""
    return check.long or comes_by_own_ways(check.subject)


def together(wanted: Sequence[Check], budget: float = BUDGET) -> list[list[Check]]:
    """Neighbours in groups that take about as long as each other, and as the budget at most where one check does not alone."""
    whole = cost(wanted)
    share = whole / math.ceil(whole / budget)
    groups: list[list[Check]] = []
    for check in wanted:
        if groups and cost(groups[-1]) < share and cost([*groups[-1], check]) <= budget:
            groups[-1].append(check)
        else:
            groups.append([check])
    return groups
