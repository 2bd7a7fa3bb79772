"""Presets and spec files: round trips, and refusals that name the field and what is allowed."""

from __future__ import annotations

import re

import pytest
import torch

from dsa_codegen import Layer, ops
from dsa_codegen.errors import InputError, SpecError, UnknownName
from dsa_codegen.gpu import resolve
from dsa_codegen.problem import presets

NAMES = ["ax-k2", "ax-k2-tp8", "deepseek-v3.2", "deepseek-v3.2-bf16", "deepseek-v3.2-bf16-tp8", "deepseek-v3.2-tp8"]
NAMES += [
    "deepseek-v4-flash",
    "deepseek-v4-flash-tp8",
    "deepseek-v4-pro",
    "deepseek-v4-pro-tp8",
    "deepseek-v4.1",
    "glm-5",
    "glm-5-tp8",
    "glm-5.2",
    "glm-5.3-flash",
]
NAMES += ["hy4", "hy4-tp8", "hy4-vl", "longcat-lite-sparse", "minimax-m3", "mistral-large-4", "qwen4-exp", "tiny", "tiny-gqa"]


def test_the_models_people_run_are_there():
    assert presets.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_a_file(name, tmp_path):
    model = presets.preset(name)
    path = tmp_path / "anything.yaml"
    path.write_text(presets.dump(model))
    assert presets.load(path) == model


GROUPED = {"attention_gqa", "select"}
"""What models of grouped queries call."""
POOLED = {"expand", "pool"}
"""What models of pooled keys call beside the others, and no others."""
UNCACHED = {"attention_paged", "candidates", "merge_lists", "merge_parts", "resolve"}
"""What a model without a cache of latents does not call."""


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_of_its_kind_of_attention_serves_a_preset(name):
    model = presets.preset(name)
    served = {name for name, op in ops.all_ops().items() if op.specs(model)}
    every = set(ops.all_ops()) - {"attention_gqa"}
    latent = every - UNCACHED if model.pool > 1 else every - POOLED
    assert served == (GROUPED if model.attention == "gqa" else latent)


def test_unknown_preset_lists_the_known():
    with pytest.raises(UnknownName, match=r"glm-5.2, glm-5.3-flash, hy4"):
        presets.preset("glm5")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("heads: 0", "heads"),
        ("heads: many", "heads"),
        ("heads: 16.0", "heads"),
        ("heads: true", "heads"),
        ("d_nope: 500", "d_nope"),
        ("topk: 63", "topk"),
        ("index_heads: 65", "index_heads"),
        ("index_head_dim: 100", "index_head_dim"),
        ("d_rope: 136", "d_rope"),
        ("keep_recent: 65", "keep_recent"),
        ("next_n: 9", "next_n"),
        ("kv_layout: v5", "kv_layout"),
        ('score: "\'; import os"', "score"),
        ('name: "../../etc"', "name"),
        ("colour: blue", "colour"),
    ],
)
def test_nonsense_is_refused_by_name(text, field, tmp_path):
    fields = presets.preset("tiny").to_dict()
    key, _, value = text.partition(": ")
    lines = [f"{name}: {old}" for name, old in fields.items() if name != key] + [f"{key}: {value}"]
    path = tmp_path / "model.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(SpecError, match=field):
        presets.load(path)


def written(tmp_path, **changes):
    """A file that states tiny with some fields changed."""
    path = tmp_path / "model.yaml"
    path.write_text("\n".join(f"{name}: {value}" for name, value in {**presets.preset("tiny").to_dict(), **changes}.items()))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_layout": "v4"}, "Model.d_nope = 512 is not possible; allowed: 448 with kv_layout: v4"),
        ({"d_nope": 448}, "Model.d_nope = 448 is not possible; allowed: 512 with kv_layout: v32"),
        ({"d_rope": 0}, "Model.d_rope = 0 is not possible; allowed: 64 with kv_layout: v32"),
        ({"kv_layout": "v4", "d_nope": 448, "d_rope": 0}, "allowed: 64 with kv_layout: v4"),
        ({"kv_layout": "none", "d_nope": 448, "d_rope": 0}, "Model.d_v = 512 is not possible; allowed: 448, the channels"),
        ({"kv_layout": "fp8_fp32_128", "d_nope": 160, "d_rope": 32, "d_v": 160}, "allowed: 128 to 512 in steps of 128"),
        ({"kv_layout": "v41"}, "Model.d_rope = 64 is not possible; allowed: 0 with kv_layout: v41"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_fields_that_contradict_each_other_are_refused(changes, words, tmp_path):
    with pytest.raises(SpecError, match=re.escape(words)):
        presets.load(written(tmp_path, **changes))


@pytest.mark.parametrize(("d_nope", "d_rope"), [(512, 0), (512, 64), (448, 64)])
def test_a_model_without_a_paged_cache_says_so(d_nope, d_rope, tmp_path):
    """Prefill and the index keys' cache are served, and whoever decodes is told."""
    model = presets.load(written(tmp_path, d_nope=d_nope, d_rope=d_rope, kv_layout="none"))
    served = {name for name, op in ops.all_ops().items() if op.specs(model)}
    uncalled = {"attention_gqa", *UNCACHED, *POOLED}
    assert served == set(ops.all_ops()) - uncalled
    assert all(spec.layout == "index_k" for name in ("quantize_paged", "gather_paged") for spec in ops.get(name).specs(model))
    with pytest.raises(InputError, match="kv_layout: none"):
        Layer(model).decode(*[torch.zeros(1)] * 7, 1)


GROUPS = {"attention": "gqa", "heads": 64, "kv_heads": 4, "d_nope": 64, "d_rope": 64, "kv_layout": "bf16", "index_heads": 4}
GROUPS |= {"d_v": 128, "topk": 2048, "block": 128}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_heads": 3}, "Model.kv_heads = 3 is not possible; allowed: a divisor of 64 heads"),
        ({"d_nope": 60}, "with d_rope 16 to 256 in steps of 16"),
        ({"d_v": 512}, "Model.d_v = 512 is not possible; allowed: 16 to 256 in steps of 16"),
        ({"keep_recent": 64}, "Model.keep_recent = 64 is not possible; allowed: 0 to 2048 in steps of 128"),
        ({"block": 48}, "Model.block = 48"),
        ({"topk": 2000}, "128 to 1048576 in steps of 128"),
        ({"kv_layout": "v32"}, "Model.kv_layout = 'v32' is not possible; allowed: bf16, none"),
        ({"attention": "mha"}, "allowed: mla, gqa"),
        ({"pool": 4}, "Model.pool = 4 is not possible; allowed: 1"),
        ({"attention": "mla"}, "Model.kv_heads = 4 is not possible; allowed: 1"),
    ],
    ids=str,
)
def test_fields_of_grouped_queries_are_refused_by_name(changes, words, tmp_path):
    with pytest.raises(SpecError, match=re.escape(words)):
        presets.load(written(tmp_path, **{**GROUPS, **changes}))


def test_a_model_of_grouped_queries_has_no_layer_of_latents(tmp_path):
    model = presets.load(written(tmp_path, **GROUPS))
    assert {name for name, op in ops.all_ops().items() if op.specs(model)} == GROUPED
    with pytest.raises(InputError, match="attention 'gqa'"):
        Layer(model)


@pytest.mark.parametrize("text", ["heads: 32", "'heads': 32", "name: tiny"])
def test_a_field_that_is_stated_twice_is_refused(text, tmp_path):
    path = written(tmp_path)
    again = path.read_text() + f"\n{text}\n"
    path.write_text(again)
    with pytest.raises(SpecError, match=r"(heads|name) is stated in line \d+ and again in line \d+"):
        presets.load(path)


NO_MAPPINGS = [b"", b"- a\n- b", b"{", b"!!python/object/apply:os.system ['true']", b"\xff\xfe\x00", b"[" * 100_000]


@pytest.mark.parametrize("text", NO_MAPPINGS, ids=["empty", "list", "open", "code", "binary", "deep"])
def test_a_file_that_is_no_mapping_is_refused(text, tmp_path):
    path = tmp_path / "model.yaml"
    path.write_bytes(text)
    with pytest.raises(SpecError, match="spec file"):
        presets.load(path)


@pytest.mark.parametrize(
    ("file", "name"),
    [("my model.yaml", "mymodel"), ("32b-chat.yaml", "b-chat"), ("v4_rank.0.yaml", "v4_rank.0"), ("7.yaml", "model")],
)
def test_any_file_name_will_do(file, name, tmp_path):
    fields = presets.preset("tiny").to_dict()
    del fields["name"]
    path = tmp_path / file
    path.write_text("\n".join(f"{field}: {value}" for field, value in fields.items()))
    assert presets.load(path).name == name


def test_a_missing_field_is_named(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("heads: 16")
    with pytest.raises(SpecError, match="d_nope"):
        presets.load(path)


ODD = {"heads": 12, "d_nope": 192, "d_rope": 48, "d_v": 192, "index_heads": 6, "index_head_dim": 96, "kv_layout": "fp8_fp32_64"}


@pytest.mark.parametrize(
    "changes", [{}, {"d_v": 240}, {"kv_layout": "bf16"}, {"d_rope": 0, "kv_layout": "fp8_tensor"}], ids=str
)
def test_a_model_of_any_shape_is_served_by_every_operation(changes, tmp_path):
    """Offline, as ``verify --spec`` and ``generate --spec`` begin: every operation has a spec and a config."""
    model = presets.load(written(tmp_path, **{**ODD, **changes}))
    gpu = resolve("H100")
    for name, op in ops.all_ops().items():
        for spec in op.specs(model):
            assert op.default_config(spec, op.workloads(spec)[0].sizes, gpu)
            assert op.options(spec)
        assert op.specs(model) or name in ("attention_gqa", "expand", "pool")
