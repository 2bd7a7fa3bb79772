"""The prologues as a model writes them: one PyTorch operation after another, in BF16, and the scattered stores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ...problem.caches import IndexKLayout, KvV32Layout, as_pages
from ...problem.op import Inputs
from ..cases import BenchCase
from ..stage import Prepared, Run
from .base import Peer

_E4M3_MAX = 448.0
_D_ROPE, _D_NOPE, _GROUP = 64, 512, 128


def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 rows and their scales [..., 1]."""
    exact = x.float()
    scale = exact.abs().amax(-1, keepdim=True).clamp(min=1e-4) / _E4M3_MAX
    return (exact / scale).to(torch.float8_e4m3fn), scale


def _half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x · cos + rotate_half(x) · sin."""
    low, high = x.chunk(2, -1)
    return (x * cos + torch.cat((-high, low), -1) * sin).to(x.dtype)


def _interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbours as complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def _write(pages: Tensor, block: Tensor, first: Tensor, rows: Tensor) -> None:
    """The bytes of rows [tokens, n] at ``first`` [tokens] of their blocks."""
    rows = rows.contiguous().view(torch.uint8)
    pages[block[:, None], first[:, None] + torch.arange(rows.shape[1], device=rows.device)] = rows


def _index(case: BenchCase, inputs: Inputs) -> Run:
    q, weights, k, slots = (inputs[name] for name in ("q", "weights", "k", "slots"))
    layout = IndexKLayout(case["page"], case["head_dim"])
    pages, norm = as_pages(layout, inputs["cache"]), (inputs["norm_weight"], inputs["norm_bias"])
    factor = (q.shape[1] * q.shape[2]) ** -0.5

    def run() -> tuple[Tensor, Tensor]:
        cos, sin = inputs["cos_sin"][inputs["positions"]].chunk(2, 1)
        cos, sin = torch.cat((cos, cos), 1).bfloat16(), torch.cat((sin, sin), 1).bfloat16()
        key = functional.layer_norm(k.float(), k.shape[1:], *norm).to(k.dtype)
        query = torch.cat((_half_split(q[..., :_D_ROPE], cos[:, None], sin[:, None]), q[..., _D_ROPE:]), -1)
        key = torch.cat((_half_split(key[:, :_D_ROPE], cos, sin), key[:, _D_ROPE:]), -1)
        values, scale = _quantise(query)
        keys, key_scale = _quantise(key)
        block, place = slots // layout.page, slots % layout.page
        _write(pages, block, place * layout.keys.stride, keys)
        _write(pages, block, layout.scale.base + place * layout.scale.stride, key_scale)
        return values, weights * scale[..., 0] * factor

    return run


def _latent(case: BenchCase, inputs: Inputs) -> Run:
    latent, slots, cache = inputs["latent"], inputs["slots"], inputs["cache"]
    layout = KvV32Layout(case["page"])
    pages, weight = as_pages(layout, cache), inputs["norm_weight"]

    def run() -> Tensor:
        cos, sin = inputs["cos_sin"][inputs["positions"]].chunk(2, 1)
        nope = functional.rms_norm(latent[:, :_D_NOPE].float(), (_D_NOPE,), weight).to(latent.dtype)
        values, scales = _quantise(nope.unflatten(1, (-1, _GROUP)))
        block, place = slots // layout.page, slots % layout.page * layout.bytes_per_token
        fields = (
            (layout.nope, values.flatten(1)),
            (layout.scales, scales[..., 0]),
            (layout.rope, _interleaved(latent[:, _D_NOPE:], cos, sin)),
        )
        for field, rows in fields:
            _write(pages, block, field.base + place, rows)
        return cache

    return run


class UnfusedPrologue(Peer):
    """See the module's first lines."""

    name = "PyTorch (unfused)"
    stages = ("index_prologue", "latent_prologue")
    distributions = ("torch",)
    similarity = 2e-3

    def available(self) -> str | None:
        return None

    def prepare(self, case: BenchCase, inputs: Inputs) -> Prepared | None:
        if case.stage == "latent_prologue":
            return Prepared(self.name, _latent(case, inputs), lambda cache: {"cache": cache})
        return Prepared(self.name, _index(case, inputs), lambda results: dict(zip(("values", "folded"), results, strict=True)))


PEERS = (UnfusedPrologue(),)
