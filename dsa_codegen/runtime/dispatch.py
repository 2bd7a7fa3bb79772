"""Dispatch: (op, spec, sizes, GPU) -> a loaded variant. Looks up, builds once, counts; never tunes, never synchronises.

What a folder of kernels built ahead holds (``prebuilt``) comes before all records; then nothing is looked up or built.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import gpu as gpus
from ..errors import BuildError, CaptureError, NoGpu
from ..invocation import command
from ..kernels.backends import Launchable
from ..kernels.build import build, build_all, find
from ..kernels.render import render
from ..kernels.variant import Variant
from ..problem.exact import exactly
from ..problem.op import Config, Inputs, Op, Outputs
from ..problem.values import Bucket, Sizes, Spec, describe
from ..records import overrides
from ..records.lookup import Found, lookup, stand_ins
from . import compiled, guards, hits, plans, prebuilt
from .tally import Tally


class Untuned(UserWarning):
    """No record serves a call: the default config is used. The message names the command that tunes it."""


# Without torch's question whether CUDA is there: where there is a plan it is.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

Key = tuple[str, Spec, Bucket, int]
"""What a loaded variant serves: operation, spec, bucket of sizes, CUDA device."""

_variants: dict[Key, Variant] = {}
_kernels: dict[tuple[str, int], Mapping[str, Launchable]] = {}
"""What is loaded, by the source's sha and the device."""
_overrides: dict[str, tuple[list[Config], ...]] = {}
"""By operation, what each open block wants, the latest last; each in a list of its own, which tells it from an equal wish."""
_tallies: dict[tuple[str, str], Tally] = {}
_lock = threading.Lock()
_plans: dict[plans.Key, plans.Plan] = {}
_MOST_PLANS = 4096
"""They are forgotten together: sizes of decoding change with every step, and a step's plans serve all of a model's layers."""
_guarded: dict[plans.Key, tuple[tuple[guards.Guard, plans.Plan, bool], ...]] = {}
"""Plans again, the latest first, by what guards do not look at, and whether tensors require gradients: to find one here takes a
third of the time."""
_MOST_GUARDS = 8


def call(op: Op, args: Iterable[Any], sms: int | None = None) -> Outputs:
    """Check the arguments, find the variant for their spec and sizes, and launch it on the current stream.

    Tensors that are not on a CUDA device go to the operation's reference, so that a model runs anywhere.

    Args:
        sms: the grid is made as for a GPU of so many SMs, so that others keep theirs; all of them where absent.

    Raises:
        InputError: an argument is wrong; nothing was launched.
        SpecError: a size or option is one that no kernel serves; nothing was launched.
        CaptureError: the variant is not built yet and a CUDA graph is being captured.
        PrebuiltError: ``DSA_BUILDS`` names a folder that cannot serve here.
    """
    args = tuple(args)
    apart = plans.taken_apart(op.name, (*args, sms) if op.budgeted else args)
    plan = None if apart is None else _plans.get(apart[0])
    if apart is not None and plan is not None:
        return dict(zip(plan.names, _launched(plan, *apart[1:]), strict=True))
    spec, sizes, inputs = op.bind(*args)
    device = _device(inputs)
    if device.type != "cuda":
        return _reference(op, spec, inputs)
    if device.index != torch.cuda.current_device():  # kernels are loaded and launched on the current device
        with torch.cuda.device(device):
            return _run(op, spec, sizes, inputs, device, apart, sms)
    return _run(op, spec, sizes, inputs, device, apart, sms)


Results = tuple[Sequence[str], Sequence[Tensor]]
"""Outputs as a plan gives them: names and tensors."""


def call_again(op: Op, args: tuple[Any, ...], form: hits.Form | None = None) -> Results | None:
    """What ``call`` does, where it was called before with arguments that look the same; None, and nothing done, elsewhere.

    So it is where gradients are wanted, or something on this thread looks at the operators that torch runs: a guard that was
    made without them tells.

    Args:
        args: the SMs behind them, where grids are made for a number of them.
        form: takes such calls over, where it can.
    """
    sketch = guards.sketched(op.name, args)
    if sketch is None:
        return None
    key, tensors, addresses = sketch
    for guard, plan, gradients in _guarded.get(key, ()):
        if guard(*tensors) and not (gradients and torch.is_grad_enabled()):
            _hand_over(form, key, args, guard, gradients, plan)
            run = plan.run if plan.device == current_device() else functools.partial(_launched, plan)
            return plan.names, run(tensors, addresses)
    if guards.watched() or (torch.is_grad_enabled() and True in [each.requires_grad for each in tensors]):
        return None
    apart = plans.completed(sketch)
    found = None if apart is None else _plans.get(apart[0])
    if apart is None or found is None:
        return None
    made, gradients = _guard(key, apart, found)
    if made is not None:
        _hand_over(form, key, args, made, gradients, found)
    return found.names, _launched(found, tensors, addresses)


def _guard(key: plans.Key, apart: plans.Call, plan: plans.Plan) -> tuple[guards.Guard | None, bool]:
    """Let the next call like this one be found by a guard; a few for calls that differ in their tensors alone.

    Returns:
        The guard, and whether tensors require gradients.
    """
    guard, gradients = guards.guard_of(apart[1]), True in [each.requires_grad for each in apart[1]]
    with _lock:
        if guard is not None and _plans.get(apart[0]) is plan:
            _guarded[key] = ((guard, plan, gradients), *_guarded.get(key, ())[: _MOST_GUARDS - 1])
    return guard, gradients


def _hand_over(
    form: hits.Form | None, key: plans.Key, args: tuple[Any, ...], guard: guards.Guard, gradients: bool, plan: plans.Plan
) -> None:
    """Let C serve the next such call; here none arrives that it knows, but from another device."""
    if form is None or plan.in_c is False or plan.device != current_device():
        return
    with _lock:
        if any(plan is each for _, each, _ in _guarded.get(key, ())):  # it may have been forgotten
            form.learn(args, guard, gradients, plan, current_device)


def _launched(plan: plans.Plan, tensors: Sequence[Tensor], addresses: Sequence[int]) -> Sequence[Tensor]:
    if plan.device == current_device():
        return plan.run(tensors, addresses)
    with torch.cuda.device(plan.device):
        return plan.run(tensors, addresses)


def _run(
    op: Op, spec: Spec, sizes: Sizes, inputs: Inputs, device: torch.device, apart: plans.Call | None, sms: int | None
) -> Outputs:
    key = (op.name, spec, sizes.bucket(), device.index)
    loaded = _variants.get(key) or _first_call(op, spec, sizes, key)
    variant = loaded if sms is None else loaded.within(sms)
    _count(op, "calls")
    outputs = op.allocate(spec, inputs)
    if apart is None:
        return variant.run(inputs, outputs)
    launches = variant.launch(inputs, outputs)
    plan = plans.record(device.index, _tally(op, "calls"), variant.kernels, apart[1], outputs, launches)
    if plan is not None:
        _keep(apart[0], plan, key, loaded)
    return outputs


def _keep(call: plans.Key, plan: plans.Plan, key: Key, variant: Variant) -> None:
    with _lock:
        if _variants.get(key) is variant:  # it may have been forgotten since it was launched
            if len(_plans) >= _MOST_PLANS:
                _plans.clear()
                _guarded.clear()
                hits.forget()
            _plans[call] = plan


def stats() -> dict[str, int]:
    """What happened so far: calls per operation, and where each variant's config came from when it was loaded.

    "built during a call" counts those that a caller waited for while they compiled: what ``warmup`` was not asked for.
    """
    values = {f"{op}: {what}": tally.value() for (op, what), tally in sorted(_tallies.items())}
    return {name: value for name, value in values.items() if value}


def reset() -> None:
    """Forget loaded variants and counts: records and folders of builds written since are seen by the next call."""
    prebuilt.opened.cache_clear()
    overrides.read.cache_clear()
    with _lock:
        _variants.clear()
        _plans.clear()
        _guarded.clear()
        hits.forget()
        _kernels.clear()
        for tally in list(_tallies.values()):
            tally.zero()


@contextmanager
def override(op: Op, config: Config) -> Iterator[None]:
    """Use ``config`` for every call of ``op`` inside the block, whatever the records say (for trying one out).

    It holds for all threads. Of blocks that several threads have open at once the one that began last counts; they may end in
    any order.
    """
    wish = [config]
    with _lock:
        _overrides[op.name] = (*_overrides.get(op.name, ()), wish)
        _forget(op)
    try:
        yield
    finally:
        with _lock:
            _overrides[op.name] = tuple(each for each in _overrides[op.name] if each is not wish)
            _forget(op)


def chosen(op: Op, spec: Spec, sizes: Sizes, gpu: gpus.Gpu) -> Found:
    """Which config the dispatcher uses for these sizes on this GPU, and why; builds nothing.

    Raises:
        OverrideError: ``DSA_OVERRIDES`` names a file that pins what cannot be.
        PrebuiltError: ``DSA_BUILDS`` names a folder that cannot serve here.
    """
    forced = _forced(op, spec, sizes, gpu)
    if forced:
        return Found(forced, "override")
    entry = prebuilt.find(op, spec, sizes.bucket(), gpu)
    return Found(entry.config, "prebuilt") if entry else lookup(op, spec, sizes, gpu)


def _prebuilt(op: Op, spec: Spec, sizes: Sizes, gpu: gpus.Gpu) -> prebuilt.Entry | None:
    return None if _forced(op, spec, sizes, gpu) else prebuilt.find(op, spec, sizes.bucket(), gpu)


def _forced(op: Op, spec: Spec, sizes: Sizes, gpu: gpus.Gpu) -> Config | None:
    """What is wanted by hand: in this process, or by the file that ``DSA_OVERRIDES`` names."""
    wishes = _overrides.get(op.name)
    return wishes[-1][0] if wishes else overrides.find(op, spec, sizes.bucket(), gpu)


def warmup(wanted: Iterable[tuple[Op, Spec, Sizes]], processes: int | None = None) -> int:
    """Build in parallel, and load on the current CUDA device, every variant that these calls will need.

    Run it before the first request and before any CUDA graph is captured: afterwards nothing compiles, and no kernel is left
    whose code a first launch would load. A spec is what compiles: every other heads, head_dim, topk, page, layout, dtype, or
    presence of starts, lengths, a sink or a page table is another kernel, of 2 to 15 s; so is a bucket of sizes whose record
    states another config. Sizes inside a bucket (rows, tokens, batch, context) and strides never compile anything. Where a
    process serves several devices, run it under ``torch.cuda.device`` for each.

    Returns:
        How many variants were not loaded before.

    Raises:
        NoGpu: there is no CUDA device.
        CaptureError: a CUDA graph is being captured.
        BuildError: a kernel does not compile.
        PrebuiltError: ``DSA_BUILDS`` names a folder that cannot serve here.
    """
    gpu = gpus.detect()
    if gpu is None:
        raise NoGpu("warmup")
    device = torch.cuda.current_device()
    missing: dict[Key, tuple[Op, Spec, Sizes]] = {}
    for op, spec, sizes in wanted:
        key = (op.name, spec, sizes.bucket(), device)
        if key not in _variants:
            missing[key] = (op, spec, sizes)
    to_build = [(op, spec, sizes) for op, spec, sizes in missing.values() if _prebuilt(op, spec, sizes, gpu) is None]
    build_all((render(op, spec, chosen(op, spec, sizes, gpu).config) for op, spec, sizes in to_build), gpu, processes)
    complaints: list[str] = []
    for key, (op, spec, sizes) in missing.items():
        _load(op, spec, sizes, key, complaints)
    if missing:
        torch.cuda.synchronize(device)  # a kernel that fails says so here, not while a request waits
    if complaints:
        warnings.warn("\n".join(dict.fromkeys(complaints)), Untuned, stacklevel=2)
    return len(missing)


def _first_call(op: Op, spec: Spec, sizes: Sizes, key: Key) -> Variant:
    complaints: list[str] = []
    variant = _load(op, spec, sizes, key, complaints)
    for complaint in complaints:
        warnings.warn(complaint, Untuned, stacklevel=4)
    return variant


def _load(op: Op, spec: Spec, sizes: Sizes, key: Key, complaints: list[str]) -> Variant:
    if torch.cuda.is_current_stream_capturing():
        raise CaptureError(op.name)
    with _lock:
        if key in _variants:
            return _variants[key]
        gpu = gpus.detect(key[-1])
        if gpu is None:  # a device that is older than any GPU kernels are generated for
            raise NoGpu(op.name)
        found = chosen(op, spec, sizes, gpu)
        _count(op, found.origin)
        complaints += _complaints(op, sizes, gpu, found)
        entry = _prebuilt(op, spec, sizes, gpu)
        if entry is None:
            variant = _built(op, spec, sizes, gpu, found.config, key[-1], complaints)
        else:
            variant = Variant(op, spec, found.config, gpu, _kernels_ahead(entry, gpu, key[-1]))
        variant.rehearse(f"cuda:{key[-1]}")
        compiled.module()  # now, not while a request waits
        _variants[key] = variant
        return variant


def _built(op: Op, spec: Spec, sizes: Sizes, gpu: gpus.Gpu, config: Config, device: int, complaints: list[str]) -> Variant:
    """The variant of a config, or where it does not build, of the first that stands in for it; an override has no stand-in."""
    try:
        return Variant(op, spec, config, gpu, _kernels_of(op, spec, gpu, config, device))
    except BuildError as error:
        if _forced(op, spec, sizes, gpu):
            raise
        reason = error
    for other in stand_ins(op, spec, sizes, gpu):
        if render(op, spec, other).sha == render(op, spec, config).sha:
            continue
        with contextlib.suppress(BuildError):
            variant = Variant(op, spec, other, gpu, _kernels_of(op, spec, gpu, other, device))
            _count(op, "stand-in")
            complaints.append(f"{op.name}: {config} does not build here, {other} stands in ({reason})")
            return variant
    raise reason


def _kernels_of(op: Op, spec: Spec, gpu: gpus.Gpu, config: Config, device: int) -> Mapping[str, Launchable]:
    rendered = render(op, spec, config)
    source = rendered.sha, device
    if source not in _kernels:  # buckets often share a source
        if find(rendered, gpu) is None:  # `warmup` has built what it was asked for
            _count(op, "built during a call")
        _kernels[source] = build(rendered, gpu).load()
    return _kernels[source]


def _kernels_ahead(entry: prebuilt.Entry, gpu: gpus.Gpu, device: int) -> Mapping[str, Launchable]:
    source = entry.source_sha, device
    if source not in _kernels:
        _kernels[source] = entry.load(gpu)
    return _kernels[source]


def _complaints(op: Op, sizes: Sizes, gpu: gpus.Gpu, found: Found) -> Iterator[str]:
    yield from (f"{op.name}: {note}" for note in found.notes)
    if found.origin == "default":
        yield (
            f"{op.name} is not tuned for {gpu.name} at {describe(sizes.bucket())}; its default config is used. "
            f"Tune it: {command()} tune --gpu {gpu.id} --op {op.name} --preset <your model>"
        )


def _count(op: Op, what: str) -> None:
    _tally(op, what).add()


def _tally(op: Op, what: str) -> Tally:
    return _tallies.get((op.name, what)) or _tallies.setdefault((op.name, what), Tally())


def _forget(op: Op) -> None:
    """Its variants and plans; held by whoever changes what serves the operation."""
    for key in [key for key in _variants if key[0] == op.name]:
        del _variants[key]
    for call in [call for call in _plans if call[0] == op.name]:
        del _plans[call]
    for call in [call for call in _guarded if call[0] == op.name]:
        del _guarded[call]
    hits.forget(op.name)


def _device(inputs: Inputs) -> torch.device:
    return next(value.device for value in inputs.values() if isinstance(value, Tensor))


def _reference(op: Op, spec: Spec, inputs: Inputs) -> Outputs:
    _count(op, "reference")
    outputs = op.allocate(spec, inputs)
    with exactly():
        for name, value in op.reference(spec, inputs).items():
            outputs[name].copy_(value)
    return outputs
