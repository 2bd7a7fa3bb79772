"""Registers every operation with torch.library, so that torch.compile traces it and ``torch.ops.dsa_codegen`` lists it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import dispatch, ops
from .op import Op, Outputs

NAMESPACE = "dsa_codegen"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def _register(op: Op) -> None:
    name = f"{NAMESPACE}::{op.function}"
    schema = torch._C.parse_schema(name + op.schema)
    arguments = schema.arguments
    listed = [str(result.type) for result in schema.returns] == ["List[Tensor]"]
    defaults = [argument.default_value if argument.has_default_value() else None for argument in arguments]
    written = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]

    def complete(args: Sequence[Any]) -> list[Any]:
        return [*args, *defaults[len(args) :]]  # torch leaves out trailing arguments that have their default value

    def run(*args: Any) -> Any:
        return _returned(dispatch.call(op, complete(args)), written, listed)

    def fake(*args: Any) -> Any:
        spec, _, inputs = op.bind(*complete(args))
        return _returned(op.allocate(spec, inputs), written, listed)

    _LIBRARY.define(op.function + op.schema)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(op.function, run, device)
    torch.library.register_fake(name, fake, lib=_LIBRARY)


def _returned(outputs: Outputs, written: Sequence[str], listed: bool) -> Any:
    values = tuple(value for name, value in outputs.items() if name not in written)
    if listed:
        return list(values)
    return None if not values else values[0] if len(values) == 1 else values


def function(name: str) -> Callable[..., Any]:
    """The registered operator, without the overload look-up of a plain ``torch.ops`` access."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


for _op in ops.all_ops().values():
    _register(_op)
