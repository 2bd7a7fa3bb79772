"""What ``tune`` does instead of a search: measure records again, repeat one candidate, replay a sweep, show old trials."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from .. import gpu as gpus
from .. import ops
from ..command import show_tuning, waiting
from ..errors import NoGpu, SpecError
from ..tune import again as repeating
from ..tune import check as checking
from ..tune import dashboard as looking
from ..tune import refresh as refreshing
from ..tune import regret, sweep
from ..tune.plan import ON_GPU, STATE
from ..tune.refresh import Wish
from . import consoles, given
from .consoles import err

_OF = {
    "": ("preset", "spec", "trials", "effort", "seed", "fresh", "missing", "backend", "wait", "port", "storage"),
    "--refresh": ("refresh", "every", "drop_stale"),
    "--check": ("check", "tolerance"),
}
"""The options of a search, and of what goes through the records that are there."""


def unmixed(context: typer.Context, mode: str) -> None:
    """Options of the search, of ``--refresh`` and of ``--check`` do not mix."""
    typed = {name: (option, value) for name, option, value in given.stated(context)}
    for of, names in _OF.items():
        for name in names if of != mode else ():
            if name in typed:
                allowed = f"only with {of}" if of else f"only without {mode}"
                raise SpecError(*typed[name], f"{allowed}, which goes through the records that are there")


def _alone(context: typer.Context, option: str, besides: Sequence[str]) -> None:
    """An option that says all there is to say takes no other."""
    for name, other, value in given.stated(context):
        if name not in besides:
            raise SpecError(other, value, f"only without {option}")


def again(context: typer.Context, name: str, as_json: bool) -> None:
    """Try one candidate once more that failed."""
    _alone(context, "--again", ("again", "as_json"))
    here = gpus.detect()
    if here is None:
        raise NoGpu("tune --again")
    with err.status("compiling and trying it"):
        seen = repeating.again(name, here)
    consoles.show(as_json, show_tuning.again(seen), [show_tuning.again_row(seen)])
    raise typer.Exit(0 if seen.now.ok else 1)


def replay(context: typer.Context, files: Sequence[Path], seeds: int, trials: int, most: int, as_json: bool) -> None:
    """Search sweeps with many seeds, and say what is lost, and how long it would have taken on so many GPUs."""
    _alone(context, "--replay", ("replay", "seeds", "trials", "most", "as_json"))
    cases = [(each, number) for each in map(sweep.read, files) for number in range(len(each.cases))]
    runs = [(*case, seed) for case in cases for seed in range(seeds)]
    found = waiting.progress(
        err, "replay", runs, lambda run: regret.search(*run, trials=trials or ON_GPU.trials, gpus=most or 1)
    )
    losses = [regret.regret(*case, found[n * seeds : (n + 1) * seeds]) for n, case in enumerate(cases)]
    consoles.show(as_json, show_tuning.regrets(losses), [show_tuning.regret_row(each) for each in losses])


def dashboard(context: typer.Context, port: int) -> None:
    """Show the trials of runs from this folder in a browser."""
    _alone(context, "--dashboard", ("dashboard", "port"))
    looking.server()
    studies = looking.snapshot(STATE)
    err.print(f"http://127.0.0.1:{port} shows the searches as they are now; Ctrl-C ends it", highlight=False)
    looking.show(studies, port)


def wish(op_names: Sequence[str], gpu: str, every: bool, drop_stale: bool) -> Wish:
    """Which records are meant."""
    names = [ops.get(name).name for name in op_names]
    return Wish(names, "" if gpu == "auto" else gpus.resolve(gpu).id, every, drop_stale)


def refresh(folder: Path, wish: Wish, budget: str, as_json: bool) -> None:
    """Measure records anew whose templates have changed."""
    budget_s = given.seconds(budget) if budget else None
    here = gpus.detect()
    report = waiting.refreshing(err, lambda tell: refreshing.refresh(folder, here, wish, budget_s=budget_s, tell=tell))
    consoles.show(as_json, show_tuning.refreshed(report), [show_tuning.fate_row(fate) for fate in report.fates])
    raise typer.Exit(130 if report.interrupted else 0 if report.complete else 4)


def check(folder: Path, wish: Wish, budget: str, tolerance: float, as_json: bool) -> None:
    """Time records again; exit code 1 where one has drifted by more than ``tolerance``."""
    budget_s = given.seconds(budget) if budget else None
    here = gpus.detect()
    if here is None:
        raise NoGpu("tune --check")
    report = waiting.refreshing(
        err, lambda tell: checking.check(folder, here, wish, tolerance=tolerance, budget_s=budget_s, tell=tell), "check"
    )
    consoles.show(as_json, show_tuning.checked(report, tolerance), [show_tuning.drift_row(drift) for drift in report.drifts])
    raise typer.Exit(130 if report.interrupted else 1 if report.drifted else 4 if report.unreached else 0)
