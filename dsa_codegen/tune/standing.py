"""Standing: whether a record still holds for today's code, and what of it can still be measured."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import DsaError
from ..gpu import Gpu
from ..kernels.render import render, template_name, template_sha
from ..ops import all_ops
from ..problem.op import Case, Config, Op
from ..problem.values import Spec, contains
from ..records.record import Record
from .problem import Problem


@dataclass(frozen=True)
class Standing:
    """Where a record stands."""

    record: Record
    reason: str
    """Why it does not hold; empty where it does."""
    template: str = ""
    """Today's hash of its template, where that is all that differs: the code is the one that was measured."""
    call: tuple[Op, Spec, Case] | None = None
    """What it was measured for; None where that can no longer be stated."""
    config: Config | None = None
    """Its config; None where the operation no longer has such parameters."""

    @property
    def holds(self) -> bool:
        """Whether lookup may use it and its hashes are today's."""
        return not self.reason

    @property
    def place(self) -> str:
        """The same for records of one problem."""
        assert self.call is not None, "it states no problem"
        op, spec, case = self.call
        return f"{op.name}/{spec.id}/{case.id}"

    def problem(self, gpu: Gpu) -> Problem | None:
        """What is to be measured on ``gpu``; None where nothing can be."""
        return Problem(*self.call, gpu) if self.call else None


def standing(record: Record) -> Standing:
    """Render what the record states and compare; no GPU is looked at."""
    op = all_ops()[record.op]
    try:
        spec, sizes = op.spec_type.from_dict(record.spec), op.sizes_type.from_dict(record.sizes)
    except DsaError as error:
        return Standing(record, str(error))
    call = op, spec, Case(sizes, record.distribution)
    try:
        config = record.config_for(op)
    except DsaError as error:
        return Standing(record, str(error), call=call)
    template = template_sha(template_name(op, record.backend))
    if not contains(record.bucket, sizes.bucket()):
        return Standing(record, "its range of sizes is divided otherwise today", call=call, config=config)
    measured = render(op, spec, config, record.toolchain.get("triton", ""))  # the text for the Triton it was measured with
    if measured.sha != record.source_sha:
        return Standing(record, "its template renders another source", call=call, config=config)
    if template != record.template:
        return Standing(record, "its template changed, its code did not", template, call, config)
    return Standing(record, "", call=call, config=config)
