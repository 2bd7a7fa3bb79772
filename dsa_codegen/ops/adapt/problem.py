"""Adaptive choice: of each row's topk tokens as many as its scores are worth, and how many they are.

Tokens of a row stand in the order of choice: those that are always kept, then the highest score first, among equal scores the
lowest token, NaN last. A row takes the longest beginning of this order that all of its rules allow:

``counts[t]``      at most so many tokens;
``min_score``      tokens whose score is at least so high;
``mass``           the fewest tokens whose share of ``Σ_s exp(mass_scale · (I[t,s] - max I[t]))`` over the row's window, or over
                   the topk chosen, reaches p (0 < p <= 1). Weights are whole multiples of 2^-32 of the highest, so that their
                   sums are exact; where nothing has a weight (all -inf or NaN) none is taken.

The window that follows the content of "dynamic" sparse attention is of this kind. What is taken ascends, -1 behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ...problem import checks, compare
from ...problem.draw import Draw
from ...problem.op import Accuracy, Case, Cost, Inputs, Outputs, Problem
from ...problem.presets import Model
from ...problem.values import Sizes, Spec
from ..select import OP as SELECT
from ..select import SelectSizes, SelectSpec
from ..select.problem import OUTPUTS, SCORES

MASSES = ("none", "chosen", "window")
"""What a share of mass is of: no rule, the topk chosen, or the whole window."""
MASS_OF = MASSES[1:]
_NAMES = {dtype: name for name, dtype in SCORES.items()}
_WEIGHT = float(1 << 32)  # of the highest score
_NEAR = 1e-5  # of the mass: powers of two have errors of an ulp or two, sums have none


@dataclass(frozen=True)
class AdaptSpec(Spec):
    """What changes the code."""

    topk: int
    scores: str = "fp32"
    mass: str = "window"
    starts: bool = True
    output: str = "tokens"
    masses: bool = False
    """Whether each row has its share of mass."""
    min_scores: bool = False
    """Whether each row has its threshold."""
    counts: bool = False
    """Whether each row has its own k."""
    chosen_scores: bool = False
    """Whether the scores of what is taken are written too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_range("topk", 1, 4096)
        self.require_in("scores", SCORES)
        self.require_in("mass", MASSES)
        self.require_in("output", OUTPUTS)
        self.require_in("masses", (False,) if self.mass == "none" else (False, True))


@dataclass(frozen=True)
class AdaptSizes(Sizes):
    """What varies from call to call."""

    rows: int
    columns: int
    EDGES: ClassVar[Mapping[str, tuple[int, ...]]] = {"rows": (133,)}


class AdaptProblem(Problem[AdaptSpec, AdaptSizes]):
    """See the module's first lines."""

    name = "adapt"
    summary = "Of each row's chosen tokens as many as a threshold, a share of the mass or its own k allow, and their number."
    function = "adapt"
    schema = (
        "(Tensor scores, Tensor chosen, Tensor ends, Tensor? starts=None, Tensor? page_table=None, int page=64, "
        "int keep_first=0, int keep_recent=0, float? min_score=None, Tensor? min_scores=None, float? mass=None, "
        "Tensor? masses=None, str mass_of='window', float mass_scale=1.0, Tensor? counts=None, "
        "bool chosen_scores=False) -> Tensor[]"
    )
    spec_type = AdaptSpec
    sizes_type = AdaptSizes
    minor = frozenset({"starts", "output", "masses", "min_scores", "counts", "chosen_scores"})

    def specs_of(self, model: Model) -> Sequence[AdaptSpec]:
        return (AdaptSpec(model.topk), AdaptSpec(model.topk, starts=False, output="slots"))

    def bind(self, *args: Any) -> tuple[AdaptSpec, AdaptSizes, Inputs]:
        scores, chosen, ends, starts, page_table, page, keep_first, keep_recent, *rule = args
        min_score, min_scores, mass, masses, mass_of, mass_scale, counts, chosen_scores = rule
        scores = checks.tensor("scores", scores, (None, None), tuple(_NAMES), inner_contiguous=True)
        rows, columns = scores.shape
        chosen = checks.tensor("chosen", chosen, (rows, None), torch.int32, like=scores)
        inputs = {"scores": scores, "chosen": chosen, "ends": ends, "starts": starts, "page_table": page_table, "page": page}
        topk = chosen.shape[1]
        # The rest of the windows is the selection's: its table, pages, and what is kept.
        SELECT.bind(scores, ends, topk, starts, page_table, page, keep_first, keep_recent)
        for name, value in (("min_scores", min_scores), ("masses", masses)):
            inputs[name] = None if value is None else checks.tensor(name, value, (rows,), torch.float32, like=scores)
        inputs["counts"] = None if counts is None else checks.tensor("counts", counts, (rows,), torch.int32, like=scores)
        checks.one_of("mass_of", mass_of, MASS_OF)
        _check_rule(min_score, min_scores, mass, masses, mass_scale)
        inputs |= {"keep_first": keep_first, "keep_recent": keep_recent, "min_score": min_score, "mass": mass}
        inputs |= {"mass_of": mass_of, "mass_scale": mass_scale}
        named = "none" if mass is None and masses is None else mass_of
        given = {"masses": masses is not None, "min_scores": min_scores is not None, "counts": counts is not None}
        output = "tokens" if page_table is None else "slots"
        spec = AdaptSpec(topk, _NAMES[scores.dtype], named, starts is not None, output, **given, chosen_scores=chosen_scores)
        return spec, AdaptSizes(rows, columns), inputs

    def inputs(self, spec: AdaptSpec, case: Case[AdaptSizes], draw: Draw) -> Inputs:
        rows, columns = case.sizes.rows, case.sizes.columns
        ragged = case.distribution.startswith("ragged")
        kept: dict[str, Any]
        first = min(3, spec.topk) if ragged else 0
        kept = {"keep_first": first, "keep_recent": min(17, spec.topk - first) if ragged else 0}
        chosen = SelectSpec(spec.topk, spec.scores, spec.starts, **kept)
        drawn = SELECT.inputs(replace(chosen, output=spec.output), Case(SelectSizes(rows, columns), case.distribution), draw)
        table = drawn["page_table"]
        ends = drawn["ends"] if table is None else drawn["ends"].clamp(max=table.shape[1] * chosen.page)
        listed = SELECT.reference(chosen, {**drawn, "ends": ends, "page_table": None})["chosen"]
        if ragged:  # as of a list that is not this row's: what no column is of is none
            listed = listed.masked_fill(draw.uniform(*listed.shape) < 0.05, columns + 3)
        return {
            **drawn,
            "ends": ends,
            "chosen": listed,
            "page": chosen.page,
            **kept,
            "min_score": 1.0 if ragged and not spec.min_scores else None,
            "min_scores": draw.normal(rows) if spec.min_scores else None,
            "mass": 0.6 if spec.mass != "none" and not spec.masses else None,
            "masses": draw.uniform(rows) if spec.masses else None,
            "mass_of": "window" if spec.mass == "none" else spec.mass,
            "mass_scale": 1.7,
            "counts": draw.integers(-2, spec.topk + 9, rows) if spec.counts else None,
        }

    def reference(self, spec: AdaptSpec, inputs: Inputs) -> Outputs:
        return _cut(spec, inputs, _lengths(spec, inputs))

    def allocate(self, spec: AdaptSpec, inputs: Inputs) -> Outputs:
        chosen = inputs["chosen"]
        outputs = {"out": torch.empty_like(chosen), "lengths": chosen.new_empty(chosen.shape[0])}
        scores = {"out_scores": torch.empty_like(chosen, dtype=torch.float32)} if spec.chosen_scores else {}
        return {**outputs, **scores}

    def check(self, spec: AdaptSpec, inputs: Inputs, outputs: Outputs, reference: Outputs) -> Accuracy:
        """As many as the rules allow, where powers of two leave it open of the mass; then exactly those."""
        found = outputs["lengths"]
        fewest, most = (_lengths(spec, inputs, 1 + error) for error in (-_NEAR, _NEAR))
        if ((found < fewest) | (found > most)).any():
            wrong = int(((found < fewest) | (found > most)).nonzero()[0, 0])
            detail = f"lengths: row {wrong} has {int(found[wrong])}, {int(fewest[wrong])} to {int(most[wrong])} allowed"
            return Accuracy(False, math.inf, math.inf, detail)
        expected = _cut(spec, inputs, found)
        pairs = {name: (outputs[name], value) for name, value in expected.items()}
        if spec.chosen_scores:  # NaN equals NaN
            found_scores, wanted = (each.nan_to_num(math.pi, math.inf, -math.inf) for each in pairs["out_scores"])
            pairs["out_scores"] = found_scores, wanted
        return compare.worst(*(compare.equal(name, *pair) for name, pair in pairs.items()))

    def cost(self, spec: AdaptSpec, case: Case[AdaptSizes]) -> Cost:
        rows, columns = case.sizes.rows, case.sizes.columns
        read = columns * SCORES[spec.scores].itemsize if spec.mass == "window" else 0
        return Cost(8.0 * rows * (columns + 32 * spec.topk), rows * (read + 12 * spec.topk), "fp32")

    def cases(self, spec: AdaptSpec) -> Sequence[Case[AdaptSizes]]:
        topk = spec.topk
        kinds = ("ragged_normal", "normal", "equal", "few", "ragged_special", "special", "narrow")
        sizes = ((1, 1), (3, topk + 1), (2, 0), (0, 40))
        plain = [Case(AdaptSizes(rows, columns), "normal") for rows, columns in sizes]
        return [*(Case(AdaptSizes(4, 5 * topk + 77), kind) for kind in kinds), *plain]

    def long_cases(self, spec: AdaptSpec) -> Sequence[Case[AdaptSizes]]:
        return [Case(AdaptSizes(*sizes), kind) for sizes in ((3, 131072), (300, 20000)) for kind in ("normal", "ragged_few")]

    def options(self, spec: AdaptSpec) -> Sequence[AdaptSpec]:
        return (
            spec,
            replace(spec, mass="chosen", scores="bf16", starts=not spec.starts, masses=True, chosen_scores=True),
            replace(spec, mass="none", masses=False, output="slots", min_scores=True, counts=True),
            replace(spec, masses=True, min_scores=True, counts=True),
        )

    def workloads(self, spec: AdaptSpec) -> Sequence[Case[AdaptSizes]]:
        return [Case(AdaptSizes(rows, 65536), "normal") for rows in (64, 1024)]


def _check_rule(min_score: Any, min_scores: Any, mass: Any, masses: Any, mass_scale: float) -> None:
    for name, value, of_rows in (("min_score", min_score, min_scores), ("mass", mass, masses)):
        if value is not None and of_rows is not None:
            raise InputError(name, str(value), f"None beside {name}s, or no {name}s")
    if min_score is not None and math.isnan(min_score):
        raise InputError("min_score", "nan", "a number, or None")
    if mass is not None and not 0 < mass <= 1:
        raise InputError("mass", str(mass), "more than 0, at most 1")
    if not 0 < mass_scale < math.inf:
        raise InputError("mass_scale", str(mass_scale), "a positive number")


def _windows(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """int64 (start, end) [rows, 1], within the columns."""
    ends = inputs["ends"].long()[:, None].clamp(max=inputs["scores"].shape[1])
    starts = torch.zeros_like(ends) if inputs["starts"] is None else inputs["starts"].long()[:, None].clamp(min=0)
    return starts, ends


def _listed(inputs: Inputs) -> Tensor:
    """The chosen tokens, -1 in place of those that no column is of."""
    chosen, columns = inputs["chosen"], inputs["scores"].shape[1]
    return chosen.masked_fill(chosen >= columns, -1)


def _ranked(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(places of a row's entries in the order of choice, fp64 ranks that are so sorted, scores, whether kept): [rows, topk]."""
    scores, chosen = inputs["scores"], _listed(inputs)
    (start, end), there = _windows(inputs), chosen >= 0
    if not scores.shape[1]:
        scores = scores.new_zeros(len(scores), 1)
    score = scores.gather(1, chosen.clamp(min=0).long()).double()
    kept = there & ((chosen < start + inputs["keep_first"]) | (chosen >= end - inputs["keep_recent"]))
    rank = score.nan_to_num(nan=-1e300, posinf=1e299, neginf=-1e299).masked_fill(kept, 1e300).masked_fill(~there, -math.inf)
    rank, order = rank.sort(dim=1, descending=True, stable=True)
    return order, rank, score.gather(1, order), kept.gather(1, order)


def _weights(score: Tensor, top: Tensor, scale: float) -> Tensor:
    """int64, 2^32 at the top."""
    power = torch.where(score == top, 0.0, ((score - top) * scale).clamp(max=0))
    return torch.where(score > -math.inf, power.exp() * _WEIGHT + 0.5, 0.0).nan_to_num(0.0).floor().long()


def _lengths(spec: AdaptSpec, inputs: Inputs, factor: float = 1.0) -> Tensor:
    """int32 [rows]: how many a row takes where its share of mass is ``factor`` times what it states."""
    _, rank, score, kept = _ranked(inputs)
    there = ~rank.isneginf()
    most = there.sum(1)
    if spec.min_scores or inputs["min_score"] is not None:
        rows = (
            score.new_full((len(score),), inputs["min_score"] or 0.0) if inputs["min_scores"] is None else inputs["min_scores"]
        )
        floor = rows.double()[:, None]
        most = torch.minimum(most, (there & ((score >= floor) | floor.isnan() | kept)).sum(1))
    if spec.counts:
        most = torch.minimum(most, inputs["counts"].clamp(min=0))
    if spec.mass != "none":
        weight, whole = _masses(spec, inputs, score.masked_fill(~there, -math.inf))
        share = inputs["masses"].double() if spec.masses else torch.full_like(most, inputs["mass"], dtype=torch.float64)
        wanted = (share.float().double() * whole.double() * factor).ceil()[:, None]
        most = torch.minimum(most, (weight.cumsum(1) - weight < wanted).sum(1))
    return torch.maximum(most, kept.sum(1)).int()


def _masses(spec: AdaptSpec, inputs: Inputs, score: Tensor) -> tuple[Tensor, Tensor]:
    """(weights of a row's entries in the order of choice [rows, topk], the mass that a share is of [rows])."""
    scale = inputs["mass_scale"]
    top = score.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).amax(1, keepdim=True)
    weight = _weights(score, top, scale)
    if spec.mass == "chosen":
        return weight, weight.sum(1)
    start, end = _windows(inputs)
    column = torch.arange(inputs["scores"].shape[1], device=score.device)
    whole = [
        _weights(row.double().masked_fill((column < first) | (column >= last), -math.inf), high, scale).sum()
        for row, first, last, high in zip(inputs["scores"], start, end, top, strict=True)
    ]
    return weight, torch.stack(whole) if whole else weight.sum(1)


def _slots(inputs: Inputs, token: Tensor) -> Tensor:
    """The slots that hold the tokens, -1 where the table names no page."""
    table, page = inputs["page_table"], inputs["page"]
    number = token.clamp(min=0) // page
    if not token.numel() or not table.shape[1]:
        return torch.full_like(token, -1)
    of_rows = table.repeat_interleave(len(token) // len(table), 0)
    block = of_rows.gather(1, number.clamp(max=table.shape[1] - 1).long())
    return torch.where((token < 0) | (block < 0) | (number >= table.shape[1]), -1, block * page + token % page)


def _cut(spec: AdaptSpec, inputs: Inputs, lengths: Tensor) -> Outputs:
    """The outputs of rows that take so many."""
    order, *_ = _ranked(inputs)
    chosen = _listed(inputs)
    place = torch.arange(spec.topk, device=chosen.device)
    taken = torch.zeros_like(chosen, dtype=torch.bool).scatter(1, order, place < lengths[:, None]) & (chosen >= 0)
    front = (~taken).int().argsort(dim=1, stable=True)
    token = chosen.masked_fill(~taken, -1).gather(1, front)
    outputs = {"out": token if spec.output == "tokens" else _slots(inputs, token), "lengths": taken.sum(1, dtype=torch.int32)}
    if spec.chosen_scores:
        scores = inputs["scores"] if inputs["scores"].shape[1] else inputs["scores"].new_zeros(len(chosen), 1)
        listed = scores.gather(1, token.clamp(min=0).long()).float()
        outputs["out_scores"] = listed.masked_fill(token < 0, -math.inf)
    return outputs
