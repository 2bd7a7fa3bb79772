"""Carry the measured records over a change that leaves their code as it was: templates moved, say, or a part taken out.

    python scripts/carry_records.py BEFORE [--write]

``BEFORE`` is a checkout of the commit at which the records hold. For each record of this checkout's ``tuned/`` both checkouts
render its source. Where the code below the header is the same, byte for byte, ``source_sha`` and ``template`` become what this
checkout says; nothing else of the file changes. A record whose code differs, or that did not hold before, stays as it is, for
``tune --refresh`` to measure it again: it is named, and the exit code is 1. ``default_sha`` stays as it is: which default a
record was timed beside does not change, and where another serves today, ``tune --refresh`` measures the record.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Runs in either checkout: how modules are called there is asked of the checkout, newest layout first.
RENDER = r"""
import importlib, inspect, json, sys
from pathlib import Path

def module(*names):
    for name in names:
        try:
            return importlib.import_module(f"dsa_codegen.{name}")
        except ModuleNotFoundError:
            pass
    raise SystemExit(f"none of {names} in this checkout")

rendering = module("kernels.render", "render")
ops = module("ops")
for path in json.load(sys.stdin):
    content = json.loads(Path(path).read_text())
    for number, record in enumerate(content["records"]):
        op, answer = ops.get(content["op"]), {"file": path, "number": number}
        try:
            config = op.config(record["backend"], record["config"])
            known = "triton" in inspect.signature(rendering.render).parameters  # the text for the Triton it was measured with
            version = {"triton": record["toolchain"].get("triton", "")} if known else {}
            rendered = rendering.render(op, op.spec_type.from_dict(record["spec"]), config, **version)
            answer["code"] = rendered.text.partition('\"\"\"\n')[2]
            answer["sha"] = rendered.sha
            answer["template"] = rendering.template_sha(rendering.template_name(op, record["backend"]))
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer))
"""


def rendered_by(checkout: Path, files: list[Path]) -> list[dict]:
    """What a checkout renders for every record of the files, in their order."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""}
    names = json.dumps([str(path) for path in files])
    done = subprocess.run(
        [sys.executable, "-c", RENDER], input=names, cwd=checkout, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{checkout} cannot render: {done.stderr.strip()}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def complaint(record: dict, before: dict, after: dict) -> str:
    """Why a record cannot be carried; empty where it can."""
    for side, answer in (("before", before), ("now", after)):
        if "error" in answer:
            return f"cannot be rendered {side}: {answer['error']}"
    if record["source_sha"] not in (before["sha"], after["sha"]):
        return "did not hold before: its source is another"
    return "" if before["code"] == after["code"] else "its code changed: measure it again"


def carried(text: str, records: list[dict], answers: list[dict]) -> str:
    """The file's text with the two fields of its records replaced, in order; every other byte as it was."""
    for field, key in (("template", "template"), ("source_sha", "sha")):
        values = iter([answer[key] for answer in answers])
        pattern = re.compile(rf'("{field}": )"[0-9a-f]*"')
        assert len(pattern.findall(text)) == len(records)
        text = pattern.sub(lambda match, values=values: f'{match[1]}"{next(values)}"', text)
    return text


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the commit at which the records hold")
    parser.add_argument("--write", action="store_true", help="write the files; otherwise only say what would change")
    options = parser.parse_args()
    files = sorted((ROOT / "tuned").glob("*/*.json"))
    sides = [rendered_by(checkout.resolve(), files) for checkout in (options.before, ROOT)]
    texts, failures, changed = {}, [], 0
    for path in files:
        text = path.read_text()
        records = json.loads(text)["records"]
        before, after = ([answer for answer in side if answer["file"] == str(path)] for side in sides)
        for number, record in enumerate(records):
            reason = complaint(record, before[number], after[number])
            if reason:
                failures.append(f"{path.relative_to(ROOT)}, record {number}: {reason}")
                after[number] = {"sha": record["source_sha"], "template": record["template"]}
            changed += (record["source_sha"], record["template"]) != (after[number]["sha"], after[number]["template"])
        texts[path] = carried(text, records, after)
    for path, text in texts.items() if options.write else ():
        path.write_text(text)
    print(f"{changed} records {'carried' if options.write else 'would be carried'}, {len(failures)} cannot be")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
