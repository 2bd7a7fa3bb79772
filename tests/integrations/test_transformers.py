"""Models of transformers by these kernels: what they compute is what their own eager attention computes."""

from __future__ import annotations

import copy
import functools
import sys

import pytest
import torch

pytest.importorskip("transformers", "5.17", reason="transformers 5.17 or newer is not installed")

import transformers
from transformers import masking_utils

import dsa_codegen as dsa
from dsa_codegen.errors import InputError, SpecError, ToolMissing, UnknownName
from dsa_codegen.integrations.transformers import capture, choose, disable, enable, families, windows
from dsa_codegen.integrations.transformers.switch import is_enabled
from dsa_codegen.problem.compare import similarity_gap

import tiny_models
from tiny_models import FAMILIES, TOPK, prompts, tiny

LENGTH, PADDING, NEW = 4 * TOPK, 37, 64  # topk is a quarter of the prompt
# Never the padding: its embedding is zero, so that all tokens score alike, and every choice is as good.
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}


@functools.cache
def model_of(kind):
    return tiny(kind)


@functools.cache
def greedy(kind):
    """What eager generates, with a dynamic cache."""
    ids, mask = prompts(LENGTH, PADDING)
    return model_of(kind).generate(ids, attention_mask=mask, **GREEDY)


def hidden_of(model, ids, mask):
    with torch.no_grad():
        return model(ids, attention_mask=mask, output_hidden_states=True).hidden_states


@pytest.mark.parametrize(("kind", "cache"), [("deepseek_v32", None), ("deepseek_v32", "static"), ("glm_moe_dsa", None)])
def test_generates_the_same_tokens_as_eager(kind, cache):
    """64 greedy tokens of a batch that is padded on the left, choosing a quarter of the prompt and less."""
    expected, model, (ids, mask) = greedy(kind), model_of(kind), prompts(LENGTH, PADDING)
    before = dsa.stats().get("select: reference", 0)
    try:
        made = enable(model).generate(ids, attention_mask=mask, cache_implementation=cache, **GREEDY)
    finally:
        disable(model)
    assert torch.equal(made, expected)
    assert len(expected[:, LENGTH:].unique()) > 8
    assert dsa.stats()["select: reference"] > before


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_layer_is_the_models_own(kind):
    """Hidden states behind every layer, and after ``disable`` the same bits as before ``enable``."""
    model, (ids, mask) = model_of(kind), prompts(2 * TOPK, PADDING)
    own = hidden_of(model, ids, mask)
    ours = hidden_of(enable(model), ids, mask)
    assert is_enabled(model)
    for one, other in zip(own, ours, strict=True):
        seen = mask.bool().view(*mask.shape, *[1] * (one.dim() - 2))
        torch.testing.assert_close(one * seen, other * seen, rtol=1e-4, atol=2e-4 * float(one.abs().max()))
    again = hidden_of(disable(model), ids, mask)
    assert not is_enabled(model)
    assert all(torch.equal(one, other) for one, other in zip(own, again, strict=True))


def test_weights_and_modules_stay_as_they_are():
    model = tiny("glm_moe_dsa", num_hidden_layers=2)
    before, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_modules()]
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    ids, mask = prompts(TOPK + 9, 5)
    hidden_of(enable(enable(model, scores="fp8")), ids, mask)
    assert [name for name, _ in model.named_modules()] == names
    disable(disable(model))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for name, module in model.named_modules():
        left = module.__dict__.keys() - attributes[name].keys()
        assert not {each for each in left if each.startswith("dsa") or each in ("forward", "expand_kv")}
    assert model.config._attn_implementation == "eager"


def test_a_shared_choice_is_made_once():
    model, (ids, mask) = model_of("glm_moe_dsa"), prompts(TOPK + 9, 5)
    calls = dsa.stats().get("select: reference", 0)
    hidden_of(enable(model), ids, mask)
    disable(model)
    assert dsa.stats()["select: reference"] == calls + 2  # of three layers the second shares


@pytest.mark.parametrize("length", [TOPK - 20, TOPK])
@pytest.mark.parametrize("dense_below", [None, 0])
def test_windows_that_are_taken_whole_are_neither_scored_nor_selected(length, dense_below):
    model, (ids, mask) = model_of("deepseek_v32"), prompts(length, 9)
    own = hidden_of(model, ids, mask)[-1]
    before = dsa.stats()
    ours = hidden_of(enable(model, dense_below=dense_below), ids, mask)[-1]
    disable(model)
    torch.testing.assert_close(own * mask[..., None], ours * mask[..., None], rtol=1e-4, atol=1e-4)
    launched = {name: count - before.get(name, 0) for name, count in dsa.stats().items() if count != before.get(name, 0)}
    assert launched == ({} if dense_below is None else {"attention: reference": 3})


def test_a_prompt_in_chunks_is_the_prompt():
    model, (ids, mask) = model_of("deepseek_v32"), prompts(3 * TOPK, PADDING)
    whole = hidden_of(enable(model), ids, mask)[-1]
    cache = transformers.DynamicCache(config=model.config)
    name = "cache" if hasattr(masking_utils, "find_first_full_attention_index") else "past_key_values"
    parts = []
    with torch.no_grad():
        for end in (40, 2 * TOPK, 3 * TOPK - 1, 3 * TOPK):
            part = model(
                ids[:, cache.get_seq_length() : end], attention_mask=mask[:, :end], output_hidden_states=True, **{name: cache}
            )
            parts.append(part.hidden_states[-1])
    disable(model)
    seen = mask[..., None]
    torch.testing.assert_close(torch.cat(parts, 1) * seen, whole * seen, rtol=1e-4, atol=1e-4)


def test_fp8_scores_choose_what_the_reference_of_the_quantised_chooses():
    """Exactly; and they share 95 % with the choice of unquantised scores."""
    model, (ids, mask) = model_of("deepseek_v32"), prompts(LENGTH, PADDING)
    chosen = {}
    for scores in ("fp8", "bf16"):
        indexer = enable(model, scores=scores).model.layers[0].self_attn.indexer
        made, forward = [], indexer.forward
        indexer.forward = lambda *args, made=made, forward=forward, **named: (
            made.append((args, named, forward(*args, **named))) or made[-1][2]
        )
        hidden_of(model, ids, mask)
        indexer.forward = forward
        disable(model)
        (chosen[scores],) = made
    (hidden, residual, rotation, window, *_), _, ours = chosen["fp8"]
    family, expected = families.FAMILIES["DeepseekV32Attention"], []
    with torch.no_grad():
        keys = families.keys(family, indexer, hidden, rotation)
        queries = families.queries(family, indexer, hidden, residual, rotation, None)
        factors = families.weights(indexer, hidden) * (indexer.n_heads * indexer.head_dim) ** 0.5
    for row in range(2):
        q, weights = dsa.quantize_index_q(queries[row].bfloat16(), factors[row])
        k, k_scale = dsa.quantize_index_k(keys[row].bfloat16())
        dots = torch.einsum("qhd,td->qht", q.float(), k.float() * k_scale[:, None]).relu()
        scores = torch.einsum("qht,qh->qt", dots, weights)
        token = torch.arange(LENGTH)
        outside = (token < window[row, :, :1]) | (token >= window[row, :, 1:])
        order = scores.masked_fill(outside, -torch.inf).sort(descending=True, stable=True)
        first = order.indices[:, :TOPK].masked_fill(order.values[:, :TOPK] == -torch.inf, LENGTH).sort().values
        expected.append(torch.where(first == LENGTH, -1, first).int())
    assert torch.equal(ours, torch.stack(expected))
    rows = (window[..., 1] - window[..., 0] > TOPK).nonzero()
    shared = [len({*ours[i, j].tolist()} & {*chosen["bf16"][2][i, j].tolist()}) / TOPK for i, j in rows.tolist()]
    assert 0.95 < sum(shared) / len(shared) < 1


def test_a_batch_whose_logits_are_many_is_chosen_sequence_by_sequence(monkeypatch):
    model, (ids, mask) = model_of("deepseek_v32"), prompts(2 * TOPK, PADDING)
    together = hidden_of(enable(model), ids, mask)[-1]
    monkeypatch.setattr(choose.choice, "LOGITS_BYTES", 0)
    apart = hidden_of(model, ids, mask)[-1]
    disable(model)
    seen = mask[..., None]
    torch.testing.assert_close(together * seen, apart * seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scores", ["bf16", "fp8"])
@pytest.mark.parametrize("tokens", [130, 192])
def test_decoding_chooses_what_the_last_query_of_a_prefill_does(scores, tokens):
    """Pages of 64 tokens, the last one full or not."""
    draw = torch.Generator().manual_seed(3)
    queries, keys, factors = (torch.randn(*shape, generator=draw) for shape in ((2, 3, 8, 32), (2, tokens, 32), (2, 3, 8)))
    rule = choose.Rule(families.FAMILIES["DeepseekV32Attention"], TOPK, scores)
    window = torch.tensor([[[37, tokens - 2], [37, tokens - 1], [37, tokens]], [[0, 3], [0, 90], [0, 91]]], dtype=torch.int32)
    whole = choose._chosen(rule, queries, keys, factors, window)
    last = choose._chosen(rule, queries[:, 2:], keys, factors[:, 2:], window[:, 2:])
    assert torch.equal(last, whole[:, 2:])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("length", [1, 3])
def test_what_kernels_are_given_is_aligned(monkeypatch, batch, length):
    """As a GPU's checks ask for: contiguous tensors at addresses of whole 16 bytes; of one query every view is contiguous."""
    given = []
    for name in ("index_select", "index_select_paged"):
        real = getattr(choose.choice, name)
        monkeypatch.setattr(
            choose.choice,
            name,
            lambda *args, real=real, **named: given.extend((*args, *named.values())) or real(*args, **named),
        )
    monkeypatch.setattr(choose.choice, "LOGITS_BYTES", 0)
    rule = choose.Rule(families.FAMILIES["DeepseekV32Attention"], TOPK, "bf16")
    window = torch.tensor([0, 90], dtype=torch.int32).expand(batch, length, 2).contiguous()
    choose._chosen(rule, torch.randn(batch, length, 8, 32), torch.randn(batch, 96, 32), torch.randn(batch, length, 8), window)
    tensors = [each for each in given if isinstance(each, torch.Tensor) and each.dtype == torch.int32]
    assert tensors
    assert all(each.is_contiguous() and each.data_ptr() % 16 == 0 for each in tensors)


def seen_by(window, tokens):
    """The boolean mask [batch, 1, queries, tokens] of windows."""
    token = torch.arange(tokens)
    return (token >= window[..., :1]) & (token < window[..., 1:])


@pytest.mark.parametrize(
    "mask",
    [None, [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], [[0] * 6, [1] * 6]],
    ids=["none", "left", "right", "nothing"],
)
@pytest.mark.parametrize(("queries", "offset", "tokens"), [(6, 0, 6), (2, 4, 6), (3, 3, 11), (1, torch.tensor(5), 8)])
@pytest.mark.parametrize("function", ["causal", "sliding"])
def test_windows_are_the_masks_of_transformers(function, mask, queries, offset, tokens):
    made = {
        "causal": masking_utils.causal_mask_function,
        "sliding": masking_utils.sliding_window_causal_mask_function(3),
    }[function]
    padding = None if mask is None else torch.tensor(mask).bool()
    sizes = {"batch_size": 2, "q_length": queries, "kv_length": tokens, "q_offset": offset, "kv_offset": 0}
    window = windows.windows(**sizes, mask_function=made, attention_mask=padding, dtype=torch.float32, config=None)
    whole = masking_utils.sdpa_mask(
        **sizes, mask_function=made, attention_mask=padding, allow_is_causal_skip=False, device="cpu", use_vmap=False
    )
    assert torch.equal(seen_by(window, tokens), whole.expand(2, 1, queries, tokens))


def test_a_mask_with_holes_is_refused():
    padding = torch.tensor([[1, 1, 0, 1, 1]]).bool()
    with pytest.raises(InputError, match=r"^attention_mask: got a row with a hole"):
        windows.windows(1, 5, 5, attention_mask=padding)
    with pytest.raises(InputError, match=r"^attention_mask"):
        windows.windows(1, 5, 5, use_vmap=True)


def test_a_prepared_mask_is_refused():
    model, (ids, _) = model_of("deepseek_v32"), prompts(8, 0)
    with pytest.raises(InputError, match=r"^attention_mask: got torch.float32"), torch.no_grad():
        enable(model)(ids, attention_mask=torch.zeros(2, 1, 8, 8))
    disable(model)


def test_gradients_are_refused():
    model, (ids, mask) = model_of("deepseek_v32"), prompts(TOPK + 4, 0)
    with pytest.raises(InputError, match="gradient"):
        enable(model)(ids, attention_mask=mask)
    disable(model)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"index_topk": 5000}, "topk"),
        ({"index_n_heads": 72}, "heads"),
        ({"kv_lora_rank": 520}, "kv_lora_rank"),
        ({"index_head_dim": 40}, "head_dim"),
    ],
    ids=str,
)
def test_shapes_that_no_kernel_serves_are_refused(changes, field):
    model = tiny("deepseek_v32", num_hidden_layers=1, **changes)
    with pytest.raises(SpecError, match=field):
        enable(model)
    assert not is_enabled(model)


def test_a_quantised_projection_is_refused():
    model = tiny("deepseek_v32", num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    attention.kv_b_proj = torch.nn.Sequential(attention.kv_b_proj)
    with pytest.raises(InputError, match=r"^kv_b_proj: got Sequential"):
        enable(model)


def test_other_models_are_told_what_is_served():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    with pytest.raises(UnknownName, match=r"LlamaAttention.*DeepseekV32Attention.*GlmMoeDsaAttention"):
        enable(transformers.LlamaModel(config))


def test_wrong_options_are_refused():
    for options, name in (({"scores": "fp4"}, "scores"), ({"dense_below": "all"}, "dense_below")):
        with pytest.raises(InputError, match=f"^{name}"):
            enable(model_of("deepseek_v32"), **options)


def test_versions_that_are_not_served_say_so(monkeypatch):
    model = model_of("deepseek_v32")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ToolMissing, match=r"this is 4\.57\.1.*pip install"):
        enable(model)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ToolMissing, match=r"transformers was not found; pip install"):
        enable(model)
    assert not is_enabled(model)


@pytest.mark.slow
def test_a_step_is_traced_whole():
    model = enable(tiny("deepseek_v32", num_hidden_layers=1, first_k_dense_replace=1))
    ids, _ = prompts(TOPK + 9, 0)
    with torch.no_grad():
        whole = torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False).logits
        torch.testing.assert_close(whole, model(ids, use_cache=False).logits)


@pytest.mark.parametrize(("kind", "layer"), [("deepseek_v32", 0), ("deepseek_v32", -1), ("glm_moe_dsa", 0)])
def test_what_is_captured_is_what_a_layer_attends_with(kind, layer):
    """Chosen anew and attended to anew, it gives the tokens and the output of the layer itself."""
    model = enable(copy.deepcopy(model_of(kind)))
    attention = [each.self_attn for each in model.model.layers if each.self_attn.indexer is not None][layer]
    given = {}
    chosen = attention.indexer.forward
    attention.indexer.forward = lambda *args, **named: given.setdefault("chosen", chosen(*args, **named))
    hook = attention.o_proj.register_forward_pre_hook(lambda module, args: given.setdefault("out", args[0]))
    found = capture(model, prompts(LENGTH, 0)[0][:1], layer)
    hook.remove()
    assert found.context == LENGTH
    own = dsa.index_select(
        found.index_q, found.index_k, None, found.index_weights, found.starts, found.ends, TOPK, scores="bf16"
    )
    assert torch.equal(own, given["chosen"][0])
    out, _ = dsa.sparse_attention(found.q, found.kv, own[:, None].contiguous(), found.sm_scale, sink=found.sink)
    up = attention.kv_b_proj.weight.unflatten(0, (found.q.shape[1], -1))[:, attention.qk_nope_head_dim :]
    values = torch.einsum("qhl,hvl->qhv", out[..., : up.shape[-1]], up)
    torch.testing.assert_close(values.flatten(1), given["out"][0], rtol=1e-4, atol=1e-5)
    (row,) = dsa.quality.measure(found.until(LENGTH, 8), [TOPK], ["fp8"])
    assert 0 < row.recall < 1 and row.overlap > 0.9


def test_capture_says_what_it_wants():
    model = copy.deepcopy(model_of("deepseek_v32"))
    ids = prompts(LENGTH, 0)[0]
    with pytest.raises(InputError, match=r"^model.*enable"):
        capture(model, ids[:1])
    enable(model)
    for arguments, name in (((ids[0],), "input_ids"), ((ids[:1], 9), "layer")):
        with pytest.raises(InputError, match=f"^{name}"):
            capture(model, *arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("scores", ["bf16", "fp8"])
@pytest.mark.parametrize(
    ("cache", "compiled"), [(None, False), ("static", False), pytest.param("static", True, marks=pytest.mark.slow)]
)
def test_generates_on_a_gpu(cache, compiled, scores):
    """Logits agree with eager's in the same dtype; what decoding made is what a prefill of all of it finds likely."""
    model, (ids, mask) = tiny("deepseek_v32", torch.bfloat16).cuda(), prompts(LENGTH, PADDING, "cuda")
    enable(model, scores=scores)
    made = model.generate(ids, attention_mask=mask, cache_implementation=cache, disable_compile=not compiled, **GREEDY)
    assert made.shape == (2, LENGTH + NEW)
    longer = torch.cat([mask, mask.new_ones(2, NEW)], 1)
    with torch.no_grad():
        ours = model(made, attention_mask=longer).logits.float()
        own = disable(model)(made, attention_mask=longer).logits.float()
    gap = similarity_gap(ours * longer[..., None], own * longer[..., None])
    assert gap < (2e-2 if scores == "bf16" else 8e-2)
    likely = ours[:, LENGTH - 1 : -1].masked_fill(torch.arange(tiny_models.VOCABULARY, device="cuda") == 0, -torch.inf)
    taken = likely.gather(2, made[:, LENGTH:, None])[..., 0]
    near = (likely.amax(-1) - taken) < 0.1 * likely.amax(-1)
    assert near.float().mean() > (0.85 if scores == "bf16" else 0.7)  # of a tiny model, where one other token shows


@pytest.mark.gpu
def test_a_model_of_another_dtype_is_refused_on_a_gpu():
    model, (ids, mask) = tiny("deepseek_v32").cuda(), prompts(TOPK + 9, 5, "cuda")
    with pytest.raises(InputError, match=r"^model: got torch.float32 on a GPU"), torch.no_grad():
        enable(model)(ids, attention_mask=mask)


def test_the_tiny_models_are_those_that_are_served():
    assert len(tiny_models.FAMILIES) == len(families.FAMILIES)
