"""How outputs are compared with the reference: similarity and tolerances for numbers, exact equality for selections."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .op import Accuracy


@dataclass(frozen=True)
class Limit:
    """What an output may differ by: similarity below ``similarity`` and |Δ| <= absolute + relative·|reference|."""

    similarity: float
    absolute: float = math.inf
    relative: float = 0.0


# The one table of tolerances, used by tests, the tuner's gate and the command line.
LOGITS = Limit(similarity=5e-6)  # in fp32 and bf16: rounding to bf16 costs 1.4e-6 of it
ATTENTION = Limit(similarity=5e-6, absolute=1e-3, relative=2 / 128)
WEIGHT_ROUNDING = 3 / 256
"""Of an element's magnitude, the sum of its weighted values without their signs: how far rounding the weights may move it.

A weight is rounded to bf16 before it is multiplied, 2^-8 of itself at most; where parts agree on a maximum later, what brings
it under that is rounded too, and the product: three times. The limit of ``ATTENTION`` is for lists of many tokens, whose errors
cancel: of rows of 2 to 4 tokens some 5 elements of 10 million are beyond it, rounded once and all else exact (emulated)."""
# Rounded to bf16 on their way are the probabilities, the scores' gradients and the sums: 1.4e-6 of similarity each. A single
# element may be off by a share of the whole, as it is the sum of shares that may cancel.
GRADIENT = Limit(similarity=1e-5, relative=2 / 128)
GRADIENT_SHARE = 0.05
"""Of the root mean square of all elements, or of an element's own row where that is larger: a row with a few tokens, or a token
that all queries choose, has gradients that are tens of times larger than the others, and errs in proportion."""
# A divergence is a difference of entropies, which are of the size of the logarithm of a row's length.
LOSS = Limit(similarity=5e-6, absolute=1e-4, relative=1e-3)
# Near 0, lse is a peak less the logarithm of a sum: errors stay absolute while what is compared vanishes. Tensor cores add up a
# score's 576 products in 36 steps and cut every sum off, so that one of 8 (the peak of 4096 tokens whose lse is 0) comes out
# up to 36 · 2^-24 · 8 = 1.7e-5 too near to 0; 6.1e-6 were measured. Exponentials and logarithms add less than 1e-6.
LSE = Limit(similarity=5e-6, absolute=1e-5, relative=8 / 65536)

# Hopper keeps 13 bits of a sum of FP8 products: an lse of 7 is off by up to 5e-3 (H200), and where a score differs in its last
# bits a weight may be rounded to the other side, 1/8 of itself away, which with few tokens is as much of an output: right ones
# have similarities up to 1e-3 (1050 draws, H200). Where the sides of the weights that count most are settled by the output, it
# is up to 7.9e-6; where sums are exact 1.5e-6 in any case (mma.sync, the CPU). A single element is off by up to 5.6e-2, where
# scores are large (steep ones, whose lse is 2e-2 off).
FP8_ATTENTION = Limit(similarity=3e-5, absolute=5e-2, relative=1 / 8)
FP8_LSE = Limit(similarity=1e-5, absolute=1e-2, relative=1 / 512)


def similarity_gap(a: Tensor, b: Tensor) -> float:
    """``1 - 2·Σab / Σ(a²+b²)`` in fp64: 0 for equal tensors (also for two empty or all-zero ones)."""
    a, b = a.double(), b.double()
    energy = (a * a + b * b).sum().item()
    return 1 - 2 * (a * b).sum().item() / energy if energy else 0.0


def close(name: str, output: Tensor, reference: Tensor, limit: Limit, slack: Tensor | None = None) -> Accuracy:
    """Compare floating-point tensors of one shape. Infinities must stand at the same places; NaN never passes.

    Args:
        slack: what each element may differ by, where ``limit.absolute`` is not one number for all.
    """
    output, reference = output.double(), reference.double()
    absolute = limit.absolute if slack is None else slack.expand_as(reference)[reference.isfinite()]
    special = ~reference.isfinite()
    if not torch.equal(output[special], reference[special]):
        return Accuracy(False, math.inf, math.inf, f"{name}: infinities differ from the reference")
    output, reference = output[~special], reference[~special]
    difference = (output - reference).abs()
    if not output.isfinite().all():
        return Accuracy(False, math.inf, math.inf, f"{name}: {int((~output.isfinite()).sum())} values are not finite")
    worst = difference.max().item() if difference.numel() else 0.0
    gap = similarity_gap(output, reference)
    outside = int((difference > absolute + limit.relative * reference.abs()).sum())
    passed = gap < limit.similarity and outside == 0
    detail = "" if passed else f"{name}: similarity {gap:.2e} (< {limit.similarity:.0e}), {outside} values outside tolerance"
    return Accuracy(passed, worst, gap, detail)


def gradient(name: str, output: Tensor, reference: Tensor) -> Accuracy:
    """Compare gradients: as a whole, and each element within a share of the root mean square of its row, or of all."""
    squares = reference.double().square().nan_to_num(0.0, posinf=0.0)
    if not squares.numel():
        return close(name, output, reference, GRADIENT)
    rows = squares.mean(-1, keepdim=True) if squares.dim() > 1 else squares.mean()
    return close(name, output, reference, GRADIENT, GRADIENT_SHARE * rows.clamp(min=squares.mean().item()).sqrt())


def equal(name: str, output: Tensor, reference: Tensor) -> Accuracy:
    """Compare discrete tensors exactly."""
    if output.shape == reference.shape and torch.equal(output, reference):
        return Accuracy(True, 0.0, 0.0)
    wrong = int((output != reference).sum()) if output.shape == reference.shape else output.numel()
    return Accuracy(False, float(wrong), math.inf, f"{name}: {wrong} of {output.numel()} values differ")


def worst(*results: Accuracy) -> Accuracy:
    """Join the comparisons of several outputs: passes where all pass."""
    details = [result.detail for result in results if result.detail]
    return Accuracy(
        all(result.passed for result in results),
        max((result.max_abs for result in results), default=0.0),
        max((result.similarity for result in results), default=0.0),
        "; ".join(details),
        any(result.stray for result in results),
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality (NaN equals itself)."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
