"""How far each design of token selection reaches: what its registers, its bitmap and its shared memory hold."""

from __future__ import annotations

import pytest

from dsa_codegen.command import verification
from dsa_codegen.errors import NoConfig
from dsa_codegen.gpu import resolve
from dsa_codegen.ops.select import OP, SelectSizes, SelectSpec
from dsa_codegen.problem import presets

from select_configs import CUDA, FAR, PLAIN, ROW, STREAMED
from support import H200


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"threads": 1024, "items": 64}, "scores of a block"),
        ({"threads": 256, "cluster": 16}, "warps for the cluster's bins"),
        ({"persistent": True, "early": False, "cluster": 2}, "blocks that stay for a row"),
        ({"persistent": True}, "scores loaded before their window"),
        ({"threads": 1024, "items": 8, "blocks_per_sm": 3}, "threads per SM"),
        ({"items": 32, "blocks_per_sm": 3}, "registers"),
        ({"threads": 1024, "items": 32, "persistent": True, "early": False, "blocks_per_sm": 2}, "smem per SM"),
        ({"stages": 2}, "scores loaded before their window"),
        ({"stages": 2, "early": False, "persistent": True, "cluster": 2}, "blocks that stay for a row"),
        ({"stages": 4, "early": False, "items": 32, "persistent": True, "longest": FAR}, "columns of a row whose block stays"),
        ({"stages": 2, "early": False, "threads": 256}, "threads for a sample"),
        ({"stages": 2, "early": False, "items": 64}, "scores of a thread"),
        ({"stages": 2, "early": False, "items": 4}, "bitmap"),
        ({"stages": 6, "early": False, "threads": 1024}, "smem"),
        ({"stages": 4, "early": False, "threads": 512, "blocks_per_sm": 2, "items": 16}, "smem per SM"),
        ({"stages": 2, "early": False, "items": 16, "longest": FAR}, "bitmap"),
        ({"longest": FAR}, "columns of a row that does not stream"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_cuda_constraints(changes, name):
    assert not OP.violations(SelectSpec(2048), CUDA, H200)
    assert name in {violation.name for violation in OP.violations(SelectSpec(2048), CUDA.replace(**changes), H200)}


def test_cuda_is_for_hopper():
    for name in ("a100", "b200"):
        assert "capability" in {violation.name for violation in OP.violations(PLAIN, CUDA, resolve(name))}
        assert OP.default_config(PLAIN, SelectSizes(1, 8192), resolve(name)).backend != "cuda"


@pytest.mark.parametrize(
    ("sizes", "broken"),
    [
        (SelectSizes(1, 1), []),
        (SelectSizes(256, 8192), []),
        (SelectSizes(257, 8192), ["rows read whole"]),
        (SelectSizes(1, 8193), ["columns"]),
        (SelectSizes(1, 131073), ["columns"]),
    ],
    ids=lambda value: getattr(value, "id", ""),
)
def test_cuda_reaches_as_far_as_its_registers(sizes, broken):
    found = OP.violations(PLAIN, CUDA, H200, sizes.bucket())
    assert [violation.name for violation in found] == broken


def test_rows_that_stream_may_be_as_long_as_their_bitmap():
    assert not OP.violations(PLAIN, STREAMED, H200, SelectSizes(4096, 131072).bucket())
    found = OP.violations(PLAIN, STREAMED, H200, SelectSizes(1, 131073).bucket())
    assert [violation.name for violation in found] == ["columns"]
    far = STREAMED.replace(items=32, longest=FAR)
    assert not OP.violations(PLAIN, far, H200, SelectSizes(4096, FAR).bucket())
    found = OP.violations(PLAIN, far, H200, SelectSizes(1, FAR + 1).bucket())
    assert [violation.name for violation in found] == ["columns"]


def test_a_record_from_before_rows_streamed_is_read():
    older = {name: value for name, value in CUDA.to_dict().items() if name not in ("stages", "longest")}
    assert OP.config("cuda", older) == CUDA


def test_rows_longer_than_any_cluster_holds_are_sampled():
    for rows, columns in ((1, 131073), (64, FAR + 1), (4096, FAR + 1)):
        assert OP.default_config(PLAIN, SelectSizes(rows, columns), H200).backend == "tilelang"
    for rows, cluster in ((2, 8), (16, 4), (17, 2), (4096, 1)):
        config = OP.default_config(PLAIN, SelectSizes(rows, 131073), H200)
        assert (config["longest"], config["cluster"]) == (FAR, cluster)
    with pytest.raises(NoConfig, match=r"select \(cuda\) fits NVIDIA H200"):
        OP.default_config(PLAIN, SelectSizes(1, FAR + 1), H200, "cuda")


def test_cases_are_cut_to_what_a_config_reaches():
    spec = SelectSpec(2048)
    longest = {case.sizes.columns for case in OP.cases_for(spec, CUDA)}
    every = [*OP.cases(spec), *OP.long_cases(spec)]
    assert max(longest) == 8192 < max(case.sizes.columns for case in every)
    assert {case.distribution for case in OP.cases_for(spec, CUDA)} == {case.distribution for case in every}
    assert OP.cases_for(spec, ROW) == every
    wide = CUDA.replace(cluster=16, threads=1024, items=8)
    assert max(case.sizes.columns for case in OP.cases_for(spec, wide)) == 131072  # a part for each of its blocks


def test_verification_covers_blocks_and_clusters_under_every_option():
    model = presets.preset("deepseek-v3.2")
    found = [each for each in verification.subjects(model, H200, ["select"]) if each.config.backend == "cuda"]
    for spec in {option for own in OP.specs(model) for option in OP.options(own)}:
        clusters = {each.config["cluster"] > 1 for each in found if each.spec == spec}
        assert clusters == {False, True}, spec
    assert any(each.config["persistent"] for each in found)
