"""Guards: whether tensors look like those of an earlier call, asked of torch in one step instead of five a tensor.

torch.compile has the question already, in C++: same types, dispatch keys (those that modes and transforms of the thread add
included), dtypes, devices, sizes and strides. It is no public part of torch: where it is missing, or asked for in other words,
calls are compared by ``plans`` alone, which takes longer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

try:
    from torch._C._dynamo import guards as _torch_guards
except ImportError:
    _torch_guards: Any = None  # type: ignore[no-redef]

Guard = Callable[..., bool]
"""Given the tensors of a call: whether they look the same. It knows nothing of their addresses."""
Sketch = tuple[tuple[Hashable, ...], list[Tensor], list[int]]
"""What a guard does not look at: a key of everything but the tensors, the tensors in order, and their addresses."""

_ALIGNMENT = 16  # bytes; `checks` refuses other addresses
_OPTIONS = frozenset((int, float, bool, str, type(None)))


def sketched(op: str, args: Sequence[Any]) -> Sketch | None:
    """The sketch of a call's arguments; None where no earlier call may speak for it.

    Subclasses of tensors and whatever does not hash are left to the operator and to ``Op.bind``, which name what is wrong.
    """
    key: list[Any] = [op]
    tensors: list[Tensor] = []
    addresses: list[int] = []
    bits = 0
    try:
        for value in args:
            kind = type(value)
            if kind is Tensor or kind is Parameter:
                key.append(Tensor)  # says which of the optional ones are there
                address = value.data_ptr()
                tensors.append(value)
                addresses.append(address)
                bits |= address
            elif kind in _OPTIONS:
                key += (kind, value)  # with its kind: True, 1 and 1.0 are equal
            else:
                return None
    except RuntimeError:  # a tensor without memory
        return None
    return None if bits % _ALIGNMENT else (tuple(key), tensors, addresses)


def guard_of(tensors: Sequence[Tensor]) -> Guard | None:
    """A guard for tensors that look like these; None where torch gives none."""
    sizes, strides = [list(each.shape) for each in tensors], [list(each.stride()) for each in tensors]
    try:
        make: Any = _torch_guards.TensorGuards
        check: Guard = make(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check if check(*tensors) else None
    except (AttributeError, TypeError, RuntimeError):
        return None
