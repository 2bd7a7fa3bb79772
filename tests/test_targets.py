"""Every operation's default kernels compile for every GPU generation that it claims, within its limits."""

from __future__ import annotations

import pytest

from dsa_codegen import ops, presets
from dsa_codegen.errors import NoConfig
from dsa_codegen.gpu import resolve

from support import assert_compiles

GPUS = ["a100", "l40s", "h200", "b200", "rtx5090"]
SMALL_SPILL = 64  # bytes; a spill of this size costs less than the smaller tile that would avoid it


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("op", ops.all_ops().values(), ids=lambda op: op.name)
def test_the_triton_template_compiles(op, gpu):
    target = resolve(gpu)
    if target.capability < op.min_capability:
        pytest.skip(f"{op.name} needs FP8 arithmetic (sm_{op.min_capability})")
    for spec in op.specs(presets.preset("deepseek-v3.2"))[:1]:
        assert_compiles(op, spec, op.seed_config(spec, "triton", target), target, spills=SMALL_SPILL)


@pytest.mark.parametrize("name", presets.names())
@pytest.mark.parametrize("gpu", GPUS)
def test_defaults_break_no_constraint(name, gpu):
    target = resolve(gpu)
    for op in ops.all_ops().values():
        for spec in op.specs(presets.preset(name)) if target.capability >= op.min_capability else ():
            for case in op.workloads(spec):
                config = op.default_config(spec, case.sizes, target)
                assert not op.violations(spec, config, target), (op.name, case.id)


def test_a_gpu_that_is_too_small_is_told_why():
    tiny = resolve("h200").__class__(**{**vars(resolve("h200")), "smem_per_block": 1024})
    op = ops.get("indexer")
    with pytest.raises(NoConfig, match="smem"):
        op.seed_config(op.specs(presets.preset("tiny"))[0], "triton", tiny)
