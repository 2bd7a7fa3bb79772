"""What ranks exchange while something runs: how many bytes, how long that takes alone, and what it adds to the whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...distributed import gather

_COLLECTIVES = ("_start", "_exchange", "_gather_parts")
"""Of ``distributed.gather``: everything that leaves a rank goes through one of them."""
_STARTED = "_start"
"""The one that may be under way when it returns, with what to wait for."""


@dataclass(frozen=True)
class Message:
    """One call of a collective: which, the shape of the bytes that this rank sends, and its other arguments."""

    name: str
    shape: torch.Size
    rest: tuple[Any, ...]
    come: Tensor
    """What arrived."""


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
            found = collective(sent, *rest, **named)
            come = found[0] if name == _STARTED else found
            messages.append(Message(name, sent.shape, (*rest, *named.values()), come))
            return found

        return note

    with _in_their_place(noting):
        yield messages


@contextmanager
def absent(messages: Sequence[Message]) -> Iterator[None]:
    """Inside the block nothing is exchanged: what a step was seen to receive is there already, run after run.

    Its own message in place of the others' would not do: candidates that come twice are chosen twice, and attended to.
    """
    arrived = itertools.cycle(messages)

    def arriving(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def take(sent: Tensor, *rest: Any, **named: Any) -> Any:
            message = next(arrived)
            assert (message.name, message.shape) == (name, sent.shape), "a step that sends other messages every time"
            return (message.come, None) if name == _STARTED else message.come

        return take

    with _in_their_place(arriving):
        yield


class Collectives:
    """The messages of a step without its arithmetic."""

    def __init__(self, messages: list[Message], device: torch.device) -> None:
        self._calls = [(each, torch.zeros(each.shape, dtype=torch.uint8, device=device)) for each in messages]

    def __call__(self) -> None:
        for message, sent in self._calls:
            found = getattr(gather, message.name)(sent, *message.rest)
            if message.name == _STARTED and found[1] is not None:
                found[1].wait()


def sent_bytes(messages: list[Message]) -> int:
    """Of all messages."""
    return sum(each.shape.numel() for each in messages)
