"""Grouped queries as requests: every KV head of every query is one, whose pages are the blocks that it lists."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...problem.op import Inputs
from ..cases import BenchCase


@dataclass(frozen=True)
class Requests:
    """What paged attention with one KV head takes."""

    q: Tensor
    """[requests, heads of a KV head, head_dim]."""
    k: Tensor
    v: Tensor
    """[pages, block, 1, head_dim]."""
    pages: Tensor
    """int32 [requests, entries]."""


_MADE: MutableMapping[Tensor, Requests] = WeakIdKeyDictionary()
"""By the keys that they were made of: peers share them, as they take gigabytes."""


def requests_of(case: BenchCase, inputs: Inputs) -> Requests:
    """The case's keys and values with heads outside of a page's tokens, as an engine that serves so would keep them."""
    found = _MADE.get(inputs["k"])
    if found is None:
        found = _MADE[inputs["k"]] = _made(case, inputs)
    return found


def _made(case: BenchCase, inputs: Inputs) -> Requests:
    block, kv_heads = case["block"], case["kv_heads"]
    listed = _places(case, inputs)
    head = listed.new_tensor(range(kv_heads))[:, None]
    pages = (listed * kv_heads + head).flatten(0, 1).int()
    q = inputs["q"].unflatten(1, (kv_heads, -1)).flatten(0, 1)
    k, v = _heads_outside(inputs["k"], block), _heads_outside(inputs["v"], block)
    return Requests(q, k, v, pages)


def _places(case: BenchCase, inputs: Inputs) -> Tensor:
    """int32 [rows, kv_heads, entries]: where each listed block lies, in blocks."""
    listed, table = inputs["indices"], inputs["page_table"]
    if table is None:
        return listed
    parts = case["page"] // case["block"]
    rows = table.repeat_interleave(len(listed) // len(table), 0)[:, None].expand(-1, listed.shape[1], -1)
    return rows.gather(2, (listed // parts).long()) * parts + listed % parts


def _heads_outside(cache: Tensor, block: int) -> Tensor:
    """[blocks · kv_heads, block, 1, channels] of rows or pages [..., kv_heads, channels]."""
    rows = cache.flatten(0, -3)
    whole = rows[: len(rows) // block * block].unflatten(0, (-1, block))
    return whole.transpose(1, 2).contiguous().flatten(0, 1)[:, :, None]


def serves(case: BenchCase) -> bool:
    """Whether a block is a page, or a part of one."""
    return dict(case.shape).get("page", case["block"]) % case["block"] == 0 and case["context"] % case["block"] == 0
