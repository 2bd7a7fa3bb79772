"""Two GPUs over NCCL give what one of them gives alone, in calls and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from dsa_codegen.problem.compare import similarity_gap

import rank_inputs
import ranks
from test_modes import assert_equal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.filterwarnings("ignore::dsa_codegen.Untuned"),
]
WORLD = 2


@pytest.fixture(scope="module")
def on_gpus(of_the_run) -> dict[int, list[dict]]:
    return ranks.computed(of_the_run / "nccl", WORLD, "nccl")


def test_rows_dealt_out_are_chosen_alike(on_gpus):
    expected = on_gpus[1][0]["rows"]
    for rank in on_gpus[WORLD]:
        assert rank["rows"].keys() == expected.keys()
        for name, chosen in rank["rows"].items():
            assert torch.equal(chosen, expected[name]), name


def test_caches_that_are_sharded_serve_alike(on_gpus):
    expected = on_gpus[1][0]["position"]
    for rank in on_gpus[WORLD]:
        for (name, *which), found in rank["position"].items():
            if name == "own heads":
                continue
            if name == "dealt":
                assert torch.equal(found, expected[which[1], 0, False][0])
                continue
            (tokens, out, lse), wanted = found, expected[tuple(which)]
            assert_equal((out, lse, tokens), (*wanted[1:], wanted[0]))


def test_layers_whose_work_is_shared(on_gpus):
    whole = on_gpus[1][0]["modes"]
    for number, rank in enumerate(on_gpus[WORLD]):
        heads, found = rank_inputs.heads_of(number, WORLD), rank["modes"]
        for tokens in rank_inputs.TOKENS:
            out, lse, chosen = whole["prefill", tokens]
            for name, deal in rank_inputs.deals(tokens, WORLD).items():
                rows = deal.rows(number)
                assert_equal(found["context", tokens, name], (out[rows], lse[rows], chosen[rows]))
            assert_equal(found["tensor", tokens], (out[:, heads], lse[:, heads], chosen))
            assert_equal(found["data", tokens], (out, lse, chosen))
        for batch, _ in rank_inputs.STEPS:
            out, lse, chosen = whole["paged", batch]
            assert_equal(found["tensor paged", batch], (out[..., heads, :], lse[..., heads], chosen))
            assert_equal(found["data paged", batch], (out, lse, chosen))
            assert_equal(found["context paged", batch], (out, lse), found["context paged", batch][2])


@pytest.mark.parametrize("way", ["pages", "own heads", "tensor", "data"])
def test_modules_whose_work_is_shared(on_gpus, way):
    """Scores are FP8's here, and sums the kernels': a token may be chosen or not where two score nearly alike."""
    expected = on_gpus[1][0]["modules", way == "data"]
    for rank in on_gpus[WORLD]:
        for (out, chosen), (wanted, tokens) in zip(rank["modules"][way], expected, strict=True):
            assert (chosen == tokens).all(1).float().mean() > 0.9
            assert similarity_gap(out, wanted) < 1e-2
            if way == "data":
                assert torch.equal(out, wanted) and torch.equal(chosen, tokens)


def test_graphs_of_modules_replay_what_calls_give(on_gpus):
    for rank in on_gpus[WORLD]:
        for which, (replayed, called) in rank["captured modules"].items():
            assert replayed.isfinite().all() and torch.equal(replayed, called), which


def test_graphs_replay_what_calls_give(on_gpus):
    for rank in on_gpus[WORLD]:
        for (name, number), (replayed, called) in rank["captured"].items():
            for a, b in zip(replayed, called, strict=True):
                assert torch.equal(a, b), (name, number)
    out, lse, chosen = on_gpus[WORLD][0]["captured"]["data", 0][0]
    last = slice(len(out) // 2, None)  # of a rank with sequences of length 0
    assert not out[last].any() and lse[last].isneginf().all() and (chosen[last] == -1).all()
    assert out[: len(out) // 2].any()
