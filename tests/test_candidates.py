"""index_select_candidates: lists in any order, of pages and of smaller blocks, against a choice among every token's scores."""

from __future__ import annotations

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import choice
from dsa_codegen.errors import InputError
from dsa_codegen.problem import checks
from dsa_codegen.problem.caches import IndexKLayout
from dsa_codegen.problem.draw import Draw

HEADS, WIDTH, PAGE, TOPK = 4, 32, 16, 24
BATCH, NEXT_N, PAGES = 3, 2, 9


def problem(scores: str, device: str = "cpu") -> dict:
    """Arguments in whole numbers, so that fp32 sums are exact in any order and many scores are equal."""
    draw = Draw(5, device)
    blocks = BATCH * PAGES + 2
    table = draw.permutation(blocks)[: BATCH * PAGES].view(BATCH, PAGES).int()
    table[0, 3] = -1
    keys = draw.integers(-2, 3, blocks * PAGE, WIDTH).to(torch.bfloat16)
    q = draw.integers(-2, 3, BATCH, NEXT_N, HEADS, WIDTH)
    if scores == "fp8":
        cache = IndexKLayout(PAGE, WIDTH).empty(blocks, device)
        scale = 2.0 ** draw.integers(-1, 2, blocks * PAGE)
        slots = torch.arange(blocks * PAGE, device=device)
        IndexKLayout(PAGE, WIDTH).pack(cache, slots, keys.to(torch.float8_e4m3fn), scale)
    else:
        cache = keys.view(blocks, PAGE, 1, WIDTH)
    weights = draw.integers(1, 4, BATCH * NEXT_N, HEADS).float()
    lengths = torch.tensor([[139, 140], [7, 0], [144, 65]], dtype=torch.int32, device=device)
    dtype = torch.float8_e4m3fn if scores == "fp8" else torch.bfloat16
    return {"q": q.to(dtype), "cache": cache, "weights": weights, "lengths": lengths, "page_table": table}


def lists(block: int, device: str = "cpu") -> torch.Tensor:
    """[BATCH, NEXT_N, 8]: in any order, some twice, some absent, some far behind the end."""
    numbers = Draw(6, device).integers(-2, PAGES * PAGE // block + 3, BATCH, NEXT_N, 8).int()
    numbers[2, 0, :3] = torch.tensor([1, 1, 2**31 - 1], dtype=torch.int32)
    numbers[0, 1] = -1
    return numbers


def expected(given: dict, candidates: torch.Tensor, block: int, scores: str, slots: bool) -> torch.Tensor:
    """The stable choice among the scores of all tokens, those beside the lists left out."""
    logits = dsa.indexer_logits_paged(**given, max_context=PAGES * PAGE, clean=True, scores=scores).cpu()
    table = given["page_table"].cpu().repeat_interleave(NEXT_N, 0)
    rows = []
    for row, numbers in enumerate(candidates.cpu().flatten(0, 1).tolist()):
        token = torch.arange(PAGES * PAGE)
        seen = torch.isin(token // block, torch.tensor(numbers)) & (token < given["lengths"].cpu().flatten()[row])
        seen &= table[row][token // PAGE] >= 0
        best = logits[row].masked_fill(~seen, -torch.inf).sort(descending=True, stable=True).indices
        chosen = best[seen[best]][:TOPK].sort().values
        rows.append(torch.nn.functional.pad(chosen, (0, TOPK - len(chosen)), value=-1))
    tokens = torch.stack(rows).int()
    return (choice.slots_of(tokens, table, PAGE) if slots else tokens).view(BATCH, NEXT_N, TOPK)


CASES = [(16, "fp8", True, 1), (16, "bf16", False, 1 << 30), (4, "fp8", False, 1), (8, "bf16", True, 99)]
"""Tokens of a block, precision, slots instead of tokens, bytes of logits and of copied keys."""


@pytest.mark.parametrize(("block", "scores", "slots", "budget"), CASES)
def test_is_the_choice_among_listed_tokens(block, scores, slots, budget, monkeypatch):
    monkeypatch.setattr(checks, "_ALIGNED", "cpu")  # as on a GPU: parts of the rows begin where kernels can read them
    given, candidates = problem(scores), lists(block)
    found = dsa.index_select_candidates(
        **given, candidates=candidates, topk=TOPK, block=block, scores=scores, slots=slots, max_bytes=budget
    )
    assert torch.equal(found, expected(given, candidates, block, scores, slots))
    assert (found[0, 1] == -1).all()  # nothing is listed
    assert (found[0, 0] >= 0).any()


def test_every_block_is_the_choice_among_all():
    given = problem("fp8")
    every = torch.arange(PAGES, dtype=torch.int32).flip(0).expand(BATCH, NEXT_N, PAGES).contiguous()
    given["page_table"] = given["page_table"].clamp(min=0)
    found = dsa.index_select_candidates(**given, candidates=every, topk=TOPK)
    assert torch.equal(found, dsa.index_select_paged(**given, max_context=PAGES * PAGE, topk=TOPK))


@pytest.mark.parametrize("name", ["candidates", "page_table", "cache"])
def test_of_nothing_there_is_no_choice(name):
    given, candidates = problem("fp8"), lists(PAGE)
    cut = {"candidates": candidates[..., :0], "page_table": given["page_table"][:, :0], "cache": given["cache"][:0]}
    arguments = {**given, "candidates": candidates, name: cut[name]}
    assert (dsa.index_select_candidates(**arguments, topk=TOPK) == -1).all()


def test_refuses():
    given, candidates = problem("fp8"), lists(PAGE)
    with pytest.raises(InputError, match=r"^block: .*a divisor of the cache's page, 16"):
        dsa.index_select_candidates(**given, candidates=candidates, topk=TOPK, block=5)
    with pytest.raises(InputError, match=r"^candidates:"):
        dsa.index_select_candidates(**given, candidates=candidates.long(), topk=TOPK)
    with pytest.raises(InputError, match=r"^lengths:"):
        dsa.index_select_candidates(**{**given, "lengths": given["lengths"][:1]}, candidates=candidates, topk=TOPK)


@pytest.mark.gpu
@pytest.mark.parametrize(("block", "scores", "slots", "budget"), CASES)
def test_kernels_choose_as_the_reference(block, scores, slots, budget):
    given, candidates = problem(scores), lists(block)
    options = {"topk": TOPK, "block": block, "scores": scores, "slots": slots, "max_bytes": budget}
    on_gpu = {name: value.cuda() for name, value in given.items()}
    found = dsa.index_select_candidates(**on_gpu, candidates=candidates.cuda(), **options)
    assert torch.equal(found.cpu(), dsa.index_select_candidates(**given, candidates=candidates, **options))
