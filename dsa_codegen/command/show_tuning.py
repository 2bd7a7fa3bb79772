"""How the command line shows what tuning did: what serves now, what changed and by how much, what failed and how to see it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..invocation import command
from ..problem.values import describe
from ..records.files import outranked
from ..records.record import Record
from .show import Printer, lines, record_row, records, table, together, values

if TYPE_CHECKING:
    from ..tune.again import Again
    from ..tune.check import Checked, Drift
    from ..tune.incumbent import Change
    from ..tune.plan import Missing
    from ..tune.problem import Problem
    from ..tune.refresh import Refreshed
    from ..tune.regret import Regret
    from ..tune.renewal import Fate
    from ..tune.run import Report


def tuned(report: Report) -> Printer:
    """What serves each call now, which files changed, which choices a measured record outranks, and what was left out."""
    fastest: dict[tuple[object, ...], Record] = {}
    for record in sorted(report.records, key=lambda record: record.time_us.median):
        fastest.setdefault((record.op, tuple(record.spec.items()), record.bucket), record)
    chosen = [record for record in report.records if record in fastest.values()]
    rivals = [outranked(path, record) for record in chosen for path in [_file_of(report, record)]]
    serving = [rival or record for rival, record in zip(rivals, chosen, strict=True)]
    changed = {_file_of(report, record) for record in report.records if outranked(_file_of(report, record), record) is None}
    files = [f"wrote {path}" if path in changed else f"left {path} as it was" for path in report.files]
    kept = sum(rival is not None for rival in rivals)
    aside = [f"{kept} of {len(chosen)} choices were not kept: measured records serve those calls, as shown"] if kept else []
    head = f"tuned in {report.elapsed_s / 60:.1f} min" + (" (interrupted; run it again to go on)" if report.interrupted else "")
    account = report.account.lines() if report.account else ()
    told = lines(_outcomes(report), *account, *_failures(report), *_changes(report), *files, *aside)
    return together(records(serving, head), told, lines(*report.notes, style="yellow"))


def _changes(report: Report) -> Iterable[str]:
    """What took another's place, with the times of both; how many stand as they were, and how far their times moved."""
    for change in report.changes:
        if change.before is not None and not change.kept:
            yield f"changed: {_place(change.now)}: {_before(change)} → {_time(change.now)}, {values(change.now.config)}"
    kept = [change for change in report.changes if change.kept]
    moved = [100 * (change.now.time_us.median / change.before.time_us.median - 1) for change in kept if change.before]
    if moved:
        yield f"kept: {len(kept)} as they were, their times {min(moved):+.1f} to {max(moved):+.1f} % from what was recorded"


def _before(change: Change) -> str:
    """``3.95 µs (4.02 here)`` of what was replaced."""
    assert change.before is not None
    here = f"{change.before_us:.4g} here" if change.before_us is not None else change.why or "not timed here"
    return f"{_time(change.before)} ({here}), {values(change.before.config)}"


def _time(record: Record) -> str:
    return f"{record.time_us.median:.4g} µs"


def _place(record: Record) -> str:
    return f"{record.gpu.id} {record.op} {record.backend}, {describe(record.bucket)}"


def _failures(report: Report) -> Iterable[str]:
    """For each kind of failure its first candidate, and the command that shows it again."""
    first = {failure.kind: failure for failure in reversed(report.failures)}
    for failure in first.values():
        yield f"{failure.kind.value}, the first: {failure.study} {failure.message}"
        if failure.again:
            yield f"  again: {command()} tune --again {shlex.quote(failure.again)}"


def again(seen: Again) -> Printer:
    """What a candidate did when it was recorded, and what it does now."""
    now = f"{seen.now.kind.value}: {seen.now.detail}" if seen.now.detail else seen.now.kind.value
    time = f" ({seen.now.time_us:.1f} µs)" if seen.now.timing else ""
    return lines(f"{seen.problem} {seen.config}", f"  was {seen.before.value}, is {now}{time}")


def _file_of(report: Report, record: Record) -> Path:
    return next(path for path in report.files if (path.parent.name, path.stem) == (record.gpu.id, record.op))


def missing(problems: Sequence[Missing], again: str, budget: str) -> Printer:
    """What has no record, why, and the command that gets it."""
    texts = [f"no record for {each.problem.op.name}, {_sizes_of(each.problem)}: {each.reason}" for each in problems]
    late = dict.fromkeys(each.problem.op.name for each in problems if not each.failed)
    again = f"{again} {' '.join(f'--op {name}' for name in late)} --budget {budget}"
    return lines(*texts, *([f"To get them: {again}"] if late else []), style="yellow")


def _sizes_of(problem: Problem) -> str:
    return f"{problem.spec.id}, {describe(problem.case.sizes.bucket())}"


def refreshed(report: Refreshed) -> Printer:
    """What became of each record, and what is still to do."""
    counts = Counter(fate.what for fate in report.fates)
    told = [f"{number} {what}" for what, number in counts.items()] + [f"{report.holding} hold as they are"]
    head = f"records: {', '.join(told)}, in {report.elapsed_s / 60:.1f} min"
    left = "What is left serves no call: run this again with that GPU at hand, or with --drop-stale to have it dropped."
    files = [f"wrote {path}" for path in report.files if path.exists()]
    return together(
        lines(*map(_fate, report.fates), head, *files),
        lines(*([] if report.complete else [left]), style="yellow"),
    )


def _fate(fate: Fate) -> str:
    record = fate.now or fate.old
    assert record is not None, "a fate is of something"
    times = [f"{each.time_us.median:.1f}" for each in (fate.old, fate.now) if each is not None]
    took = f", {' → '.join(times)} µs" if fate.now is not None and fate.what != "carried" else ""
    why = f" ({fate.why})" if fate.why else ""
    return f"{fate.what}: {record.gpu.id} {record.op} {record.backend}, {describe(record.bucket)}{took}{why}"


def fate_row(fate: Fate) -> dict[str, Any]:
    """One record's fate for JSON; the record is the new one, where there is one."""
    record = fate.now or fate.old
    assert record is not None, "a fate is of something"
    before = fate.old.time_us.median if fate.old else None
    return {"fate": fate.what, "why": fate.why, "before_us": before, **record_row(record)}


def _outcomes(report: Report) -> str:
    """``candidates: 412 ok, 31 infeasible``."""
    counts: Counter[str] = Counter()
    for study in report.studies:
        counts.update({kind.value: number for kind, number in study.counts.items() if number})
    return "candidates: " + (", ".join(f"{number} {kind}" for kind, number in counts.most_common()) or "none")


def again_row(seen: Again) -> dict[str, Any]:
    """One candidate's two outcomes for JSON."""
    time_us = seen.now.time_us if seen.now.timing else None
    return {
        "problem": seen.problem,
        "backend": seen.config.backend,
        "config": seen.config.to_dict(),
        "was": seen.before.value,
        "is": seen.now.kind.value,
        "detail": seen.now.detail,
        "time_us": time_us,
    }


def checked(report: Checked, tolerance: float) -> Printer:
    """Each record with what it says and what it takes today, those that drifted last."""
    rows = [_drift(drift) for drift in sorted(report.drifts, key=lambda drift: drift in report.drifted)]
    columns = ("record", "sizes", "says µs", "now µs", "±", "moved %", "verdict")
    counts = Counter(drift.what for drift in report.drifts)
    told = ", ".join(f"{number} {what}" for what, number in counts.items()) or "no record"
    aside = [f"{report.elsewhere} are of other GPUs"] if report.elsewhere else []
    late = [f"not timed: {_place(fate.old)}: {fate.why}" for fate in report.unreached if fate.old]
    title = f"{told} (within {100 * tolerance:g} % or the spread), in {report.elapsed_s / 60:.1f} min"
    return together(table(title, columns, rows), lines(*aside), lines(*late, style="yellow"))


def _drift(drift: Drift) -> tuple[str, ...]:
    record, now = drift.record, drift.now
    spread = f"{(now.p80 - now.p20) / 2:.2g}" if now else ""
    moved = f"{100 * drift.change:+.1f}" if drift.change is not None else ""
    name = f"{record.gpu.id} {record.op} {record.backend}"
    times = f"{record.time_us.median:.4g}", f"{now.median:.4g}" if now else ""
    return name, describe(record.bucket), *times, spread, moved, ": ".join(filter(None, (drift.what, drift.why)))


def drift_row(drift: Drift) -> dict[str, Any]:
    """One record's drift for JSON."""
    now = drift.now
    timing = {"median": now.median, "p20": now.p20, "p80": now.p80, "n": now.n} if now else None
    more = {"verdict": drift.what, "why": drift.why, "now_us": timing, "change": drift.change}
    return {**record_row(drift.record), **more, "default_now_us": drift.default_us}


def regrets(found: Sequence[Regret]) -> Printer:
    """What searches lose against trying everything, by case of a sweep."""
    return lines(*(line for each in found for line in _regret(each)))


def _regret(each: Regret) -> Iterable[str]:
    count, lost = len(each.runs), [f"{100 * share:.2f} %" for share in (each.mean, each.p90, each.losses[-1])]
    same, top1, flips = (round(share * count) for share in (each.same, each.top1, each.flips))
    trials = max(run.trials for run in each.runs)
    yield f"{each.label} on {each.sweep.gpu.id}: {each.configs} configs, the best {each.best_us:.4g} µs"
    yield (
        f"  {trials} trials, {each.seconds:.0f} s, lose {lost[0]} on average, {lost[1]} in nine of ten, {lost[2]} at worst "
        f"(the default {100 * each.of(each.default_us):.2f} %)"
    )
    yield f"  of {count} seeds {same} end with the best or a tie, {top1} with the best; {flips} finals overruled the search"


def regret_row(each: Regret) -> dict[str, Any]:
    """One case's for JSON; shares, not per cent."""
    return {
        "gpu": each.sweep.gpu.id,
        "searched": each.label,
        "configs": each.configs,
        "best_us": each.best_us,
        "best": each.best.to_dict(),
        "default": each.of(each.default_us),
        "mean": each.mean,
        "p90": each.p90,
        "worst": each.losses[-1],
        "same_or_tied": each.same,
        "top1": each.top1,
        "flips": each.flips,
        "seconds": each.seconds,
        "runs": [{"config": run.config.to_dict(), "time_us": run.time_us, "trials": run.trials} for run in each.runs],
    }
