"""The ranking without a GPU: what is shipped is what the sweeps say, one of its ten best is nearly the best."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from dsa_codegen import ops
from dsa_codegen.gpu import GPUS
from dsa_codegen.kernels.anatomy import Anatomy, Dissected
from dsa_codegen.kernels.backends import Resources
from dsa_codegen.kernels.build import Built
from dsa_codegen.problem.op import Launch
from dsa_codegen.problem.presets import preset
from dsa_codegen.tune import model, ranking, sweep
from dsa_codegen.tune.space import Space

from support import H200

FILES = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "sweeps").glob("*.json"))
WITHIN = 1.10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_shipped_is_fitted_to_the_sweeps_and_ranks_them(path):
    swept = sweep.read(path)
    found = ranking.calibrate(swept)
    shipped = ranking.calibrations()[f"{swept.op.name}.{swept.backend}"]
    assert shipped.weights == pytest.approx(found.weights, abs=1e-4)
    assert (shipped.level, shipped.gpu) == (pytest.approx(found.level, abs=1e-4), swept.gpu.id)
    assert shipped.correlation == pytest.approx(found.correlation, abs=1e-3)
    assert all(correlation > 0.5 for correlation in found.correlation.values())
    assert all(top <= WITHIN for top in found.top.values()), "of configs that were left out of the fit"


def test_how_far_a_ranking_may_be_trusted_is_said():
    known, unknown = ranking.trust(["select.cuda", "attention.triton", "select.cuda", "indexer.gluon"])
    assert known.startswith("select.cuda is ranked by its machine code") and known.endswith(
        "with a sweep on h200: 0.93 to 0.98"
    )
    assert unknown.endswith("no sweep has judged: attention.triton, indexer.gluon")


def test_the_calibration_is_better_than_the_model():
    swept = sweep.read(next(path for path in FILES if path.stem == "select-cuda-h200"))
    case = swept.cases[0]
    took = [case.time_us(number) for number in range(len(swept.entries))]
    modelled = [
        model.modelled_us(
            swept.op, swept.spec, swept.today(entry.config), case.case, H200, swept.sources[entry.source].resources
        )
        for entry in swept.entries
    ]
    assert ranking.spearman(np.array(modelled), np.array(took)) < 0.3 < 0.9 < ranking.calibrate(swept).correlation[case.case.id]


def built_of(op, anatomies):
    """A default of an operation with a build that was never made."""
    spec = op.specs(preset("deepseek-v3.2"))[-1]
    case = op.workloads(spec)[0]
    config = op.default_config(spec, case.sizes, H200, "cuda" if "cuda" in op.backends else "")
    rendered = Space(op, spec, config.backend, H200).candidate(config).rendered
    name = "select_row" if op.name == "select" else op.name
    usage = {name: Resources(64, 0, 40000, 512)}
    kind = Dissected if anatomies else Built
    built = kind(rendered, H200, Path(), usage, **({"anatomies": {name: anatomies}} if anatomies else {}))
    return op, spec, config, case, H200, built


SMALL, LARGE = (Anatomy(({"integer": count}, {"shared": count}, {}, {}), 3) for count in (100, 4000))


def test_instructions_count_where_a_sweep_has_shown_how_much():
    select = ops.get("select")
    times = [ranking.estimate_us(*built_of(select, each)) for each in (SMALL, LARGE, None)]
    assert times[0] != times[1] and all(0 < each < math.inf for each in times)
    assert times[2] == model.modelled_us(*built_of(select, None)[:5], built_of(select, None)[5].resources)


def test_other_templates_are_judged_by_the_model():
    quantize = ops.get("quantize")
    name = next(iter(built_of(quantize, SMALL)[5].resources))
    launches = model.plan(*built_of(quantize, SMALL)[:5])
    arguments = list(built_of(quantize, SMALL))
    arguments[5] = dataclasses.replace(arguments[5], resources={each.kernel: arguments[5].resources[name] for each in launches})
    assert ranking.estimate_us(*arguments) == model.modelled_us(*arguments[:5], arguments[5].resources)


def test_the_launch_with_the_most_threads_is_looked_at():
    usages = {"small": Resources(32, 0, 0, 128), "large": Resources(128, 8, 1024, 256)}
    mixes = dict.fromkeys(usages, SMALL.mix)
    launches = [Launch("small", (10, 1, 1), ()), Launch("large", (1000, 1, 1), ())]
    values = dict(zip(ranking.FEATURES, ranking.features(launches, usages, mixes, GPUS["h200"]), strict=True))
    assert values["registers"] == math.log(128) and values["spills"] == math.log(9)
    assert values["blocks"] == math.log(1000) and values["waves"] == math.log(4) and values["resident"] == math.log(2)
