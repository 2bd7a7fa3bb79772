"""Plans: what a call launched, kept for the next call whose arguments look the same.

Checks, spec, sizes and launch parameters follow from shapes, strides, dtypes, devices and options, never from data. So a call
that went through all of them leaves a plan: its kernels, grids and arguments, with places for the tensors of the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.backends import Launchable
from ..kernels.tma import Tiled
from ..problem.op import Launch, Outputs
from . import guards

Key = tuple[Hashable, ...]
"""Equal for calls that a plan serves alike; the operation's name comes first."""
Call = tuple[Key, Sequence[Tensor], list[int]]
"""A call's key, its tensors in order and their addresses."""

_APART = 512  # bytes; as far apart as the allocator would place them
_MOST_VIEWS = 64  # of one argument: a cache stays where it is, other tensors take turns in the allocator's few places


def taken_apart(op: str, args: Sequence[Any]) -> Call | None:
    """What there is to know of a call's arguments; None where no plan may serve it, whatever else is the matter with it."""
    sketch = guards.sketched(op, args)
    return None if sketch is None else completed(sketch)


def completed(sketch: guards.Sketch) -> Call | None:
    """A sketch with what guards would look at in its key."""
    key, tensors, addresses = sketch
    if not tensors:
        return None
    looks: list[Hashable] = []
    try:
        for tensor in tensors:
            looks += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    except RuntimeError:  # a tensor without strides (sparse, say)
        return None
    return (*key, *looks), tensors, addresses


def _maker(tensor: Tensor) -> Callable[[], Tensor]:
    """Allocates a tensor like this one, which was allocated for an earlier call."""
    assert not tensor.storage_offset(), "a fresh tensor begins where its memory does"
    shape, stride = tuple(tensor.shape), tensor.stride()
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if tensor.numel() else -1
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    if held == last + 1:
        return guards.allocator(shape, stride, tensor.dtype, tensor.device)
    whole = guards.allocator((held,), (1,), tensor.dtype, tensor.device)  # the last row is padded too
    return lambda: whole().as_strided(shape, stride)


def _side_by_side(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], int]:
    """(offsets, bytes of all) of tensors that share one allocation."""
    offsets, end = [], 0
    for tensor in tensors:
        assert not tensor.storage_offset(), "a fresh tensor begins where its memory does"
        offsets.append(end)
        end += -(-tensor.untyped_storage().nbytes() // _APART) * _APART
    return tuple(offsets), end


class _Views:
    """A matrix of which TMA loads tiles, over the tensor in one place: the same object while the tensor stays where it is.

    Launchers may keep with the object what they made of it.
    """

    def __init__(self, place: int, tiled: Tiled) -> None:
        self.place = place
        self._tiled = tiled.at(0)  # without the tensor, which would live as long as the plan
        self._known: dict[int, Tiled] = {}

    def at(self, address: int) -> Tiled:
        view = self._known.get(address)
        if view is None:
            if len(self._known) >= _MOST_VIEWS:
                self._known.clear()
            view = self._known[address] = self._tiled.at(address)
        return view


class Plan:
    """The launches of one call, for other tensors.

    A call fills one row of values: its tensors (or their addresses), what is freshly allocated, views for TMA, and what stays
    the same. Every kernel picks its arguments from that row.
    """

    def __init__(
        self,
        device: int,
        count: Callable[[], object],
        outputs: Mapping[str, int | Callable[[], Tensor]],
        workspaces: Sequence[Tensor],
        views: Sequence[_Views],
        constants: Sequence[Any],
        launches: Sequence[tuple[Launchable, tuple[int, int, int], Callable[[Sequence[Any]], tuple[Any, ...]]]],
        by_address: bool,
    ) -> None:
        self.device = device
        self._count = count
        self._outputs = tuple(outputs.items())
        # Where addresses will do, all lie in one allocation; each costs about as much as half a launch.
        self._offsets, room = _side_by_side(workspaces if by_address else ())
        self._room = guards.allocator((room,), (1,), torch.uint8, workspaces[0].device) if room else None
        self._workspaces = () if by_address else tuple(map(_maker, workspaces))
        self._views = tuple(views)
        self._constants = tuple(constants)
        self._launches = tuple(launches)
        self._by_address = by_address

    def run(self, tensors: Sequence[Tensor], addresses: Sequence[int]) -> Outputs:
        """Allocate the outputs and launch on the current stream; the plan's device must be the current one."""
        self._count()
        outputs: Outputs = {}
        fresh: list[Tensor] = []
        for name, how in self._outputs:
            if isinstance(how, int):
                outputs[name] = tensors[how]
            else:
                outputs[name] = made = how()
                fresh.append(made)
        row: list[Any]
        if self._by_address:
            row = [*addresses, *[made.data_ptr() for made in fresh]]
            if self._room is not None:
                room = self._room()  # stays until the last launch is on its way
                base = room.data_ptr()
                row += [base + offset for offset in self._offsets]
        else:
            row = [*tensors, *fresh, *[make() for make in self._workspaces]]
        for view in self._views:
            row.append(view.at(addresses[view.place]))
        row += self._constants
        for kernel, grid, pick in self._launches:
            kernel(grid, pick(row))
        return outputs


def record(
    device: int,
    count: Callable[[], object],
    kernels: Mapping[str, Launchable],
    tensors: Sequence[Tensor],
    outputs: Outputs,
    launches: Sequence[Launch],
) -> Plan | None:
    """The plan that does for other tensors what these launches did for ``tensors``.

    Args:
        device: index of the CUDA device that the kernels are loaded on.
        count: what to call at every run.

    Returns:
        None where that cannot be told: nothing was launched (torch may have filled the outputs), one tensor was passed as two
        arguments, or a kernel got a tensor that shares the memory of another.
    """
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    if not launches or len(places) < len(tensors):
        return None
    arguments = list({id(value): value for launch in launches for value in launch.args}.values())
    by_address = all(getattr(kernels[launch.kernel], "takes_addresses", False) for launch in launches)
    if by_address:
        places |= _settled_places(tensors, arguments)
    allocated = [output for output in outputs.values() if id(output) not in places]
    known = places.keys() | {id(output) for output in allocated}
    workspaces = [value for value in arguments if isinstance(value, Tensor) and value.numel() and id(value) not in known]
    tiled = [value for value in arguments if isinstance(value, Tiled)]
    if any(id(value.tensor) not in places for value in tiled) or _share_memory(tensors, [*allocated, *workspaces]):
        return None
    views = [_Views(places[id(value.tensor)], value) for value in tiled]
    made = {name: places.get(id(output)) for name, output in outputs.items()}
    varying = known | {id(value) for value in (*workspaces, *tiled)}
    constants = [value for value in arguments if id(value) not in varying]  # among them workspaces of no elements
    for place, value in enumerate((*allocated, *workspaces, *tiled, *constants), len(tensors)):
        places[id(value)] = place
    picked = [
        (kernels[launch.kernel], launch.grid, guards.picker([places[id(value)] for value in launch.args]))
        for launch in launches
    ]
    return Plan(
        device,
        count,
        {name: _maker(outputs[name]) if place is None else place for name, place in made.items()},
        workspaces,
        views,
        constants,
        picked,
        by_address,
    )


def _settled_places(tensors: Sequence[Tensor], arguments: Sequence[Any]) -> dict[int, int]:
    """The places of arguments that are ``checks.settled`` views of a tensor of the call: alike where only addresses count."""
    views = [value for value in arguments if isinstance(value, Tensor) and value.numel()]
    views += [value.tensor for value in arguments if isinstance(value, Tiled) and value.tensor is not None]
    return {
        id(view): place
        for view in views
        for place, tensor in enumerate(tensors)
        if (view.data_ptr(), view.shape, view.dtype) == (tensor.data_ptr(), tensor.shape, tensor.dtype)
        and view is not tensor
        and 1 in view.shape
        and not any(view is other for other in tensors)
    }


def _share_memory(given: Sequence[Tensor], fresh: Sequence[Tensor]) -> bool:
    """Whether one that is taken to be fresh lies in the memory of another: then it is a view, which no allocation replaces."""
    addresses = [tensor.untyped_storage().data_ptr() for tensor in fresh if tensor.numel()]
    return len(set(addresses)) < len(addresses) or any(tensor.untyped_storage().data_ptr() in addresses for tensor in given)
