"""Hits: the calls of one function that have plans, handed to C, which then serves the next one from its arguments on.

C does what ``torch_ops``, ``dispatch`` and ``plans`` do for such a call: it compares types, options and tensors, allocates,
writes addresses into parameters that lie ready otherwise, and launches. Where it cannot be (``compiled``), or where a kernel is
launched by its compiler's own code (TileLang), calls stay with those.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..kernels.backends import cubin, driver
from ..kernels.backends.driver import Recipe
from . import compiled, guards, plans

_MAP_BYTES = 128
_TENSORS = (Tensor, Parameter)


def _never(args: tuple[Any, ...]) -> Any:
    return NotImplemented


class Form:
    """The hits of one function.

    Args:
        op: the operation's name.
        written: names of results that the caller gave the memory of.
        listed: whether the results come as a list.
    """

    def __init__(self, op: str, written: Sequence[str] = (), listed: bool = False) -> None:
        self.again: Callable[[tuple[Any, ...]], Any] = _never
        """The results of a call with these arguments; NotImplemented, and nothing done, where it is like none that is known."""
        self._hits: Any = None
        self._module: Any = None
        self._op, self._written, self._listed = op, frozenset(written), listed
        _forms.add(self)

    def learn(
        self, args: tuple[Any, ...], guard: guards.Guard, gradients: bool, plan: plans.Plan, current_device: Callable[[], int]
    ) -> None:
        """Serve the next calls like this one, where C can; held by whoever may forget plans.

        Args:
            args: a call that ``plan`` serves.
            guard: whether tensors look like its tensors.
            gradients: whether some of them require any.
        """
        if plan.in_c is None:
            plan.in_c = _translated(plan, current_device) or False
        module = compiled.module()
        if not plan.in_c or module is None:
            return
        kinds = tuple(map(type, args))
        options = tuple([kind if kind in _TENSORS else value for kind, value in zip(kinds, args, strict=True)])
        places = tuple([place for name, place in zip(plan.names, plan.results, strict=True) if name not in self._written])
        known = module.Known(kinds, options, guard, gradients, plan.in_c, places, self._listed)
        if self._hits is None:
            self._module = module
            self._hits = module.Hits(guards.function_modes, guards.profiler_enabled, torch.is_grad_enabled)
        self._hits.add(known)
        self.again = self._hits

    def forget(self, op: str | None = None) -> None:
        """Know no call any more, if this is the operation; or whatever it is."""
        if self._hits is not None and op in (None, self._op):
            self._hits.clear()
            self.again = _never
            if op is None:
                self._module.release()


_forms: weakref.WeakSet[Form] = weakref.WeakSet()


def forget(op: str | None = None) -> None:
    """Know no call of the operation any more, or none at all and keep no memory either; held by whoever forgets plans."""
    for form in list(_forms):
        form.forget(op)


class _Maps:
    """A view's descriptors by the tensor's address, as one kernel's tiles want them."""

    def __init__(self, view: plans.Views, described: Any) -> None:
        self._view, self._described = view, described
        self.known: dict[int, bytes] = {}

    def __call__(self, address: int) -> bytes:
        if len(self.known) >= plans.MOST_VIEWS:
            self.known.clear()
        self.known[address] = found = cubin.encode(self._view.at(address), self._described)[0]
        return found


def _translated(plan: plans.Plan, current_device: Callable[[], int]) -> Any:
    """The plan in C; None where that is not there, or a kernel can only be launched by its compiler's own code."""
    module = compiled.module()
    found = [getattr(kernel, "recipe", None) for kernel, *_ in plan.launches]
    recipes = [recipe for recipe in found if recipe is not None]
    grids = [grid for _, grid, _ in plan.launches]
    if module is None or not plan.by_address or len(recipes) < len(found) or min(map(min, grids)) < 1:
        return None
    views: list[tuple[int, dict[int, bytes], _Maps]] = []
    launches = tuple([_launch(plan, *each, recipe, views) for each, recipe in zip(plan.launches, recipes, strict=True)])
    used = {place for *_, places in plan.launches for place in places}
    makes = tuple([(*_call_of(make), plan.given + number in used) for number, make in enumerate(plan.makers)])
    room = None if plan.make_room is None else (*_call_of(plan.make_room), True)
    raw_stream: Any = torch._C._cuda_getCurrentRawStream
    recover = _recovery(plan.device, recipes, grids)
    asked = plan.calls.ticks, plan.device, current_device, raw_stream, Tensor.data_ptr, recover
    try:
        rest = plan.given, makes, room, plan.room, tuple(views), launches
        return module.Plan(*driver.addresses(), *asked, tuple(recipes), *rest)
    except ValueError:  # more parameters than C has room for
        return None


def _call_of(make: Callable[[], Tensor]) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """A function and its arguments."""
    return (make.func, make.args) if isinstance(make, partial) and not make.keywords else (make, ())


def _launch(
    plan: plans.Plan,
    kernel: object,
    grid: tuple[int, int, int],
    places: Sequence[int],
    recipe: Recipe,
    views: list[tuple[int, dict[int, bytes], _Maps]],
) -> tuple[Any, ...]:
    """What C takes of a launch: the parameters' bytes, and which addresses and descriptors go into them where."""
    workspaces = plan.given + len(plan.makers)
    looks = workspaces + len(plan.offsets)
    constants = looks + len(plan.views)
    row: list[Any] = []
    pointers: list[tuple[int, int, int]] = []
    maps: list[tuple[int, int]] = []
    offsets = recipe.parameters.offsets
    described = iter(recipe.described)
    for place in places:
        if place < workspaces:
            pointers.append((offsets[len(row)], place, 0))
            row.append(0)
        elif place < looks:
            pointers.append((offsets[len(row)], workspaces, plan.offsets[place - workspaces]))
            row.append(0)
        elif place < constants:
            view = plan.views[place - looks]
            made = _Maps(view, next(described))
            maps.append((offsets[len(row)], len(views)))
            views.append((view.place, made.known, made))
            row.append(bytes(_MAP_BYTES))
            if recipe.followed:
                row += [*view.shape, *view.strides]
        else:
            row.append(plan.constants[place - constants])
    packed = bytearray(recipe.parameters.size)
    recipe.parameters.pack_into(packed, 0, *row, *[0] * recipe.hidden)
    shape = recipe.threads, recipe.smem, recipe.cluster, recipe.pdl
    return recipe.function, grid, *shape, bytes(packed), offsets, tuple(pointers), tuple(maps)


def _recovery(device: int, recipes: Sequence[Recipe], grids: Sequence[tuple[int, int, int]]) -> Callable[[int, int, int], None]:
    """What C calls with a launch's number where the driver refused it, the driver's code, and how often it was tried again."""

    def recover(number: int, code: int, tries: int) -> None:
        if code == driver.INVALID_CONTEXT and not tries:
            driver.enter_context(device)
        else:
            driver.check(code, f"to launch {recipes[number].name} with a grid of {grids[number]}")

    return recover
