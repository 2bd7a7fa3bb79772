"""A Hugging Face config as a model: what is read, what is refused, and that defaults are those of transformers."""

from __future__ import annotations

import json
import re

import pytest

from dsa_codegen import ops
from dsa_codegen.errors import SpecError, UnknownName
from dsa_codegen.integrations import configs
from dsa_codegen.problem import presets

from command_line import cli

LATENT = {"num_attention_heads": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_n_heads": 16, "index_topk": 1024}
QWEN = {"model_type": "qwen4_exp_text", "num_attention_heads": 24, "indexer_n_heads": 4, "indexer_head_dim": 128}
QWEN |= {"indexer_budget": 1024, "indexer_compress_ratio": 8, "rope_parameters": {"partial_rotary_factor": 0.25}}
OLDER = {"sparse_num_index_heads": 2, "sparse_index_dim": 64, "sparse_block_size": 64, "sparse_topk_blocks": 32}
LONGCAT = {"model_type": "longcat2", "index_topk": 2048, "index_init_tokens": 16, "index_local_tokens": 1024}
SAME = [
    ({"model_type": "deepseek_v32"}, "deepseek-v3.2"),
    ({"model_type": "glm_moe_dsa"}, "glm-5"),
    ({"model_type": "glm5_next"}, "glm-5.3-flash"),
    ({"model_type": "hy_v4"}, "hy4"),
    ({"model_type": "hy_v4_vl", "text_config": {"model_type": "hy_v4_vl_text"}}, "hy4-vl"),
    ({"model_type": "mistral_large4", "text_config": {"model_type": "mistral_large4_text"}}, "mistral-large-4"),
    ({"model_type": "axk2"}, "ax-k2"),
    ({**LONGCAT, "num_attention_heads": 32, "index_n_heads": 16}, "longcat-lite-sparse"),
    ({"model_type": "deepseek_v4"}, "deepseek-v4-flash"),
    ({"model_type": "deepseek_v4", "num_attention_heads": 128, "index_topk": 1024, "qk_rope_head_dim": 64}, "deepseek-v4-pro"),
    ({"model_type": "deepseek_v41", "text_config": {"model_type": "deepseek_v41_text", "head_dim": 512}}, "deepseek-v4.1"),
    ({"model_type": "minimax_m3_vl", "text_config": {"model_type": "minimax_m3_vl_text"}}, "minimax-m3"),
    (
        {**QWEN, "num_attention_heads": 16, "indexer_budget": 2048, "indexer_compress_ratio": 4},
        "qwen4-exp",
    ),
]
STATED = [
    ({"model_type": "glm5_next_text", "index_kpool": 4}, {"pool": 4, "d_rope": 0, "kv_layout": "none"}),
    ({"model_type": "hy_v4", **LATENT}, {"heads": 32, "attn_sink": True, "index_heads": 16, "topk": 1024}),
    ({"model_type": "mistral_large4", "text_config": {**LATENT, "model_type": "mistral_large4_text"}}, {"index_head_dim": 128}),
    ({"model_type": "dots3_note", "text_config": {"num_attention_heads": 64}}, {"heads": 64, "index_heads": 64}),
    ({**QWEN}, {"heads": 24, "kv_heads": 2, "d_nope": 192, "d_rope": 64, "topk": 1032, "block": 8, "index_heads": 4}),
    ({"model_type": "minimax_m3_vl_text", "sparse_attention_config": OLDER}, {"topk": 2048, "block": 64, "index_heads": 2}),
]


@pytest.mark.parametrize(("config", "name"), SAME, ids=lambda value: value if isinstance(value, str) else "")
def test_the_models_people_run_are_their_presets(config, name):
    model = configs.model_of(config, name)
    assert model == presets.preset(name)


@pytest.mark.parametrize(("config", "fields"), STATED, ids=lambda value: value.get("model_type", ""))
def test_what_a_config_states_counts(config, fields, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    model = configs.read(path)
    assert fields.items() <= model.to_dict().items()
    assert any(op.specs(model) for op in ops.all_ops().values())


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"model_type": "llama"}, UnknownName, "unknown model_type 'llama'; known: axk2, deepseek_v32, deepseek_v4"),
        (LONGCAT, SpecError, "config.num_attention_heads = None is not possible"),
        ({}, UnknownName, "unknown model_type 'None'"),
        ({"model_type": "glm5_next", "index_kpool": 3}, SpecError, "Model.pool = 3"),
        ({"model_type": "deepseek_v32", "num_attention_heads": "128"}, SpecError, "config.num_attention_heads = '128'"),
        ({"model_type": "deepseek_v32", "index_topk": True}, SpecError, "config.index_topk = True"),
        ({"model_type": "deepseek_v32", "index_topk": 10}, SpecError, "Model.topk = 10"),
        (
            {"model_type": "qwen4_exp"},
            SpecError,
            "config.indexer_compress_ratio = None is not possible",
        ),
        ({"model_type": "qwen4_exp", "rope_parameters": 3}, SpecError, "config.rope_parameters = 3"),
        ({"model_type": "minimax_m3_vl", "sparse_attention_config": [1]}, SpecError, "config.sparse_attention_config = [1]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused_by_name(config, error, words):
    with pytest.raises(error, match=re.escape(words)):
        configs.model_of(config)


@pytest.mark.parametrize("text", ["", "[1]", "{", '"deepseek_v32"'])
def test_a_file_that_is_no_config_is_refused(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(SpecError, match="config file"):
        configs.read(path)


def test_the_command_writes_what_spec_reads(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hy_v4", **LATENT}))
    printed = cli("spec", "--from-hf", "config.json", "--name", "hy4", cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    assert cli("spec", "--from-hf", "config.json", "--name", "hy4", "--out", "hy4.yaml", cwd=tmp_path).returncode == 0
    assert (tmp_path / "hy4.yaml").read_text() == printed.stdout
    assert presets.load(tmp_path / "hy4.yaml") == configs.read(tmp_path / "config.json", "hy4")
    shown = cli("explain", "--spec", "hy4.yaml", "--op", "attention", "--gpu", "h100", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert cli("spec", "--preset", "tiny").stdout == presets.dump(presets.preset("tiny"))
    assert cli("spec").returncode == cli("spec", "--preset", "tiny", "--from-hf", "x").returncode == 2
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused = cli("spec", "--from-hf", "config.json", cwd=tmp_path)
    assert refused.returncode == 2 and "unknown model_type 'llama'" in refused.stderr


@pytest.mark.parametrize("kind", sorted({*configs._LATENTS, "deepseek_v4", "deepseek_v41", "minimax_m3_vl"} - {"longcat"}))
def test_defaults_are_those_of_transformers(kind):
    transformers = pytest.importorskip("transformers", reason="the defaults are its")
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip("newer than this transformers")
    stated = json.loads(transformers.CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
    text = stated.get("text_config") or stated
    assert {name for name in configs._KEYS.values() if kind in configs._LATENTS} <= text.keys()
    assert configs._FAMILIES[configs._OTHER_NAMES.get(kind, kind)](text, kind) == configs._FAMILIES[
        configs._OTHER_NAMES.get(kind, kind)
    ]({}, kind)
