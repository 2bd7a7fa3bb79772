"""Dispatch: (op, spec, sizes, GPU) -> a loaded variant. Looks up, builds once, counts; never tunes, never synchronises."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import gpu as gpus
from .build import build, build_all
from .errors import CaptureError, NoGpu
from .lookup import Found, lookup
from .op import Config, Inputs, Op, Outputs
from .render import render
from .values import Bucket, Sizes, Spec, describe
from .variant import Variant


class Untuned(UserWarning):
    """No record serves a call: the default config is used. The message names the command that tunes it."""


_variants: dict[tuple[str, Spec, Bucket, int], Variant] = {}
_overrides: dict[str, Config] = {}
_counts: Counter[str] = Counter()
_lock = threading.Lock()


def call(op: Op, args: Iterable[Any]) -> Outputs:
    """Check the arguments, find the variant for their spec and sizes, and launch it on the current stream.

    Tensors that are not on a CUDA device go to the operation's reference, so that a model runs anywhere.

    Raises:
        InputError: an argument is wrong; nothing was launched.
        SpecError: a size or option is one that no kernel serves; nothing was launched.
        CaptureError: the variant is not built yet and a CUDA graph is being captured.
    """
    spec, sizes, inputs = op.bind(*args)
    device = _device(inputs)
    if device.type != "cuda":
        return _reference(op, spec, inputs)
    if device.index != torch.cuda.current_device():  # kernels are loaded and launched on the current device
        with torch.cuda.device(device):
            return _run(op, spec, sizes, inputs, device)
    return _run(op, spec, sizes, inputs, device)


def _run(op: Op, spec: Spec, sizes: Sizes, inputs: Inputs, device: torch.device) -> Outputs:
    key = (op.name, spec, sizes.bucket(), device.index)
    variant = _variants.get(key) or _load(op, spec, sizes, key)
    _counts[f"{op.name}: calls"] += 1
    return variant.run(inputs, op.allocate(spec, inputs))


def stats() -> dict[str, int]:
    """What happened so far: calls per operation, and where each variant's config came from when it was loaded."""
    return dict(sorted(_counts.items()))


def reset() -> None:
    """Forget loaded variants and counts: records written since are seen by the next call."""
    with _lock:
        _variants.clear()
        _counts.clear()


@contextmanager
def override(op: Op, config: Config) -> Iterator[None]:
    """Use ``config`` for every call of ``op`` inside the block, whatever the records say (for trying one out)."""
    with _lock:
        before, _overrides[op.name] = _overrides.get(op.name), config
        _forget(op)
    try:
        yield
    finally:
        with _lock:
            if before is None:
                del _overrides[op.name]
            else:
                _overrides[op.name] = before
            _forget(op)


def chosen(op: Op, spec: Spec, sizes: Sizes, gpu: gpus.Gpu) -> Found:
    """Which config the dispatcher uses for these sizes on this GPU, and why; builds nothing."""
    forced = _overrides.get(op.name)
    return Found(forced, "override") if forced else lookup(op, spec, sizes, gpu)


def warmup(wanted: Iterable[tuple[Op, Spec, Sizes]], processes: int | None = None) -> int:
    """Build in parallel and load every variant that these calls will need; returns how many were not loaded before.

    Run it before the first request and before any CUDA graph is captured.

    Raises:
        NoGpu: there is no CUDA device.
    """
    gpu = gpus.detect()
    if gpu is None:
        raise NoGpu("warmup")
    device = torch.cuda.current_device()
    missing: dict[tuple[str, Spec, Bucket, int], tuple[Op, Spec, Sizes]] = {}
    for op, spec, sizes in wanted:
        key = (op.name, spec, sizes.bucket(), device)
        if key not in _variants:
            missing[key] = (op, spec, sizes)
    build_all((render(op, spec, chosen(op, spec, sizes, gpu).config) for op, spec, sizes in missing.values()), gpu, processes)
    for key, (op, spec, sizes) in missing.items():
        _load(op, spec, sizes, key)
    return len(missing)


def _load(op: Op, spec: Spec, sizes: Sizes, key: tuple[str, Spec, Bucket, int]) -> Variant:
    if torch.cuda.is_current_stream_capturing():
        raise CaptureError(op.name)
    with _lock:
        if key in _variants:
            return _variants[key]
        gpu = gpus.detect()
        if gpu is None:  # a device that is older than any GPU kernels are generated for
            raise NoGpu(op.name)
        found = chosen(op, spec, sizes, gpu)
        _report(op, sizes, gpu, found)
        kernels = build(render(op, spec, found.config), gpu).load()
        variant = _variants[key] = Variant(op, spec, found.config, gpu, kernels)
        return variant


def _report(op: Op, sizes: Sizes, gpu: gpus.Gpu, found: Found) -> None:
    _counts[f"{op.name}: {found.origin}"] += 1
    for note in found.notes:
        warnings.warn(f"{op.name}: {note}", Untuned, stacklevel=4)
    if found.origin == "default":
        warnings.warn(
            f"{op.name} is not tuned for {gpu.name} at {describe(sizes.bucket())}; its default config is used. "
            f"Tune it: python cli.py tune --gpu {gpu.id} --op {op.name} --preset <your model>",
            Untuned,
            stacklevel=4,
        )


def _forget(op: Op) -> None:
    for key in [key for key in _variants if key[0] == op.name]:
        del _variants[key]


def _device(inputs: Inputs) -> torch.device:
    return next(value.device for value in inputs.values() if isinstance(value, Tensor))


def _reference(op: Op, spec: Spec, inputs: Inputs) -> Outputs:
    _counts[f"{op.name}: reference"] += 1
    outputs = op.allocate(spec, inputs)
    for name, value in op.reference(spec, inputs).items():
        outputs[name].copy_(value)
    return outputs
