"""What a person sees while long work goes on: a bar on a terminal, a line now and then where there is none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from ..tune.progress import Notify
    from ..tune.progress import Progress as TuneProgress
    from ..tune.run import Report

T = TypeVar("T")
R = TypeVar("R")


def progress(console: Console, title: str, items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """Work on the items one after another under a bar that says how long the rest will take."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        return [work(item) for item in bar.track(items, description=title)]


def tuning(console: Console, run: Callable[[Notify], Report]) -> Report:
    """Run a tuning under a bar: share of the work, time left, outcomes so far, the last study to improve."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[eta]}"),
        TextColumn("[dim]{task.fields[counts]}"),
    )
    log = logger(console)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("tune", total=1.0, eta="", counts="")

        def notify(state: TuneProgress) -> None:
            eta = "" if state.eta_s is None else f"{state.eta_s / 60:.0f} min left"
            counts = " · ".join(f"{number} {kind.value}" for kind, number in state.counts.items() if number)
            bar.update(task, description=f"tune: {state.phase}", completed=state.fraction, eta=eta, counts=counts)
            log(f"tune: {state.phase}, {state.fraction:.0%} of the work, {', '.join(filter(None, (eta, counts)))}")

        log("tune: reading records, opening the search")
        return run(notify)


def refreshing(console: Console, run: Callable[[Callable[[int, int], None]], R], title: str = "refresh") -> R:
    """Run a refresh, or a check, under a bar of the problems that are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    log = logger(console)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def notify(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            log(f"{title}: {done} of {total} problems")

        log(f"{title}: reading records")
        return run(notify)


def logger(console: Console, every_s: float = 20.0) -> Callable[[str], None]:
    """Prints a line at once and then one every so often, where no terminal can show a bar; nothing where one can."""
    last = -math.inf

    def log(line: str) -> None:
        nonlocal last
        if not console.is_terminal and time.monotonic() - last >= every_s:
            last = time.monotonic()
            console.print(line, highlight=False, markup=False)

    return log
