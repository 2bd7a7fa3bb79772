"""Kernels built ahead: on a hit nothing is rendered, compiled or looked up; a folder that does not fit is refused whole."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_codegen.command import prebuild
from dsa_codegen.errors import PrebuiltError
from dsa_codegen.gpu import resolve
from dsa_codegen.kernels.backends import cubin
from dsa_codegen.problem import presets
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Case
from dsa_codegen.problem.values import describe
from dsa_codegen.records.lookup import Found, lookup
from dsa_codegen.runtime import dispatch, prebuilt, torch_ops

from fake_gpu import FakeGpu
from support import H200, arguments

ROOT = Path(__file__).resolve().parents[2]
H100, L40S = resolve("H100"), resolve("L40S")
CALLS = prebuild.calls(presets.preset("tiny"), H100, ["quantize"])
HELD, MISSED = CALLS[0], next(call for call in CALLS if call[1] != CALLS[0][1])


@pytest.fixture(scope="module")
def written(build_cache, tmp_path_factory):
    """A folder with the kernels of one call, really compiled."""
    folder = tmp_path_factory.mktemp("builds")
    prebuild.prebuild([HELD], H100, folder)
    return folder


@pytest.fixture
def folder(written, monkeypatch, tmp_path, fresh_dispatch):
    """A copy of it, to spoil, that DSA_BUILDS names."""
    monkeypatch.setenv("DSA_BUILDS", str(shutil.copytree(written, tmp_path / "builds")))
    return tmp_path / "builds"


@pytest.fixture
def loads(monkeypatch):
    """What is loaded, as far as that goes without a GPU."""
    found = []

    class Backend:
        def load_ahead(self, source, gpu, out):
            found.append((source.name, gpu.id, out.name))
            return {}

    monkeypatch.setattr(prebuilt.backends, "get", lambda name: Backend())
    return found


@pytest.fixture
def nothing_else(monkeypatch):
    """Whoever renders, compiles or looks records up fails."""

    def fail(*args, **options):
        raise AssertionError("not for kernels that were built ahead")

    for name in ("render", "build", "find", "lookup"):
        monkeypatch.setattr(dispatch, name, fail)
    monkeypatch.setattr(dispatch, "build_all", lambda sources, gpu, processes=None: [fail() for _ in sources])


def run(call):
    op, spec, sizes = call
    small = dataclasses.replace(sizes, **{name: min(size, 3) for name, size in sizes.to_dict().items()})
    return torch_ops.function(op.function)(*arguments(op, spec, op.inputs(spec, Case(small, ""), Draw(3))))


def edit(folder, **changes):
    path = folder / prebuilt.INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_call_that_the_folder_holds_is_loaded_and_nothing_else(folder, loads, monkeypatch, request):
    FakeGpu(monkeypatch, {0: H100})
    request.getfixturevalue("nothing_else")
    run(HELD)
    run(HELD)
    assert dispatch.stats() == {"quantize: calls": 2, "quantize: prebuilt": 1}
    ((source, gpu, out),) = loads
    (entry,) = json.loads((folder / "index.json").read_text())["entries"]
    assert (gpu, out) == ("h100", entry["build"])
    assert source == f"dsa_quantize_{entry['backend']}_{entry['source_sha'][:12]}.py"


def test_warmup_loads_what_is_there(folder, loads, monkeypatch, request):
    FakeGpu(monkeypatch, {0: H100})
    request.getfixturevalue("nothing_else")
    assert dispatch.warmup([HELD]) == 1
    assert len(loads) == 1


@pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")
def test_a_call_that_the_folder_does_not_name_goes_the_ordinary_way(folder, loads, monkeypatch):
    fake = FakeGpu(monkeypatch, {0: H100})
    dispatch.warmup([HELD, MISSED])
    assert (len(loads), len(fake.builds)) == (1, 1)
    assert dispatch.stats() == {"quantize: default": 1, "quantize: prebuilt": 1}


def test_what_is_chosen_is_what_the_folder_says(folder, monkeypatch):
    op, spec, sizes = HELD
    expected = lookup(op, spec, sizes, H100).config
    assert dispatch.chosen(op, spec, sizes, H100) == Found(expected, "prebuilt")
    monkeypatch.delenv("DSA_BUILDS")
    assert dispatch.chosen(op, spec, sizes, H100).origin == "default"


@pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")
def test_an_override_comes_before_the_folder(folder, loads, monkeypatch):
    op, spec, sizes = HELD
    fake = FakeGpu(monkeypatch, {0: H100})
    with dispatch.override(op, lookup(op, spec, sizes, H100).config):
        run(HELD)
    assert (len(loads), len(fake.builds)) == (0, 1)


def test_a_sibling_is_served_unless_it_breaks_a_limit(folder, monkeypatch):
    op, spec, sizes = HELD
    assert prebuilt.find(op, spec, sizes.bucket(), H200) is not None
    monkeypatch.setattr(type(op), "violations", lambda *args: ["too large"])
    assert prebuilt.find(op, spec, sizes.bucket(), H200) is None
    assert prebuilt.find(op, spec, sizes.bucket(), H100) is not None  # it was asked when the folder was built


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 99}, "schema 99, this version reads 1"),
        ({"sources": "0123"}, "built from other sources"),
        (
            {"loaded_by": {"tilelang": "0.0.1"}},
            "loaded by tilelang 0.0.1, here is .*; install tilelang 0.0.1, or build it again",
        ),
        ({"loaded_by": {"machine": "pdp11", "tilelang": prebuilt.loaders(["tilelang"])["tilelang"]}}, "machine pdp11"),
        ({"gpu": {"id": "h100"}}, "no index of builds"),
        ({"entries": [{"op": "quantize"}]}, "an entry of index.json is not one"),
    ],
    ids=["schema", "sources", "tilelang", "machine", "gpu", "entries"],
)
def test_a_folder_that_does_not_fit_is_refused(folder, monkeypatch, changes, words):
    FakeGpu(monkeypatch, {0: H100})
    edit(folder, **changes)
    with pytest.raises(PrebuiltError, match=words) as refused:
        run(HELD)
    assert f" build --gpu {'auto' if 'gpu' in changes else 'h100'} --preset" in str(refused.value)
    assert str(folder) in str(refused.value)


def test_an_entry_leads_nowhere_else(folder):
    (entry,) = json.loads((folder / "index.json").read_text())["entries"]
    edit(folder, entries=[{**entry, "build": "../elsewhere"}])
    with pytest.raises(PrebuiltError, match="elsewhere"):
        prebuilt.opened(folder)


def test_another_architecture_is_refused(folder, monkeypatch):
    FakeGpu(monkeypatch, {0: L40S})
    with pytest.raises(PrebuiltError, match=r"built for h100 \(sm_90a\), here is l40s \(sm_89\); .*build --gpu l40s"):
        run(HELD)


def test_a_folder_that_is_not_there_is_an_error(folder, monkeypatch):
    monkeypatch.setenv("DSA_BUILDS", str(folder / "gone"))
    with pytest.raises(PrebuiltError, match=r"index\.json cannot be read"):
        dispatch.chosen(*HELD, H100)


@pytest.mark.parametrize("spoil", ["code", "binary", "gone", "index"])
def test_an_entry_that_was_changed_is_not_loaded(folder, loads, monkeypatch, spoil):
    FakeGpu(monkeypatch, {0: H100})
    (entry,) = (path for path in folder.iterdir() if path.is_dir())
    spoiled = next(entry.glob("*.py" if spoil == "code" else "*.cubin"))
    if spoil == "gone":
        spoiled.unlink()
    elif spoil == "index":
        (stated,) = json.loads((folder / prebuilt.INDEX).read_text())["entries"]
        edit(folder, entries=[{**stated, "source_sha": "0" * 64}])
    else:
        spoiled.write_bytes(spoiled.read_bytes() + b"\n")
    with pytest.raises(PrebuiltError, match=f"{entry.name} is not as it was built; copy the folder again"):
        run(HELD)
    assert not loads


def test_templates_and_code_are_what_sources_are(monkeypatch, tmp_path):
    """Any change of a template or of what renders, builds or launches; not one of the models that are known."""
    copies = {name: shutil.copytree(path, tmp_path / name) for name, path in prebuilt.paths.sources().items()}
    before = prebuilt.sources_sha()
    monkeypatch.setattr(prebuilt.paths, "sources", lambda: copies)

    def sha():
        prebuilt.sources_sha.cache_clear()
        return prebuilt.sources_sha()

    try:
        assert sha() == before
        (copies["problem"] / "presets.yaml").write_text("")
        assert sha() == before
        seen = {before}
        for name in ("templates/select/triton.py.jinja", "ops/rows.py", "kernels/render.py", "problem/op.py"):
            path = tmp_path / name
            path.write_text(path.read_text() + "\n")
            seen.add(sha())
        assert len(seen) == 5
    finally:
        prebuilt.sources_sha.cache_clear()


LOAD = """
import subprocess, sys
from pathlib import Path
sys.modules["jinja2"] = None  # whoever imports it gets an ImportError
from dsa_codegen import gpu
from dsa_codegen.kernels import backends
from dsa_codegen.runtime import prebuilt
(entry,) = {each.folder: each for each in prebuilt.opened(Path(sys.argv[1])).entries.values()}.values()
backends.get(entry.config.backend)
def fail(*args, **options):
    raise AssertionError(f"started {args}")
subprocess.Popen = fail  # a compiler is a process
print(sorted(entry.load(gpu.resolve("H100"))))
"""


def test_what_triton_compiled_is_loaded_by_the_driver_alone(written, monkeypatch):
    """Whatever Triton is here: its own loader is not asked, unless the kernel wants what only that one gives."""
    (entry,) = prebuilt.opened(written).entries.values()
    assert entry.config.backend == "triton", "name another operation above"
    backend = prebuilt.backends.get("triton")
    monkeypatch.setattr(type(backend), "load", lambda self, source, gpu, out: {"by": "Triton"})
    monkeypatch.setattr(cubin, "TritonCubin", lambda code, types, facts: (len(code) > 0, types[0][0], facts["num_warps"] > 0))
    assert set(entry.load(H100).values()) == {(True, "*", True)}
    monkeypatch.setattr(cubin, "_KNOWN", ((1, 0), (1, 1)))
    assert entry.load(H100) == {"by": "Triton"}


def test_tilelang_loads_without_a_compiler(build_cache, tmp_path):
    """Really, in a process with neither Jinja nor nvcc: TileLang is the backend that loads where there is no GPU."""
    model = dataclasses.replace(presets.preset("tiny"), heads=64)  # the default of fewer is in CUDA C++
    op, spec, sizes = prebuild.calls(model, H100, ["attention"])[0]
    (done,) = prebuild.prebuild([(op, spec, sizes)], H100, tmp_path)
    assert done.config.backend == "tilelang", "name another operation here"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    environment = {**os.environ, "PATH": "", "CUDA_HOME": "", "DSA_CACHE_DIR": "/dev/null", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    loaded = subprocess.run([sys.executable, "-c", LOAD, tmp_path], capture_output=True, text=True, env=environment)
    assert loaded.stdout.strip() == "['attention']", loaded.stderr
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_every_call_of_warmup_is_built():
    """A model's whole list is what warmup asks for, and it names no call twice."""
    from dsa_codegen.runtime import serving

    model = presets.preset("tiny")
    keys = [(op.name, spec, describe(sizes.bucket())) for op, spec, sizes in prebuild.calls(model, H100)]
    asked = {(op.name, spec, describe(sizes.bucket())) for op, spec, sizes in serving.calls(model, serving.Limits())}
    assert asked <= set(keys) and len(keys) == len(set(keys))
    assert {op.name for op, _, _ in prebuild.calls(model, resolve("A100"))} < {name for name, _, _ in keys}
