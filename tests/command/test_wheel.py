"""The wheel alone, elsewhere: its command, its functions, and the templates and records inside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSIDE = """
import json, sys
from pathlib import Path
import torch
import dsa_codegen as dsa
from dsa_codegen import cli, gpu, paths
assert not paths.is_checkout() and all((Path(dsa.__file__).parent / name).exists() for name in ("py.typed", "runtime/hits.c"))
values, scale = dsa.quantize_index_k(torch.randn(5, 128).bfloat16())
chosen = dsa.select(torch.arange(300.0)[None], torch.tensor([300], dtype=torch.int32), 64)
assert (values.shape, scale.shape, chosen[0, 0]) == ((5, 128), (5,), 236)
op = dsa.ops.get("indexer")
spec = op.specs(dsa.preset("deepseek-v3.2"))[0]
found = dsa.chosen(op, spec, op.sizes_type(queries=4096, context=32768), gpu.resolve("H100"))
print(json.dumps({"package": dsa.__file__, "templates": str(paths.templates()), "origin": found.origin}))
sys.argv = ["dsa", "list", "--gpu", "H100", "--json"]
cli.main()
"""


def uv(*arguments: object) -> None:
    """Run uv; what it says is shown where it fails."""
    done = subprocess.run([sys.executable, "-m", "uv", *map(str, arguments)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    uv("build", "--quiet", "--wheel", "--out-dir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


def check(python: Path, command: Path, folder: Path, **environment: str) -> None:
    """What a user has who installed it, in a folder that knows nothing of the checkout."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "DSA_CACHE_DIR": str(folder / "cache"), **environment}

    def run(*words: object) -> str:
        done = subprocess.run([*map(str, words)], cwd=folder, env=variables, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    facts, listed = run(python, "-c", INSIDE).split("\n", 1)
    told = json.loads(facts)
    assert told["origin"] in ("tuned", "borrowed"), "no record of the wheel serves"
    assert Path(told["templates"]).is_relative_to(Path(told["package"]).parent)
    assert not Path(told["package"]).is_relative_to(ROOT)
    shipped = [json.loads(path.read_text())["records"] for path in (ROOT / "tuned" / "h100").glob("*.json")]
    assert len(json.loads(listed)) == sum(map(len, shipped))
    run(command, "tune", "--gpu", "H100", "--preset", "tiny", "--op", "quantize", "--trials", "1", "--folder", "records")
    assert json.loads((folder / "records" / "h100" / "quantize.json").read_text())["records"]


def test_it_works_beside_the_packages_that_are_here(wheel, tmp_path):
    site = tmp_path / "site"
    uv("pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", site, wheel)
    check(Path(sys.executable), site / "bin" / "dsa", tmp_path, PYTHONPATH=str(site))


@pytest.mark.slow
def test_it_works_in_an_environment_of_its_own(wheel, tmp_path):
    """With all that it names, from the public index: torch with CUDA is 3 GB."""
    own = tmp_path / "environment"
    uv("venv", "--quiet", "--python", sys.executable, own)
    uv("pip", "install", "--quiet", "--no-config", "--python", own / "bin" / "python", f"{wheel}[tune,tilelang]")
    check(own / "bin" / "python", own / "bin" / "dsa", tmp_path)
