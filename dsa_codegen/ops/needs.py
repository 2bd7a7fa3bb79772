"""What a model needs: every operation, spec and size bucket that serving it calls; what is generated, tuned, built ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .. import ops
from ..errors import NoConfig, SpecError
from ..gpu import Gpu
from ..problem.op import Case, Op
from ..problem.presets import Model
from ..problem.values import Bucket, Spec


@dataclass(frozen=True)
class Need:
    """One call that a model makes: an operation, a spec, and the case that stands for the bucket of its sizes."""

    op: Op
    spec: Spec
    case: Case


def specs(model: Model, names: Sequence[str] = (), gpu: Gpu | None = None) -> list[tuple[Op, Spec]]:
    """The operations that serve a model on ``gpu`` (or the named ones, of training too) with each of their specs.

    Raises:
        UnknownName: a name is no operation.
        NoConfig: ``gpu`` is too old for an operation that was named.
        SpecError: the model calls none of those that were named.
    """
    chosen = [ops.get(name) for name in names] or [op for op in ops.all_ops().values() if not op.training]
    able = [op for op in chosen if gpu is None or gpu.capability >= op.min_capability]
    for op in chosen if names else ():
        if op not in able:
            assert gpu is not None
            raise NoConfig(op.name, gpu.name, [f"sm_{op.min_capability} or newer needed, it is sm_{gpu.capability}"])
    found = [(op, spec) for op in able for spec in op.specs(model)]
    if names and not found:
        called = ", ".join(op.name for op in ops.all_ops().values() if op.specs(model))
        raise SpecError("op", ", ".join(names), f"what {model.name} calls: {called}")
    return found


def needs(model: Model, names: Sequence[str] = (), gpu: Gpu | None = None) -> Iterator[Need]:
    """Every call of a model, one per operation, spec and size bucket that people serve."""
    for op, spec in specs(model, names, gpu):
        first: dict[Bucket, Case] = {}
        for case in op.workloads(spec):
            first.setdefault(case.sizes.bucket(), case)
        for case in first.values():
            yield Need(op, spec, case)
