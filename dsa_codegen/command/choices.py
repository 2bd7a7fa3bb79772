"""Quality on the command line: which contexts and numbers of tokens are taken where none are named, and their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import InputError
from ..problem.presets import Model
from ..quality import Activations, Row, drawn, load, measure

_PARTS = (8, 4, 2, 1)
"""Of the model's topk, or of half of the context of a file."""


def device_of(name: str) -> str:
    """``auto`` is the GPU where there is one.

    Raises:
        InputError: a device that is not here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise InputError("--device", name, "auto, cpu, or cuda where a GPU is visible")
    return name


def activations(file: Path | None, model: Model, contexts: Sequence[int], queries: int, seed: int, device: str) -> Activations:
    """Those of a file, or random ones of the model that reach as far as the longest context."""
    if file is not None:
        return load(file).to(device)
    longest = max(contexts, default=131072 if device == "cuda" else 4096)
    return drawn(model, longest, queries, seed, device, contexts=contexts)


def rows(of: Activations, contexts: Sequence[int], ks: Sequence[int], queries: int, seed: int, topk: int | None) -> list[Row]:
    """Of each context the last queries; ``ks`` where none are named are parts of ``topk``, or of half of the longest context.

    Raises:
        InputError: a context, a number of tokens or of queries that cannot be.
    """
    if queries < 1 or any(context < 1 for context in contexts):
        raise InputError("--queries, --context", f"{queries}, {list(contexts)}", "1 or more")
    most = topk or max(of.context // 2, 1)
    wanted = list(ks) or sorted({max(1, most // part) for part in _PARTS})
    found: list[Row] = []
    for context in sorted(set(contexts)) or [of.context]:
        found += measure(of.until(context, queries), wanted, seed=seed)
    return found
