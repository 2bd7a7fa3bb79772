"""FlashMLA for shapes that it was not made for: heads, channels and lists padded to what its Hopper kernels take."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ...problem.op import Inputs
from ..cases import BenchCase
from ..models import model_of
from ..stage import Prepared
from . import sgl_flash_mla
from .base import Peer
from .flashmla import HEAD_DIMS, padded, served_heads
from .gathered_latents import STAGES, read_back, rows_of

_ENTRIES = 128  # of a list over latents: a multiple of these


def served_channels(channels: int) -> int:
    """The channels that a call of so many runs as; zeros behind them change no product, nor the first values."""
    return next(served for served in HEAD_DIMS if served >= channels)


def label(case: BenchCase, latents: bool) -> str:
    """The library, what was padded, and that a quantised cache is kept in BF16 instead."""
    heads, channels, k = case["heads"], case["head_dim"], case["k"]
    words = [f"{served_heads(heads)} heads"] if served_heads(heads) != heads else []
    words += [f"{served_channels(channels)} channels"] if served_channels(channels) != channels else []
    words += [f"k {k + -k % _ENTRIES}"] if latents and k % _ENTRIES else []
    told = [f"padded to {', '.join(words)}"] if words else []
    told += ["BF16 cache"] if latents and model_of(case).kv_layout not in ("bf16", "none") and case.stage == STAGES[1] else []
    return f"{sgl_flash_mla.NAME} ({'; '.join(told)})" if told else sgl_flash_mla.NAME


class PaddedFlashMla(Peer):
    """Its FP8 decode kernel over rows that it knows; its prefill kernel over all others, in BF16, as vLLM calls it for them."""

    name = "FlashMLA, padded"
    stages = STAGES
    distributions = (sgl_flash_mla.NAME,)

    def available(self) -> str | None:
        return sgl_flash_mla.reason()

    def build_key(self, case: BenchCase) -> Hashable | None:
        return self.name, case.stage

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        heads, d_v = case["heads"], model_of(case).d_v
        known = "cache" in inputs and model_of(case).kv_layout == "v32"
        attend, q, lists = over_rows(case, inputs) if known else over_latents(case, inputs)
        shape = (*inputs["q"].shape[:-1], d_v)

        def outputs(results: list[Tensor]) -> dict[str, Tensor]:
            return {"out": results[0][..., :heads, :d_v].reshape(shape)}

        return Prepared(label(case, not known), lambda: attend(q, lists), outputs)


def over_rows(case: BenchCase, inputs: Inputs) -> tuple[sgl_flash_mla.Attend, Tensor, Tensor]:
    """The call of its FP8 decode kernel, with what it takes."""
    q, sink = padded(inputs["q"]), padded_sink(inputs["sink"])
    decode = sgl_flash_mla.decode_of(inputs["cache"], q.shape, case["context"], case["k"], inputs["sm_scale"], sink=sink)
    return decode, q, inputs["indices"]


def over_latents(case: BenchCase, inputs: Inputs) -> tuple[sgl_flash_mla.Attend, Tensor, Tensor]:
    """The call of its prefill kernel over every latent there is."""
    q, lists = rows_of(inputs)
    more = served_channels(case["head_dim"]) - case["head_dim"]
    q, kv = (
        torch.nn.functional.pad(each, (0, more)) if more else each for each in (padded(q), read_back(model_of(case), inputs))
    )
    lists = torch.nn.functional.pad(lists, (0, -lists.shape[1] % _ENTRIES), value=-1)[:, None]
    return sgl_flash_mla.prefill_of(kv[:, None], inputs["sm_scale"], padded_sink(inputs["sink"])), q, lists.contiguous()


def padded_sink(sink: Tensor | None) -> Tensor | None:
    """One logit for each head that a call runs as."""
    return None if sink is None else torch.nn.functional.pad(sink, (0, served_heads(len(sink)) - len(sink)))


PEERS = (PaddedFlashMla(),)
