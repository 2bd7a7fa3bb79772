"""From scores to lists: the k highest, as many as they are worth, the tokens of chosen blocks, and where tokens lie."""

from __future__ import annotations

from torch import Tensor

from . import operators


def select(
    scores: Tensor,
    ends: Tensor,
    topk: int,
    *,
    starts: Tensor | None = None,
    page_table: Tensor | None = None,
    page: int = 64,
    keep_first: int = 0,
    keep_recent: int = 0,
    out: Tensor | None = None,
    sms: int | None = None,
) -> Tensor:
    """The k highest scores of each row's window [start, end), in ascending order of tokens; ties go to the lowest token.

    Args:
        scores: fp32 or bf16 [rows, columns], at most 2^30 columns; rows may be strided.
        ends: int32 [rows].
        topk: 1 to 4096.
        starts: int32 [rows]; 0 where absent.
        page_table: int32 [requests, max_pages]; with it the result holds physical slots (block · page + offset), and
            rows / requests consecutive rows share a request.
        keep_first, keep_recent: so many tokens at the window's start and end are always chosen; they count among the k.
        out: int32 [rows, topk], contiguous, where to write the result; a new tensor where absent.
        sms: as in ``indexer_logits``.

    Returns:
        int32 [rows, topk], -1 behind the last chosen token of a short window. The same input gives the same bits, always.
    """
    if out is None:
        return operators.select(scores, ends, topk, starts, page_table, page, keep_first, keep_recent, sms)
    operators.select_into(scores, ends, topk, starts, page_table, page, keep_first, keep_recent, out, sms)
    return out


def adapt(
    scores: Tensor,
    chosen: Tensor,
    ends: Tensor,
    *,
    starts: Tensor | None = None,
    page_table: Tensor | None = None,
    page: int = 64,
    keep_first: int = 0,
    keep_recent: int = 0,
    min_score: float | Tensor | None = None,
    mass: float | Tensor | None = None,
    mass_of: str = "window",
    mass_scale: float = 1.0,
    counts: Tensor | None = None,
    chosen_scores: bool = False,
) -> tuple[Tensor, ...]:
    """Of each row's choice as many tokens as its scores are worth: the longest beginning of the order that all rules allow.

    The order is that of choice: what is kept, then the highest score first, ties to the lowest token, NaN last.

    Args:
        scores: fp32 or bf16 [rows, columns], what ``chosen`` was chosen from.
        chosen: int32 [rows, topk], tokens as ``select`` gives them, not slots.
        ends, starts, keep_first, keep_recent: as in ``select``; what is kept there is kept here.
        page_table, page: as in ``select``; with a table the result holds slots.
        min_score: only tokens whose score is at least so high; for all rows, or fp32 [rows].
        mass: the fewest tokens whose share of ``Σ exp(mass_scale · score)`` reaches so much, more than 0 and at most 1; for all
            rows, or fp32 [rows].
        mass_of: "window" for a share of all scores of the row's window, "chosen" of those in ``chosen`` alone, which reads
            nothing else.
        counts: int32 [rows], each row's own k.
        chosen_scores: also return the scores of what is taken.

    Returns:
        tokens or slots int32 [rows, topk] in ascending order of tokens, -1 behind the last, and lengths int32 [rows], how many
        they are, which ``sparse_attention`` takes; then fp32 [rows, topk], -inf behind the last, where scores are asked for. A
        weight below 2^-32 of the highest counts as none; so do those of -inf and NaN.
    """
    minimum, share = ((None, each) if isinstance(each, Tensor) else (each, None) for each in (min_score, mass))
    windows = ends, starts, page_table, page, keep_first, keep_recent
    return tuple(operators.adapt(scores, chosen, *windows, *minimum, *share, mass_of, mass_scale, counts, chosen_scores))


def expand_blocks(
    chosen: Tensor,
    block_starts: Tensor,
    starts: Tensor,
    ends: Tensor,
    pool: int,
    *,
    page_table: Tensor | None = None,
    page: int = 64,
) -> tuple[Tensor, Tensor]:
    """The tokens of chosen blocks, and the tail: the row's tokens behind its last whole block, of which it chose none.

    Args:
        chosen: int32 [rows, n], blocks that ``select`` chose, ascending, -1 behind the last.
        block_starts: int32 [rows], the first block of the row's sequence.
        starts: int32 [rows], the first token of the sequence: that of block ``block_starts``.
        ends: int32 [rows], one past the last token that the row sees.
        pool: tokens of a block, a power of two up to 64.
        page_table: int32 [requests, max_pages], of tokens counted from 0; with it the result holds slots.

    Returns:
        int32 [rows, n · pool + pool - 1], ascending, -1 behind the last, and lengths int32 [rows].
    """
    out, lengths = operators.expand_blocks(chosen, block_starts, starts, ends, pool, page_table, page)
    return out, lengths


def resolve(chosen: Tensor, page_table: Tensor, *, page: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Look chosen tokens up in a cache that holds some of a sequence's: where they are, and which must be fetched.

    For KV caches in the host's memory with a buffer of hot rows on the GPU: ``slots`` and ``counts`` are what
    ``sparse_attention_paged`` takes as ``indices`` and ``lengths``, ``misses`` are what a loader copies. Deterministic: both
    lists keep the order of the choice. Rows of one request may miss the same token, each for itself.

    Args:
        chosen: int32 [rows, topk], tokens of the sequence, -1 anywhere for none; topk 1 to 8192.
        page_table: int32 [requests, pages]: the block of the buffer that holds each page of tokens, negative where none does; a
            token beyond the table is missing. rows / requests consecutive rows share a request.
        page: tokens per page, 1 to 1024; with 1 the table states a row of the buffer for each token.

    Returns:
        slots int32 [rows, topk], block · page + offset, -1 behind the last, and counts int32 [rows];
        misses int32 [rows, topk], the tokens, -1 behind the last, and missed int32 [rows], how many they are.
    """
    slots, counts, misses, missed = operators.resolve(chosen, page_table, page, True, 0, 1, 1, 2**31 - 1)
    return slots, counts, misses, missed


def resolve_own(chosen: Tensor, page_table: Tensor, page: int, held: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """``resolve`` of the tokens that a shard holds, without a list of others: slots and counts.

    Args:
        held: offset, stride, block and tokens of ``distributed.Shard``; page_table names the shard's own pages.
    """
    slots, counts = operators.resolve(chosen, page_table, page, False, *held)
    return slots, counts


def candidates_of(logits: Tensor, tokens: Tensor, held: tuple[int, int, int] = (0, 1, 1)) -> Tensor:
    """What a part of a sequence offers to a choice from all of it: chosen tokens, by the sequence's numbers, and their scores.

    Args:
        logits: fp32 or bf16 [rows, columns] of the part's tokens; rows may be strided.
        tokens: int32 [rows, topk], from ``select`` over these; -1 for none.
        held: offset, stride and block of ``distributed.Shard``.

    Returns:
        int32 [rows, 2, topk]: tokens, 2^31 - 1 for none, and the bits of their fp32 scores, -inf for none.
    """
    return operators.candidates_of(logits, tokens, *held)


def merge_candidates(candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates of several parts in the order of their tokens, so that ``select`` chooses as from all scores, ties included.

    Args:
        candidates: int32 [parts, rows, 2, topk], of each part what ``candidates_of`` gives of tokens that ascend; no token is
            in two parts. 1 to 128 parts.

    Returns:
        fp32 [rows, parts · topk], scores; int32 of the same shape, tokens; int32 [rows], how many there are. Behind them is
        anything.
    """
    ranked, tokens, ends = operators.merge_candidates(candidates)
    return ranked, tokens, ends
