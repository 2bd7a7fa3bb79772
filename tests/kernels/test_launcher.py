"""What reaches CUDA's driver is what Triton's own launcher would have sent, descriptors and all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

HERE = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory) -> Path:
    """A driver that writes launches down."""
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    headers = Path(triton.__file__).parent / "backends/nvidia/include"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-I", headers, HERE / "fake_libcuda.c", "-o", library]
    subprocess.run(command, check=True)
    return library


LAUNCHED = [
    ("indexer", "gluon"),
    ("indexer_paged", "gluon"),
    ("indexer_paged", "triton"),
    ("attention_paged", "triton"),
    ("select", "triton"),
]


@pytest.fixture(scope="module")
def said(libcuda, tmp_path_factory) -> str:
    """What a process says that launches all of them; each would import torch and Triton anew, 3 s of CPU."""
    cache = tmp_path_factory.mktemp("triton")
    paths = {"LD_LIBRARY_PATH": libcuda.parent, "TRITON_LIBCUDA_PATH": libcuda.parent, "TRITON_CACHE_DIR": cache}
    environment = {**os.environ, **{name: str(path) for name, path in paths.items()}}
    environment["PYTHONPATH"] = os.pathsep.join((str(HERE.parents[1]), str(HERE)))
    command = [sys.executable, HERE / "launches_without_gpu.py", libcuda, *(f"{op} {backend}" for op, backend in LAUNCHED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available() or not shutil.which("gcc"), reason="stands in for a driver where there is none")
@pytest.mark.parametrize(("op", "backend"), LAUNCHED)
def test_launches_reach_the_driver_as_triton_sends_them(op, backend, said):
    assert f"{op} {backend}: as Triton sends them" in said.splitlines(), said
