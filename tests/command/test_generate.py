"""What ``generate`` writes can be found by name, and runs by itself in a folder where this package cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dsa_codegen.command.generate import generate
from dsa_codegen.gpu import resolve
from dsa_codegen.problem import presets

ROOT = Path(__file__).resolve().parents[2]
H200 = resolve("h200")
NO_PACKAGE = "import sys; sys.modules['dsa_codegen'] = None\n"  # any import of it raises


def alone(folder: Path, code: str, **environment: str) -> str:
    """Run Python in a folder, without the package; returns what it printed."""
    packages = [path for path in sys.path if path and not Path(path).resolve().is_relative_to(ROOT)]  # where compilers may lie
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(packages)}
    done = subprocess.run(
        [sys.executable, "-c", NO_PACKAGE + textwrap.dedent(code)],
        cwd=folder,
        env={**variables, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    """All modules of the small model, as the dispatcher chooses them."""
    folder = tmp_path_factory.mktemp("generated")
    generate(presets.preset("tiny"), H200, folder)
    return folder


def entries(folder: Path) -> list[dict]:
    return json.loads((folder / "index.json").read_text())


def test_names_say_operation_backend_spec_and_config(tmp_path):
    written = generate(presets.preset("tiny"), H200, tmp_path, ["select"], "triton")
    names = {each.path.stem for each in written}
    assert all(name.startswith("select_triton_topk64_") and "_block_n" in name for name in names)
    for each in written:
        assert each.path.stem.isidentifier()
        assert all(f"{name}{each.config[name]}" in each.path.stem for name in ("block_n", "num_warps"))


def test_the_index_names_every_module_and_every_size(everything):
    found = entries(everything)
    assert {entry["module"] for entry in found} == {path.stem for path in everything.glob("*.py")} - {"launch", "interpreter"}
    calls = {(entry["op"], str(entry["spec"]), served["sizes"]) for entry in found for served in entry["serves"]}
    assert len(calls) == sum(len(entry["serves"]) for entry in found) > len(found)
    for entry in found:
        module = (everything / f"{entry['module']}.py").read_text()
        assert all(f'"{launch["kernel"]}"' in module for launch in entry["call"]["launches"])


def test_every_module_imports_without_the_package(everything):
    code = """
        import launch
        for name in launch.index():
            module = launch.load(name)
            print(*(getattr(module, "SIGNATURES", None) or module.KERNELS))
    """
    assert len(alone(everything, code).splitlines()) == len(entries(everything))


def test_a_module_launches_by_itself(tmp_path):
    """In Triton's interpreter: the selection's small call chooses what a stable sort of its random scores chooses."""
    generate(presets.preset("tiny"), H200, tmp_path, ["select"], "triton")
    code = """
        import launch, torch
        checked = 0
        for name, entry in launch.index().items():
            if entry["spec"]["output"] != "tokens":
                continue
            found = launch.run(name, "cpu")
            for row, (scores, chosen) in enumerate(zip(found["scores"], found["chosen"])):
                low, high = (int(found[bound][row]) if bound in found else 0 for bound in ("starts", "ends"))
                low, high = max(low, 0), min(high, scores.numel())
                window = scores[low:high]
                best = torch.sort(window, descending=True, stable=True).indices[: chosen.numel()].sort().values + low
                assert chosen[: best.numel()].tolist() == best.tolist(), (row, chosen, best)
                assert (chosen[best.numel() :] == -1).all()
                checked += best.numel() > 0
        print(checked)
    """
    assert int(alone(tmp_path, code, TRITON_INTERPRET="1")) > 0


def test_the_launcher_is_a_command(tmp_path):
    generate(presets.preset("tiny"), H200, tmp_path, ["quantize"])
    (name, *_) = (entry["module"] for entry in entries(tmp_path))
    listed = alone(tmp_path, "sys.argv = ['launch.py']; import launch; launch.main()")
    assert name in listed and "tokens" in listed
    shown = alone(tmp_path, f"sys.argv = ['launch.py', '{name}']; import launch; launch.main()", TRITON_INTERPRET="1")
    assert "float8_e4m3fn" in shown


@pytest.mark.parametrize(("op", "backend"), [("quantize", "triton"), ("indexer_paged", "gluon")])
def test_a_module_compiles_by_itself(tmp_path, op, backend):
    generate(presets.preset("tiny"), H200, tmp_path, [op], backend)
    code = """
        import launch
        from triton.backends.compiler import GPUTarget
        name = next(iter(launch.index()))
        module = launch.load(name)
        for kernel in module.SIGNATURES:
            assert launch.compile_kernel(module, kernel, GPUTarget("cuda", 90, 32)).asm["cubin"]
        print("compiled")
    """
    assert alone(tmp_path, code, TRITON_CACHE_DIR=str(tmp_path / "cache")) == "compiled\n"


@pytest.mark.gpu
def test_every_module_launches_on_the_gpu(tmp_path):
    from dsa_codegen import gpu

    generate(presets.preset("tiny"), gpu.resolve("auto"), tmp_path)
    code = """
        import launch, torch
        for name in launch.index():
            launch.run(name, "cuda")
            torch.cuda.synchronize()
        print("launched")
    """
    assert alone(tmp_path, code).endswith("launched\n")
