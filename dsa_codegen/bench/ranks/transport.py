"""What ranks exchange while something runs: how many bytes, how long that takes alone, and what it adds to the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...distributed import gather

_COLLECTIVES = ("_start", "_exchange", "_gather_parts")
"""Of ``distributed.gather``: everything that leaves a rank goes through one of them."""


@dataclass(frozen=True)
class Message:
    """One call of a collective: which, the shape of the bytes that this rank sends, and its other arguments."""

    name: str
    shape: torch.Size
    rest: tuple[Any, ...]


@contextmanager
def _in_their_place(make: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    before = {name: getattr(gather, name) for name in _COLLECTIVES}
    for name, collective in before.items():
        setattr(gather, name, make(name, collective))
    try:
        yield
    finally:
        for name, collective in before.items():
            setattr(gather, name, collective)


@contextmanager
def noted() -> Iterator[list[Message]]:
    """Every message that this rank sends inside the block, in order."""
    messages: list[Message] = []

    def noting(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def note(sent: Tensor, *rest: Any, **named: Any) -> Any:
            messages.append(Message(name, sent.shape, (*rest, *named.values())))
            return collective(sent, *rest, **named)

        return note

    with _in_their_place(noting):
        yield messages


@contextmanager
def absent(world: int) -> Iterator[None]:
    """Inside the block nothing is exchanged: every rank takes its own message for those of all others.

    Results are not those of the step; as much is computed, on numbers of the same kind.
    """
    silent: dict[str, Callable[..., Any]] = {
        "_start": lambda sent, group, wait: (sent.expand(world, len(sent)).contiguous(), None),
        "_exchange": lambda sent, group: sent.clone(),
        "_gather_parts": lambda sent, sizes, group: torch.cat([sent.repeat(-(-size // len(sent)))[:size] for size in sizes]),
    }
    with _in_their_place(lambda name, collective: silent[name]):
        yield


class Collectives:
    """The messages of a step without its arithmetic."""

    def __init__(self, messages: list[Message], device: torch.device) -> None:
        self._calls = [(each, torch.zeros(each.shape, dtype=torch.uint8, device=device)) for each in messages]

    def __call__(self) -> None:
        for message, sent in self._calls:
            found = getattr(gather, message.name)(sent, *message.rest)
            if message.name == "_start" and found[1] is not None:
                found[1].wait()


def sent_bytes(messages: list[Message]) -> int:
    """Of all messages."""
    return sum(each.shape.numel() for each in messages)
