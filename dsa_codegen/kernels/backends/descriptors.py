"""Arguments of which TMA loads tiles, as a kernel's parameters take them: a descriptor, for Triton's with shape and strides.

A descriptor is a value: of the same view and tile it is the same, so a view that is launched again keeps what was made of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_VIEW = re.compile(r"tensordesc<[^[>]*\[([^]]*)\]")

Encode = Callable[[Any, Mapping[str, Any]], Sequence[Any]]
"""A view and what its kernel says of the tile -> the parameters that it comes as, the descriptor first."""


def rank_of(kind: str) -> int:
    """Dimensions of an argument that is a view; 0 of any other."""
    view = _VIEW.match(kind)
    return 1 + view[1].count(",") if view else 0


def places_of(types: Sequence[str]) -> list[int]:
    """Which of a kernel's arguments are views, by its types as SIGNATURES states them."""
    return [place for place, kind in enumerate(types) if rank_of(kind)]


class Views:
    """Puts descriptors in the place of a row of arguments' views.

    Args:
        places: of the arguments that are views.
        described: what the compiled kernel says of each view's tile, in their order.
        encode: makes a descriptor.
    """

    def __init__(self, places: Sequence[int], described: Sequence[Mapping[str, Any]], encode: Encode) -> None:
        self.known = len(described) == len(places) and all(described)
        self._views = tuple(zip(places, described, strict=False))
        self._encode = encode

    def __bool__(self) -> bool:
        return bool(self._views) and self.known

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        row: list[Any] = []
        last = 0
        for place, described in self._views:
            view = args[place]
            encoded = view.encoded
            if encoded is None or encoded[0] is not described:  # as another kernel's tiles want it
                encoded = view.encoded = described, self._encode(view, described)
            row += args[last:place]
            row += encoded[1]
            last = place + 1
        row += args[last:]
        return row
