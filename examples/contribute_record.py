"""Contributing a record: tune an operation on your GPU into a folder of your own, look at the record, and check it as CI does.

    python examples/contribute_record.py           # no GPU: the records that come with the package are looked at
    python examples/contribute_record.py tiny cuda # a GPU: one operation is tuned, in half a minute

To contribute, tune into ``tuned/`` of a checkout (without DSA_TUNED_DIR), run ``python cli.py verify``, commit the files of
``tuned/<gpu>/`` and open a pull request: CONTRIBUTING.md says what it should tell.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from dsa_codegen import ops, paths
from dsa_codegen.cli import app
from dsa_codegen.kernels.render import render
from dsa_codegen.records import files

OP = "gather_paged"


def tuned(preset: str, folder: str) -> Path:
    """Measure the operation's configs on the GPU that is here."""
    os.environ["DSA_TUNED_DIR"] = folder
    command = ["tune", "--gpu", "auto", "--preset", preset, "--op", OP, "--budget", "30s"]
    print("$ dsa", *command)
    app(command, standalone_mode=False)
    return Path(folder)


def show(folder: Path) -> None:
    """Each record of the folder: what it is for, what it says, and whether it holds today."""
    op, found = ops.get(OP), files.read_all(folder, OP)
    print(f"{len(found)} records of {OP}")
    for record in found:
        spec, config = op.spec_type.from_dict(record.spec), record.config_for(op)
        source = render(op, spec, config, record.toolchain.get("triton", ""))
        holds = "holds" if source.sha == record.source_sha else "the template has changed: measure again"
        print(f"  {record.gpu.id} {spec.id}: {config}, {record.time_us.median:.1f} us, {record.evidence}; {holds}")


def main(preset: str = "tiny", device: str = "cpu") -> None:
    if device != "cuda":
        show(paths.shipped_records())
        return
    with tempfile.TemporaryDirectory() as folder:
        show(tuned(preset, folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
