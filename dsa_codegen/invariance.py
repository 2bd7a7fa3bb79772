"""Whether all calls of a process are batch invariant: what ``DSA_BATCH_INVARIANT`` says, until ``use_batch_invariant`` does."""

from __future__ import annotations

import os

_OFF = ("", "0", "false", "no", "off")
_always = os.environ.get("DSA_BATCH_INVARIANT", "").lower() not in _OFF


def always() -> bool:
    """Whether calls are batch invariant that do not ask for it themselves."""
    return _always


def use_batch_invariant(wanted: bool = True) -> bool:
    """Make every call of this process batch invariant, whoever makes it: ``compat``, integrations, a layer; or no longer.

    ``scores``, choice, ``out`` and ``lse`` of a row then have the same bits whatever the batch, the chunk, the split, the rank
    and the records at hand. ``DSA_BATCH_INVARIANT=1`` in the environment does the same from the start. Call it before
    ``warmup``: batch-invariant calls are kernels of their own where others serve better.

    Returns:
        What held before.
    """
    global _always
    before, _always = _always, bool(wanted)
    return before
