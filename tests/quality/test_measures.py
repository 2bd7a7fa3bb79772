"""What a choice is worth: known on data whose answer is known, and what must hold on any."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import quality
from dsa_codegen.errors import InputError, SpecError
from dsa_codegen.problem.draw import Draw

KS = (8, 40, 96, 160)
CONTEXT, QUERIES, CHANNELS = 160, 6, 32


def small(seed=0, heads=2):
    """Random activations of a few heads."""
    model = dsa.Model("small", heads, 512, 64, 8, 32, 64)
    return quality.drawn(model, CONTEXT, QUERIES, seed)


def exact_indexer(seed=0):
    """One attention head whose score the indexer computes: ReLU(q · k) - ReLU(-q · k), of the few channels that are not 0."""
    draw, of = Draw(seed), small(heads=1)
    q, kv = torch.zeros_like(of.q), torch.zeros_like(of.kv)
    q[..., :CHANNELS] = 30 * draw.normal(QUERIES, 1, CHANNELS)
    kv[..., :CHANNELS] = draw.normal(CONTEXT, 1, CHANNELS)
    index_q, weights = torch.zeros_like(of.index_q), torch.zeros_like(of.index_weights)
    index_q[:, 0], index_q[:, 1] = q[:, 0, :CHANNELS], -q[:, 0, :CHANNELS]
    weights[:, 0], weights[:, 1] = 1, -1
    return replace(of, q=q, kv=kv, index_q=index_q, index_k=kv[:, 0, :CHANNELS].contiguous(), index_weights=weights)


@pytest.fixture(scope="module")
def rows():
    """Of random activations, by choice and k."""
    return {(row.choice, row.k): row for row in quality.measure(small(), KS)}


def test_an_indexer_that_is_the_exact_score_recalls_everything():
    found = quality.measure(exact_indexer(), KS, ["exact", "bf16", "fp8"])
    by = {(row.choice, row.k): row for row in found}
    for k in KS:
        exact, plain, served = (by[choice, k] for choice in ("exact", "bf16", "fp8"))
        assert plain.recall == exact.recall == 1
        assert plain.mass == pytest.approx(exact.mass) and plain.error == pytest.approx(exact.error, abs=1e-5)
        assert 0.85 <= served.recall <= 1 and served.overlap == served.recall


@pytest.mark.parametrize("seed", [1, 2])
def test_a_random_choice_recalls_its_share(seed):
    """Within three standard deviations of what drawing k of L tokens without putting them back gives."""
    of = quality.drawn(dsa.Model("small", 1, 512, 64, 8, 32, 64), 400, 100, seed)
    for row in quality.measure(of, [20, 100], ["random"], seed):
        length = of.ends.double()
        share = row.k / length
        variance = share * (1 - share) * (length - row.k) / (length - 1) / row.k
        sigma = (variance.sum().sqrt() / len(length)).item()
        assert abs(row.recall - share.mean().item()) < 3 * sigma
        assert sigma < 0.02, "or nothing would be seen"


@pytest.mark.parametrize("choice", quality.CHOICES)
def test_what_is_found_never_falls_as_k_grows(rows, choice):
    for name in ("hits", "mass"):
        values = [getattr(rows[choice, k], name) for k in KS]
        assert values == sorted(values), name
    recalls = [rows[choice, k].recall for k in KS]
    assert all(later > earlier - 0.05 for earlier, later in itertools.pairwise(recalls))


@pytest.mark.parametrize("choice", quality.CHOICES)
def test_to_choose_everything_is_dense_attention(rows, choice):
    row = rows[choice, CONTEXT]
    assert row.recall == row.hits == 1
    assert row.mass == pytest.approx(1) and row.error < 1e-5
    assert rows[choice, KS[0]].error > 1e-2


def test_nothing_captures_more_than_the_exact_choice(rows):
    for k in KS:
        assert max(rows[choice, k].mass for choice in quality.CHOICES) == rows["exact", k].mass


def test_what_fp8_scores_choose_is_what_serving_chooses():
    of = small()
    q, weights = dsa.quantize_index_q(of.index_q.bfloat16(), of.index_weights)
    served = dsa.index_select(q, *dsa.quantize_index_k(of.index_k.bfloat16()), weights, of.starts, of.ends, 64)
    ranked = quality.rankings.Ranked(of, torch.zeros(QUERIES, CONTEXT))
    assert torch.equal(ranked.order("fp8")[:, :64].sort(dim=1).values.int(), served)


def test_mass_and_error_are_those_of_plain_softmax():
    of = replace(small(), sink=torch.tensor([0.5, 3.0]), starts=torch.full((QUERIES,), 7, dtype=torch.int32))
    (row,) = quality.measure(of, [40], ["window"])
    masses, outs, wholes = [], [], []
    for t in range(QUERIES):
        window = slice(7, int(of.ends[t]))
        s = (of.q[t] @ of.kv[window, 0].T) * of.sm_scale
        masses.append(s.softmax(-1)[:, -40:].sum(-1).mean())
        for scores, latents, into in ((s[:, -40:], of.kv[window, 0][-40:], outs), (s, of.kv[window, 0], wholes)):
            p = torch.cat([scores, of.sink[:, None]], 1).softmax(-1)[:, :-1]
            into.append(p @ latents[:, :512])
    out, whole = torch.stack(outs), torch.stack(wholes)
    assert row.mass == pytest.approx(torch.stack(masses).mean().item(), rel=1e-4)
    assert row.error == pytest.approx(((out - whole).norm() / whole.norm()).item(), rel=1e-4)


def test_parts_of_the_queries_count_as_much_together(monkeypatch):
    of = small()
    whole = quality.measure(of, KS[:2], ["exact", "bf16"])
    monkeypatch.setattr(quality.measures, "_BYTES", 4 * CONTEXT * 4)
    for mine, wanted in zip(quality.measure(of, KS[:2], ["exact", "bf16"]), whole, strict=True):
        assert mine.recall == wanted.recall and mine.mass == pytest.approx(wanted.mass)


def test_a_shorter_context_has_the_last_queries_that_fit():
    of = small()
    cut = of.until(CONTEXT - 2, 3)
    assert cut.context == CONTEXT - 2
    assert torch.equal(cut.q, of.q[-5:-2]) and torch.equal(cut.ends, of.ends[-5:-2])
    with pytest.raises(InputError, match=r"^context"):
        of.until(10, 3)


def test_a_file_gives_back_what_was_saved(tmp_path):
    of = replace(small(), name="named", sink=torch.zeros(2))
    quality.save(of, tmp_path / "layer.pt")
    again = quality.load(tmp_path / "layer.pt")
    assert again.name == "named" and again.sm_scale == of.sm_scale
    assert all(torch.equal(getattr(again, name), getattr(of, name)) for name in ("q", "kv", "index_q", "sink"))


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "layer.pt").write_text("no tensors")
    with pytest.raises(InputError, match=r"^activations.*quality\.save"):
        quality.load(tmp_path / "layer.pt")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"kv": torch.zeros(CONTEXT, 576)}, "kv"),
        ({"index_k": torch.zeros(3, 32)}, "index_k"),
        ({"ends": torch.zeros(QUERIES)}, "ends"),
    ],
)
def test_wrong_activations_are_named(changes, name):
    with pytest.raises(InputError, match=f"^{name}:"):
        replace(small(), **changes)


def test_wrong_choices_and_ks_are_named():
    more = ((8, ["exact"]), "ks"), (([True], ["exact"]), "ks"), (([8], "exact"), "choices")
    for arguments, name in (([0], ["exact"]), "ks"), (([8], ["best"]), "choices"), (([], ["exact"]), "ks"), *more:
        with pytest.raises(InputError, match=f"^{name}"):
            quality.measure(small(), *arguments)
    with pytest.raises(SpecError, match=r"^score"):
        quality.drawn(replace(dsa.preset("tiny"), score="relu_bias"), 64)


def test_sharper_attention_needs_fewer_tokens():
    model = dsa.Model("small", 1, 512, 64, 8, 32, 64)
    masses = [quality.measure(quality.drawn(model, 200, 8, sharpness=each), [8], ["exact"])[0].mass for each in (0.0, 4.0)]
    assert masses[0] == pytest.approx(8 / 196.5, rel=0.02) and masses[1] > 0.6
    assert math.isclose(quality.drawn(model, 200, 8).sm_scale, 576**-0.5)


@pytest.mark.gpu
def test_a_gpu_measures_what_the_cpu_does():
    """On the same bf16 numbers; where scores nearly tie another token may be chosen."""
    of = quality.drawn(dsa.Model("small", 16, 512, 64, 8, 64, 64), 700, 20).to("cuda")
    ks = [64, 200, 700]
    for mine, wanted in zip(quality.measure(of, ks), quality.measure(of.to("cpu"), ks), strict=True):
        if mine.choice == "random":  # each device draws its own
            continue
        assert mine.recall == pytest.approx(wanted.recall, abs=5e-3) and mine.mass == pytest.approx(wanted.mass, abs=5e-3)
        assert mine.error == pytest.approx(wanted.error, abs=1e-2)
