"""The part that runs inside an environment: compile what is asked for, one line of JSON for each answer.

    python -c "from compiling import main; main()" < request

The request is JSON: ``compiler``, ``keys`` (what to compile) and ``processes``.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import queue
import sys
import tempfile
import threading

from dsa_codegen.errors import DsaError
from dsa_codegen.kernels import build
from dsa_codegen.worker import Worker

from subjects import TRITONS, Subject, digest, subjects

_TOOLS = ("torch", "triton", "tilelang", "nvidia-cuda-nvcc")


def main() -> None:
    """Answer the request on stdin: first what is here and what it renders, then each result as it comes."""
    request = json.load(sys.stdin)
    compiler = request["compiler"]
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _TOOLS}}
    if compiler in TRITONS and not versions["triton"].startswith(f"{compiler}."):
        sys.exit(f"Triton {compiler} was asked for, {sys.executable} has {versions['triton']}")
    print(json.dumps({"versions": versions, "digest": digest(compiler)}), flush=True)
    known = subjects(compiler)
    waiting: queue.SimpleQueue[Subject] = queue.SimpleQueue()
    for key in request["keys"]:
        waiting.put(known[tuple(key)])
    with tempfile.TemporaryDirectory(prefix="dsa-matrix-") as folder:
        environment = {"DSA_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton", "CUDA_VISIBLE_DEVICES": ""}
        threads = [threading.Thread(target=_work, args=(waiting, environment)) for _ in range(request["processes"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _work(waiting: queue.SimpleQueue[Subject], environment: dict[str, str]) -> None:
    with Worker({**environment, "OMP_NUM_THREADS": "1"}) as worker:
        while True:
            try:
                subject = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                reason = worker.call(attempt, subject)
            except DsaError as error:
                reason = str(error)
            print(json.dumps({"key": subject.key, "reason": reason}), flush=True)


def attempt(subject: Subject) -> str:
    """The job: why the text does not compile, or not within the GPU's shared memory; empty where it does."""
    try:
        build.build(subject.rendered, subject.gpu)
    except DsaError as error:
        return f"{type(error).__name__}: {error}"
    return ""
