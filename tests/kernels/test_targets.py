"""Every operation's default kernels compile for every GPU generation that it claims, within its limits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsa_codegen import ops
from dsa_codegen.errors import NoConfig
from dsa_codegen.gpu import resolve
from dsa_codegen.problem import presets

from support import FURTHER, assert_compiles, of_preset

ROOT = Path(__file__).resolve().parents[2]
GPUS = ["a100", "l40s", "h200", "b200", "rtx5090"]
SMALL_SPILL = 64  # bytes; a spill of this size costs less than the smaller tile that would avoid it
LONG = {"attention", "attention_backward", "attention_dense", "attention_paged", "indexer_backward", "select"}
"""Operations that take a compiler 2 to 20 s for each GPU."""


def defaults():
    """Operations and GPUs: all for Hopper, quick ones for the oldest and the newest data center GPU, the others further."""
    for op in ops.all_ops().values():
        for gpu in GPUS:
            here = gpu == "h200" or (gpu in ("a100", "b200") and op.name not in LONG)
            yield pytest.param(op, gpu, id=f"{op.name}-{gpu}", marks=() if here else FURTHER)


@pytest.mark.parametrize(("op", "gpu"), list(defaults()))
def test_the_default_compiles(op, gpu):
    """The first workload's; all of them, of every preset and Triton, stand in docs/matrix.md, and no template is newer."""
    target = resolve(gpu)
    if target.capability < op.min_capability:
        pytest.skip(f"{op.name} needs FP8 arithmetic (sm_{op.min_capability})")
    for spec in of_preset(op, "deepseek-v3.2")[:1]:
        sizes = op.workloads(spec)[0].sizes
        assert_compiles(op, spec, op.default_config(spec, sizes, target), target, spills=SMALL_SPILL)


@pytest.mark.parametrize("name", presets.names())
@pytest.mark.parametrize("gpu", GPUS)
def test_defaults_break_no_constraint(name, gpu):
    target = resolve(gpu)
    for op in ops.all_ops().values():
        for spec in op.specs(presets.preset(name)) if target.capability >= op.min_capability else ():
            for case in op.workloads(spec):
                config = op.default_config(spec, case.sizes, target)
                assert not op.violations(spec, config, target), (op.name, case.id)


@pytest.mark.parametrize("op", ops.all_ops().values(), ids=lambda op: op.name)
def test_every_backend_has_a_default_of_its_own(op):
    gpu = resolve("h200")
    for spec in of_preset(op, "deepseek-v3.2"):
        for case in op.workloads(spec):
            for backend in op.backends:
                config = op.default_config(spec, case.sizes, gpu, backend)
                assert config.backend == backend
                assert not op.violations(spec, config, gpu, case.sizes.bucket())
            assert op.default_config(spec, case.sizes, gpu).backend == next(iter(op.guesses(spec, case.sizes, gpu))).backend


def test_without_a_guess_that_fits_the_first_config_that_does_is_taken():
    gpu, op = resolve("h200"), ops.get("indexer")
    spec = op.specs(presets.preset("deepseek-v3.2"))[0]
    sizes = op.workloads(spec)[0].sizes
    assert "tilelang" not in {config.backend for config in op.guesses(spec, sizes, gpu)}
    assert op.default_config(spec, sizes, gpu, "tilelang") == op.seed_config(spec, "tilelang", gpu)


def test_a_gpu_that_is_too_small_is_told_why():
    tiny = resolve("h200").__class__(**{**vars(resolve("h200")), "smem_per_block": 1024})
    op = ops.get("indexer")
    with pytest.raises(NoConfig, match="smem"):
        op.seed_config(op.specs(presets.preset("tiny"))[0], "triton", tiny)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
def test_a_plain_template_compiles_for_amd(target):
    """The smallest; docs/amd.md has all of them, by scripts/amd_targets.py."""
    triton = pytest.importorskip("triton")
    if "amd" not in triton.backends.backends:
        pytest.skip("this Triton has no HIP backend")
    command = [sys.executable, ROOT / "scripts" / "amd_targets.py", "--one", "quantize", "--target", target]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.strip().endswith(" B"), said.stderr
