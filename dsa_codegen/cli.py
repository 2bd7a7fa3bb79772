"""The command line: parses, calls, prints. The same app as ``dsa``, ``python -m dsa_codegen`` and a checkout's ``cli.py``.

Exit codes: 0 done, 1 a check failed, 2 bad usage or input, 3 a GPU or compiler is missing, 4 tune ended before every call had
a record, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

try:
    import typer
    from rich.console import Console
except ImportError:
    from .invocation import command, install

    sys.exit(f"{command()} needs typer and rich: {install('tune')}")

from . import gpu as gpus
from . import ops, paths
from .bench import command as benchmark
from .bench import comparison, installed, printing, results
from .bench import quality as qualities
from .bench import report as reports
from .bench.campaign import Campaign
from .bench.peers.libraries import PEER_FOLDER
from .command import choices, ours, prebuild, show, show_tuning, verification, waiting
from .command import doctor as diagnosis
from .command import generate as generation
from .errors import BuildError, DsaError, NoGpu, SpecError, ToolMissing, UnknownName
from .integrations import configs
from .invocation import command
from .kernels import backends
from .ops import needs
from .problem import presets
from .proof.timing import COLD, WARM, Policy
from .records import explain as explanation
from .records import listing
from .runtime import dispatch
from .worker import Worker

OFFLINE_GPU = "h200"
"""What ``--gpu auto`` means where there is no GPU and the command can work without one; the GPU with shipped records."""

DOCUMENTS = ("README.md", "docs/performance-{gpu}.md", "docs/quality.md")
"""What holds tables of measured times, between markers."""
_MARKED = "A document whose marked tables are written anew; may be repeated. Otherwise README.md and docs/performance-GPU.md."

app = typer.Typer(
    help="Generate, verify and tune kernels for DeepSeek Sparse Attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)


def _place(text: str) -> Path:
    """A folder or file that was named; nothing at all would silently be the current folder."""
    if not text:
        raise typer.BadParameter("nothing is named; name a place, or leave the option out")
    return Path(text)


Preset = Annotated[str, typer.Option(help=f"A model: {', '.join(presets.names())}.")]
SpecFile = Annotated[Optional[Path], typer.Option("--spec", help="A YAML file that states a model, instead of --preset.")]  # noqa: UP045
OpNames = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--op", help=f"Only this operation ({', '.join(ops.all_ops())}); may be repeated."),
]
Backends = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--backend", help=f"Only this backend ({', '.join(backends.NAMES)}); may be repeated."),
]
GpuName = Annotated[str, typer.Option("--gpu", help=f"auto, or one of {', '.join(gpus.GPUS)}.")]
SIZES = "Sizes as name=value, all or none (then those that people serve). " + "; ".join(
    f"{op.name}: {' '.join(f'{field.name}=…' for field in dataclasses.fields(op.sizes_type))}" for op in ops.all_ops().values()
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"dsa_codegen {importlib.metadata.version('dsa-codegen')}", highlight=False)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Say which version this is.")
    ] = False,
) -> None:
    """Generate, verify and tune kernels for DeepSeek Sparse Attention."""


@app.command()
def generate(
    out_dir: Annotated[Path, typer.Option("--out", help="Where the modules go.", parser=_place, metavar="FOLDER")] = Path(
        "generated"
    ),
    preset: Preset = "deepseek-v3.2",
    spec: SpecFile = None,
    op: OpNames = None,
    gpu: GpuName = "auto",
    backend: Annotated[str, typer.Option(help=f"Only this backend: {', '.join(backends.NAMES)}.")] = "",
    as_json: Json = False,
) -> None:
    """Write the rendered kernels of a model to a folder, as Python modules to read, step through or ship."""
    written = generation.generate(_model(preset, spec), _gpu(gpu), out_dir, op or (), backend)
    _print(as_json, show.generated(written), [show.generated_row(each) for each in written])


@app.command()
def build(
    out_dir: Annotated[Path, typer.Option("--out", help="Where the kernels go.", parser=_place, metavar="FOLDER")] = Path(
        "builds"
    ),
    preset: Preset = "deepseek-v3.2",
    spec: SpecFile = None,
    op: OpNames = None,
    gpu: GpuName = "auto",
    as_json: Json = False,
) -> None:
    """Compile ahead all that serving a model can call, into a folder for DSA_BUILDS; the GPU need not be here."""
    target = _gpu(gpu)
    wanted = prebuild.calls(_model(preset, spec), target, op or ())
    with err.status(f"compiling the kernels of {len(wanted)} calls for {target.name}"):
        done = prebuild.prebuild(wanted, target, out_dir)
    _print(as_json, show.prebuilt(done, out_dir), [show.prebuilt_row(each) for each in done])


@app.command()
def verify(
    preset: Preset = "tiny",
    spec: SpecFile = None,
    op: OpNames = None,
    gpu: GpuName = "auto",
    repeats: Annotated[
        int, typer.Option(help="Runs on the GPU that must agree bit for bit.", min=1)
    ] = verification.GPU_REPEATS,
    as_json: Json = False,
) -> None:
    """Check every operation, option and template of a model against the reference; offline, interpret and compile them."""
    target = _gpu(gpu)
    subjects = verification.subjects(_model(preset, spec), target, op or ())
    here = gpus.detect()
    if here is not None and here.arch == target.arch:
        environment: dict[str, str] = {}
        check: Callable[..., Iterable[verification.Verdict]] = functools.partial(verification.on_gpu, repeats=repeats)
    else:
        environment, check = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, verification.offline
    with err.status(f"compiling {len(subjects)} sources for {target.name}"):
        verification.build_ahead(subjects, target)
    with Worker(environment) as worker:
        batches = waiting.progress(err, "verify", subjects, lambda subject: list(check(subject, target, worker)))
        verdicts = [verdict for batch in batches for verdict in batch]
    _print(as_json, show.verdicts(verdicts), [show.verdict_row(verdict) for verdict in verdicts])
    raise typer.Exit(0 if all(verdict.passed for verdict in verdicts) else 1)


@app.command()
def tune(
    context: typer.Context,
    gpu: GpuName = "auto",
    preset: Preset = "deepseek-v3.2",
    spec: SpecFile = None,
    op: OpNames = None,
    budget: Annotated[str, typer.Option(help="Wall time, interrupted runs included: 90s, 1h; 10m, without the GPU 4m.")] = "",
    trials: Annotated[int, typer.Option(help="Candidates per study at most; 48, without the GPU 24.", min=0, max=10**6)] = 0,
    effort: Annotated[
        str, typer.Option(help="quick: a minute, what the model needs most; normal; thorough: an hour. Budgets are by these.")
    ] = "normal",
    seed: Annotated[int, typer.Option(help="Of the search.", min=0, max=2**31 - 1)] = 0,
    folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--folder", help="Where records go; by default tuned/.", parser=_place, metavar="FOLDER"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what interrupted runs found.")] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="No search: measure the records anew whose templates have changed, of any model.")
    ] = False,
    every: Annotated[bool, typer.Option("--every", help="With --refresh: also the records that hold.")] = False,
    drop_stale: Annotated[
        bool, typer.Option("--drop-stale", help="With --refresh: drop what no longer holds and cannot be measured here.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="No search: time the records again; exit code 1 where one has drifted.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option(help="With --check: per cent that a time may move, beyond its spread.", min=0.0, max=100.0)
    ] = 5.0,
    backend: Backends = None,
    most: Annotated[
        int, typer.Option("--gpus", help="GPUs of this host that share the search, all alike; 0 for all.", min=0)
    ] = 0,
    wait: Annotated[str, typer.Option(help="For another run that uses the same studies; 0s: give up at once.")] = "24h",
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="No search: show the trials of earlier ones in a browser (optuna-dashboard).")
    ] = False,
    port: Annotated[int, typer.Option(help="With --dashboard: where, on this machine.", min=1, max=65535)] = 8080,
    again: Annotated[
        str, typer.Option(help="No search: try one candidate once more that failed.", metavar="JOURNAL:TRIAL")
    ] = "",
    storage: Annotated[
        str,
        typer.Option(
            help="A database that keeps the trials, for several machines: postgresql://user@host/name.", metavar="URL"
        ),
    ] = "",
    ray: Annotated[
        str, typer.Option(help="Search on the hosts of a Ray cluster: auto, or the head's host:port.", metavar="ADDRESS")
    ] = "",
    replay: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="No GPU: search a sweep (scripts/sweep.py) with many seeds, and say what is lost.", metavar="FILE"),
    ] = None,
    seeds: Annotated[int, typer.Option(help="With --replay: searches of each case.", min=1, max=1000)] = 20,
    as_json: Json = False,
) -> None:
    """Search for the fastest kernels. Without that GPU candidates are compiled for it and ranked by a model."""
    from .tune import effort as efforts
    from .tune import refresh as refreshing
    from .tune import run

    folder = folder or paths.user_records() or paths.shipped_records()
    if again:
        return _again(context, again, as_json)
    if replay:
        return _replay(context, replay, seeds, trials, as_json)
    if dashboard:
        return _dashboard(context, port)
    _check_tune(context, "--refresh" if refresh else "--check" if check else "")
    if refresh or check:
        names = [ops.get(name).name for name in op or ()]
        wish = refreshing.Wish(names, "" if gpu == "auto" else gpus.resolve(gpu).id, every, drop_stale)
        seconds = _seconds(budget) if budget else None
        if check:
            return _check_records(folder, wish, seconds, tolerance / 100, as_json)
        return _refresh(folder, wish, seconds, as_json)
    cluster = _cluster(ray)
    here = cluster.detect() if cluster else gpus.detect()
    target = here if here and cluster and gpu == "auto" else _gpu(gpu)
    offline = here is None or here.id != target.id
    target = target if here is None or offline else here  # with the limits that the device has
    if cluster and offline and not cluster.offline:
        raise SpecError("--gpu", gpu, f"{here.id if here else 'auto'}, which the cluster's hosts have")
    chosen = efforts.effort(effort)
    usual = chosen.budget(offline)
    limits = run.Budget(_seconds(budget) if budget else usual.wall_s, trials or usual.trials)
    report = waiting.tuning(
        err,
        lambda notify: run.tune(
            needs.specs(_model(preset, spec), op or (), target),
            target,
            folder,
            budget=limits,
            effort=chosen,
            offline=offline,
            backends=_backends(backend or (), op or ()),
            seed=seed,
            fresh=fresh,
            storage=storage,
            cluster=cluster,
            patience=_patience(wait),
            devices=[""] if offline else _devices(target, most),
            notify=notify,
        ),
    )
    _print(as_json, show_tuning.tuned(report), [show.record_row(record) for record in report.records])
    if report.missing:
        state = f"--spec {shlex.quote(str(spec))}" if spec else f"--preset {preset}"
        again = f"{command()} tune --gpu {target.id} {state}"
        show_tuning.missing(report.missing, again, _longer(limits.wall_s, usual.wall_s))(err)
    raise typer.Exit(_exit_code(report))


_OF = {
    "": ("preset", "spec", "trials", "effort", "seed", "fresh", "backend", "wait", "port", "storage"),
    "--refresh": ("refresh", "every", "drop_stale"),
    "--check": ("check", "tolerance"),
}
"""The options of a search, and of what goes through the records that are there."""


def _check_tune(context: typer.Context, mode: str) -> None:
    """Options of the search, of ``--refresh`` and of ``--check`` do not mix."""
    for of, names in _OF.items():
        for name in names if of != mode else ():
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                option = f"--{name.replace('_', '-')}"
                allowed = f"only with {of}" if of else f"only without {mode}"
                raise SpecError(option, context.params[name], f"{allowed}, which goes through the records that are there")


def _devices(target: gpus.Gpu, most: int) -> Sequence[str]:
    """The GPUs that share a search; where it is one, the process's own."""
    found = gpus.alike(target)[: most or None]
    return found if len(found) > 1 else [""]


def _cluster(address: str) -> Any:
    """The cluster that searches, where one is named."""
    if not address:
        return None
    from .tune.cluster import Cluster

    with err.status("joining the cluster"):
        return Cluster(address)


def _patience(wait: str) -> Any:
    """Waits for other runs, and says so."""
    from .tune.lock import Patience

    seconds = 0.0 if wait in ("0", "0s") else _seconds(wait, "--wait")
    return Patience(seconds, lambda path: err.print(f"waiting for another tuning run, which is using {path}", highlight=False))


def _again(context: typer.Context, name: str, as_json: bool) -> None:
    from .tune import again as repeating

    _alone(context, "--again", ("again", "as_json"))
    here = gpus.detect()
    if here is None:
        raise NoGpu("tune --again")
    with err.status("compiling and trying it"):
        seen = repeating.again(name, here)
    _print(as_json, show_tuning.again(seen), [show_tuning.again_row(seen)])
    raise typer.Exit(0 if seen.now.ok else 1)


def _replay(context: typer.Context, files: Sequence[Path], seeds: int, trials: int, as_json: bool) -> None:
    from .tune import regret, sweep
    from .tune.plan import ON_GPU

    _alone(context, "--replay", ("replay", "seeds", "trials", "as_json"))
    cases = [(each, number) for each in map(sweep.read, files) for number in range(len(each.cases))]
    runs = [(*case, seed) for case in cases for seed in range(seeds)]
    found = waiting.progress(err, "replay", runs, lambda run: regret.search(*run, trials=trials or ON_GPU.trials))
    losses = [regret.regret(*case, found[n * seeds : (n + 1) * seeds]) for n, case in enumerate(cases)]
    _print(as_json, show_tuning.regrets(losses), [show_tuning.regret_row(each) for each in losses])


def _dashboard(context: typer.Context, port: int) -> None:
    from .tune import dashboard as looking

    _alone(context, "--dashboard", ("dashboard", "port"))
    looking.server()
    studies = looking.snapshot(run_state())
    err.print(f"http://127.0.0.1:{port} shows the searches as they are now; Ctrl-C ends it", highlight=False)
    looking.show(studies, port)


def run_state() -> Path:
    """Where the journals of runs from here lie."""
    from .tune.plan import STATE

    return STATE


def _alone(context: typer.Context, option: str, besides: Sequence[str]) -> None:
    """An option that says all there is to say takes no other."""
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name not in besides and source is not None and source.name == "COMMANDLINE":
            raise SpecError(f"--{name.replace('_', '-')}", value, f"only without {option}")


def _refresh(folder: Path, wish: Any, budget_s: float | None, as_json: bool) -> None:
    from .tune import refresh as refreshing

    here = gpus.detect()
    report = waiting.refreshing(err, lambda tell: refreshing.refresh(folder, here, wish, budget_s=budget_s, tell=tell))
    _print(as_json, show_tuning.refreshed(report), [show_tuning.fate_row(fate) for fate in report.fates])
    raise typer.Exit(130 if report.interrupted else 0 if report.complete else 4)


def _check_records(folder: Path, wish: Any, budget_s: float | None, tolerance: float, as_json: bool) -> None:
    from .tune import check as checking

    here = gpus.detect()
    if here is None:
        raise NoGpu("tune --check")
    report = waiting.refreshing(
        err, lambda tell: checking.check(folder, here, wish, tolerance=tolerance, budget_s=budget_s, tell=tell), "check"
    )
    _print(as_json, show_tuning.checked(report, tolerance), [show_tuning.drift_row(drift) for drift in report.drifts])
    raise typer.Exit(130 if report.interrupted else 1 if report.drifted else 4 if report.unreached else 0)


def _exit_code(report: Any) -> int:
    """What a run of the tuner says to whoever called it."""
    if report.interrupted:
        return 130
    if any(each.failed for each in report.missing):
        return 1
    return 4 if report.missing else 0


def _longer(had_s: float | None, usual_s: float | None) -> str:
    """A budget to try next: the usual one, or twice what was not enough."""
    usual = usual_s or 0.0
    return f"{math.ceil((usual if had_s is None or had_s < usual else 2 * had_s) / 60)}m"


@app.command()
def bench(
    preset: Preset = "deepseek-v3.2",
    spec: SpecFile = None,
    op: OpNames = None,
    warm: Annotated[bool, typer.Option("--warm", help="Leave the inputs in L2.")] = False,
    against: Annotated[str, typer.Option(help="Beside peers: all, none, or adapters such as deep_gemm,flashmla.")] = "",
    stage: Annotated[str, typer.Option(help="Only these stages, separated by commas.")] = "",
    suite: Annotated[str, typer.Option(help="Which shapes: core, distributions, flashmla, deepgemm, all.")] = "core",
    limit: Annotated[int, typer.Option(help="So many cases of each stage; 0 for all.", min=0)] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="The first case of each stage.")] = False,
    host: Annotated[bool, typer.Option("--host", help="Also what a call costs the host.")] = False,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Only a layer whose work 1, 2, 4, … of all visible GPUs share.")
    ] = False,
    sweep: Annotated[str, typer.Option(help="context: also time and memory from 4K to 1M tokens.")] = "",
    budget: Annotated[str, typer.Option(help="Wall time after which nothing new begins: 240s, 10m.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what has been measured at this commit.")] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Hold a short run again; exit code 1 where a ratio of --out's fell by more than 5 %."),
    ] = False,
    peer_folder: Annotated[
        str,
        typer.Option(help="Files of peers that are no packages: sparse_mla_bwd.py of TileLang.", metavar="FOLDER"),
    ] = "",
    folder: Annotated[
        Path, typer.Option("--out", help="Results are merged into files below this folder.", parser=_place, metavar="FOLDER")
    ] = results.FOLDER,
    commit: Annotated[str, typer.Option(help="What rows say they were measured at; by default the checkout's.")] = "",
    gpu: Annotated[str, typer.Option("--gpu", help="Measure only if this is the GPU that is here.")] = "auto",
    as_json: Json = False,
) -> None:
    """Time kernels on the GPU: this package's against the roofline, or with --against side by side with what people run."""
    if peer_folder:
        os.environ[PEER_FOLDER] = str(Path(peer_folder).resolve())
    if distributed:
        return _bench_ranks(folder, commit, gpu, as_json)
    listed = bool(
        check or against or stage or limit or quick or suite != "core" or ((budget or resume) and not (host or sweep))
    )
    if not (listed or host or sweep):
        return _bench_ours(preset, spec, op, WARM if warm else COLD, _visible(gpu), as_json)
    stages, per_stage = tuple(filter(None, stage.split(","))), benchmark.QUICK if quick else limit
    until = _seconds(budget) if budget else math.inf
    request = benchmark.Request(against or "all", stages, suite.split(","), per_stage, folder, commit, until, resume)
    model = "" if preset == "deepseek-v3.2" else preset
    benchmark.check(request, sweep, {"--preset": model, "--spec": spec, "--op": ",".join(op or ()), "--warm": warm})
    campaign = request.campaign(_visible(gpu))
    if check:
        _check(request, campaign, as_json)
    rows = printing.campaign(err, lambda notify: benchmark.run(request, campaign, notify)) if listed else []
    host_rows = benchmark.run_host(campaign) if host else []
    sweep_rows = benchmark.run_sweep(campaign, resume=resume) if sweep else []
    parts = [printing.rows(rows, campaign.gpu.name)] if rows else []
    parts += [printing.host(host_rows)] if host_rows else []
    parts += [printing.sweep(sweep_rows)] if sweep_rows else []
    parts += [printing.unreached(campaign.unreached, until)] if campaign.unreached else []
    _print(as_json, show.together(*parts), [*rows, *host_rows, *sweep_rows])


def _bench_ranks(folder: Path, commit: str, gpu: str, as_json: bool) -> None:
    """Seconds of building and minutes of timing, on every GPU that is here."""
    from .bench.ranks import command as on_ranks

    facts = {"date": results.now(), "commit": commit or results.commit(), "toolchain": benchmark.versions()}
    rows = on_ranks.run(_visible(gpu), facts, folder)
    _print(as_json, printing.ranks(rows), rows)


def _check(request: benchmark.Request, campaign: Campaign, as_json: bool) -> NoReturn:
    found = printing.campaign(err, lambda notify: benchmark.run_check(request, campaign, notify))
    _print(as_json, printing.regression(found), [dataclasses.asdict(pair) for pair in found.pairs])
    raise typer.Exit(1 if found.fallen or not found.pairs else 0)


def _bench_ours(preset: str, spec: Path | None, op: list[str] | None, policy: Policy, target: gpus.Gpu, as_json: bool) -> None:
    model = _model(preset, spec)
    cases = ours.plan(model, target, op or ())
    timed = waiting.progress(err, "bench", cases, lambda need: ours.time_case(need.op, need.spec, need.case, target, policy))
    _print(as_json, show.bench(timed, target, policy), [show.bench_row(row) for row in timed])


def _visible(name: str) -> gpus.Gpu:
    """The GPU that is here, which must be the one that is meant."""
    here = gpus.detect()
    if here is None:
        raise NoGpu("bench")
    if name != "auto" and gpus.resolve(name).id != here.id:
        raise SpecError("--gpu", name, f"auto, or {here.id}, which is here")
    return here


@app.command()
def report(
    folder: Annotated[
        Path, typer.Option("--results", help="The folder that bench writes to.", parser=_place, metavar="FOLDER")
    ] = results.FOLDER,
    page: Annotated[Path, typer.Option("--out", help="The page to write.", parser=_place, metavar="FILE")] = results.FOLDER
    / "report.html",
    readme: Annotated[Optional[list[Path]], typer.Option(help=_MARKED)] = None,  # noqa: UP045
    gpu: Annotated[str, typer.Option("--gpu", help="Whose figures the README shows; otherwise those that are newest.")] = "",
    merge: Annotated[Optional[Path], typer.Option(help="First take over results from another folder.")] = None,  # noqa: UP045
    compare: Annotated[
        Optional[tuple[Path, Path]],  # noqa: UP045
        typer.Option(help="Instead, compare the ratios of two runs: files of results or folders; exit code 1 beyond 5 %."),
    ] = None,
) -> None:
    """Write one HTML page of all results, and the README's tables, from what bench has measured."""
    if compare is not None:
        first, second = (comparison.rows_of(path, gpus.resolve(gpu).id if gpu else "") for path in compare)
        found = comparison.compare(first, second)
        printing.comparison(found)(out)
        raise typer.Exit(1 if found.outside or not found.pairs else 0)
    if merge is not None:
        taken = benchmark.merge(merge, folder)
        out.print(f"took over {len(taken)} rows from {merge}")
    shown = gpus.resolve(gpu).id if gpu else results.latest_gpu(folder)
    documents = readme or [Path(name.format(gpu=shown)) for name in DOCUMENTS]
    written = benchmark.write_report(folder, page, documents, shown, Path(".tune"))
    show.lines(*written)(out)


@app.command()
def quality(
    activations: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="A file of a layer's activations (quality.save); otherwise random ones.", parser=_place, metavar="FILE"
        ),
    ] = None,
    preset: Preset = "deepseek-v3.2",
    spec: SpecFile = None,
    context: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(help="Tokens of context; may be repeated. Otherwise the longest of the file; 4096, or 131072 on a GPU."),
    ] = None,
    k: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(
            "--k", help="Tokens that a query chooses; may be repeated. Otherwise from an eighth of topk to all of it."
        ),
    ] = None,
    queries: Annotated[int, typer.Option(help="The last queries of each context.")] = 64,
    seed: Annotated[int, typer.Option(help="Of what is random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out_dir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="Write the rows below this folder, for report.", parser=_place, metavar="FOLDER"),
    ] = None,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw the longest context by k (needs matplotlib).", parser=_place, metavar="FILE.svg"),
    ] = None,
    commit: Annotated[str, typer.Option(help="What the rows say they were measured at.")] = "",
    as_json: Json = False,
) -> None:
    """Say what choosing k tokens costs: recall, captured attention mass, error of the output; beside a sliding window."""
    contexts, model, where = context or [], _model(preset, spec), choices.device_of(device)
    of = choices.activations(activations, model, contexts, queries, seed, where)
    found = choices.rows(of, contexts, k or [], queries, seed, None if activations else model.topk)
    plain = [row.to_dict() for row in found]
    if out_dir is not None:
        what = gpus.resolve("auto").name if where == "cuda" else "CPU"
        facts = {"date": results.now(), "commit": commit or results.commit(), "device": what}
        err.print(f"wrote {qualities.write(out_dir, found, facts)}", style="dim")
    if plot is not None:
        plot.write_text(reports.method.standalone(plain))
    _print(as_json, show.quality(found), plain)


@app.command("list")
def list_records(gpu: Annotated[str, typer.Option("--gpu", help="Only this GPU.")] = "", as_json: Json = False) -> None:
    """Show what tuned/ holds (and DSA_TUNED_DIR, where it is set), and which records serve calls."""
    wanted = gpus.resolve(gpu).id if gpu else ""
    found = list(listing.listing(wanted))
    serving = sum(each.status == listing.SERVES for each in found)
    head = f"{len(found)} records, {serving} serve calls of their GPU"
    if not found:
        head = f"no records; {command()} tune --gpu {wanted or 'auto'} makes some"
    rows = [{**show.record_row(each.record), "status": each.status, "why": each.why} for each in found]
    _print(as_json, show.listed(found, head), rows)


@app.command()
def explain(
    op: Annotated[str, typer.Option("--op", help="The operation.")],
    sizes: Annotated[Optional[list[str]], typer.Argument(help=SIZES)] = None,  # noqa: UP045
    preset: Preset = "deepseek-v3.2",
    spec: SpecFile = None,
    gpu: GpuName = "auto",
    as_json: Json = False,
) -> None:
    """Say which record serves a call, or field by field why none does."""
    operation = ops.get(op)
    stated = operation.sizes_type.from_dict(_sizes(sizes)) if sizes else None
    target, model = _gpu(gpu), _model(preset, spec)
    if stated is None:
        calls = [(need.spec, need.case.sizes) for need in needs.needs(model, [op], target)]
    else:
        calls = [(each, stated) for _, each in needs.specs(model, [op], target)]
    printers, rows = [], []
    for each, size in calls:
        answer = each, dispatch.chosen(operation, each, size, target), explanation.explain(operation, each, size, target)
        printers.append(show.explanation(operation, size, target, [answer]))
        rows.append({"sizes": size.to_dict(), **show.explanation_row(*answer)})
    if any(row["origin"] == "default" for row in rows):
        state = f"--spec {spec}" if spec else f"--preset {preset}"
        printers.append(show.lines(f"Tune it: {command()} tune --gpu {target.id} --op {op} {state}"))
    _print(as_json, show.together(*printers), rows)


@app.command("spec")
def write_spec(
    from_hf: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--from-hf", help="The config.json of a Hugging Face checkpoint.", metavar="FILE"),
    ] = None,
    preset: Preset = "",
    name: Annotated[str, typer.Option(help="The model's name; its model_type where absent.")] = "",
    out_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", help="A YAML file to write, instead of printing.", parser=_place, metavar="FILE"),
    ] = None,
) -> None:
    """State a model as YAML, for --spec: one that a Hugging Face config describes, or a preset to begin with."""
    if bool(from_hf) == bool(preset):
        raise typer.BadParameter("name one of --from-hf and --preset")
    model = configs.read(from_hf, name) if from_hf else presets.preset(preset)
    text = presets.dump(model)
    if out_file is None:
        print(text, end="")
    else:
        out_file.write_text(text)
        out.print(f"{model.name}: {out_file}", highlight=False)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is here (GPU, compilers, records), what is missing and how to get it."""
    findings = [*diagnosis.diagnose(), *installed.findings()]
    _print(as_json, show.findings(findings), [vars(finding) for finding in findings])


def _model(preset: str, spec: Path | None) -> presets.Model:
    return presets.load(spec) if spec else presets.preset(preset)


def _gpu(name: str) -> gpus.Gpu:
    """The GPU that is meant; ``auto`` without one means the one that is compiled for offline."""
    try:
        return gpus.resolve(name)
    except NoGpu:
        err.print(f"No GPU is visible: taking {OFFLINE_GPU.upper()} as the target (--gpu names another).", style="dim")
        return gpus.resolve(OFFLINE_GPU)


def _backends(names: Sequence[str], op_names: Sequence[str]) -> Sequence[str]:
    """The backends that were named, each known and one that an operation has templates of."""
    able = {name for op in map(ops.get, op_names or ops.all_ops()) for name in op.backends}
    for name in names:
        if name not in able:
            raise UnknownName(f"backend of {', '.join(op_names) or 'any operation'}", name, sorted(able))
    return names


def _seconds(text: str, option: str = "--budget") -> float:
    """``90s``, ``10m``, ``1h`` or a plain number of seconds."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        seconds = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise SpecError(option, text, "a time such as 90s, 10m or 1h")
    return seconds


def _sizes(pairs: Iterable[str]) -> dict[str, Any]:
    found: dict[str, int] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not value.isdecimal() or len(value) > 15:
            raise SpecError(name, value, "name=value with a whole number below 10^15, e.g. queries=4096")
        if name in found:
            raise SpecError(name, value, f"one value; {name}={found[name]} was given before")
        found[name] = int(value)
    return found


def _print(as_json: bool, table: Callable[[Console], None], rows: list[Any]) -> None:
    if as_json:
        print(json.dumps(rows, indent=1, default=str))
    else:
        table(out)


def _complain(what: object) -> None:
    err.print(str(what), style="red", highlight=False, markup=False)


def _warn(message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning without the line of code that it came from."""
    err.print(str(message), style="yellow", highlight=False, markup=False)


def main() -> None:
    """Run the command line; the project's errors become one line and an exit code."""
    os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")
    warnings.showwarning = lambda message, *where, **more: err.print(
        str(message), style="yellow", highlight=False, markup=False
    )
    try:
        app()
    except (NoGpu, ToolMissing) as error:
        _complain(error)
        sys.exit(3)
    except BuildError as error:
        _complain(error)
        sys.exit(1)
    except DsaError as error:
        _complain(error)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:  # not about a path that somebody named
            raise
        _complain(f"cannot use {error.filename}: {error.strerror}; name another place (--out, --folder, DSA_CACHE_DIR).")
        sys.exit(2)
