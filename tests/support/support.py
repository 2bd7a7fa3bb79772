"""Checks that hold for every operation; each test file calls them with its own specs and configs."""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton as triton_package

from dsa_codegen import ops
from dsa_codegen.gpu import Gpu, resolve
from dsa_codegen.kernels import build, render
from dsa_codegen.kernels.backends import triton
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.problem import presets
from dsa_codegen.problem.op import Case, Config, Inputs, Op, Outputs
from dsa_codegen.problem.values import Spec
from dsa_codegen.proof.verify import interpret, poison
from dsa_codegen.worker import Worker

H200 = resolve("H200")
FURTHER = pytest.mark.slow
"""Of compilations that take nvcc 6 to 20 s each: one of each kind runs everywhere, the further ones with ``-m slow``."""
UNMEASURED = {"adapt", "expand", "pool"}
"""Operations that nothing has been measured of yet."""
UNMEASURED_H100 = set(ops.all_ops()) - {"gather_paged", "quantize", "quantize_paged", "select"}
"""Without records of the H100's own."""
SPILLS_OF = (3, 6)  # the Triton that the templates were tuned with; each compiler allocates registers in its own way


def of_preset(op: Op, name: str = "tiny") -> Sequence[Spec]:
    """The operation's specs of a preset, or of one whose kind of attention it is for: grouped queries, pooled keys."""
    models = (presets.preset(each) for each in (name, "tiny-gqa", "glm-5.3-flash"))
    return next(found for model in models if (found := op.specs(model)))


def default(op: Op, spec: Spec, backend: str, gpu: Gpu = H200) -> Config:
    """The default config, or the first that fits where the default belongs to another backend."""
    config = op.default_config(spec, op.workloads(spec)[0].sizes, gpu)
    return config if config.backend == backend else op.seed_config(spec, backend, gpu)


def arguments(op: Op, spec: Spec, inputs: Inputs) -> list[Any]:
    """The arguments of the operator for inputs as the operation names them, options as the spec has them."""
    schema = torch._C.parse_schema(f"any::{op.function}{op.schema}")
    names = "weights starts lengths sink extra_cache extra_indices extra_lengths norm_weight norm_bias"
    absent = dict.fromkeys(names.split())
    options = {**spec.to_dict(), **absent}
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    options = {**defaults, **options}
    return [inputs.get(argument.name, options.get(argument.name)) for argument in schema.arguments]


def completed(op: Op, *args: Any) -> list[Any]:
    """The arguments, and behind them the defaults of the operator's schema."""
    schema = torch._C.parse_schema(f"any::{op.function}{op.schema}")
    return [*args, *(argument.default_value for argument in schema.arguments[len(args) :])]


def assert_matches_reference(interpreter: Worker, op: Op, spec: Spec, config: Config, case: Case, repeats: int = 1) -> None:
    """The rendered Triton kernels, interpreted on the CPU, agree with the reference within the op's limits."""
    assert not op.violations(spec, config, H200)
    accuracy = interpreter.call(interpret, op.name, spec, config, case, H200, repeats)
    assert accuracy.passed, accuracy.detail


def run_interpreted(interpreter: Worker, op_name: str, spec: Spec, config: Config, inputs: Inputs) -> Outputs:
    """What the rendered Triton kernels make of these inputs on the CPU."""
    return _unpacked(interpreter.call(_run_packed, op_name, spec, config, _packed(inputs)))


def _packed(tensors: Mapping[str, Any]) -> bytes:
    """Tensors themselves would travel as shared memory, which workers have none of."""
    written = io.BytesIO()
    torch.save(dict(tensors), written)
    return written.getvalue()


def _unpacked(written: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(written))


def _run_packed(op_name: str, spec: Spec, config: Config, packed: bytes) -> bytes:
    op, inputs = ops.get(op_name), _unpacked(packed)
    rendered = render.render(op, spec, config)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"{rendered.module_name}.py"
        source.write_text(rendered.text)
        outputs = op.allocate(spec, inputs)
        poison(outputs)
        return _packed(Variant(op, spec, config, H200, triton.interpreted(source)).run(inputs, outputs))


def assert_compiles(op: Op, spec: Spec, config: Config, gpu: Gpu = H200, spills: int = 0) -> None:
    """The rendered source compiles for the GPU's architecture, within its limits and without spilling registers."""
    assert not op.violations(spec, config, gpu)
    built = build.build(render.render(op, spec, config), gpu)
    for kernel, usage in built.resources.items():
        assert usage.smem <= gpu.smem_per_block, (kernel, usage)
        if config.backend in ("tilelang", "cuda") or render.release(render.installed_triton()) == SPILLS_OF:
            assert usage.spills <= spills, (kernel, usage)
    if config.backend == "cuda" and re.search(r"\bcopy16(?:_of_line)?\((?!u32 to)", built.rendered.code):  # it is called
        assert_policies_are_in_even_registers(built)


def assert_policies_are_in_even_registers(built: build.Built) -> None:
    """Of copies with an L2 policy: CUDA 13.0 may put it into an odd register, which is an illegal instruction."""
    disassembler = Path(triton_package.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if disassembler.exists():
        (binary,) = built.folder.glob("*.cubin")
        text = subprocess.run([disassembler, "-c", binary], capture_output=True, text=True, check=True).stdout
        policies = re.findall(r"LDGSTS.*desc\[UR(\d+)\]", text)
        assert policies
        assert not [register for register in policies if int(register) % 2]
