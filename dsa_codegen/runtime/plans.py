"""Plans: what a call launched, kept for the next call whose arguments look the same.

Checks, spec, sizes and launch parameters follow from shapes, strides, dtypes, devices and options, never from data. So a call
that went through all of them leaves a plan: its kernels, grids and arguments, with places for the tensors of the next call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from ..kernels.backends import Launchable
from ..kernels.tma import Tiled
from ..problem.op import Launch, Outputs
from . import guards
from .tally import Tally

Key = tuple[Hashable, ...]
"""Equal for calls that a plan serves alike; the operation's name comes first."""
Call = tuple[Key, Sequence[Tensor], list[int]]
"""A call's key, its tensors in order and their addresses."""

_APART = 512  # bytes; as far apart as the allocator would place them
MOST_VIEWS = 64  # of one argument: a cache stays where it is, other tensors take turns in the allocator's few places


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


class Views:
    """A matrix of which TMA loads tiles, over the tensor in one place: the same object while the tensor stays where it is.

    Launchers may keep with the object what they made of it.
    """

    def __init__(self, place: int, tiled: Tiled) -> None:
        self.place = place
        self._tiled = tiled.at(0)  # without the tensor, which would live as long as the plan
        self._known: dict[int, Tiled] = {}
        self.shape, self.strides = self._tiled.shape, self._tiled.strides

    def at(self, address: int) -> Tiled:
        view = self._known.get(address)
        if view is None:
            if len(self._known) >= MOST_VIEWS:
                self._known.clear()
            view = self._known[address] = self._tiled.at(address)
        return view


class Plan:
    """The launches of one call, for other tensors.

    A call fills one row of values: its tensors (or their addresses), what is freshly allocated, views for TMA, and what stays
    the same. ``run`` is a function of straight lines that was written for it: to walk lists of outputs, launches and arguments
    took half of a call.

    Args:
        results: the outputs by name, with their places in the row.
        allocated, workspaces: tensors like those that a call allocates; where kernels take addresses, workspaces share one.
        launches: kernels with their grids, and the places of their arguments.
    """

    def __init__(
        self,
        device: int,
        calls: Tally,
        results: Mapping[str, int],
        given: int,
        allocated: Sequence[Tensor],
        workspaces: Sequence[Tensor],
        views: Sequence[Views],
        constants: Sequence[Any],
        launches: Sequence[tuple[Launchable, tuple[int, int, int], Sequence[int]]],
        by_address: bool,
    ) -> None:
        self.device, self.names, self.results, self.given = device, tuple(results), tuple(results.values()), given
        self.calls, self.views, self.launches, self.by_address = calls, tuple(views), tuple(launches), by_address
        self.makers = tuple([_maker(each) for each in allocated])
        if by_address:  # of workspaces of no elements
            constants = [value.data_ptr() if isinstance(value, Tensor) else value for value in constants]
        self.constants = tuple(constants)
        self.make_room: Callable[[], Tensor] | None = None
        self.offsets: tuple[int, ...] = ()
        """Of the workspaces in the room that they share."""
        self.room = 0
        """Its bytes."""
        names: dict[str, Any] = {"count": calls.add}
        names |= {f"make_{number}": make for number, make in enumerate(self.makers)}
        names |= {f"view_{number}": each.at for number, each in enumerate(views)}
        names |= {f"constant_{number}": value for number, value in enumerate(constants)}
        names |= {f"launch_{number}": _bound(kernel, grid, by_address) for number, (kernel, grid, _) in enumerate(launches)}
        if by_address:
            self.offsets, self.room = _side_by_side(workspaces)
            names |= {f"offset_{number}": offset for number, offset in enumerate(self.offsets)}
            if self.room:
                self.make_room = guards.allocator((self.room,), (1,), torch.uint8, workspaces[0].device)
                names["make_room"] = self.make_room
        else:
            names |= {f"work_{number}": _maker(each) for number, each in enumerate(workspaces)}
        at = tuple([view.place for view in views])
        counts = given, len(allocated), len(workspaces), len(constants)
        exec(
            _written(counts, at, tuple(results.values()), tuple([tuple(places) for *_, places in launches]), by_address), names
        )
        self.run: Callable[[Sequence[Tensor], Sequence[int]], tuple[Tensor, ...]] = names["run"]
        """Allocate the outputs and launch on the current stream; the plan's device must be the current one."""
        self.in_c: Any = None
        """The same in C, once ``hits`` has made it; False where it cannot."""


@functools.lru_cache(maxsize=1 << 10)
def _written(
    counts: tuple[int, int, int, int],
    viewed: tuple[int, ...],
    results: tuple[int, ...],
    launches: tuple[tuple[int, ...], ...],
    by_address: bool,
) -> CodeType:
    """``Plan.run``; calls that differ in sizes alone share it.

    Args:
        counts: the values of a row: given tensors, allocated ones, workspaces, constants; views come before constants.
        viewed: the place of the tensor that each view is of.
        results, launches: places in the row.
    """
    given, allocated, workspaces, constants = counts
    lines = ["count()", *(f"made_{number} = make_{number}()" for number in range(allocated))]
    tensors = [*(f"tensors[{number}]" for number in range(given)), *(f"made_{number}" for number in range(allocated))]
    row = list(tensors)
    if by_address:
        used = {place for places in launches for place in places}
        lines += [f"at_{number} = made_{number}.data_ptr()" for number in range(allocated) if given + number in used]
        row = [*(f"addresses[{number}]" for number in range(given)), *(f"at_{number}" for number in range(allocated))]
        if workspaces:
            lines += ["room = make_room()", "base = room.data_ptr()"]  # it stays until the last launch is on its way
            row += [f"base + offset_{number}" for number in range(workspaces)]
    else:
        lines += [f"worked_{number} = work_{number}()" for number in range(workspaces)]
        row += [f"worked_{number}" for number in range(workspaces)]
    lines += [f"seen_{number} = view_{number}(addresses[{place}])" for number, place in enumerate(viewed)]
    row += [*(f"seen_{number}" for number in range(len(viewed))), *(f"constant_{number}" for number in range(constants))]
    lines += [f"launch_{number}({', '.join(row[place] for place in places)})" for number, places in enumerate(launches)]
    lines.append("return (" + "".join(f"{tensors[place]}, " for place in results) + ")")
    return compile("\n    ".join(["def run(tensors, addresses):", *lines]), "<plan>", "exec")


def _bound(kernel: Launchable, grid: tuple[int, int, int], by_address: bool) -> Callable[..., None]:
    """Launches the kernel with this grid, given its arguments one by one."""
    bind = getattr(kernel, "bound", None) if by_address else None
    launch: Callable[..., None] = (lambda *args: kernel(grid, args)) if bind is None else bind(grid)
    return launch


def record(
    device: int,
    calls: Tally,
    kernels: Mapping[str, Launchable],
    tensors: Sequence[Tensor],
    outputs: Outputs,
    launches: Sequence[Launch],
) -> Plan | None:
    """The plan that does for other tensors what these launches did for ``tensors``.

    Args:
        device: index of the CUDA device that the kernels are loaded on.
        calls: counts the runs.

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
    views = [Views(places[id(value.tensor)], value) for value in tiled]
    varying = known | {id(value) for value in (*workspaces, *tiled)}
    constants = [value for value in arguments if id(value) not in varying]  # among them workspaces of no elements
    for place, value in enumerate((*allocated, *workspaces, *tiled, *constants), len(tensors)):
        places[id(value)] = place
    placed = [(kernels[launch.kernel], launch.grid, [places[id(value)] for value in launch.args]) for launch in launches]
    results = {name: places[id(output)] for name, output in outputs.items()}
    rest = allocated, workspaces, views, constants, placed, by_address
    return Plan(device, calls, results, len(tensors), *rest)


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
