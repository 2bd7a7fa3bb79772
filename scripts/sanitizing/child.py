"""What runs under the tool: a piece's checks, one after another, until its time is up.

Inputs are drawn, references computed and results compared on the CPU: under a tool each of torch's kernels takes long to load,
and memcheck makes each of its tensors an allocation. Twenty queries' reference took longer than all else.
"""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsa_codegen.gpu import Gpu
from dsa_codegen.kernels.build import build
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.problem.draw import Draw
from dsa_codegen.problem.op import Accuracy, Case, Inputs, Op, Outputs
from dsa_codegen.proof.verify import verify

from .cases import Check, operation, sms
from .sources import label, run_in_place


def run(file: Path, until: float) -> None:
    """Verify the checks of the piece in ``file``; none is begun after ``until`` (seconds of the clock).

    Says of each when it begins and that it has ended, so that a report tells how far a process came that was stopped.
    """
    gpu, piece = pickle.loads(file.read_bytes())
    torch.zeros(1, device="cuda")  # makes the context, which a driver asked before it would report to be missing
    loaded: dict[str, Variant] = {}
    ended = 0
    for nth, check in enumerate(piece.checks):
        if time.time() > until:
            break
        print(f"began {nth}: {label(check.subject)} {check.id}", flush=True)
        _verify(check, loaded, gpu)
        torch.cuda.synchronize()
        ended += 1
    print(f"ended {ended} of {len(piece.checks)} checks", flush=True)


def _verify(check: Check, loaded: dict[str, Variant], gpu: Gpu) -> None:
    subject = check.subject
    name, count = label(subject), sms(check, gpu)
    if name not in loaded:
        kernels = build(run_in_place(subject), gpu).load()
        loaded[name] = Variant(subject.op, subject.spec, subject.config, gpu, kernels)
    variant = replace(loaded[name].within(count), op=on_host(operation(check)))
    accuracy = verify(variant, check.case, "cuda")
    if not accuracy.passed:
        raise SystemExit(f"{subject.op.name} {subject.spec.id} {subject.config} {check.id}: {accuracy.detail}")


def on_host(op: Op) -> Op:
    """The operation with everything but its kernels on the CPU."""
    host = copy.copy(op)

    def inputs(spec: Any, case: Case, draw: Draw) -> Inputs:
        return moved(op.inputs(spec, case, Draw(draw.seed)), draw.device)

    def reference(spec: Any, inputs: Inputs) -> Outputs:
        return op.reference(spec, moved(inputs, "cpu"))

    def check(spec: Any, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        return op.check(spec, moved(inputs, "cpu"), moved(outputs, "cpu"), reference)

    host.inputs, host.reference, host.check = inputs, reference, check  # type: ignore[method-assign]
    return host


def moved(values: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The tensors of a call on another device, where strides of a padded or spaced one are kept."""
    return {name: _moved(value, device) if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def _moved(value: torch.Tensor, device: str) -> torch.Tensor:
    if value.is_contiguous() or not value.numel():
        return value.to(device)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    whole = value.as_strided((extent,), (1,)).to(device)
    return whole.as_strided(value.shape, value.stride())
