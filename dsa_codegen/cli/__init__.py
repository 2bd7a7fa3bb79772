"""The command line: parses, calls, prints. The same app as ``dsa``, ``python -m dsa_codegen`` and a checkout's ``cli.py``.

Here is the list of its commands, each a module beside it, and what becomes of errors. Exit codes: 0 done, 1 a check failed,
2 bad usage or input, 3 a GPU or compiler is missing, 4 tune ended before every call had a record, 130 interrupted.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

from ..errors import BuildError, DsaError, NoGpu, ToolMissing
from ..invocation import command, install

try:
    import typer
    from rich.console import Console  # noqa: F401
except ImportError:
    sys.exit(f"{command()} needs typer and rich: {install('tune')}")

from . import bench, build, doctor, explain, generate, list_records, quality, report, spec, tune, verify
from .consoles import err, out

COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate.generate,
    "build": build.build,
    "verify": verify.verify,
    "tune": tune.tune,
    "bench": bench.bench,
    "report": report.report,
    "quality": quality.quality,
    "list": list_records.list_records,
    "explain": explain.explain,
    "spec": spec.spec,
    "doctor": doctor.doctor,
}
"""In the order that ``--help`` shows them in."""

app = typer.Typer(
    help="Generate, verify and tune kernels for DeepSeek Sparse Attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for name, function in COMMANDS.items():
    app.command(name)(function)


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


def main() -> None:
    """Run the command line; the project's errors become one line and an exit code."""
    os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")
    warnings.showwarning = _warn
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


def _complain(what: object) -> None:
    err.print(str(what), style="red", highlight=False, markup=False)


def _warn(message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning without the line of code that it came from."""
    err.print(str(message), style="yellow", highlight=False, markup=False)
