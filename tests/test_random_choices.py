"""A thousand random choices on a GPU: exactly the stable reference applied to the scores of the same kernels."""

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

    @property
    def select(self) -> SelectSpec:
        """Of the selection that such a choice calls."""
        starts = not self.paged
        output = {"output": "slots", "page": PAGE} if self.slots else {}
        return SelectSpec(self.topk, self.logits, starts, keep_first=self.keep_first, keep_recent=self.keep_recent, **output)


KINDS = (
    Kind(64, False, False),
    Kind(512, False, True, keep_first=3, keep_recent=17),
    Kind(2048, False, False, "bf16"),
    Kind(2048, True, True),
    Kind(64, True, False, "bf16", keep_first=64),
    Kind(1024, True, True, keep_recent=128),
)
ROWS, COLUMNS = (1, 5, 12, 40), (100, 3000, 8000)


def wanted(kind):
    for rows in ROWS:
        for columns in COLUMNS:
            yield SELECT, kind.select, SelectSizes(rows, columns)
    if kind.paged:
        yield from (
            (INDEXER_PAGED, IndexerPagedSpec(HEADS, WIDTH, page=PAGE, logits=kind.logits), IndexerPagedSizes(rows, 8000))
            for rows in ROWS
        )
    else:
        yield INDEXER, IndexerSpec(HEADS, WIDTH, logits=kind.logits), IndexerSizes(40, 8000)


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


def prefill(kind, dice, draw, nature):
    rows, tokens = dice.choice(ROWS), dice.randint(1, COLUMNS[-1])
    keys, scales = keys_of(draw, tokens, nature)
    q = draw.normal(rows, HEADS, WIDTH).round().to(torch.float8_e4m3fn)
    starts = draw.integers(-2, tokens, rows)
    ends = starts + draw.integers(-5, tokens + 3, rows)
    table = None
    if kind.slots:
        pages = dice.randint(1, tokens // PAGE + 2)
        table = draw.integers(-1, 1 << 20, rows, pages)
    call = q, keys, scales, weights_of(draw, rows, nature), starts, ends
    kept = {"keep_first": kind.keep_first, "keep_recent": kind.keep_recent}
    rest = {**kept, "page_table": table, "page": PAGE, "logits": kind.logits, "max_bytes": dice.choice((1 << 30, 1 << 17))}
    found = dsa.index_select(*call, kind.topk, **rest)
    logits = dsa.indexer_logits(*call, logits=kind.logits)
    return found, {"scores": logits, "starts": starts, "ends": ends, "page_table": table}


def decode(kind, dice, draw, nature):
    batch, tokens = dice.choice(ROWS), dice.randint(1, COLUMNS[-1])
    pages = -(-tokens // PAGE)
    layout = IndexKLayout(PAGE, WIDTH)
    cache = layout.empty(batch * pages, "cuda")
    slots = torch.arange(batch * pages * PAGE, device="cuda")
    layout.pack(cache, slots, *keys_of(draw, len(slots), nature))
    table = draw.permutation(batch * pages).view(batch, pages).int()
    lengths = draw.integers(0, tokens + 1, batch, 1)
    q = draw.normal(batch, 1, HEADS, WIDTH).round().to(torch.float8_e4m3fn)
    call = q, cache, weights_of(draw, batch, nature), lengths, table, tokens
    kept = {"keep_first": kind.keep_first, "keep_recent": kind.keep_recent}
    found = dsa.index_select_paged(*call, kind.topk, slots=kind.slots, logits=kind.logits, **kept)
    logits = dsa.indexer_logits_paged(*call, logits=kind.logits)
    return found.flatten(0, 1), {
        "scores": logits,
        "starts": None,
        "ends": lengths.flatten(),
        "page_table": table if kind.slots else None,
    }


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned")
def test_random_choices_are_the_stable_reference():
    dsa.warmup(call for kind in KINDS for call in wanted(kind))
    for case in range(CASES):
        dice, draw = random.Random(case), Draw(case, "cuda")
        kind, nature = KINDS[case % len(KINDS)], dice.choice(("normal", "ties", "broken", "zero"))
        found, inputs = (decode if kind.paged else prefill)(kind, dice, draw, nature)
        expected = SELECT.reference(kind.select, inputs)["chosen"]
        assert torch.equal(found, expected), (case, kind, nature, tuple(inputs["scores"].shape))
