"""All that is stated of several GPUs of one host, by one command: a layer's times, a preset tuned by one and by all, the plot.

    python scripts/several_gpus.py --out OUT [--preset NAME] [--op NAME ...] [--budget 10m] [--layer-only | --tuning-only]
    python scripts/several_gpus.py --out OUT --cpu 8

A layer of DeepSeek-V3.2 in groups of 1, 2, 4, … of the GPUs (what ``cli.py bench --distributed`` times, with the prefill of a
million tokens where there are eight), each beside what the model of docs/scaling.md says of it; the preset tuned from nothing
by one GPU and by all of them: how long, and whether the same configs win, or configs that noise cannot tell apart. ``OUT``
gets ``results/<gpu>x<n>.json``, ``several.json``, ``several.svg`` and both runs' records. ``--cpu``: tiny steps in so many
processes over gloo, with no time of any meaning, and no tuning.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from dsa_codegen import gpu as gpus  # noqa: E402
from dsa_codegen.bench import command as benchmark  # noqa: E402
from dsa_codegen.bench import results  # noqa: E402
from dsa_codegen.bench.ranks import command, model  # noqa: E402
from dsa_codegen.bench.ranks.cases import CASES, SMALL  # noqa: E402
from dsa_codegen.bench.report import curves, theme  # noqa: E402
from dsa_codegen.proof.timing import TIE  # noqa: E402
from dsa_codegen.records.files import read_all  # noqa: E402
from dsa_codegen.records.record import Record  # noqa: E402
from dsa_codegen.tune.finals import mad_us  # noqa: E402

Row = dict[str, Any]


def main() -> int:
    """Parse, run, write."""
    asked = _parser().parse_args()
    here = gpus.resolve("h100") if asked.cpu else gpus.detect()
    count = asked.cpu or torch.cuda.device_count()
    if here is None or count < 2:
        print("two GPUs or more are needed; --cpu 8 tries everything but times on a machine without", file=sys.stderr)
        return 2
    found: Row = {"gpu": here.id, "gpus": count, "commit": asked.commit or results.commit(), "date": results.now()}
    if not asked.tuning_only:
        found["layer"] = layer(here, found, asked.out, count, bool(asked.cpu))
    if not asked.layer_only and not asked.cpu:
        found["tuning"] = tuning(asked.preset, asked.op, asked.budget, asked.out, count)
    (asked.out / "several.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(lines(found)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="deepseek-v3.2")
    parser.add_argument("--op", action="append", default=[])
    parser.add_argument("--budget", default="10m", help="of each of the two searches")
    parser.add_argument("--layer-only", action="store_true")
    parser.add_argument("--tuning-only", action="store_true")
    parser.add_argument("--cpu", type=int, default=0, metavar="PROCESSES")
    parser.add_argument("--commit", default="", help="by default the checkout's")
    return parser


def layer(here: gpus.Gpu, facts: Row, out: Path, count: int, on_cpu: bool) -> list[Row]:
    """The rows of every group, each with what the model says of it; and the plot. Of a run that is cut short what is behind."""
    known = {"date": facts["date"], "commit": facts["commit"], "toolchain": {} if on_cpu else benchmark.versions()}
    device, cases = ("cpu", SMALL) if on_cpu else ("cuda", CASES)
    try:
        rows = command.run(here, known, out, cases, device, count)
    except (KeyboardInterrupt, command.RunFailed) as error:
        print(f"cut short ({type(error).__name__} {error}): what was timed before is kept", file=sys.stderr, flush=True)
        rows = command.measured(out, here.id)
    picture = theme.drawn(lambda: curves.ranks(rows), "several", "a layer on several GPUs")
    (out / "several.svg").write_text(theme.standalone(picture))
    return [{**row, "predicted": predicted(row)} for row in rows]


def predicted(row: Row) -> float:
    """The model's speed-up for a row."""
    stage, way = row["stage"].split("_", 1)
    return round(model.speedup(stage, way, row["shape"]["context"], row["shape"]["ranks"]), 2)


def tuning(preset: str, ops: Sequence[str], budget: str, out: Path, count: int) -> Row:
    """The same search from nothing by one GPU and by all of them."""
    took, found = {}, {}
    for number in (1, count):
        home = out / f"tuned-by-{number}"
        home.mkdir(parents=True, exist_ok=True)
        wanted = [part for op in ops for part in ("--op", op)]
        options = ["--preset", preset, *wanted, "--budget", budget, "--gpus", str(number), "--folder", str(home / "tuned")]
        begun = time.monotonic()
        subprocess.run([sys.executable, ROOT / "cli.py", "tune", "--fresh", *options], cwd=home, check=False)
        took[number] = round(time.monotonic() - begun, 1)
        found[number] = [record for path in (home / "tuned").glob("*/*.json") for record in read_all(home / "tuned", path.stem)]
    return {"seconds": took, "records": {n: len(each) for n, each in found.items()}, **agreement(found[1], found[count])}


def agreement(one: Sequence[Record], many: Sequence[Record]) -> Row:
    """Of the calls that both have a record for: how many configs are the same, or tied, and which are neither."""
    others = {record.key: record for record in many}
    same, tied, apart = 0, 0, []
    for record in one:
        other = others.get(record.key)
        if other is None:
            continue
        if dict(record.config) == dict(other.config):
            same += 1
        elif are_tied(record, other):
            tied += 1
        else:
            times = [round(each.time_us.median, 3) for each in (record, other)]
            apart.append({"op": record.op, "backend": record.backend, "sizes": dict(record.sizes), "time_us": times})
    return {"same": same, "tied": tied, "apart": apart}


def are_tied(one: Record, other: Record) -> bool:
    """Whether the slower is no slower than noise explains: 1 %, or two median absolute deviations, as in finals."""
    fast, slow = sorted((one.time_us, other.time_us), key=lambda timing: timing.median)
    return slow.median <= fast.median + max(TIE * fast.median, 2 * mad_us(fast))


def lines(found: Row) -> list[str]:
    """What is printed in the end."""
    shown = []
    for row in found.get("layer", ()):
        step = f"{row['stage']} {row['shape']['context']} on {row['shape']['ranks']}"
        shown.append(f"{step}: {row['ours_us']:.0f} us, {row['speedup']:.2f} times one GPU (model {row['predicted']:.2f})")
    if "tuning" in found:
        search = found["tuning"]
        shown.append(f"tuning: {search['seconds']} s, {search['records']} records by number of GPUs")
        shown.append(f"winners: {search['same']} the same, {search['tied']} tied, {len(search['apart'])} apart")
    return shown


if __name__ == "__main__":
    sys.exit(main())
