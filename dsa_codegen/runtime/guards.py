"""Guards: whether tensors look like those of an earlier call, asked of torch in one step instead of five a tensor.

torch.compile has the question already, in C++: same types, dispatch keys (those that modes and transforms of the thread add
included), dtypes, devices, sizes and strides. It is no public part of torch: where it is missing, or asked for in other words,
calls are compared by ``plans`` alone, which takes longer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial, reduce
from operator import itemgetter, or_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

try:
    from torch._C._dynamo import guards as _torch_guards
except ImportError:
    _torch_guards: Any = None  # type: ignore[no-redef]

Guard = Callable[..., bool]
"""Given the tensors of a call: whether they look the same, whether they require gradients too, and the thread's modes,
transforms and traces do. It knows nothing of addresses, of profilers, of modes that look at functions and of ``no_grad``."""
Sketch = tuple[tuple[Hashable, ...], Sequence[Tensor], list[int]]
"""What a guard does not look at: a key of everything but the tensors, the tensors in order, and their addresses."""

_ALIGNMENT = 16  # bytes; `checks` refuses other addresses
_address_of = Tensor.data_ptr
_OPTIONS = frozenset((int, float, bool, str, type(None)))


def sketched(op: str, args: Sequence[Any]) -> Sketch | None:
    """The sketch of a call's arguments; None where no earlier call may speak for it.

    Subclasses of tensors and whatever does not hash are left to the operator and to ``Op.bind``, which name what is wrong.
    """
    kinds = tuple(map(type, args))
    layout = _layouts.get(kinds) or _laid_out(kinds)
    if layout is None:
        return None
    tensors = layout[0](args)
    try:
        addresses = list(map(_address_of, tensors))
    except RuntimeError:  # a tensor without memory
        return None
    return None if reduce(or_, addresses, 0) % _ALIGNMENT else ((op, layout[2], layout[1](args)), tensors, addresses)


_Pick = Callable[[Sequence[Any]], tuple[Any, ...]]
_Layout = tuple[_Pick, _Pick, tuple[type, ...]]
_layouts: dict[tuple[type, ...], _Layout] = {}
"""By the types of a call's arguments: what picks its tensors, what picks its options, and the types, parameters as tensors.

They say which of the optional tensors are there, and tell True, 1 and 1.0, which are equal, apart.
"""


def _laid_out(kinds: tuple[type, ...]) -> _Layout | None:
    plain = tuple([Tensor if kind is Parameter else kind for kind in kinds])
    if not _OPTIONS.issuperset(kind for kind in plain if kind is not Tensor):
        return None
    tensors = [place for place, kind in enumerate(plain) if kind is Tensor]
    options = [place for place, kind in enumerate(plain) if kind is not Tensor]
    _layouts[kinds] = found = picker(tensors), picker(options), plain
    return found


def picker(places: Sequence[int]) -> _Pick:
    """The values at these places of a row, as a tuple."""
    return itemgetter(*places) if len(places) > 1 else lambda row: tuple([row[place] for place in places])


def allocator(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Makes such tensors on the current device: as torch.compile's code does, in half the time of the public way.

    Nothing of that size is allocated here: beside a first call that would be its results and workspaces once more.
    """
    shape, stride = tuple(shape), tuple(stride)
    make: Any = getattr(_torch_guards, f"_empty_strided_{device.type}", None)
    try:
        make((0,), (1,), dtype)
    except TypeError:
        return lambda: torch.empty_strided(shape, stride, dtype=dtype, device=device)
    return partial(make, shape, stride, dtype)


def guard_of(tensors: Sequence[Tensor]) -> Guard | None:
    """A guard for tensors that look like these; None where torch gives none."""
    sizes, strides = [list(each.shape) for each in tensors], [list(each.stride()) for each in tensors]
    try:
        make: Any = _torch_guards.TensorGuards
        check: Guard = make(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check if check(*tensors) else None
    except (AttributeError, TypeError, RuntimeError):
        return None


dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack
transforms = torch._C._functorch.peek_interpreter_stack
is_tracing = torch._C._is_tracing
profiler_enabled: Callable[[], bool] = torch._C._autograd._profiler_enabled


def watched() -> bool:
    """Whether something on this thread wants to see the operators that torch runs."""
    return dispatch_modes() > 0 or function_modes() > 0 or transforms() is not None or is_tracing() or profiler_enabled()
