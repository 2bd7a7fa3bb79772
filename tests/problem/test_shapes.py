"""The table of shapes: what it says is served renders, what it says is refused is refused by name; no row without its check."""

from __future__ import annotations

import contextlib
import random
import re

import pytest
import torch

import dsa_codegen as dsa
from dsa_codegen import ops, paths
from dsa_codegen.errors import DsaError, InputError, SpecError
from dsa_codegen.kernels.render import render
from dsa_codegen.ops.needs import specs
from dsa_codegen.problem import channels, presets
from dsa_codegen.problem.kv_layouts import KV_LAYOUTS
from dsa_codegen.problem.presets import Model

from support import H200

PAGE = (paths.templates().parent / "docs" / "shapes.md").read_text()
ATTENTION = {"heads": 12, "d_qk": 208, "d_v": 192, "topk": 70}
PAGED = {"heads": 12, "topk": 70, "kv_layout": "bf16", "d_v": 192, "d_rope": 16}
INSIDE = {**PAGED, "kv_layout": "fp8_ue8m0_token", "d_v": 320, "d_rope": 64, "rope_in_value": True}
GROUPS = {"heads": 12, "kv_heads": 3, "d_qk": 96, "d_v": 80, "topk": 20}
INDEXER = {"heads": 6, "head_dim": 96}
PROLOGUE = {**INDEXER, "d_rope": 48}
SELECT = {"topk": 100}
MODEL = {"name": "m", "heads": 12, "d_nope": 192, "d_rope": 48, "d_v": 192, "index_heads": 6, "index_head_dim": 96, "topk": 256}
MODEL |= {"kv_layout": "bf16"}

# By the first words of a row: operation ("model": a user's file), fields, the field asked for, values served, values refused.
ROWS = {
    "query heads": [
        ("attention", ATTENTION, "heads", (1, 12, 128), (0, 129)),
        ("attention_paged", PAGED, "heads", (1, 128), (0, 129)),
        ("attention_gqa", {**GROUPS, "kv_heads": 1}, "heads", (1, 128), (0, 129)),
        ("model", MODEL, "heads", (1, 128), (0, 129)),
    ],
    "`d_v`": [
        ("attention", {**ATTENTION, "d_qk": 512}, "d_v", (384, 448, 512), (376, 504, 528)),
        ("attention", {**ATTENTION, "d_qk": 64}, "d_v", (64,), (48, 56)),
        ("attention_paged", PAGED, "d_v", (64, 320, 512), (48, 72, 528)),
        ("model", {**MODEL, "d_nope": 320}, "d_v", (320, 368), (312, 336, 512)),
    ],
    "channels that are key only": [
        ("attention", ATTENTION, "d_qk", (192, 208, 288, 320), (176, 200, 336)),
        ("attention_paged", PAGED, "d_rope", (0, 96, 128), (8, 144)),
        ("model", MODEL, "d_rope", (0, 96, 128), (8, 144)),
    ],
    "rotary channels inside the value": [
        ("attention_paged", INSIDE, "d_rope", (16, 96, 128), (8, 144)),
        ("attention_paged", {**INSIDE, "kv_layout": "bf16"}, "rope_in_value", (False,), (True,)),
    ],
    "indexer heads": [
        ("indexer", INDEXER, "heads", (1, 7, 64), (0, 65)),
        ("indexer_paged", INDEXER, "heads", (1, 64), (0, 65)),
        ("index_prologue", PROLOGUE, "heads", (1, 64), (65,)),
        ("model", MODEL, "index_heads", (1, 64), (0, 65)),
    ],
    "indexer channels": [
        ("indexer", INDEXER, "head_dim", (32, 96, 256), (16, 40, 272)),
        ("indexer_paged", INDEXER, "head_dim", (32, 96, 256), (16, 40, 272)),
        ("pool", {"head_dim": 96, "pool": 16}, "head_dim", (32, 96, 256), (16, 40, 272)),
        ("model", MODEL, "index_head_dim", (32, 96, 256), (16, 40, 272)),
    ],
    "Hadamard rotation": [
        ("index_prologue", {**PROLOGUE, "head_dim": 32, "d_rope": 16}, "hadamard", (True, False), ()),
        ("index_prologue", {**PROLOGUE, "head_dim": 256}, "hadamard", (True,), ()),
        ("index_prologue", PROLOGUE, "hadamard", (False,), (True,)),
    ],
    "rotary channels of the prologues": [
        ("index_prologue", {**PROLOGUE, "head_dim": 128}, "d_rope", (0, 16, 96, 128), (8, 144)),
        ("latent_prologue", {"layout": "bf16", "width": 192}, "d_rope", (0, 16, 96, 128), (8, 144)),
    ],
    "`topk`": [
        ("attention", ATTENTION, "topk", (1, 1 << 20), (0, (1 << 20) + 1)),
        ("attention_paged", PAGED, "topk", (1, 1 << 20), (0, (1 << 20) + 1)),
        ("attention_gqa", GROUPS, "topk", (1, 1 << 20), (0, (1 << 20) + 1)),
        ("select", SELECT, "topk", (1, 4096), (0, 4097)),
        ("adapt", {"topk": 64}, "topk", (1, 4096), (0, 4097)),
        ("model", MODEL, "topk", (64, 4096), (63, 4097)),
    ],
    "scales of cached latents": [
        ("attention_paged", {**PAGED, "d_v": 256}, "kv_layout", sorted({*KV_LAYOUTS} - {"v32", "v4", "v41"}), ("fp8_fp32_16",)),
        ("quantize_paged", {"layout": "fp8_fp32_64", "width": 256, "d_rope": 64}, "layout", ("fp8_tensor",), ("fp8_fp32_256",)),
        ("attention_paged", {**PAGED, "kv_layout": "fp8_fp32_128"}, "d_v", (128, 512), (192,)),
    ],
    "KV heads": [
        ("attention_gqa", GROUPS, "kv_heads", (1, 2, 3, 12), (0, 5, 24)),
        ("model", {**MODEL, "attention": "gqa", "d_nope": 80}, "kv_heads", (1, 4, 12), (0, 5)),
    ],
    "channels of grouped queries": [
        ("attention_gqa", GROUPS, "d_qk", (16, 80, 256), (8, 24, 272)),
        ("attention_gqa", GROUPS, "d_v", (16, 80, 256), (8, 24, 272)),
    ],
    "blocks in lists": [("attention_gqa", GROUPS, "block", (1, 2, 64, 256), (0, 3, 512))],
    "pooled keys": [
        ("pool", {"head_dim": 96, "pool": 16}, "pool", (1, 2, 64), (0, 3, 128)),
        ("expand", {"blocks": 16, "pool": 16}, "pool", (1, 2, 64), (0, 3, 128)),
        ("model", {**MODEL, "topk": 4096}, "pool", (1, 16, 64), (3, 128)),
        ("model", {**MODEL, "topk": 2048, "pool": 16}, "topk", (1024, 4096), (1008, 2040)),
    ],
    "tokens always kept": [
        ("select", SELECT, "keep_first", (0, 3, 100), (-1, 101)),
        ("select", {**SELECT, "keep_first": 40}, "keep_recent", (0, 60), (61,)),
        ("model", {**MODEL, "topk": 1024, "pool": 16}, "keep_recent", (0, 16, 1024), (8, 1040)),
    ],
    "page of a KV cache": [
        ("attention_paged", PAGED, "page", (1, 48, 1024), (0, 1025)),
        ("attention_gqa", GROUPS, "page", (1, 48, 1024), (-1, 1025)),
        ("model", MODEL, "page", (16, 256), (1, 48, 512)),
    ],
    "page of the indexer's cache": [("indexer_paged", INDEXER, "page", (16, 32, 64, 128, 256), (1, 8, 48, 512))],
}


def rows():
    """The first column of the table."""
    table = PAGE.partition("| what | allowed |")[2].partition("\n\n")[0]
    return re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)[1:]


def source(op, spec):
    """What serves a spec."""
    return render(op, spec, op.default_config(spec, op.workloads(spec)[0].sizes, H200))


def texts(name, fields):
    """What serving it renders."""
    if name != "model":
        op = ops.get(name)
        return [source(op, op.spec_type.from_dict(fields))]
    return [source(op, spec) for op, spec in specs(Model.from_dict(fields), (), H200)]


def test_every_row_of_the_table_has_its_check():
    assert len(rows()) == len(ROWS)
    assert [row for row in rows() if not any(row.startswith(words) for words in ROWS)] == []


@pytest.mark.parametrize(("name", "fields", "field", "served", "refused"), [each for row in ROWS.values() for each in row])
def test_what_the_table_says(name, fields, field, served, refused):
    for value in served:
        assert texts(name, {**fields, field: value}), (field, value)
    for value in refused:
        with pytest.raises(SpecError) as error:
            texts(name, {**fields, field: value})
        assert "allowed" in str(error.value), (field, value)
        kind = "Model" if name == "model" else ops.get(name).spec_type.__name__
        assert str(error.value).startswith(f"{kind}."), (field, value, str(error.value))


def test_functions_name_the_argument_that_they_have():
    """A layout's channels without position are no argument of attention's, the value's are."""
    q, cache = torch.zeros(1, 1, 16, 256, dtype=torch.bfloat16), torch.zeros(4, 64, 1, 336, dtype=torch.uint8)
    listed = torch.zeros(1, 1, 4, dtype=torch.int32)
    with pytest.raises(InputError, match=r"^d_v: got 192; expected 128 to 512 in steps of 128"):
        dsa.sparse_attention_paged(q, cache, listed, 0.1, layout="fp8_fp32_128", d_v=192)


def drawn(draw):
    """The fields of a model of latents, of the whole space; what contradicts itself is drawn again."""
    d_nope, pool = draw.randrange(16, 513, 16), draw.choice((1, 1, *presets.POOLS))
    d_rope = draw.choice((0, 32, 64, draw.randrange(0, 129, 16)))
    layout = draw.choice((*KV_LAYOUTS, presets.NO_CACHE))
    fixed = {"v32": (512, 64), "v41": (512, 0), "v4": (448, 64)}
    d_nope, d_rope = fixed.get(layout, (d_nope, d_rope))
    blocks, first = draw.randint(64, 4096 // pool), draw.choice((0, draw.randint(0, 32)))
    fields = {"name": "drawn", "d_nope": d_nope, "d_rope": d_rope, "kv_layout": layout, "pool": pool, "topk": pool * blocks}
    fields |= {"d_v": d_nope + d_rope if layout == "v4" else draw.choice((d_nope, d_nope + d_rope))}
    fields |= {"heads": draw.randint(1, 128), "index_heads": draw.randint(1, 64)}
    fields |= {"index_head_dim": draw.choice(channels.INDEX_WIDTHS), "page": draw.choice((16, 32, 64, 128, 256))}
    fields |= {"score": draw.choice(presets.SCORES), "index_scores": draw.choice(presets.PRECISIONS)}
    fields |= {"keep_first": pool * first, "keep_recent": pool * draw.choice((0, draw.randint(0, 32)))}
    return fields | {name: draw.random() < 0.5 for name in ("attn_sink", "batch_invariant")}


def test_whatever_a_model_may_state_every_operation_serves():
    """A spec that contradicts a model's fields would be told of in words that its file does not have."""
    draw, models = random.Random(29), []
    while len(models) < 12:
        with contextlib.suppress(SpecError):
            models.append(Model.from_dict(drawn(draw)))
    for model in models:
        for op, spec in specs(model, (), H200):
            try:
                assert source(op, spec).text
            except DsaError as error:
                pytest.fail(f"{op.name} of {model}: {error}")
