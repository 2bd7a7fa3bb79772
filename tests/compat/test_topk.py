"""The top-k drop-ins (SGLang, vLLM): what is chosen, what it is counted from, and where it is written."""

from __future__ import annotations

import pytest
import torch

from dsa_codegen.compat.fast_topk import fast_topk, fast_topk_transform_fused, fast_topk_transform_ragged_fused, fast_topk_v2
from dsa_codegen.compat.top_k_per_row import top_k_per_row_decode, top_k_per_row_prefill

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
TOPK, COLUMNS = 64, 300
LENGTHS = [0, 5, 64, 65, 250, 131]


def windows(device, starts=(40, 0, 3, 17, 50, 169)):
    scores = torch.randn(len(LENGTHS), COLUMNS, generator=torch.Generator().manual_seed(0)).to(device)
    return scores, *(torch.tensor(values, dtype=torch.int32, device=device) for values in (LENGTHS, starts))


def expected(scores, lengths, starts=None):
    """The places of each window's highest scores, counted from its start, as sets."""
    starts = [0] * len(scores) if starts is None else starts.tolist()
    cut = [row[start : start + length] for row, start, length in zip(scores, starts, lengths.tolist(), strict=True)]
    return [set(row.topk(min(TOPK, len(row))).indices.tolist()) for row in cut]


def told(chosen):
    """The chosen places of each row, -1 stripped from its end, where alone it may stand."""
    rows = [[place for place in row if place >= 0] for row in chosen.tolist()]
    assert all(row[len(kept) :] == [-1] * (TOPK - len(kept)) for row, kept in zip(chosen.tolist(), rows, strict=True))
    return [set(row) for row in rows]


@DEVICES
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("function", [fast_topk_v2, fast_topk])
def test_indices_count_from_the_start_of_a_window(device, ragged, function):
    scores, lengths, starts = windows(device)
    chosen = function(scores, lengths, TOPK, row_starts=starts if ragged else None)
    assert (chosen.shape, chosen.dtype) == ((6, TOPK), torch.int32)
    assert told(chosen) == expected(scores, lengths, starts if ragged else None)


@DEVICES
@pytest.mark.parametrize("ragged", [False, True])
def test_ragged_indices_have_their_rows_offset(device, ragged):
    scores, lengths, starts = windows(device)
    offset = torch.tensor([1000, 0, 7, 9, 100, 5], dtype=torch.int32, device=device)
    row_starts = starts if ragged else None
    chosen = fast_topk_transform_ragged_fused(scores, lengths, offset, TOPK, row_starts=row_starts)
    places = expected(scores, lengths, row_starts)
    assert told(chosen) == [{place + shift for place in row} for row, shift in zip(places, offset.tolist(), strict=True)]


@DEVICES
@pytest.mark.parametrize("rows_of", [(1, 1, 1, 1, 1, 1), (3, 1, 0, 2), (2, 2, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_paged_indices_are_entries_of_the_requests_row(device, rows_of, ragged):
    """Decode (a row for each request), prefill (any number of rows, none among them) and rows that only pad a graph."""
    scores, lengths, starts = windows(device)
    requests = len(rows_of)
    table = torch.randperm(requests * COLUMNS, generator=torch.Generator().manual_seed(1)).view(requests, COLUMNS).int()
    row_starts = starts if ragged else None
    counts = torch.tensor((0, *rows_of), dtype=torch.int32)
    chosen = fast_topk_transform_fused(
        score=scores,
        lengths=lengths,
        page_table_size_1=table.to(device),
        cu_seqlens_q=counts.cumsum(0).int().to(device),
        topk=TOPK,
        row_starts=row_starts,
    )
    request = [number for number, rows in enumerate(rows_of) for _ in range(rows)]
    request += [requests - 1] * (len(LENGTHS) - len(request))
    places = expected(scores, lengths, row_starts)
    assert told(chosen) == [set(table[r, list(row)].tolist()) for r, row in zip(request, places, strict=True)]


@DEVICES
@pytest.mark.parametrize("width", [TOPK, TOPK + 8], ids=["whole", "slice"])
def test_vllm_prefill_writes_places_in_the_window(device, width):
    scores, lengths, starts = windows(device)
    buffer = torch.full((6, width), 77, dtype=torch.int32, device=device)
    target = buffer[:, :TOPK]
    top_k_per_row_prefill(scores, starts, starts + lengths, target, 6, *scores.stride(), TOPK)
    assert told(target) == expected(scores, lengths, starts)
    assert (buffer[:, TOPK:] == 77).all()


@DEVICES
@pytest.mark.parametrize("width", [TOPK, TOPK + 8], ids=["whole", "slice"])
@pytest.mark.parametrize("form", ["per row", "per sequence", "padded"])
def test_vllm_decode_knows_what_each_query_sees(device, width, form):
    scores, lengths, _ = windows(device)
    buffer = torch.full((6, width), 77, dtype=torch.int32, device=device)
    if form == "per row":
        seen, seq_lens = lengths, lengths.view(3, 2)
    else:  # the last query of a sequence sees all of it
        seq_lens = torch.tensor([[2], [150], [300]], dtype=torch.int32, device=device)
        seen = torch.tensor([1, 2, 149, 150, 299, 300], dtype=torch.int32, device=device)
    logits = torch.cat([scores, scores]) if form == "padded" else scores
    top_k_per_row_decode(logits, 2, seq_lens, buffer[:, :TOPK], 6, *logits.stride(), TOPK)
    assert told(buffer[:, :TOPK]) == expected(scores, seen)
    assert (buffer[:, TOPK:] == 77).all()
