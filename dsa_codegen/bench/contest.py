"""Contest: one case, ours and its peers, compared with the reference and then timed in turns; runs in a child process."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..gpu import Gpu
from ..problem.draw import Draw
from ..problem.op import Inputs, Outputs
from ..proof.measure import InputSet, Measured, measure_calls, nbytes, rotation
from ..proof.stopwatch import Stopwatch
from ..proof.timing import Policy, Timing
from ..proof.turns import SETTLED, Turns
from ..proof.verify import poison, seed_of
from ..runtime.dispatch import Untuned
from . import peers as adapters
from .cases import BenchCase
from .peers import Peer
from .problems import stage_of
from .stage import Prepared, Run, Stage, moved

OURS = "ours"
FEW_ROWS = 128
"""Selections of so many rows at most are also timed warm, as decode is."""


_COLD = Policy(rounds=20)
_WARM = Policy(cold_l2=False, reps=50, rounds=20, warmup_ms=5.0)
_WARM_WITHIN = 10.0  # times the fastest: nobody asks for the warm time of those behind


@dataclass(frozen=True)
class How:
    """How a contest is held."""

    cold: Policy = _COLD
    warm: Policy = _WARM
    limit_s: float = 0.8
    """Device seconds for the cold samples of all contestants; a third of it for the warm ones."""
    turns: Turns = SETTLED
    device: str = "cuda"
    stopwatch: Stopwatch | None = None


@dataclass(frozen=True)
class Entry:
    """One contestant: timed, or the reason why not."""

    name: str
    timing: Timing | None = None
    warm: Timing | None = None
    similarity: float | None = None
    note: str = ""
    """Missing, crashed, disagrees; or what to know of its time."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of a peer: its version, and what its users may count on."""


@dataclass(frozen=True)
class Outcome:
    """What came of a contest."""

    entries: tuple[Entry, ...]
    variant: str = ""
    sets: int = 0
    cold: bool = False
    settled: bool = False
    """Whether each contestant ran untimed before each of its samples."""
    versions: dict[str, str] = field(default_factory=dict)
    wall_s: float = 0.0
    """What the contest took, everything included."""


@dataclass
class _Contestant:
    """Somebody who takes part: ``peer`` None is this package."""

    peer: Peer | None
    name: str
    similarity: float | None = None
    note: str = ""

    def prepare(self, stage: Stage, case: BenchCase, inputs: Inputs) -> Prepared | None:
        return stage.ours(case, inputs) if self.peer is None else self.peer.prepare(case, inputs)

    @property
    def allowed(self) -> float:
        """What it may differ from the reference by: ours has limits of its own."""
        return 0.0 if self.peer is None else self.peer.similarity


def hold(case: BenchCase, gpu: Gpu, sources: Sequence[str], without: Sequence[str] = (), how: How | None = None) -> Outcome:
    """Compare and time everybody who serves the case.

    Args:
        sources: modules that state the peers, by import path.
        without: who is left out, by name (they took the process with them before).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Untuned)  # the row says where its variant comes from
        return _hold(case, gpu, sources, without, how or How())


def _hold(case: BenchCase, gpu: Gpu, sources: Sequence[str], without: Sequence[str], how: How) -> Outcome:
    began, stage = time.monotonic(), stage_of(case.stage)
    contestants = [] if OURS in without else [_Contestant(None, OURS)]
    entries: list[Entry] = []
    versions: dict[str, str] = {}
    for peer in adapters.load(sources):
        if case.stage not in peer.stages or peer.name in without:
            continue
        missing = peer.reason()
        if missing:
            entries.append(Entry(peer.name, note=missing))
        else:
            contestants.append(_Contestant(peer, peer.name))
            versions |= peer.versions()
    inputs = stage.inputs(case, Draw(seed_of(case.id), how.device))
    entries += _compared(stage, case, inputs, contestants, how.device)
    fit = [each for each in contestants if each.similarity is not None]
    sets = _sets(stage, case, inputs, gpu, how.device)
    calls = [[_guarded(_ready(each, stage, case, one)) for one in sets] for each in fit]
    cold = len(sets) * moved(stage.costs(case)) > gpu.l2
    timed = measure_calls(calls, how.cold, how.stopwatch, how.limit_s, cold, how.turns)
    near = _near(timed) if _also_warm(case) else []
    again = measure_calls([calls[who] for who in near], how.warm, how.stopwatch, how.limit_s / 3, turns=how.turns)
    warm = dict(zip(near, again, strict=True))
    entries += [_entry(each, timed[who], warm.get(who)) for who, each in enumerate(fit)]
    del calls, sets, inputs
    _give_back(how.device)
    wall_s, rotated = round(time.monotonic() - began, 2), max((each.sets for each in timed), default=0)
    settled = any(each.settled for each in timed)
    return Outcome(tuple(entries), stage.variant(case, gpu), rotated, cold, settled, versions, wall_s)


def get_ready(sources: Sequence[str], device: str) -> None:
    """Load what every case needs: the peers' libraries and the device."""
    for peer in adapters.load(sources):
        peer.reason()
    torch.zeros(1, device=device)


def attempt(case: BenchCase, sources: Sequence[str], name: str, device: str) -> None:
    """Run one contestant once; whether the process survives it is what the caller wants to know."""
    able: list[Peer | None] = [peer for peer in adapters.load(sources) if peer.name == name and not peer.reason()]
    stage = stage_of(case.stage)
    for peer in [None] if name == OURS else able:
        prepared = _Contestant(peer, name).prepare(stage, case, stage.inputs(case, Draw(seed_of(case.id), device)))
        if prepared is not None:
            prepared.run()
    _synchronise(device)


def _compared(stage: Stage, case: BenchCase, inputs: Inputs, contestants: Sequence[_Contestant], device: str) -> list[Entry]:
    """Run everybody once against the reference; who may not be timed is returned, the others get their similarity."""
    reference = stage.reference(case, inputs)
    failed = []
    for each in contestants:
        try:
            prepared = each.prepare(stage, case, inputs)
            if prepared is None:
                continue
            each.name = prepared.label
            outputs = prepared.outputs(prepared.run())
            _synchronise(device)
            accuracy = stage.check(case, inputs, outputs, reference, exact=each.peer is None)
            _spoil(outputs, inputs)
        except Exception as error:  # a foreign library may fail in any way: that is its row's news, not the run's end
            _synchronise(device)  # raises where the failure took the device with it: then a fresh process must go on
            if isinstance(error, torch.OutOfMemoryError):
                _give_back(device)
            failed.append(Entry(each.name, note=f"failed: {type(error).__name__}: {_short(error)}"))
            continue
        if accuracy.passed or accuracy.similarity < each.allowed:
            each.similarity = accuracy.similarity
        else:
            failed.append(Entry(each.name, similarity=_finite(accuracy.similarity), note=f"disagrees: {accuracy.detail}"))
    return failed


def _spoil(outputs: Outputs, inputs: Inputs) -> None:
    """Nobody may pass with what another left in memory."""
    given = {value.data_ptr() for value in inputs.values() if isinstance(value, torch.Tensor)}
    poison({name: value for name, value in outputs.items() if value.data_ptr() not in given and value.numel()})


def _sets(stage: Stage, case: BenchCase, first: Inputs, gpu: Gpu, device: str) -> list[Inputs]:
    seed = seed_of(case.id)
    size = nbytes(InputSet(first, {}))
    return rotation(lambda n: stage.inputs(case, Draw(seed + n, device)), first, size, moved(stage.costs(case)), gpu)


def _ready(each: _Contestant, stage: Stage, case: BenchCase, inputs: Inputs) -> Run:
    prepared = each.prepare(stage, case, inputs)
    assert prepared is not None
    return prepared.run


def _guarded(run: Run) -> Run:
    """Whatever a foreign call raises while a graph is captured must look like what the stopwatch expects."""

    def call() -> None:
        try:
            run()
        except RuntimeError:
            raise
        except Exception as error:
            raise RuntimeError(_short(error)) from error

    return call


def _entry(each: _Contestant, timed: Measured, warm: Measured | None) -> Entry:
    note = "" if timed.policy.graph else "not captured in a graph: its time includes the host's"
    facts = each.peer.facts() if each.peer else {}
    return Entry(each.name, timed.timing, warm.timing if warm else None, _finite(each.similarity), note, facts)


def _near(timed: Sequence[Measured]) -> list[int]:
    """Who is not hopelessly slow, by place."""
    fastest = min((each.timing.median for each in timed), default=0.0)
    return [who for who, each in enumerate(timed) if each.timing.median <= _WARM_WITHIN * fastest]


def _also_warm(case: BenchCase) -> bool:
    shape = dict(case.shape)
    return case.stage.endswith("_decode") or shape.get("rows", shape.get("tokens", FEW_ROWS + 1)) <= FEW_ROWS


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < 1e300 else None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _give_back(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
