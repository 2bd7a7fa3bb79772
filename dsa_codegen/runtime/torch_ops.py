"""Registers every operation with torch.library, so that torch.compile traces it and ``torch.ops.dsa_codegen`` lists it.

What models call goes around the registered operator where it can: torch takes the arguments apart, boxes them and looks for
traces, modes and gradients, which costs the host as much as a launch does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import InputError
from ..problem.checks import check_kind
from ..problem.op import Op, Outputs
from . import dispatch, guards, hits

NAMESPACE = "dsa_codegen"
_NO_GRADIENTS = "none that does: the operations have no backward; call them under torch.no_grad(), or detach the tensor"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# Asked at every call, and found here at once.
_is_compiling, _is_traced = torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling
_function_modes, _profiler_enabled = guards.function_modes, guards.profiler_enabled


def _forms(op: Op) -> dict[str, str]:
    """The schemas of an operation's operators by name: one that returns its results, and one that writes them to buffers.

    Where grids are made for a number of SMs, both take it behind all else.
    """
    head, results = op.schema.rsplit(") ->", 1)
    last = ", int? sms=None" if op.budgeted else ""
    forms = {op.function: f"{head}{last}) ->{results}"}
    if op.buffers:
        written = "".join(f", Tensor({letter}!)? {name}=None" for letter, name in zip("abcdef", op.buffers, strict=False))
        forms[f"{op.function}_into"] = f"{head}{written}{last}) -> ()"
    return forms


def _register(op: Op, function: str, form: str) -> None:
    name = f"{NAMESPACE}::{function}"
    schema = torch._C.parse_schema(name + form)
    arguments = schema.arguments
    defaults = [argument.default_value if argument.has_default_value() else None for argument in arguments]
    written, listed = _results(schema)

    def complete(args: Sequence[Any]) -> tuple[list[Any], int | None]:
        """(what the operation binds, the SMs); torch leaves out trailing arguments that have their default value."""
        full = [*args, *defaults[len(args) :]]
        return full, _checked_sms(full.pop()) if op.budgeted else None

    def run(*args: Any) -> Any:
        return _of(dispatch.call(op, *complete(args)), written, listed)

    def fake(*args: Any) -> Any:
        spec, _, inputs = op.bind(*complete(args)[0])
        return _of(op.allocate(spec, inputs), written, listed)

    def refuse_gradients(*args: Any) -> Any:
        wanted = [argument.name for argument, value in zip(arguments, args, strict=False) if _wants_gradient(value)]
        if wanted:
            raise InputError(wanted[0], "a tensor that requires a gradient", _NO_GRADIENTS)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(getattr(torch.ops, NAMESPACE), function).default(*args)

    _LIBRARY.define(function + form)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(function, run, device)
    _LIBRARY.impl(function, refuse_gradients, "Autograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)


def _checked_sms(sms: int | None) -> int | None:
    if sms is not None and sms < 1:
        raise InputError("sms", sms, "a whole number of SMs, at least 1, or None for all")
    return sms


def _wants_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()


def _returned(names: Iterable[str], values: Sequence[Tensor], written: Sequence[str], listed: bool) -> Any:
    if written:
        values = tuple([value for name, value in zip(names, values, strict=True) if name not in written])
    if listed:
        return list(values)
    return None if not values else values[0] if len(values) == 1 else values


def _of(outputs: Outputs, written: Sequence[str], listed: bool) -> Any:
    return _returned(outputs, tuple(outputs.values()), written, listed)


def function(name: str) -> Callable[..., Any]:
    """The registered operator, without the overload look-up of a plain ``torch.ops`` access."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def direct(name: str, **public: str) -> Callable[..., Any]:
    """The registered operator, or the way around it for a call like an earlier one; takes the schema's arguments by place.

    All of them but the last one, ``sms``, which may be left out and is no argument to ``Op.bind``.

    Nobody can tell the two apart: the first call of its kind went through the operator, which found its arguments good, and
    whatever wants to see operators (a trace, a mode, a transform, a profiler, gradients) still sees this one.

    Args:
        public: names that arguments of the schema have in the function that people call; errors are about those.
    """
    operator, (op, schema_of) = function(name), _BY_FUNCTION[name]
    schema = torch._C.parse_schema(name + schema_of)
    written, listed = _results(schema)
    kinds = [(argument.name, str(argument.type)) for argument in schema.arguments]
    form, most = hits.Form(op.name, written, listed), len(kinds)

    def first(args: Sequence[Any]) -> Any:
        try:
            for (argument, kind), value in zip(kinds, args, strict=False):
                check_kind(argument, value, kind)
            return operator(*args)
        except InputError as error:
            raise error.renamed(public) from None

    def call(*args: Any) -> Any:
        if _is_traced():  # by torch.compile, which cannot look into C and finds this a constant
            return operator(*args)
        found = form.again(args)
        if found is not NotImplemented:
            return found
        if _is_compiling():  # by torch.export, whose tensors are none that C knows
            return operator(*args)
        if len(args) < most:
            args = (*args, None)
            found = form.again(args)
            if found is not NotImplemented:
                return found
        results = None if _function_modes() or _profiler_enabled() else dispatch.call_again(op, args, form)
        return first(args) if results is None else _returned(*results, written, listed)

    return call


def _results(schema: Any) -> tuple[list[str], bool]:
    """(arguments that are written to, whether the results come as a list)."""
    written = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    return written, [str(result.type) for result in schema.returns] == ["List[Tensor]"]


_BY_FUNCTION = {name: (op, form) for op in ops.all_ops().values() for name, form in _forms(op).items()}
for _name, (_op, _form) in _BY_FUNCTION.items():
    _register(_op, _name, _form)
