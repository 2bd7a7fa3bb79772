"""The command line and other scripts without a process for each: it would import torch and TileLang anew, 3 seconds of CPU."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsa_codegen.runtime import dispatch
from dsa_codegen.worker import Worker

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}
_worker = Worker(WITHOUT_GPU)


def cli(*arguments: str, cwd: Path = ROOT, hidden: Sequence[str] = (), **environment: str) -> subprocess.CompletedProcess:
    """``python cli.py ARGUMENTS`` as a user would run it in ``cwd``, without a GPU, where everything is imported already.

    Args:
        hidden: packages that are not to be found, as where they are not installed.
    """
    return script(ROOT / "cli.py", *arguments, cwd=cwd, hidden=hidden, **{"COLUMNS": "200", **environment})


def script(
    path: Path, *arguments: str, cwd: Path = ROOT, hidden: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess:
    """``python PATH ARGUMENTS``, likewise."""
    words = [str(path), *arguments]
    code, out, err = _worker.call(_run, words, str(cwd), {**os.environ, **WITHOUT_GPU, **environment}, hidden)
    return subprocess.CompletedProcess(words, code, out, err)


def _run(words: Sequence[str], folder: str, variables: Mapping[str, str], hidden: Sequence[str]) -> tuple[int, str, str]:
    """The job: a script from its first line, as in a new process but for what modules below it keep."""
    modules = {name: sys.modules.get(name) for name in hidden}
    sys.modules.update(dict.fromkeys(hidden))  # whoever imports one gets an ImportError
    for name in [name for name in sys.modules if f"{name}.".startswith("dsa_codegen.cli.")]:
        del sys.modules[name]  # its consoles measure the terminal when they are made
    dispatch.reset()
    out, err, before = io.StringIO(), io.StringIO(), (os.getcwd(), dict(os.environ), sys.argv)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        try:
            os.chdir(folder)
            _set(variables)
            sys.argv = [Path(words[0]).name, *words[1:]]
            runpy.run_path(words[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            os.chdir(before[0])
            _set(before[1])
            sys.argv = before[2]
            for name, module in modules.items():
                sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    return code, out.getvalue(), err.getvalue()


def _set(variables: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
