"""What runs under the tool: a piece's checks, one after another, until its time is up."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import torch

from dsa_codegen.gpu import Gpu
from dsa_codegen.kernels.build import build
from dsa_codegen.kernels.variant import Variant
from dsa_codegen.proof.verify import verify

from .cases import Check, operation, sms
from .sources import label, rendered


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
    name = label(subject)
    if name not in loaded:
        kernels = build(rendered(subject), gpu).load()
        loaded[name] = Variant(subject.op, subject.spec, subject.config, gpu, kernels).within(sms(check.tool, subject, gpu))
    variant = Variant(operation(check), subject.spec, subject.config, loaded[name].gpu, loaded[name].kernels)
    accuracy = verify(variant, check.case, "cuda")
    if not accuracy.passed:
        raise SystemExit(f"{subject.op.name} {subject.spec.id} {subject.config} {check.id}: {accuracy.detail}")
