"""The build cache: what is damaged is built again, and servers whose processes may have no children can build too."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_codegen import ops
from dsa_codegen.errors import BuildError, InputError
from dsa_codegen.kernels import build, render
from dsa_codegen.kernels.backends import Resources, triton
from dsa_codegen.ops.indexer import IndexerSpec
from dsa_codegen.problem.op import Config

from support import H200
from toy import OP

RENDERED = render.render(
    OP, IndexerSpec(8, 64), Config.of("triton", block_q=2, block_n=64, num_stages=2, splits=1, num_warps=4)
)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A build cache of its own and a compiler that takes no time; the modules that it compiled."""
    sources = []

    def compile(source, gpu, out):
        sources.append(source)
        (out / "indexer.cubin").write_bytes(b"machine code")
        return {"indexer": Resources(32, 0, 1024, 128)}

    monkeypatch.setenv("DSA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.BACKEND, "compile", compile)
    return sources


def test_is_built_once(compiled):
    first = build.build(RENDERED, H200)
    assert build.build(RENDERED, H200) == first
    assert len(compiled) == 1


def test_more_shared_memory_than_a_block_has_is_refused(compiled):
    small = dataclasses.replace(H200, name="a small GPU", smem_per_block=1023)
    for _ in range(2):  # compiled, then found
        with pytest.raises(BuildError, match=r"needs 1024 bytes of shared memory, a small GPU has 1023"):
            build.build(RENDERED, small)
    assert build.build(RENDERED, H200).resources["indexer"].smem == 1024


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def forget_resources(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "resources": None}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("indexer.cubin", shorten),
        ("indexer.cubin", lambda path: path.unlink()),
        (f"{RENDERED.module_name}.py", shorten),
        ("build.json", shorten),
        ("build.json", forget_resources),
    ],
)
def test_a_damaged_entry_is_built_again(compiled, name, damage):
    built = build.build(RENDERED, H200)
    damage(built.folder / name)
    assert build.find(RENDERED, H200) is None
    again = build.build(RENDERED, H200)
    assert (again.folder, len(compiled)) == (built.folder, 2)
    assert (again.folder / "indexer.cubin").read_bytes() == b"machine code"


QUANTIZE = ops.get("quantize")
SOURCES = [
    render.render(QUANTIZE, QUANTIZE.spec_type(32), Config.of("triton", block_t=block_t, num_warps=1)) for block_t in (1, 2, 4)
]
UNGUARDED = """
import os
print("the script", flush=True)
import dsa_codegen as dsa
from dsa_codegen.kernels import build, render
from dsa_codegen.gpu import resolve
from dsa_codegen.problem.op import Config
op, h200 = dsa.ops.get("quantize"), resolve("H200")
sources = [render.render(op, op.spec_type(32), Config.of("triton", block_t=block_t, num_warps=1)) for block_t in (1, 2, 4)]
print(build.build_all(sources, h200, 2), [build.find(source, h200) is not None for source in sources])
"""


def test_a_script_without_a_main_guard_builds_in_children(monkeypatch, tmp_path):
    """As a user writes it: the children must not run the script, which would load the model in each of them."""
    script = tmp_path / "serve.py"
    script.write_text(UNGUARDED)
    environment = {**os.environ, "DSA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(Path(build.__file__).parents[2])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == ["the script", "{} [True, True, True]"]
    assert "Traceback" not in done.stderr


def test_a_server_whose_process_may_have_no_children_builds_too(monkeypatch, tmp_path):
    monkeypatch.setenv("DSA_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    assert build.build_all([SOURCES[0], SOURCES[0]], H200) == {}
    assert build.find(SOURCES[0], H200) is not None


def test_one_that_fails_does_not_keep_the_others(monkeypatch, tmp_path):
    monkeypatch.setenv("DSA_CACHE_DIR", str(tmp_path))
    broken = dataclasses.replace(SOURCES[1], code=SOURCES[1].code.replace("tl.load", "tl.lode"))
    reasons = build.build_all([SOURCES[0], broken, SOURCES[2]], H200, processes=1)
    assert list(reasons) == [broken.sha]
    assert "did not compile" in reasons[broken.sha]
    assert [build.find(source, H200) is not None for source in (SOURCES[0], SOURCES[2])] == [True, True]


def test_less_than_one_process_is_refused():
    with pytest.raises(InputError, match=r"^processes: got 0"):
        build.build_all(SOURCES, H200, processes=0)
