"""Other libraries that are missing, broken, or installed: what the benchmark says of each."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch

from dsa_codegen.bench import installed, peers
from dsa_codegen.bench.peers import base, flashmla, libraries


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_torch_takes_part():
    able = {peer.name for peer in peers.load(peers.sources()) if peer.available() is None}
    gathered = {"PyTorch (gathered, SDPA)", "PyTorch (gathered latents)", "PyTorch (gathered latents, SDPA)"}
    assert able == {"torch.topk", "PyTorch (unfused)", *gathered}


def test_a_missing_library_is_a_reason():
    assert libraries.loaded("sgl_kernel", "flashmla_ops.abi3.so", "sglang-kernel") == "sglang-kernel is not installed"
    assert libraries.imported("no_such_library.part") == "no_such_library is not installed"
    assert libraries.from_file("no_such_library", "part.py", "no-such") == "no-such is not installed"
    assert libraries.version_of("no-such", "no_such_library/part.py") is None


def test_a_library_that_cannot_be_loaded_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (tmp_path / "a_package" / "broken.abi3.so").write_bytes(b"not a library")
    (tmp_path / "a_package" / "broken.py").write_text("raise OSError('no driver')")
    (tmp_path / "broken_module.py").write_text("raise OSError('libnuma is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    assert libraries.loaded("a_package", "absent.*so", "a-package") == "a-package has no absent.*so"
    assert libraries.loaded("a_package", "broken.*so", "a-package").startswith("broken.abi3.so cannot be loaded")
    assert libraries.imported("broken_module") == "broken_module cannot be imported: OSError: libnuma is missing"
    assert libraries.from_file("a_package", "absent.py", "a-package") == "a-package has no absent.py"
    assert libraries.from_file("a_package", "broken.py", "a-package") == "broken.py cannot be imported: OSError: no driver"


def test_files_without_their_package_are_enough(tmp_path, monkeypatch):
    """What was carried to a machine may be a folder of files, without ``__init__`` or metadata."""
    (tmp_path / "carried").mkdir()
    (tmp_path / "carried" / "part.py").write_text("ANSWER = 42")
    monkeypatch.syspath_prepend(tmp_path)
    assert libraries.from_file("carried", "part.py", "carried").ANSWER == 42
    version = libraries.version_of("carried", "carried/part.py")
    (tmp_path / "carried" / "part.py").write_text("ANSWER = 43")
    assert version.startswith("of unknown version (sha1 ") and libraries.version_of("carried", "carried/part.py") != version
    assert libraries.version_of("torch", "carried/part.py") == importlib.metadata.version("torch")


def test_a_library_that_breaks_when_it_is_looked_at_is_a_reason(monkeypatch):
    peer = next(each for each in flashmla.PEERS if each.name == "FlashMLA")
    monkeypatch.setattr(peer, "available", lambda: {}["driver"])
    assert peer.reason() == "cannot be looked at: KeyError: 'driver'"


def test_what_is_installed_is_named_with_its_version(monkeypatch):
    monkeypatch.setattr(base, "version_of", lambda name, file: {"sglang-kernel": "0.4.2", "torch": "2.11"}.get(name))
    found = {finding.what: finding for finding in installed.findings()}
    assert set(found) == {"peer sglang-kernel", "peer torch", "peers not installed"} and all(each.ok for each in found.values())
    assert found["peer sglang-kernel"].state.startswith("0.4.2: ") and "FlashMLA" in found["peer sglang-kernel"].state
    assert "sgl-flash-mla" in found["peers not installed"].state and "sglang-kernel" not in found["peers not installed"].state


def test_the_documented_commands_install_the_extras():
    """Without dependencies pip ignores extras too: the command repeats what they hold, and SGLang, which cannot be resolved."""
    root = Path(__file__).resolve().parents[2]
    project, page = (root / "pyproject.toml").read_text(), (root / "docs/benchmark.md").read_text().replace("\\\n", " ")
    listed = {
        extra: set(re.findall(r'"([^"]+)"', re.search(rf"^{extra} = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)[1]))
        for extra in ("peers", "peers-torch211")
    }
    without = set(re.search(r"^pip install --no-deps (.*)$", page, re.MULTILINE)[1].split())
    assert {each for each in without if not each.startswith("sglang==")} == listed["peers-torch211"]
    named = re.search(r"\[bench,peers\]'  # (.*)$", page, re.MULTILINE)[1].split(", ")
    assert sorted(named) == sorted(each.partition("==")[0] for each in listed["peers"])
    known = {name for peer in peers.load(peers.sources()) for name in peer.distributions}
    assert {each.partition("==")[0] for each in set().union(*listed.values())} - {"apache-tvm-ffi", "msgspec"} <= known
