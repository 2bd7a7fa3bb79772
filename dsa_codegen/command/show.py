"""How the command line shows what came of it: one table at the end, plain rows for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..errors import NoConfig
from ..gpu import Gpu
from ..invocation import command
from ..problem.op import Op
from ..problem.values import Scalar, Sizes, Spec, describe
from ..proof.timing import Policy
from ..quality import Row as Choice
from ..records.default import still_default
from ..records.explain import Difference
from ..records.listing import SERVES, Listed
from ..records.lookup import Found
from ..records.record import MEASURED, Record
from .doctor import Finding
from .generate import Generated
from .ours import Row
from .prebuild import Prebuilt
from .verification import Verdict

Printer = Callable[[Console], None]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Printer:
    """A table to print. A row of one cell is the heading of those behind it.

    Columns whose names end in a unit, or start with "# " (which is not shown), are right-aligned.
    """

    def show(console: Console) -> None:
        drawn = Table(title=title, title_justify="left", header_style="bold")
        for column in columns:
            right = column.endswith((" µs", "%", "/s", "TFLOPS", "±")) or column.startswith("#")
            head = column.removeprefix("# ")
            drawn.add_column(head, justify="right" if right else "left", overflow="fold", no_wrap=right or column == "op")
        for row in rows:
            if len(row) == 1:
                drawn.add_section()
            drawn.add_row(*map(escape, row), style="bold" if len(row) == 1 else "")
        console.print(drawn)

    return show


def together(*printers: Printer) -> Printer:
    """One printer after another."""

    def show(console: Console) -> None:
        for printer in printers:
            printer(console)

    return show


def quality(rows: Sequence[Choice]) -> Printer:
    """What each choice is worth, by context and k."""
    columns = ("choice", "# k", "# recall", "# hits", "# mass", "# error", "# overlap")
    body: list[Sequence[str]] = []
    for context in sorted({row.context for row in rows}):
        body.append((f"{context} tokens",))
        for row in (row for row in rows if row.context == context):
            shares = (row.recall, row.hits, row.mass, row.error)
            overlap = "" if row.overlap is None else f"{row.overlap:.3f}"
            body.append((row.choice, str(row.k), *(f"{share:.3f}" for share in shares), overlap))
    return table(f"What a choice costs: {rows[0].data}", columns, body)


def lines(*texts: str, style: str = "", whole: bool = False) -> Printer:
    """Plain lines; those with a command, or a path (``whole``), are broken by the terminal alone, so that it can be copied."""

    def show(console: Console) -> None:
        for text in texts:
            unbroken = whole or f"{command()} " in text
            console.print(text, style=style, highlight=False, markup=False, soft_wrap=unbroken)

    return show


def _under(head: str, texts: Iterable[str]) -> Printer:
    """A line and what belongs to it, each thing once; what a console is too narrow for goes on below its own beginning."""

    def show(console: Console) -> None:
        _indented(console, head, 0, "")
        for text in dict.fromkeys(texts):
            _indented(console, text, 1, "")

    return show


def values(mapping: Any) -> str:
    """``block_n=64 num_warps=4``."""
    return " ".join(f"{name}={value}" for name, value in mapping.items())


def generated(written: Sequence[Generated]) -> Printer:
    """The files that ``generate`` wrote, each with the sizes that it serves."""
    by_file: dict[Path, list[Generated]] = {}
    for each in written:
        by_file.setdefault(each.path, []).append(each)

    def show(console: Console) -> None:
        folder = written[0].path.parent
        head = (
            f"{len(by_file)} modules for {len(written)} calls in {folder}, with index.json; python {folder}/launch.py runs them"
        )
        lines(head, whole=True)(console)
        for path, calls in by_file.items():
            _indented(console, path.name, 1, "bold")
            for each in calls:
                _indented(console, f"{describe(each.need.case.sizes.bucket())}: {each.config} ({each.origin})", 2, "")

    return show


def generated_row(each: Generated) -> dict[str, Any]:
    """One written file for JSON."""
    spec, config = each.need.spec.to_dict(), each.config.to_dict()
    return {"file": str(each.path), "op": each.need.op.name, "spec": spec, "backend": each.config.backend, "config": config}


def prebuilt(done: Sequence[Prebuilt], folder: Path) -> Printer:
    """For each operation how many builds lie in the folder, for how many calls, and where their configs come from."""
    groups: dict[tuple[str, str, str], list[Prebuilt]] = {}
    for each in done:
        groups.setdefault((each.op.name, each.config.backend, each.origin), []).append(each)
    rows = [(*key, str(len(group)), str(len({each.built.folder for each in group}))) for key, group in groups.items()]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    head = f"{folder} serves {len(done)} calls ({size / 1e6:.1f} MB): DSA_BUILDS={folder.absolute()}"
    columns = ("op", "backend", "config from", "# calls", "# builds")
    return together(table("built ahead", columns, rows), lines(head, whole=True))


def prebuilt_row(each: Prebuilt) -> dict[str, Any]:
    """One call that the folder serves, for JSON."""
    return {
        "op": each.op.name,
        "spec": each.spec.to_dict(),
        "sizes": describe(each.sizes.bucket()),
        "backend": each.config.backend,
        "config": each.config.to_dict(),
        "origin": each.origin,
        "build": each.built.folder.name,
    }


def verdicts(found: Sequence[Verdict]) -> Printer:
    """A line per operation and backend, and one for each check that failed."""
    groups: dict[tuple[str, str, str], list[Verdict]] = {}
    for verdict in found:
        key = verdict.subject.op.name, verdict.subject.config.backend, verdict.check.split()[0]
        groups.setdefault(key, []).append(verdict)
    rows = []
    for (op, backend, check), group in groups.items():
        failed = sum(not verdict.passed for verdict in group)
        worst = max(verdict.similarity for verdict in group)
        state = "passed" if not failed else f"{failed} FAILED"
        seconds = sum(verdict.seconds for verdict in group)
        rows.append(
            (op, backend, check, str(len(group)), state, f"{worst:.1e}" if check != "compile" else "", f"{seconds:.0f}")
        )
    columns = ("op", "backend", "check", "# checks", "outcome", "# similarity", "# seconds")
    failures = [
        f"{verdict.subject.op.name} {verdict.subject.spec.id} {verdict.subject.config}\n  {verdict.check}: {verdict.detail}"
        for verdict in found
        if not verdict.passed
    ]
    return together(table("verify", columns, rows), lines(*failures, style="red"))


def verdict_row(verdict: Verdict) -> dict[str, Any]:
    """One verdict for JSON."""
    subject = verdict.subject
    return {
        "op": subject.op.name,
        "spec": subject.spec.to_dict(),
        "backend": subject.config.backend,
        "config": subject.config.to_dict(),
        "check": verdict.check,
        "passed": verdict.passed,
        "similarity": verdict.similarity,
        "seconds": round(verdict.seconds, 3),
        "detail": verdict.detail,
    }


def records(found: Sequence[Record], title: str = "records") -> Printer:
    """Records by GPU, operation and spec."""
    return listed([Listed(record, Path(), "") for record in found], title)


def listed(found: Sequence[Listed], title: str) -> Printer:
    """Records by GPU, operation, spec and sizes; what a console is too narrow for goes on in the next line, between words."""

    def show(console: Console) -> None:
        console.print(title, highlight=False, markup=False)
        last: tuple[str, ...] = ()
        for each in sorted(found, key=lambda each: _headings(each)[:3]):  # stable: buckets keep their order
            headings = _headings(each)
            for level, heading in enumerate(headings):
                if headings[: level + 1] != last[: level + 1]:
                    _indented(console, heading, level, "bold" if level < 2 else "")
            last = headings
            _indented(console, _result(each), 4, "" if each.status in ("", SERVES) else "dim")
            _indented(console, values(each.record.config), 5, "dim")

    return show


def _headings(each: Listed) -> tuple[str, ...]:
    return each.record.gpu.id, each.record.op, _short(each.record.spec), describe(each.record.bucket)


def _result(each: Listed) -> str:
    """``tilelang 14.5 µs, 2.56× default, 61 % of limit; serves``."""
    record = each.record
    parts = [f"{record.backend} {record.time_us.median:.1f} µs"]
    if record.default_time_us:
        parts.append(f"{record.default_time_us / record.time_us.median:.2f}× default")
    parts.append(f"{100 * record.limit_us / record.time_us.median:.0f} % of limit")
    parts += [] if record.evidence == MEASURED else [record.evidence]
    status = f"; {each.status} {each.why}".rstrip() if each.status else ""
    return ", ".join(parts) + status


def _indented(console: Console, text: str, level: int, style: str) -> None:
    console.print(Padding(Text(text, style=style), (0, 0, 0, 2 * level), expand=False))


def _short(spec: Mapping[str, Scalar]) -> str:
    """A spec for people: what is off or zero is left out."""
    parts = (
        value if isinstance(value, str) else name if value is True else f"{name}={value}"
        for name, value in spec.items()
        if value
    )
    return " ".join(part for part in parts if part != "none")


def record_row(record: Record) -> dict[str, Any]:
    """One record for JSON."""
    return {
        "gpu": record.gpu.id,
        "op": record.op,
        "backend": record.backend,
        "spec": dict(record.spec),
        "bucket": describe(record.bucket),
        "config": dict(record.config),
        "evidence": record.evidence,
        "time_us": record.time_us.median,
        "default_time_us": record.default_time_us,
        "limit_us": record.limit_us,
        "samples": record.time_us.n,
        "p20_us": record.time_us.p20,
        "p80_us": record.time_us.p80,
        "eager_us": record.eager_us.median if record.eager_us else None,
        "card": record.card,
    }


def bench(rows: Sequence[Row], gpu: Gpu, policy: Policy) -> Printer:
    """Timed cases against the roofline."""
    body = [
        (
            row.need.op.name,
            row.need.case.id,
            str(row.found.config),
            row.found.origin,
            f"{row.timing.median:.1f}",
            f"{(row.timing.p80 - row.timing.p20) / 2:.1f}",
            f"{row.tflops:.0f}",
            f"{row.terabytes_per_s:.2f}",
            f"{100 * row.share_of_limit:.0f}",
        )
        for row in rows
    ]
    columns = ("op", "case", "config", "from", "time µs", "±", "TFLOPS", "TB/s", "limit %")
    state = "inputs not in L2" if policy.cold_l2 else "inputs in L2"
    return table(f"{gpu.name}, graph replay, {state}", columns, body)


def bench_row(row: Row) -> dict[str, Any]:
    """One timed case for JSON."""
    need, timing = row.need, row.timing
    return {
        "op": need.op.name,
        "spec": need.spec.to_dict(),
        "case": need.case.id,
        "backend": row.found.config.backend,
        "config": row.found.config.to_dict(),
        "origin": row.found.origin,
        "time_us": {"median": timing.median, "p20": timing.p20, "p80": timing.p80, "n": timing.n},
        "limit_us": row.limit_us,
    }


Answer = tuple[Spec, Found, list[tuple[Record, list[Difference]]]]


def explanation(op: Op, sizes: Sizes, gpu: Gpu, answers: Sequence[Answer]) -> Printer:
    """For each spec: what is used and why, and field by field what kept the nearest records from it."""
    printers: list[Printer] = []
    for spec, found, compared in answers:
        used = f"at {describe(sizes.bucket())} on {gpu.name}: {found.origin} {found.config}"
        kin = [f"tuned for {_short(found.record.spec)}"] if found.record and found.origin == "kin" else []
        unserved = [] if found.record else _unserved(op, spec, sizes, gpu)
        below = [used, *kin, *_runner_up(found, op, gpu), *trust(found.record), *found.notes, *unserved]
        printers.append(_under(f"{op.name} {_short(spec.to_dict())}", below))
        missed = [(record, differences) for record, differences in compared if differences][:3]
        rows = [
            (f"{record.gpu.id} {record.backend} {describe(record.bucket)}", each.field, each.wanted, each.there)
            for record, differences in missed
            for each in differences
        ]
        if found.record is None and rows:
            printers.append(table("nearest records", ("record", "field", "wanted", "there"), rows))
    return together(*printers)


def _unserved(op: Op, spec: Spec, sizes: Sizes, gpu: Gpu) -> Iterator[str]:
    """Which templates cannot serve this, and why."""
    for backend in op.backends:
        try:
            op.default_config(spec, sizes, gpu, backend)
        except NoConfig as error:
            yield f"not served by {backend}: {'; '.join(error.reasons)}"


def _runner_up(found: Found, op: Op, gpu: Gpu) -> list[str]:
    """By how much the second best of the search lost, and what the default takes, or took that was one then."""
    record = found.record
    if record is None:
        return []
    best = record.time_us.median
    lost = [f"{100 * (each.time_us / best - 1):.1f} % behind: {_listed(each.config)}" for each in record.runners_up[:1]]
    beside = record.default_time_us
    named = "the default" if still_default(op, record, gpu) else "what was the default then"
    default = [f"{named} {100 * (beside / best - 1):.1f} % behind"] if beside else []
    others = "; ".join([*(f"runner-up {each}" for each in lost), *default])
    kind = "measured" if record.evidence == MEASURED else "modelled"
    return [f"{kind} {best:.4g} µs; {others}"] if others else []


def trust(record: Record | None) -> list[str]:
    """How far a record may be trusted: samples, spread, board and day; and the time without graphs where it is another."""
    if record is None:
        return []
    time, day = record.time_us, record.measured_at[:10]
    if not time.n:
        return ["a model's word: nothing was timed"]
    where = " on one " + (record.card or record.gpu.id)
    when = f", {day}" if day else ""
    spread = f"{time.n} samples, the middle ones {time.p20:.4g} to {time.p80:.4g} µs,{where}{when}"
    eager = record.eager_us
    return [spread, *([f"launched without a graph {eager.median:.4g} µs, the host's work included"] if eager else [])]


def _listed(config: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.items())


def explanation_row(spec: Spec, found: Found, compared: list[tuple[Record, list[Difference]]]) -> dict[str, Any]:
    """One answer for JSON."""
    return {
        "spec": spec.to_dict(),
        "origin": found.origin,
        "backend": found.config.backend,
        "config": found.config.to_dict(),
        "stale": found.stale,
        "notes": list(found.notes),
        "time_us": found.record.time_us.median if found.record else None,
        "runner_up": dataclasses.asdict(found.record.runners_up[0]) if found.record and found.record.runners_up else None,
        "nearest": [[vars(difference) for difference in differences] for _, differences in compared[:3]],
    }


def findings(found: Sequence[Finding]) -> Printer:
    """The diagnosis; below what is amiss stands the remedy."""

    def show(console: Console) -> None:
        drawn = Table.grid(padding=(0, 2))
        for overflow in ("ellipsis", "ellipsis", "fold"):
            drawn.add_column(overflow=overflow, no_wrap=overflow != "fold")
        for each in found:
            style = "" if each.ok else "bold"
            drawn.add_row("ok" if each.ok else "amiss", each.what, Text(each.state), style=style)
            if not each.ok:
                drawn.add_row("", "", Text(each.remedy))
        console.print(drawn)

    return show
