"""A thousand random choices: exactly the stable reference applied to the scores of the unfused pair's indexer.

On a GPU of kinds whose kernels are built once; on the CPU of any k, page and option, in chunks too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen.ops.indexer import OP as INDEXER
from dsa_codegen.ops.indexer import IndexerSizes, IndexerSpec
from dsa_codegen.ops.indexer_paged import OP as INDEXER_PAGED
from dsa_codegen.ops.indexer_paged import IndexerPagedSizes, IndexerPagedSpec
from dsa_codegen.ops.select import OP as SELECT
from dsa_codegen.ops.select import SelectSizes, SelectSpec
from dsa_codegen.problem.caches import IndexKLayout
from dsa_codegen.problem.draw import Draw

HEADS, WIDTH, PAGE = 8, 64, 64
CASES = 1000


@dataclass(frozen=True)
class Kind:
    """What is compiled: the rest of a case is drawn."""

    topk: int
    paged: bool
    slots: bool
    logits: str = "fp32"
    keep_first: int = 0
    keep_recent: int = 0
    score: str = "weighted_relu"
    next_n: int = 1
    windows: bool = False
    """Whether windows over pages begin at tokens of their own."""

    @property
    def kept(self) -> dict[str, int]:
        return {"keep_first": self.keep_first, "keep_recent": self.keep_recent}

    @property
    def scoring(self) -> dict[str, str]:
        return {"logits": self.logits, "score": self.score}

    @property
    def select(self) -> SelectSpec:
        """Of the selection that such a choice calls."""
        starts = self.windows or not self.paged
        output = {"output": "slots", "page": PAGE} if self.slots else {}
        return SelectSpec(self.topk, self.logits, starts, **self.kept, **output)


KINDS = (
    Kind(64, False, False),
    Kind(512, False, True, keep_first=3, keep_recent=17),
    Kind(2048, False, False, "bf16"),
    Kind(2048, True, True),
    Kind(64, True, False, "bf16", keep_first=64),
    Kind(1024, True, True, keep_recent=128),
    Kind(1, False, False, score="relu_bias"),
    Kind(4096, False, False, keep_recent=9),
    Kind(100, True, True, keep_first=3, next_n=2, windows=True),
)
ROWS, COLUMNS = (1, 5, 12, 40), (100, 3000, 8000)


def wanted(kind):
    for rows in ROWS:
        for columns in COLUMNS:
            yield SELECT, kind.select, SelectSizes(rows * kind.next_n, columns)
    if kind.paged:
        yield from (
            (INDEXER_PAGED, IndexerPagedSpec(HEADS, WIDTH, kind.next_n, PAGE, **kind.scoring), IndexerPagedSizes(rows, 8000))
            for rows in ROWS
        )
    else:
        yield INDEXER, IndexerSpec(HEADS, WIDTH, **kind.scoring), IndexerSizes(40, 8000)


def keys_of(draw, tokens, nature):
    """e4m3 keys and scales: normal, of few different scores, or with broken ones."""
    keys, scales = dsa.quantize_index_k(draw.normal(tokens, WIDTH, dtype=torch.bfloat16))
    if nature == "ties":
        keys = draw.integers(-1, 2, tokens, WIDTH).to(torch.float8_e4m3fn)
        scales = torch.ones_like(scales)
    if nature == "broken":
        scales = scales.masked_fill(draw.uniform(tokens) < 0.2, torch.nan).masked_fill(draw.uniform(tokens) < 0.05, torch.inf)
    return keys, scales


def weights_of(draw, rows, nature):
    if nature == "ties":
        return draw.integers(-1, 2, rows, HEADS).float()
    return draw.normal(rows, HEADS) * (0.0 if nature == "zero" else 1.0)


def buffers_of(kind, dice, draw, *shape):
    """The scores of what is chosen, now and then; of slots nobody could look them up below."""
    return {} if kind.slots or dice.random() < 0.7 else {"chosen_scores": draw.normal(*shape, kind.topk)}


def prefill(kind, dice, draw, nature, most, budgets):
    rows, tokens = dice.choice(ROWS), dice.randint(1, most)
    keys, scales = keys_of(draw, tokens, nature)
    q = draw.normal(rows, HEADS, WIDTH).round().to(torch.float8_e4m3fn)
    starts = draw.integers(-2, tokens, rows)
    ends = starts + draw.integers(-5, tokens + 3, rows)
    table = None
    if kind.slots:
        pages = dice.randint(1, tokens // PAGE + 2)
        table = draw.integers(-1, 1 << 20, rows, pages)
    call = q, keys, scales, weights_of(draw, rows, nature), starts, ends
    written = buffers_of(kind, dice, draw, rows)
    rest = {**kind.kept, **kind.scoring, "page_table": table, "page": PAGE, "max_bytes": dice.choice(budgets)}
    found = dsa.index_select(*call, kind.topk, **rest, **written)
    logits = dsa.indexer_logits(*call, **kind.scoring)
    return found, written, {"scores": logits, "starts": starts, "ends": ends, "page_table": table}


def decode(kind, dice, draw, nature, most, budgets):
    batch, tokens = dice.choice(ROWS), dice.randint(1, most)
    pages, rows = -(-tokens // PAGE), batch * kind.next_n
    layout = IndexKLayout(PAGE, WIDTH)
    cache = layout.empty(batch * pages, draw.device)
    slots = torch.arange(batch * pages * PAGE, device=draw.device)
    layout.pack(cache, slots, *keys_of(draw, len(slots), nature))
    table = draw.permutation(batch * pages).view(batch, pages).int()
    lengths = draw.integers(0, tokens + 1, batch, kind.next_n)
    starts = draw.integers(-2, tokens, batch, kind.next_n) if kind.windows else None
    q = draw.normal(batch, kind.next_n, HEADS, WIDTH).round().to(torch.float8_e4m3fn)
    call = q, cache, weights_of(draw, rows, nature), lengths, table, tokens
    written = buffers_of(kind, dice, draw, batch, kind.next_n)
    rest = {**kind.kept, **kind.scoring, "starts": starts, "slots": kind.slots, "max_bytes": dice.choice(budgets)}
    found = dsa.index_select_paged(*call, kind.topk, **rest, **written)
    logits = dsa.indexer_logits_paged(*call, **kind.scoring)
    return (
        found.flatten(0, 1),
        written,
        {
            "scores": logits,
            "starts": starts if starts is None else starts.flatten(),
            "ends": lengths.flatten(),
            "page_table": table if kind.slots else None,
        },
    )


def assert_is_the_reference(kind, case, device, most, budgets=(1 << 30,)):
    """One call of a kind, everything else drawn: lengths, ties, NaN, pages, chunks."""
    dice, draw = random.Random(case), Draw(case, device)
    nature = dice.choice(("normal", "ties", "broken", "zero"))
    exact = nature == "ties"  # rows have the same bits in any chunk
    drawn = (decode if kind.paged else prefill)(
        kind, dice, draw, nature, most, budgets if exact or device != "cpu" else budgets[:1]
    )
    found, written, inputs = drawn
    expected = SELECT.reference(kind.select, inputs)["chosen"]
    told = case, kind, nature, tuple(inputs["scores"].shape)
    assert torch.equal(found, expected), told
    for scores in written.values():
        wanted = inputs["scores"].float().gather(1, expected.clamp(min=0).long()).masked_fill(expected < 0, -torch.inf)
        assert torch.equal(scores.view(wanted.shape).nan_to_num(nan=7.5), wanted.nan_to_num(nan=7.5)), told


def any_kind(dice):
    """What no kernel has to be built for."""
    topk = dice.choice((1, 2, 63, 64, 65, dice.randint(1, 400), dice.randint(401, 4096)))
    first = dice.choice((0, dice.randint(0, min(topk, 20))))
    kept = {"keep_first": first, "keep_recent": dice.choice((0, dice.randint(0, min(topk - first, 20))))}
    scoring = {"logits": dice.choice(("fp32", "bf16")), "score": dice.choice(("weighted_relu", "relu_bias"))}
    paged = dice.random() < 0.5
    windows = {"next_n": dice.randint(1, 3), "windows": dice.random() < 0.5} if paged else {}
    return Kind(topk, paged, dice.random() < 0.5, **kept, **scoring, **windows)


@pytest.mark.parametrize("quarter", range(4))
def test_random_choices_of_any_kind_are_the_stable_reference(quarter):
    """Of the references: what is checked are chunks, windows, slots, buffers and options."""
    for case in range(quarter, CASES, 4):
        assert_is_the_reference(any_kind(random.Random(-1 - case)), case, "cpu", 300, (1 << 30, 1))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")
def test_random_choices_are_the_stable_reference():
    dsa.warmup(call for kind in KINDS for call in wanted(kind))
    for case in range(CASES):
        assert_is_the_reference(KINDS[case % len(KINDS)], case, "cuda", COLUMNS[-1], (1 << 30, 1 << 17))
