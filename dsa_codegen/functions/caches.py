"""What queries attend to: quantised, stored into the slots of paged caches and read back, alone or with norm and position."""

from __future__ import annotations

from torch import Tensor

from .. import invariance
from ..errors import InputError
from ..problem import checks
from ..problem.kv_layouts import KV_LAYOUTS
from ..problem.paged import D_ROPE
from . import operators


def quantize_index_q(q: Tensor, weights: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Queries of the indexer to e4m3, their scales folded into the weights.

    Args:
        q: bf16 [queries, heads, head_dim].
        weights: fp32 or bf16 [queries, heads].
        power_of_two: round scales up to a power of two (ue8m0).

    Returns:
        e4m3 [queries, heads, head_dim] and fp32 [queries, heads]: ``weights · scale · head_dim^-0.5 · heads^-0.5``.
    """
    if weights is None:  # the operator takes that for keys
        raise InputError("weights", "None", "a tensor")
    return operators.quantize_q(q, weights, power_of_two)


def quantize_index_k(k: Tensor, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Keys of the indexer, bf16 [tokens, head_dim], to e4m3 [tokens, head_dim] and one fp32 scale per token.

    A row with a NaN is NaN, values and scale; so it is wherever rows are quantised. One with an infinity is so once it is
    multiplied out.
    """
    return operators.quantize_k(k, None, power_of_two)


def quantize_latents(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Queries or tokens of ``sparse_attention``, bf16 [rows, heads or 1, d], to e4m3, and fp32 scales [rows, heads or 1].

    A scale is the largest magnitude over 448, at least 1e-4 / 448.
    """
    if not isinstance(latents, Tensor) or latents.dim() != 3:
        came = f"shape {list(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise InputError("latents", came, "a tensor [rows, heads or 1, d]")
    values, scales = operators.quantize_latents(latents.flatten(0, 1), None, False)
    return values.view(latents.shape), scales.view(latents.shape[:2])


def store_index_k(k: Tensor, slots: Tensor, cache: Tensor, *, power_of_two: bool = False) -> None:
    """Quantise keys of the indexer, bf16 [tokens, head_dim], into their slots [tokens] of a paged cache.

    A slot is block · page + offset; one outside the cache (-1) is skipped. Of rows with the same slot the last is stored,
    whole. More than 1024 rows take 4 bytes of scratch memory for every slot of the cache.
    """
    operators.store_k(k, None, slots, cache, "index_k", power_of_two, 1.0)


def store_kv(
    nope: Tensor,
    rope: Tensor | None,
    slots: Tensor,
    cache: Tensor,
    *,
    layout: str = "v32",
    power_of_two: bool = False,
    scale: float = 1.0,
) -> None:
    """Quantise latent vectors into their slots [tokens] of a paged KV cache; slots as in ``store_index_k``.

    Args:
        nope: bf16 [tokens, 512] ("v32") or [tokens, 448] ("v4"), quantised in groups of 128 or 64 channels; of other layouts 16
            to 512 channels in steps of their groups, or of 16.
        rope: bf16 [tokens, 64], stored as it is; of other layouts 0 to 128 channels in steps of 16, None for none.
        layout: "v32" (656 bytes a token), "v4" (584), "bf16" (nothing is quantised), or one of docs/shapes.md ("fp8_ue8m0_64");
            those with ue8m0 scales, "v4" too, have power-of-two scales only.
        scale: of a cache of layout "fp8_tensor", whose values share one: what lies beyond 448 of it becomes 448 of it.
    """
    checks.one_of("layout", layout, KV_LAYOUTS)
    operators.store_kv(nope, rope, slots, cache, layout, power_of_two, scale)


def gather_index_k(cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of the indexer at ``slots`` [tokens]: e4m3 [tokens, head_dim] and fp32 scales; zeros at invalid slots."""
    keys, scales = operators.gather_paged(cache, slots, "index_k", D_ROPE, 1.0)
    return keys, scales


def gather_kv(cache: Tensor, slots: Tensor, *, layout: str = "v32", d_rope: int = D_ROPE, scale: float = 1.0) -> Tensor:
    """Latent vectors at ``slots`` [tokens], dequantised: bf16 [tokens, 576] ("v32"), [tokens, 512] ("v4"), …

    Invalid slots give zeros.

    Args:
        layout, scale: as in ``store_kv``.
        d_rope: channels that stay bf16, of FP8 rows; their others follow from the bytes of a token.
    """
    checks.one_of("layout", layout, KV_LAYOUTS)
    (latent,) = operators.gather_paged(cache, slots, layout, d_rope, scale)
    return latent


def index_prologue(
    q: Tensor,
    weights: Tensor,
    k: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    cos_sin: Tensor | None,
    positions: Tensor | None,
    slots: Tensor,
    cache: Tensor,
    *,
    eps: float = 1e-6,
    rotary: str = "half_split",
    rope_first: bool = True,
    hadamard: bool = False,
    power_of_two: bool = False,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """What lies between the indexer's projections and its scores, in one launch: LayerNorm of k, rotary position, an optional
    Hadamard rotation, FP8, q's scales folded into the weights, k stored into its cache.

    Args:
        q: bf16 [tokens, heads, head_dim]; tokens may be strided. No heads store keys alone, for a step that scores nothing.
        weights: fp32 or bf16 [tokens, heads], not scaled; rows may be strided.
        k: bf16 [tokens, head_dim]; rows may be strided.
        norm_weight, norm_bias: fp32 or bf16 [head_dim], the LayerNorm of k; both None for keys that come normalised.
        cos_sin: fp32 [positions, d_rope], d_rope / 2 cosines and as many sines of each position; d_rope 16 to 128 in steps of
            16, at most head_dim. None, with positions, where no channel is rotary.
        positions: int64 [tokens]; a token whose position the table does not have is NaN.
        slots: int32 or int64 [tokens], where k is stored; as in ``store_index_k``.
        cache: uint8 [blocks, page, 1, head_dim + 4].
        eps: added to the variance of the norm.
        rotary: "half_split" (channel i is paired with i + d_rope / 2; DeepSeek-V3.2) or "interleaved" (2i with 2i + 1; GLM-5).
        rope_first: whether the rotary channels are the first ones of a row, or the last.
        hadamard: multiply q and k by the Hadamard matrix / sqrt(head_dim) before they are quantised; head_dim a power of two.
        power_of_two: round scales up to a power of two (ue8m0).
        batch_invariant: see the package's first lines.

    Returns:
        q as e4m3 [tokens, heads, head_dim] and fp32 [tokens, heads]: ``weights · scale · head_dim^-0.5 · heads^-0.5``.
    """
    placed = cos_sin, positions, slots, cache
    options = eps, rotary, rope_first, hadamard, power_of_two, batch_invariant or invariance.always()
    return operators.index_prologue(q, weights, k, norm_weight, norm_bias, *placed, *options)


def store_latent(
    latent: Tensor,
    norm_weight: Tensor | None,
    cos_sin: Tensor | None,
    positions: Tensor | None,
    slots: Tensor,
    cache: Tensor,
    *,
    eps: float = 1e-6,
    layout: str = "v32",
    rotary: str = "interleaved",
    power_of_two: bool = False,
    batch_invariant: bool = False,
    scale: float = 1.0,
) -> None:
    """RMSNorm of latent vectors, rotary position of their last channels, and their slots of a paged KV cache, in one launch.

    Args:
        latent: bf16 [tokens, 576] ("v32"), [tokens, 512] ("v4") or what another layout holds, as the down projection gives it.
        norm_weight: fp32 or bf16, of the channels without position (512 or 448) or of all of them; None for no norm.
        cos_sin, positions, eps, rotary: as in ``index_prologue``; d_rope is 64 in "v32" and "v4".
        slots: int32 or int64 [tokens]; as in ``store_index_k``.
        cache: of the layout, as in ``store_kv``.
        layout, power_of_two, scale: as in ``store_kv``.
        batch_invariant: see the package's first lines.
    """
    checks.one_of("layout", layout, KV_LAYOUTS)
    placed = cos_sin, positions, slots, cache
    options = eps, layout, rotary, power_of_two, batch_invariant or invariance.always(), scale
    operators.store_latent(latent, norm_weight, *placed, *options)
