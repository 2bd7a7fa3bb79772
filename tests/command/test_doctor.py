"""What a broken or missing install says: one clear error, the same in the doctor's diagnosis and where it is met."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch

from dsa_codegen import ops, paths
from dsa_codegen.command import doctor
from dsa_codegen.errors import SpecError, ToolBroken, ToolMissing
from dsa_codegen.gpu import resolve
from dsa_codegen.kernels import backends
from dsa_codegen.kernels.backends import base
from dsa_codegen.records import files, lookup
from dsa_codegen.records.record import GpuKey
from dsa_codegen.runtime import prebuilt

from support import H200


@pytest.fixture
def fresh():
    """Compilers are looked for anew, and nothing of it stays."""
    caches = (backends.get, lookup.missing_tool)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def raising(error: BaseException):
    """A function that raises, whatever it is given."""

    def fail(*args, **options):
        raise error

    return fail


def finding(what: str) -> doctor.Finding:
    (found,) = (each for each in doctor.diagnose() if each.what == what)
    return found


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ModuleNotFoundError("No module named 'tilelang'", name="tilelang"), ToolMissing, "tilelang was not found"),
        (ModuleNotFoundError("No module named 'z3'", name="z3"), ToolBroken, "No module named 'z3'"),
        (OSError("libcudart.so.13: cannot open shared object file"), ToolBroken, "OSError: libcudart.so.13"),
        (RuntimeError("built for another Python"), ToolBroken, "built for another Python"),
        (AssertionError("`nvidia-cuda-nvcc` installed but no `nvcc` found"), ToolBroken, "no `nvcc` found"),
        (AttributeError("module 'tvm' has no attribute 'tirx'"), ToolBroken, "no attribute 'tirx'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_compiler_that_cannot_be_imported(fresh, monkeypatch, error, kind, words):
    monkeypatch.setattr(backends.importlib, "import_module", raising(error))
    with pytest.raises(ToolMissing, match=r"pip install .*tilelang") as raised:
        backends.get("tilelang")
    assert type(raised.value) is kind
    assert words in str(raised.value)
    assert words in lookup.missing_tool("tilelang")
    found = finding("tilelang")
    assert not found.ok
    assert words in found.state
    assert "pip install" in found.remedy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (raising(RuntimeError("Failed to automatically detect CUDA installation")), "nvcc was not found"),
        (lambda: "/nowhere/bin/nvcc", "nvcc at /nowhere/bin/nvcc was not found"),
        (lambda: __file__, "is installed but does not work"),
    ],
    ids=["none", "not there", "not executable"],
)
def test_a_missing_or_broken_nvcc(fresh, monkeypatch, change, words):
    from dsa_codegen.kernels.backends import tilelang

    monkeypatch.setattr(tilelang, "get_nvcc_compiler", change)
    with pytest.raises(ToolMissing, match="CUDA_HOME"):
        tilelang.BACKEND.toolchain()
    assert words in lookup.missing_tool("tilelang")


def test_the_compiler_that_is_reported_is_the_one_that_compiles(monkeypatch):
    """Wherever TileLang finds its nvcc: not the first of the PATH."""
    from dsa_codegen.kernels.backends import tilelang

    monkeypatch.setattr(tilelang.nvcc, "report_of", lambda tool, *arguments, remedy: f"release 99.9 of {tool}")
    monkeypatch.setattr(tilelang, "get_nvcc_compiler", lambda: sys.executable)
    assert tilelang.BACKEND.toolchain()["nvcc"] == "99.9"


def test_another_backend_stands_in(fresh, monkeypatch, tmp_path):
    from dsa_codegen.ops.select import OP, SelectSizes, SelectSpec

    monkeypatch.setattr(backends.importlib, "import_module", raising_for(".tilelang", OSError("libz3.so"), backends.importlib))
    spec, sizes = SelectSpec(64), SelectSizes(4096, 1 << 21)
    assert OP.default_config(spec, sizes, H200).backend == "tilelang"
    found = lookup.lookup(OP, spec, sizes, H200, {"tuned": tmp_path})
    assert (found.config.backend, found.origin) == ("triton", "default")
    assert "libz3.so" in found.notes[0]


def raising_for(name: str, error: Exception, module):
    """``import_module`` with one module that cannot be imported."""
    real = module.import_module

    def import_module(wanted, package=None):
        if wanted == name:
            raise error
        return real(wanted, package)

    return import_module


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC"), ToolMissing, "install gcc or clang"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), ToolBroken, "python3-dev"),
    ],
    ids=["none", "fails"],
)
def test_loading_without_a_c_compiler(monkeypatch, tmp_path, error, kind, words):
    from dsa_codegen.kernels.backends import triton

    (tmp_path / "kernels.py").write_text("SIGNATURES = {'kernel': {}}\n")
    monkeypatch.setattr(triton.TritonBackend, "_restore", raising(error))
    with pytest.raises(kind, match=words):
        triton.BACKEND.load(tmp_path / "kernels.py", H200, tmp_path)
    monkeypatch.setattr(triton.TritonBackend, "_restore", raising(RuntimeError("Triton Error [CUDA]: out of memory")))
    with pytest.raises(RuntimeError, match=r"^Triton Error \[CUDA\]: out of memory$"):
        triton.BACKEND.load(tmp_path / "kernels.py", H200, tmp_path)


def test_a_tool_that_fails_says_what_it_said():
    with pytest.raises(ToolBroken, match=r"exit status 3.*; try this"):
        base.report_of(sys.executable, "-c", "import sys; sys.exit(3)", remedy="try this")


def test_no_c_compiler_is_found_before_it_is_needed(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert finding("C compiler") == doctor.Finding("C compiler", "not found", False, base.C_COMPILER)


def test_every_device_is_named(monkeypatch):
    found = [H200, resolve("L40S"), None, SpecError("DSA_GPU", "h200", "a GPU of sm_75")]

    def detect(device):
        if isinstance(found[device], Exception):
            raise found[device]
        return found[device]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(doctor.gpu, "detect", detect)
    lines = [each for each in doctor.diagnose() if each.what.startswith("GPU")]
    assert [each.ok for each in lines] == [True, True, False, False]
    assert "NVIDIA L40S (sm_89" in lines[1].state
    assert "Tesla V100 is older than sm_80" in lines[2].state
    assert "DSA_GPU" in lines[3].remedy


@pytest.fixture
def no_gpu(monkeypatch):
    """Nothing visible, whatever this machine has; no variable is set."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("DSA_TUNED_DIR", "DSA_BUILDS", "DSA_CACHE_DIR", "DSA_GPU"):
        monkeypatch.delenv(name, raising=False)


def amiss() -> dict[str, doctor.Finding]:
    """What is not well, apart from the GPU that is not here."""
    return {each.what: each for each in doctor.diagnose() if not each.ok and each.what != "GPU"}


def test_where_all_is_well_nothing_is_reported(no_gpu, monkeypatch, tmp_path):
    assert not amiss()
    monkeypatch.setenv("DSA_TUNED_DIR", str(tmp_path))
    monkeypatch.setenv("DSA_CACHE_DIR", str(tmp_path / "not" / "there" / "yet"))
    monkeypatch.setenv("DSA_GPU", "h100")
    assert not amiss()
    assert not list(tmp_path.iterdir()), "looking leaves nothing behind"


def test_a_folder_of_own_records_that_is_missing(no_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("DSA_TUNED_DIR", str(tmp_path / "gone"))
    found = amiss()["own records"]
    assert "gone is not there" in found.state and f"mkdir -p {tmp_path / 'gone'}" in found.remedy


def test_own_records_that_are_a_file(no_gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSA_TUNED_DIR", str(tmp_path / "file"))
    found = amiss()["own records"]
    assert "is not a folder" in found.state and "name a folder" in found.remedy


@pytest.fixture
def builds(no_gpu, monkeypatch, tmp_path):
    """DSA_BUILDS names a folder for the H100 whose kernels Triton and TileLang load; no call is in it."""
    index = {
        "schema": prebuilt.SCHEMA,
        "gpu": dataclasses.asdict(GpuKey.of(resolve("H100"))),
        "sources": prebuilt.sources_sha(),
        "loaded_by": prebuilt.loaders(["gluon", "tilelang"]),
        "entries": [],
    }
    (tmp_path / prebuilt.INDEX).write_text(json.dumps(index))
    monkeypatch.setenv("DSA_BUILDS", str(tmp_path))
    prebuilt.opened.cache_clear()
    yield tmp_path
    prebuilt.opened.cache_clear()


def test_kernels_built_ahead_say_what_loading_takes(builds):
    assert not amiss()
    state = finding("kernels built ahead").state
    assert "0 calls for h100 (sm_90a)" in state
    assert "loading takes tilelang 0" in state and "triton" not in state


def test_kernels_built_ahead_that_do_not_fit(builds, monkeypatch):
    monkeypatch.setattr(doctor.gpu, "detect", lambda device=None: resolve("L40S"))
    found = amiss()["kernels built ahead"]
    assert "here is l40s (sm_89)" in found.state and "build --gpu l40s" in found.remedy and "unset DSA_BUILDS" in found.remedy
    (builds / prebuilt.INDEX).write_text("{")
    prebuilt.opened.cache_clear()
    assert "no index of builds" in amiss()["kernels built ahead"].state


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99}'], ids=["cut off", "a list", "another schema"])
def test_records_that_cannot_be_read(no_gpu, monkeypatch, tmp_path, text):
    path = tmp_path / "h100" / "select.json"
    path.parent.mkdir()
    path.write_text(text)
    monkeypatch.setenv("DSA_TUNED_DIR", str(tmp_path))
    found = amiss()["own records"]
    assert str(path) in found.state and f"move away {path}" in found.remedy


def test_one_record_of_a_file_that_is_damaged(no_gpu, monkeypatch, tmp_path):
    shutil.copytree(paths.shipped_records() / "h100", tmp_path / "h100")
    path = tmp_path / "h100" / "select.json"
    path.write_text(path.read_text().replace('"evidence": "measured"', '"evidence": "hearsay"', 1))
    monkeypatch.setenv("DSA_TUNED_DIR", str(tmp_path))
    assert "record 0" in amiss()["own records"].state


def test_a_cache_that_cannot_be_written(no_gpu, monkeypatch):
    monkeypatch.setenv("DSA_CACHE_DIR", "/dev/null/cache")
    found = amiss()["build cache"]
    assert "/dev/null is not a folder" in found.state and "DSA_CACHE_DIR" in found.remedy


def test_a_gpu_of_the_environment_that_nobody_knows(no_gpu, monkeypatch):
    monkeypatch.setenv("DSA_GPU", "h1000x")
    found = amiss()["DSA_GPU"]
    assert "h1000x" in found.state and "unset DSA_GPU" in found.remedy


@pytest.mark.parametrize(("driver", "ok"), [(13000, True), (12080, False)])
def test_an_nvcc_that_is_newer_than_the_driver_is_named(monkeypatch, driver, ok):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    monkeypatch.setattr(doctor.nvcc, "version", lambda compiler: "13.0")
    (found,) = doctor._nvcc_for_driver()
    assert (found.ok, f"CUDA {driver // 1000}." in found.state) == (ok, True)


def test_what_the_compilers_here_mean_for_the_records_is_said():
    told = [each.state for each in doctor.diagnose() if each.what == "records' compilers"]
    counts = [int(state.partition(" of ")[0]) for state in told]
    known = [record for name in ops.all_ops() for record in files.read_all(paths.shipped_records(), name)]
    assert sum(counts) == sum(not lookup.missing_tool(record.backend) for record in known)
    assert all("stale" in state or "those here" in state for state in told)
