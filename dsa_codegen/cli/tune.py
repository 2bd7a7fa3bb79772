"""``tune``: its options, and which of its modes they ask for. The modes load the tuner, which no other command needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import paths
from . import options

Wall = Annotated[str, typer.Option(help="Wall time, interrupted runs included: 90s, 1h; 10m, without the GPU 4m.")]
Trials = Annotated[int, typer.Option(help="Candidates per study at most; 48, without the GPU 24.", min=0, max=10**6)]
EffortName = Annotated[
    str, typer.Option(help="quick: a minute, what the model needs most; normal; thorough: an hour. Budgets are by these.")
]
Seed = Annotated[int, typer.Option(help="Of the search.", min=0, max=2**31 - 1)]
Folder = Annotated[Path | None, options.place("--folder", help="Where records go; by default tuned/.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget what interrupted runs found.")]
Missing = Annotated[bool, typer.Option("--missing", help="Only the calls that no measured record of their own serves.")]
Refresh = Annotated[
    bool, typer.Option("--refresh", help="No search: measure the records anew whose code or default has changed, of any model.")
]
Every = Annotated[bool, typer.Option("--every", help="With --refresh: also the records that hold.")]
DropStale = Annotated[
    bool, typer.Option("--drop-stale", help="With --refresh: drop what no longer holds and cannot be measured here.")
]
Check = Annotated[bool, typer.Option("--check", help="No search: time the records again; exit code 1 where one has drifted.")]
Tolerance = Annotated[
    float, typer.Option(help="With --check: per cent that a time may move, beyond its spread.", min=0.0, max=100.0)
]
Most = Annotated[int, typer.Option("--gpus", help="GPUs of this host that share the search, all alike; 0 for all.", min=0)]
Wait = Annotated[str, typer.Option(help="For another run that uses the same studies; 0s: give up at once.")]
Dashboard = Annotated[
    bool, typer.Option("--dashboard", help="No search: show the trials of earlier ones in a browser (optuna-dashboard).")
]
Port = Annotated[int, typer.Option(help="With --dashboard: where, on this machine.", min=1, max=65535)]
Again = Annotated[str, typer.Option(help="No search: try one candidate once more that failed.", metavar="JOURNAL:TRIAL")]
Storage = Annotated[
    str,
    typer.Option(help="A database that keeps the trials, for several machines: postgresql://user@host/name.", metavar="URL"),
]
RayAddress = Annotated[
    str, typer.Option(help="Search on the hosts of a Ray cluster: auto, or the head's host:port.", metavar="ADDRESS")
]
Replay = Annotated[
    list[Path] | None,
    typer.Option(help="No GPU: search a sweep (scripts/sweep.py) with many seeds, and say what is lost.", metavar="FILE"),
]
Seeds = Annotated[int, typer.Option(help="With --replay: searches of each case.", min=1, max=1000)]


def tune(
    context: typer.Context,
    gpu: options.GpuName = "auto",
    preset: options.Preset = "deepseek-v3.2",
    spec: options.SpecFile = None,
    op: options.OpNames = None,
    budget: Wall = "",
    trials: Trials = 0,
    effort: EffortName = "normal",
    seed: Seed = 0,
    folder: Folder = None,
    fresh: Fresh = False,
    missing: Missing = False,
    refresh: Refresh = False,
    every: Every = False,
    drop_stale: DropStale = False,
    check: Check = False,
    tolerance: Tolerance = 5.0,
    backend: options.Backends = None,
    most: Most = 0,
    wait: Wait = "24h",
    dashboard: Dashboard = False,
    port: Port = 8080,
    again: Again = "",
    storage: Storage = "",
    ray: RayAddress = "",
    replay: Replay = None,
    seeds: Seeds = 20,
    as_json: options.Json = False,
) -> None:
    """Search for the fastest kernels. Without that GPU candidates are compiled for it and ranked by a model."""
    from . import tune_modes, tune_search

    folder = folder or paths.user_records() or paths.shipped_records()
    if again:
        return tune_modes.again(context, again, as_json)
    if replay:
        return tune_modes.replay(context, replay, seeds, trials, most, as_json)
    if dashboard:
        return tune_modes.dashboard(context, port)
    tune_modes.unmixed(context, "--refresh" if refresh else "--check" if check else "")
    if refresh or check:
        wish = tune_modes.wish(op or (), gpu, every, drop_stale)
        if check:
            return tune_modes.check(folder, wish, budget, tolerance / 100, as_json)
        return tune_modes.refresh(folder, wish, budget, as_json)
    asked = tune_search.Asked(
        preset, spec, op or (), backend or (), gpu, most, ray, storage, budget, trials, effort, seed, fresh, missing, wait
    )
    return tune_search.search(asked, folder, as_json)
