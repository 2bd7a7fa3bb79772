"""Which cases a text is run with: all of them, or a few that stand for the others; each is one check."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsa_codegen.command.verification import Subject
from dsa_codegen.gpu import Gpu
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case, Inputs, Op

from .sources import are_pairs, label, of, rendered

TOOLS = ("memcheck", "racecheck", "synccheck")
FEW = 4
"""Cases of a text that stand for all of them: dozens differ in their numbers only, and take the same way through the kernels.

Each sequence of kernels that a text launches is among them. Otherwise a text's are evenly apart and begin where the text before
it did not, so that every case is run with some text of its operation and backend where there are enough of these. Every fourth
text has long cases among its own: more blocks than the GPU has SMs, loops and rings that go round.
"""
_LONG_EVERY = 4  # texts
SMS = {"attention": 2, "attention_paged": 3, "select": 1}
"""On how many SMs an operation's kernels in CUDA C++ run under the tools that look at barriers, twice as many where blocks are
pairs: they stay, and take several queries (rows of scores, shares of rows) of a short case there, where on all SMs each would
take one."""
_BARRIERS = ("racecheck", "synccheck")
_GAP = 64  # elements between blocks of a cache that holds several layers


@dataclass(frozen=True)
class Check:
    """One case of one text under one tool."""

    tool: str
    subject: Subject
    case: Case
    long: bool = False
    """Whether it is one of the cases that are too long for an interpreter."""

    @property
    def apart(self) -> bool:
        """Whether blocks of its cache lie apart, as in one of several layers: lists of BF16 rows are made anew then."""
        return _reads_plain_pages(self.subject) and self.case.distribution == "ragged"

    @property
    def id(self) -> str:
        """The case's; what it is run on is the subject's label."""
        return f"{self.case.id}-apart" if self.apart else self.case.id

    @property
    def key(self) -> tuple[str, str, str]:
        """What a check that ended clean is known by."""
        return self.tool, label(self.subject), self.id


def _reads_plain_pages(subject: Subject) -> bool:
    return subject.op.name == "attention_paged" and subject.config.backend == "cuda" and subject.spec.kv_layout == "bf16"


def sms(check: Check, gpu: Gpu) -> int:
    """On how many SMs a check runs."""
    few = check.subject.config.backend == "cuda" and check.tool in _BARRIERS and not check.long
    if not few or check.subject.op.name not in SMS:
        return gpu.sms
    return min(SMS[check.subject.op.name] * (2 if are_pairs(check.subject) else 1), gpu.sms)


def cases_of(subject: Subject, tool: str, gpu: Gpu, long: bool = True) -> list[Check]:
    """All that launch anything; without ``long``, of the long ones only what launches kernels that no short one does.

    Where every access is compared with all others none is long.
    """
    op, spec, config = subject.op, subject.spec, subject.config
    brief = {op.within_reach(spec, config, case) for case in op.cases(spec)}
    all_ = [Check(tool, subject, case, case not in brief) for case in op.cases_for(spec, config)]
    found = [each for each in all_ if launched(each, gpu)]
    if long and tool not in _BARRIERS:
        return found
    known = {launched(each, gpu) for each in found if not each.long}
    return [each for each in found if not each.long or launched(each, gpu) not in known]


def checks(subjects: Sequence[Subject], tools: Iterable[str], gpu: Gpu, thorough: bool = False) -> list[Check]:
    """Those of each text that launch anything, by default few of them."""
    kinds = dict.fromkeys((each.op.name, each.config.backend) for each in subjects)
    return [each for kind in kinds for tool in tools for each in of_kind(of(subjects, *kind), tool, gpu, thorough)]


def of_kind(subjects: Iterable[Subject], tool: str, gpu: Gpu, thorough: bool = False) -> list[Check]:
    """Those of one operation and backend under one tool."""
    texts: dict[str, list[Subject]] = {}
    for subject in subjects:
        texts.setdefault(rendered(subject).sha, []).append(subject)
    kind = functools.partial(launched, gpu=gpu)
    found: list[Check] = []
    for nth, own in enumerate(texts.values()):
        long = thorough or nth % _LONG_EVERY == 0
        all_ = [check for subject in own for check in cases_of(subject, tool, gpu, long)]
        found += all_ if thorough else representatives(all_, nth, kind)
    return found


def representatives(own: Sequence[Check], nth: int, kind: Callable[[Check], object], few: int = FEW) -> list[Check]:
    """A few of the nth text's checks, in their order: one of every kind, and others evenly apart."""
    count = len(own)
    if count <= few:
        return list(own)
    turned = [(nth + place) % count for place in range(count)]
    places = {kind(own[place]): place for place in reversed(turned)}
    chosen = set(places.values())
    for place in ((nth + step * count // few) % count for step in range(few)):
        if len(chosen) < max(few, len(places)) or place in chosen:
            chosen.add(place)
    return [own[place] for place in sorted(chosen)]


def launched(check: Check, gpu: Gpu) -> tuple[str, ...]:
    """The kernels that a check launches, in order; asked without memory."""
    card = replace(gpu, sms=sms(check, gpu))
    return _launched(replace(check, tool="", long=False), card)


@functools.lru_cache(maxsize=1 << 14)
def _launched(check: Check, gpu: Gpu) -> tuple[str, ...]:
    op, spec = operation(check), check.subject.spec
    inputs = op.inputs(spec, check.case, Draw(0, "meta"))
    launches = op.launches(spec, check.subject.config, inputs, op.allocate(spec, inputs), gpu)
    return tuple(launch.kernel for launch in launches)


def operation(check: Check) -> Op:
    """The check's operation, with blocks of caches apart where it is about that."""
    op = check.subject.op
    if not check.apart:
        return op
    spaced = copy.copy(op)

    def inputs(spec: Any, case: Case, draw: Draw) -> Inputs:
        return apart(op.inputs(spec, case, draw))

    spaced.inputs = inputs  # type: ignore[method-assign]
    return spaced


def apart(inputs: Inputs) -> Inputs:
    """The same with NaN between the blocks of the cache."""
    cache = inputs["cache"]
    blocks = cache.flatten(1)
    wide = torch.full((len(cache), blocks.shape[1] + _GAP), torch.nan, dtype=cache.dtype, device=cache.device)
    wide[:, : blocks.shape[1]] = blocks
    return {**inputs, "cache": wide[:, : blocks.shape[1]].view(cache.shape)}
