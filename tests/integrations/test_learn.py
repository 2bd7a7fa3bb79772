"""Training a model of transformers by these kernels: its own gradients, indexers that learn, and transformers' Trainer."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("transformers", "5.17", reason="transformers 5.17 or newer is not installed")

import transformers

from dsa_codegen.errors import InputError
from dsa_codegen.integrations.transformers import disable, enable, families, indexer_loss, indexer_parameters

from tiny_models import TOPK, VOCABULARY, prompts, tiny

SHORT, LONG, PADDING = TOPK - 14, TOPK + 26, 17


@functools.cache
def model_of(kind):
    return tiny(kind, num_hidden_layers=2, attention_dropout=0.0).train()


def language_loss(model, length, **more):
    ids, mask = prompts(length, PADDING, next(model.parameters()).device)
    foreseen = mask.bool() & mask.roll(1, 1).bool()  # not from padding, where nothing is attended to
    return model(ids, attention_mask=mask, labels=ids.masked_fill(~foreseen, -100), use_cache=False, **more).loss


def gradients(model, loss):
    """Of every parameter that has one, by name."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: each for name, each in zip(named, found, strict=True) if each is not None}


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa", "hy_v4"])
@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_the_models_own_gradients_are_eagers(kind, stage):
    """Over the chosen tokens, of a padded batch; and over all of them, where eager chooses all."""
    model, length = model_of(kind), LONG if stage == "sparse" else SHORT
    wanted = gradients(model, language_loss(model, length))
    enable(model, stage=stage, indexer_weight=0.0)
    loss = language_loss(model, length)
    found = gradients(model, loss)
    disable(model)
    torch.testing.assert_close(loss, language_loss(model, length), rtol=1e-4, atol=1e-4)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()), msg=name)
    others = {name for name in found.keys() - wanted.keys() if found[name].abs().sum() > 0}
    assert not others, "indexers learn from no loss but their own"


@pytest.mark.parametrize("stage", ["warm-up", "sparse"])
def test_indexers_learn_eagers_attention(stage):
    """Loss and gradients by torch, from the weights of eager's attention and the scores of the model's own projections."""
    model, length = model_of("deepseek_v32"), SHORT
    layer = model.model.layers[0].self_attn
    given = []
    handle = layer.indexer.register_forward_pre_hook(lambda module, args, named: given.append((args, named)), with_kwargs=True)
    ids, mask = prompts(length, PADDING)
    weights = model(ids, attention_mask=mask, use_cache=False, output_attentions=True).attentions[0].detach()
    handle.remove()
    (hidden, resid, rotation, *_), _ = given[0]
    family = families.FAMILIES["DeepseekV32Attention"]
    q = families.queries(family, layer.indexer, hidden.detach(), resid.detach(), rotation, None)
    k = families.keys(family, layer.indexer, hidden.detach(), rotation)
    scores = (torch.einsum("bqhd,btd->bqht", q, k).relu() * families.weights(layer.indexer, hidden)[..., None]).sum(2)
    seen = torch.ones(length, length).tril().bool() & mask.bool()[:, None]
    rows = seen.any(-1)
    target = weights.sum(1)[rows] / weights.sum(1)[rows].sum(-1, keepdim=True)
    log_softmax = scores.masked_fill(~seen, -torch.inf)[rows].log_softmax(-1).masked_fill(~seen[rows], 0.0)
    wanted = torch.nn.functional.kl_div(log_softmax, target.masked_fill(~seen[rows], 0.0), reduction="sum") / rows.sum()
    own = dict(layer.indexer.named_parameters())
    of_wanted = torch.autograd.grad(wanted, list(own.values()))

    enable(model, stage=stage, indexer_weight=0.5)
    loss = language_loss(model, length)
    of_found = torch.autograd.grad(loss, list(own.values()))
    torch.testing.assert_close(layer.dsa_loss, wanted.detach(), rtol=1e-4, atol=1e-5)
    assert indexer_loss(model) is not None and not indexer_loss(model).requires_grad
    disable(model)
    for name, mine, other in zip(own, of_found, of_wanted, strict=True):
        torch.testing.assert_close(mine, 0.5 * other, rtol=1e-3, atol=1e-3 * float(other.abs().max()), msg=name)
    assert indexer_loss(model) is None and "dsa_lesson" not in layer.__dict__


def test_recomputed_activations_give_the_same_gradients():
    model = tiny("deepseek_v32", num_hidden_layers=2, attention_dropout=0.0).train()
    enable(model, stage="sparse")
    wanted = gradients(model, language_loss(model, LONG))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, language_loss(model, LONG))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)


def texts(count, length):
    """Endless repetitions of eight tokens, at another place in each text."""
    period = torch.arange(2, 10).repeat(length // 8 + 2)
    return [{"input_ids": period[i % 8 : i % 8 + length], "labels": period[i % 8 : i % 8 + length]} for i in range(count)]


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["kept", "recomputed"])
def test_trainer_fits_the_indexer_then_the_model(tmp_path, recompute):
    pytest.importorskip("accelerate", reason="transformers' Trainer wants accelerate")
    model = tiny("deepseek_v32", num_hidden_layers=1, first_k_dense_replace=1, mlp_layer_types=["dense"], attention_dropout=0.0)
    own = list(indexer_parameters(enable(model, stage="warm-up")))
    model.requires_grad_(False)
    for parameter in own:
        parameter.requires_grad_(True)
    before, losses = {name: each.clone() for name, each in model.named_parameters()}, []

    class Note(transformers.TrainerCallback):
        def on_step_end(self, *args, **named):
            losses.append(float(indexer_loss(model)))

    def fit(steps):
        options = {"max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        if recompute:
            quiet |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **options, **quiet)
        trainer = transformers.Trainer(model, arguments, train_dataset=texts(2 * steps, LONG), callbacks=[Note()])
        return trainer.train().training_loss

    fit(8)
    changed = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert changed == {name for name in before if ".indexer." in name}
    assert losses[-1] < 0.7 * losses[0]
    model.requires_grad_(True)
    enable(model, stage="sparse")
    assert fit(4) > 1.3 * fit(4)
    assert len(losses) == 16


def test_what_cannot_be_trained_is_refused():
    model = model_of("deepseek_v32")
    with pytest.raises(InputError, match=r"^stage.*warm-up"):
        enable(model, stage="finetune")
    enable(model)
    with pytest.raises(InputError, match="gradient"):
        language_loss(model, LONG)
    enable(model, stage="sparse")
    ids, _ = prompts(LONG, 0)
    with torch.no_grad():
        cache = model(ids[:, :40], use_cache=True).past_key_values
    with pytest.raises(InputError, match=r"^past_key_values: got 180 tokens, 100 of them new"):
        model(ids[:, 40:], past_key_values=cache)
    disable(model)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32 under autocast"])
@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_gradients_on_a_gpu_are_eagers(stage, dtype):
    """Of a model in bf16, and of one in fp32 under autocast, as Trainer's ``bf16=True`` runs it."""
    model = tiny("deepseek_v32", dtype, num_hidden_layers=1, mlp_layer_types=["dense"], attention_dropout=0.0).train().cuda()
    length = TOPK - 2

    def own():
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.float32):
            return gradients(model, language_loss(model, length))

    wanted = own()
    enable(model, stage=stage)
    found = own()
    assert indexer_loss(model) is not None or stage == "dense"
    for name, value in wanted.items():
        assert (found[name].float() - value.float()).norm() < 0.1 * value.float().norm() + 1e-6, name


def test_tokens_of_these_texts_are_in_the_vocabulary():
    assert max(int(each["input_ids"].max()) for each in texts(8, LONG)) < VOCABULARY
