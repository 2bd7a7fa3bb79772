"""Which config of sparse MLA prefill serves where nothing was tuned, and what no config may ask for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsa_codegen.gpu import resolve
from dsa_codegen.ops.attention import OP, AttentionSizes, AttentionSpec
from dsa_codegen.problem.op import Config
from dsa_codegen.records import lookup

from attention_configs import CLUSTER, MULTISTAGE, PAIR, RING, SPECIALISED, TRITON
from support import H200


@pytest.mark.parametrize(
    ("heads", "d_qk", "topk", "gpu", "expected"),
    [
        (128, 576, 2048, "h100", PAIR.replace(sweep=True)),
        (128, 512, 1024, "h200", PAIR),
        (64, 576, 2048, "h200", PAIR.replace(sweep=True)),
        (64, 512, 512, "h100", PAIR),
        (128, 576, 500, "h200", SPECIALISED),
        (16, 576, 2048, "h200", RING.replace(sweep=True)),
        (8, 576, 2048, "h100", RING.replace(num_stages=8, sweep=True)),
        (32, 576, 2048, "h200", RING.replace(num_stages=6, consumer_registers=216, sweep=True)),
        (16, 512, 512, "h100", RING.replace(num_stages=11)),
        (33, 576, 2048, "h200", SPECIALISED),
        (128, 576, 2048, "b200", None),
    ],
)
def test_default_is_in_cuda_where_it_wins(heads, d_qk, topk, gpu, expected):
    found = OP.default_config(AttentionSpec(heads, d_qk, topk), AttentionSizes(4096, 32768), resolve(gpu))
    assert found == expected or (expected is None and found.backend == "triton")


def test_products_and_copies_are_others_where_latents_are_far():
    """Of lists that are not sorted: short ones, and where bits may depend on nothing else."""
    spec = AttentionSpec(64, 576, 1023)
    assert OP.default_config(spec, AttentionSizes(4096, 65536), H200) == PAIR
    far = AttentionSizes(4096, 65537)
    assert OP.default_config(spec, far, H200) == PAIR.replace(interleave=True, l2_prefetch=128)
    assert OP.default_config(replace(spec, topk=2048, batch_invariant=True), far, H200) == PAIR.replace(l2_prefetch=128)
    assert OP.default_config(replace(spec, d_qk=512), far, H200) == PAIR.replace(interleave=True)
    assert OP.default_config(replace(spec, heads=128), far, H200) == PAIR


def test_without_nvcc_the_default_is_not_the_cluster(monkeypatch, tmp_path):
    monkeypatch.setattr(lookup, "missing_tool", lambda backend: None if backend == "triton" else f"{backend} (no nvcc)")
    found = lookup.lookup(OP, AttentionSpec(128, 576, 2048), AttentionSizes(4096, 32768), H200, {"tuned": tmp_path})
    assert (found.config.backend, found.origin) == ("triton", "default")
    assert "no nvcc" in found.notes[0]


@pytest.mark.parametrize("gpu", ["a100", "l40s", "h200", "b200", "rtx5090"])
@pytest.mark.parametrize("heads", [8, 32, 128])
def test_default_breaks_no_constraint(gpu, heads):
    spec = AttentionSpec(heads, 576, 2048)
    config = OP.default_config(spec, AttentionSizes(4096, 32768), resolve(gpu))
    assert not OP.violations(spec, config, resolve(gpu))


def test_tilelangs_default_of_many_heads_is_specialised_on_hopper():
    assert OP.default_config(AttentionSpec(128, 576, 2048), AttentionSizes(4096, 32768), H200, "tilelang") == SPECIALISED


@pytest.mark.parametrize(
    ("config", "gpu", "name"),
    [
        (SPECIALISED.replace(block_n=32), "h200", "block_n"),
        (SPECIALISED, "a100", "capability"),
        (MULTISTAGE.replace(block_h=64), "h200", "accumulator registers"),
        (MULTISTAGE.replace(threads=256), "h200", "columns per warp"),
        (MULTISTAGE.replace(block_n=64, num_stages=6), "h200", "smem"),
        (CLUSTER, "h200", "heads"),
        (CLUSTER, "a100", "capability"),
        (CLUSTER.replace(num_stages=4), "h200", "smem"),
        (CLUSTER.replace(consumer_registers=168), "h200", "accumulator registers"),
        (TRITON.replace(block_h=64), "h200", "accumulator registers"),
        (TRITON.replace(block_h=64, num_warps=8, num_stages=7), "l40s", "smem"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else value.backend,
)
def test_constraints_name_what_does_not_fit(config, gpu, name):
    found = OP.violations(AttentionSpec(64, 576, 2048), config, resolve(gpu))
    assert name in [violation.name for violation in found]
    assert all(violation.excess > 0 for violation in found)


def test_a_list_of_one_tile_needs_more_shared_memory():
    """116736 bytes: its loop is gone, and with it the place where the pipeline kept the tile."""
    few, l40s = Config.of("triton", block_h=16, block_n=64, num_stages=3, num_warps=4), resolve("l40s")
    assert not OP.violations(AttentionSpec(16, 576, 65), few, l40s)
    assert [violation.name for violation in OP.violations(AttentionSpec(16, 576, 64), few, l40s)] == ["smem"]
    assert OP.default_config(AttentionSpec(16, 576, 64), AttentionSizes(4096, 32768), l40s)["block_n"] == 32


def test_padding_to_more_than_twice_the_heads_is_refused():
    found = OP.violations(AttentionSpec(8, 576, 2048), TRITON.replace(block_h=32, num_warps=8), H200)
    assert [violation.name for violation in found] == ["padded heads"]
