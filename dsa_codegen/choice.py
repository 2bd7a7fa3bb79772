"""The tokens that each query chooses: indexer and selection in one call, in memory that does not grow with the context.

This is the unfused pair. Logits of a chunk of rows are written within a budget of bytes, read by ``select`` and forgotten
before the next chunk's are allocated; what stays are rows · topk integers. On the CPU the references take several times the
budget.
A chunk is a call of its own, as in ``indexer_logits_chunks``: where other rows make another kernel serve, the fp32 sums are
rounded in another order, and a choice among scores that differ by no more than that may differ; not with ``batch_invariant``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from . import functions
from .adaptive import Adaptive
from .chunk import Chunk, Wanted, taken
from .chunk import slots_of as slots_of  # whose part it is for everybody else
from .errors import InputError
from .ops.indexer import OP as INDEXER
from .ops.indexer_paged import OP as INDEXER_PAGED
from .ops.logits import LOGITS, chunk_rows
from .ops.select import OP as SELECT
from .ops.select import SelectSpec
from .problem import checks
from .problem.paged import check_keys

LOGITS_BYTES = 1 << 30
_ALIGNED_ROWS = 4  # kernels read windows of 4 bytes that lie on 16-byte addresses


def index_select(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor | None,
    weights: Tensor,
    starts: Tensor,
    ends: Tensor,
    topk: int,
    *,
    score: str = "weighted_relu",
    logits: str = "fp32",
    page_table: Tensor | None = None,
    page: int = 64,
    keep_first: int = 0,
    keep_recent: int = 0,
    max_bytes: int = LOGITS_BYTES,
    out: Tensor | None = None,
    chosen_scores: Tensor | None = None,
    scores: str = "fp8",
    sms: int | None = None,
    batch_invariant: bool = False,
    adaptive: Adaptive | None = None,
    chosen_lengths: Tensor | None = None,
) -> Tensor:
    """``select`` of ``indexer_logits``: the topk tokens of each query's window that its indexer scores highest.

    Args:
        q, k, k_scale, weights, starts, ends, score, logits, scores: as in ``indexer_logits``.
        topk, page_table, page, keep_first, keep_recent: as in ``select``.
        max_bytes: logits in memory at once, or those of 4 rows where these take more.
        out: int32 [queries, topk], contiguous, where to write the result; a new tensor where absent.
        chosen_scores: fp32 [queries, topk], where to write the score of each chosen token, -inf where there is none.
        sms, batch_invariant: as in ``indexer_logits``.
        adaptive: topk is "at most": a rule by which each query takes as many as its scores are worth.
        chosen_lengths: int32 [queries], where to write how many each takes; with a rule, and then needed.

    Returns:
        int32 [queries, topk] as ``select`` returns it: tokens in ascending order, or slots.

    Raises:
        InputError, SpecError: before anything is launched.
    """
    rule = _rule(topk, page, keep_first, keep_recent)
    _check_kinds(max_bytes=(max_bytes, "int"))
    _, sizes, _ = INDEXER.bind(q, k, k_scale, weights, starts, ends, score, logits, False, None, scores, False)
    queries = sizes.queries
    _check_buffers(q, (queries, rule.topk), out, chosen_scores)
    _check_adaptive(adaptive, chosen_lengths, (queries,), q)
    # Rows of no columns: every other argument of the selection is checked by it.
    nothing = q.new_empty(queries, 0, dtype=LOGITS[logits])
    SELECT.bind(nothing, ends, topk, starts, page_table, page, keep_first, keep_recent)

    options: dict[str, Any] = {"score": score, "logits": logits, "scores": scores, "sms": sms}
    options["batch_invariant"] = batch_invariant

    def choose(rows: slice, table: Tensor | None, out: Tensor | None) -> Tensor:
        made = functions.indexer_logits(q[rows], k, k_scale, weights[rows], starts[rows], ends[rows], **options)
        worth = None if adaptive is None else adaptive.of_rows(rows)
        wanted = Wanted(out, _part(chosen_scores, rows), _part(chosen_lengths, rows))
        return taken(Chunk(made, ends[rows], starts[rows], table), rule, worth, wanted, sms)

    step = max(_ALIGNED_ROWS, chunk_rows(max_bytes, queries, len(k), logits))
    if step >= queries:
        return choose(slice(None), page_table, out)
    out = q.new_empty(queries, rule.topk, dtype=torch.int32) if out is None else out
    for first in range(0, queries, step):
        rows = slice(first, min(first + step, queries))
        choose(rows, _table_of(page_table, queries, rows), out[rows])
    return out


def index_select_paged(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    max_context: int,
    topk: int,
    *,
    starts: Tensor | None = None,
    score: str = "weighted_relu",
    logits: str = "fp32",
    slots: bool = True,
    keep_first: int = 0,
    keep_recent: int = 0,
    max_bytes: int = LOGITS_BYTES,
    out: Tensor | None = None,
    chosen_scores: Tensor | None = None,
    scores: str = "fp8",
    sms: int | None = None,
    batch_invariant: bool = False,
    adaptive: Adaptive | None = None,
    chosen_lengths: Tensor | None = None,
) -> Tensor:
    """``select`` of ``indexer_logits_paged``: the same over paged caches. May be captured in a CUDA graph.

    Args:
        q, cache, weights, lengths, page_table, max_context, score, logits, scores: as in ``indexer_logits_paged``.
        topk, keep_first, keep_recent: as in ``select``.
        starts: int32 [batch, next_n], where each query's window begins; token 0 where absent.
        slots: physical slots of the cache's pages; False gives token numbers.
        max_bytes: logits in memory at once, or those of 4 sequences where these take more.
        out: int32 [batch, next_n, topk], contiguous, where to write the result; a new tensor where absent.
        chosen_scores: fp32 [batch, next_n, topk], where to write the score of each chosen token, -inf where there is none.
        sms, batch_invariant: as in ``indexer_logits``.
        adaptive: as in ``index_select``; numbers of each query are [batch, next_n].
        chosen_lengths: int32 [batch, next_n], where to write how many each query takes; with a rule, and then needed.

    Returns:
        int32 [batch, next_n, topk]. Slots of pages that the table states as absent are -1, tokens of them have the score -inf.

    Raises:
        InputError, SpecError: before anything is launched.
    """
    checked, page = check_keys(q, cache, scores)
    batch, next_n = checked.shape[:2]
    rule = _rule(topk, page, keep_first, keep_recent)
    _check_kinds(max_bytes=(max_bytes, "int"), slots=(slots, "bool"), max_context=(max_context, "int"))
    checks.one_of("logits", logits, tuple(LOGITS))
    if starts is not None:
        checks.tensor("starts", starts, (batch, next_n), torch.int32, like=q)
    _check_buffers(q, (batch, next_n, rule.topk), out, chosen_scores)
    _check_adaptive(adaptive, chosen_lengths, (batch, next_n), q)

    options: dict[str, Any] = {"score": score, "logits": logits, "scores": scores, "sms": sms}
    options["batch_invariant"] = batch_invariant

    def choose(rows: slice, out: Tensor | None) -> Tensor:
        own, pages, ends = _queries_of(rows, next_n), page_table[rows], lengths[rows].flatten()
        made = functions.indexer_logits_paged(q[rows], cache, weights[own], lengths[rows], pages, max_context, **options)
        if not slots:  # as slots do, tokens end where the table does
            ends = ends.clamp(max=pages.shape[1] * rule.page)
        worth = None if adaptive is None else adaptive.of_rows(own)
        wanted = Wanted(_flat(out), _flat(_part(chosen_scores, rows)), _flat(_part(chosen_lengths, rows)))
        chunk = Chunk(made, ends, _flat(_part(starts, rows)), pages if slots else None)
        return taken(chunk, rule, worth, wanted, sms)

    step = _sequences(max_bytes, batch, next_n, max_context, logits)
    if step >= batch:
        return choose(slice(None), out).view(batch, next_n, rule.topk)
    INDEXER_PAGED.bind(q, cache, weights, lengths, page_table, max_context, score, logits, False, scores, False)
    out = q.new_empty(batch, next_n, rule.topk, dtype=torch.int32) if out is None else out
    for first in range(0, batch, step):
        rows = slice(first, min(first + step, batch))
        choose(rows, out[rows])
    return out


def candidates_paged(
    q: Tensor,
    cache: Tensor,
    weights: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    max_context: int,
    topk: int,
    held: tuple[int, int, int],
    *,
    logits: str = "fp32",
    max_bytes: int = LOGITS_BYTES,
    sms: int | None = None,
    **options: Any,
) -> Tensor:
    """What ``index_select_paged`` would choose in a part of each sequence, for a choice from all of it.

    Args:
        q, cache, weights, page_table, max_context, logits, max_bytes, sms: as there, of the part.
        lengths: int32 [batch, next_n], of the part, none beyond the pages of the table.
        topk: 1 to 4096, of the whole choice.
        held: offset, stride and block of ``distributed.Shard``.
        options: score, batch_invariant of ``indexer_logits_paged``.

    Returns:
        int32 [batch · next_n, 2, topk], see ``functions.candidates_of``.
    """
    batch, next_n = checks.tensor("lengths", lengths, (None, None), torch.int32).shape
    step = _sequences(max_bytes, batch, next_n, max_context, logits)
    options |= {"logits": logits, "sms": sms}
    found = []
    for first in range(0, max(batch, 1), max(step, 1)):
        rows, own = slice(first, first + step), slice(first * next_n, (first + step) * next_n)
        ends, table = lengths[rows], page_table[rows]
        made = functions.indexer_logits_paged(q[rows], cache, weights[own], ends, table, max_context, **options)
        found.append(functions.candidates_of(made, functions.select(made, ends.flatten(), topk, sms=sms), held))
    return found[0] if len(found) == 1 else torch.cat(found)


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _flat(tensor: Tensor | None) -> Tensor | None:
    """One row for each query of all sequences."""
    return None if tensor is None else tensor.flatten(0, 1)


def _queries_of(sequences: slice, next_n: int) -> slice:
    """The rows that belong to some sequences."""
    first, last = sequences.start, sequences.stop
    return slice(None if first is None else first * next_n, None if last is None else last * next_n)


def _sequences(max_bytes: int, batch: int, next_n: int, columns: int, logits: str) -> int:
    """How many sequences' logits to compute at a time: all, or as many whole groups of 4 as the budget allows, at least one."""
    fitting = chunk_rows(max_bytes, batch * next_n, columns, logits) // max(next_n, 1)
    return batch if fitting >= batch else max(_ALIGNED_ROWS, fitting // _ALIGNED_ROWS * _ALIGNED_ROWS)


def _new_spec(topk: int, page: int, keep_first: int, keep_recent: int) -> SelectSpec:
    return SelectSpec(topk, page=page, keep_first=keep_first, keep_recent=keep_recent)


_spec = functools.lru_cache(maxsize=256)(_new_spec)


def _rule(topk: int, page: int, keep_first: int, keep_recent: int) -> SelectSpec:
    """What is chosen and how it is written, checked before a kernel runs."""
    whole = {"topk": topk, "page": page, "keep_first": keep_first, "keep_recent": keep_recent}
    _check_kinds(**{name: (value, "int") for name, value in whole.items()})
    # At once where the same was asked before; a trace does not see through the cache, and need not.
    make = _new_spec if torch.compiler.is_compiling() else _spec
    return make(topk, page, keep_first, keep_recent)


def _check_kinds(**arguments: tuple[object, str]) -> None:
    """Name what is of no sensible type; a trace has symbols for numbers, which no check can look into."""
    if not torch.compiler.is_compiling():
        for name, (value, kind) in arguments.items():
            checks.check_kind(name, value, kind)


def _check_buffers(q: Tensor, shape: tuple[int, ...], out: Tensor | None, chosen_scores: Tensor | None) -> None:
    for name, value, dtype in (("out", out, torch.int32), ("chosen_scores", chosen_scores, torch.float32)):
        if value is not None:
            checks.tensor(name, value, shape, dtype, like=q)


def _table_of(page_table: Tensor | None, queries: int, rows: slice) -> Tensor | None:
    """The page table of a chunk, one row of it for each query: a chunk may end inside a request."""
    if page_table is None:
        return None
    request = torch.arange(rows.start, rows.stop, device=page_table.device) // (queries // len(page_table))
    return page_table[request]


def _check_adaptive(adaptive: Adaptive | None, chosen_lengths: Tensor | None, shape: tuple[int, ...], q: Tensor) -> None:
    """The rule's numbers, and a buffer for lengths with a rule and none without."""
    if adaptive is not None:
        if not isinstance(adaptive, Adaptive):
            raise InputError("adaptive", type(adaptive).__name__, "an Adaptive, or None")
        adaptive.checked(math.prod(shape))
        checks.tensor("chosen_lengths", chosen_lengths, shape, torch.int32, like=q)
    elif chosen_lengths is not None:
        allowed = "None without an adaptive rule: every list is as long as its window, up to topk"
        raise InputError("chosen_lengths", "a tensor", allowed)
