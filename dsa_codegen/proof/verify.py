"""Verify: run a case on fresh random inputs and poisoned outputs, compare with the reference, repeat bit for bit."""

from __future__ import annotations

import math
import tempfile
import zlib
from pathlib import Path

import torch

from .. import ops
from ..gpu import Gpu
from ..kernels.render import render
from ..kernels.variant import Variant
from ..problem.compare import same_bits
from ..problem.draw import Draw
from ..problem.exact import exactly
from ..problem.op import Accuracy, Case, Config, Inputs, Outputs
from ..problem.values import Spec
from .fences import STRAY, broken, fenced


def poison(outputs: Outputs) -> None:
    """Fill with values that no kernel may leave behind: NaN, or 0x5A in every byte of an integer tensor."""
    for tensor in outputs.values():
        if tensor.is_floating_point() and tensor.element_size() > 1:
            tensor.fill_(math.nan)
        else:
            tensor.view(torch.uint8).fill_(0x5A)


def seed_of(text: str) -> int:
    """A seed fixed by a readable id, so that a failing case can be run again by name."""
    return zlib.crc32(text.encode())


def interpret(op_name: str, spec: Spec, config: Config, case: Case, gpu: Gpu, repeats: int = 1) -> Accuracy:
    """Verify a Triton config of one case on the CPU; a job for a ``Worker`` with ``TRITON_INTERPRET=1``.

    There blocks run one after another: a repeat can only show what was read before it was written.
    """
    from ..kernels.backends import triton

    op = ops.get(op_name)
    rendered = render(op, spec, config)
    with tempfile.TemporaryDirectory(prefix="dsa-interpret-") as folder:
        source = Path(folder) / f"{rendered.module_name}.py"
        source.write_text(rendered.text)
        return verify(Variant(op, spec, config, gpu, triton.interpreted(source)), case, "cpu", repeats=repeats)


def verify(variant: Variant, case: Case, device: str, *, seed: int | None = None, repeats: int = 1) -> Accuracy:
    """Run one case on fresh random inputs and poisoned outputs and compare with the reference.

    With ``repeats`` > 1 every further run must reproduce the first bit for bit, where the operation says that it does.
    A write beside an output (within 4096 bytes) fails, too.
    """
    op, spec = variant.op, variant.spec
    draw = Draw(seed_of(f"{op.name}-{case.id}") if seed is None else seed, device)
    inputs = op.inputs(spec, case, draw)
    outputs, strays = _run_poisoned(variant, inputs)
    if strays:
        return STRAY
    with exactly():
        accuracy = op.check(spec, inputs, outputs, op.reference(spec, inputs))
    for _ in range(repeats - 1 if accuracy.passed and op.repeatable(spec) else 0):
        again, strays = _run_poisoned(variant, inputs)
        if strays:
            return STRAY
        if not all(same_bits(outputs[name], again[name]) for name in outputs):
            return Accuracy(False, accuracy.max_abs, accuracy.similarity, "a repeat differs bitwise")
    return accuracy


def _run_poisoned(variant: Variant, inputs: Inputs) -> tuple[Outputs, bool]:
    """The outputs of a run, and whether it wrote beside them."""
    outputs, fences = fenced(variant.op.allocate(variant.spec, inputs), inputs)
    poison(outputs)
    variant.run(inputs, outputs)
    # An operation that writes into one of its inputs hands out that tensor: keep this run's bits from the next run.
    written = [id(value) for value in inputs.values()]
    kept = {name: tensor.clone() if id(tensor) in written else tensor for name, tensor in outputs.items()}
    return kept, broken(fences)
