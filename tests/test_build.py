"""The build cache: what is damaged is built again, and servers whose processes may have no children can build too."""

from __future__ import annotations

import json
import multiprocessing

import pytest

from dsa_codegen import build, render
from dsa_codegen.backends import Resources, triton
from dsa_codegen.op import Config
from dsa_codegen.ops.indexer import IndexerSpec

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


def test_a_daemon_builds_without_children(compiled, monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    assert build.build_all([RENDERED, RENDERED], H200) == {}
    assert len(compiled) == 1
    assert build.find(RENDERED, H200) is not None
