"""The measured records that ship: each fits its GPU and renders today to the source that was measured."""

from __future__ import annotations

import pytest

from dsa_codegen import ops, paths
from dsa_codegen.gpu import GPUS
from dsa_codegen.kernels.render import render, template_name, template_sha
from dsa_codegen.problem.values import contains
from dsa_codegen.records import files as records
from dsa_codegen.records import lookup
from dsa_codegen.records.record import MEASURED

import support

EVERYTHING = [record for name in ops.all_ops() for record in records.read_all(paths.shipped_records(), name)]
SHIPPED = [record for record in EVERYTHING if record.evidence == MEASURED]  # tuning without a GPU adds modelled ones


def name(record) -> str:
    low = "-".join(str(bounds[1]) for bounds in record.bucket)
    return f"{record.gpu.id}-{record.op}-{record.backend}-{'-'.join(map(str, record.spec.values()))}-{low}"


UNMEASURED = {"h100": support.UNMEASURED_H100, "h200": support.UNMEASURED}
"""By GPU. Where the templates have changed since a GPU was measured, what serves there is borrowed."""
_CUDA = ("select", "attention", "attention_dense", "attention_paged")
SERVES = {**dict.fromkeys((*_CUDA, "indexer"), "cuda"), "indexer_paged": "gluon"}
"""The backend that wins an operation's first workload with a record on an H200; Triton elsewhere."""
MEASURED_OF = {"attention_gqa": "minimax-m3"}
"""The model whose first spec has a record, where it is not DeepSeek-V3.2."""


@pytest.mark.parametrize("gpu", UNMEASURED)
def test_there_are_records_for_hopper(gpu):
    assert {record.op for record in SHIPPED if record.gpu.id == gpu} == set(ops.all_ops()) - UNMEASURED[gpu]


@pytest.mark.parametrize("name", sorted(UNMEASURED["h100"] - UNMEASURED["h200"]))
def test_what_is_not_measured_on_a_gpu_is_borrowed_from_the_other(name):
    """The fastest config of the other's records serves, not a default."""
    op = ops.get(name)
    spec = support.of_preset(op, MEASURED_OF.get(name, "deepseek-v3.2"))[0]
    buckets = {record.bucket for record in SHIPPED if record.op == name and op.spec_type.from_dict(record.spec) == spec}
    all_sizes = [case.sizes for case in op.workloads(spec)]
    sizes = next((sizes for sizes in all_sizes if sizes.bucket() in buckets), all_sizes[0])  # the first, where a kin's serves
    found = lookup.lookup(op, spec, sizes, GPUS["h100"])
    assert (found.origin, found.config.backend) == ("borrowed", SERVES.get(name, "triton"))
    assert found.record is not None
    assert found.record.gpu.id == "h200"


@pytest.mark.parametrize("record", SHIPPED, ids=name)
def test_a_shipped_record_holds(record):
    """Over all that it states, but blocks that take a row each: of their range a lookup leaves to others what would idle."""
    op = ops.get(record.op)
    spec, config = op.spec_type.from_dict(record.spec), record.config_for(op)
    bucket = op.sizes_type.from_dict(record.sizes).bucket()
    assert record.policy is not None
    assert record.accuracy is not None
    assert record.time_us.n >= 3
    assert contains(record.bucket, bucket)
    assert not op.violations(spec, config, GPUS[record.gpu.id], bucket)
    beyond = op.violations(spec, config, GPUS[record.gpu.id], record.bucket)
    assert [violation.name for violation in beyond] in ([], ["per cent of waves left idle"])
    assert record.template == template_sha(template_name(op, record.backend)), "the template changed: tune again"
    measured = render(op, spec, config, record.toolchain.get("triton", ""))
    assert record.source_sha == measured.sha, "the source changed: tune again"


@pytest.mark.parametrize("record", SHIPPED, ids=name)
def test_what_serves_is_no_slower_than_the_default(record):
    """Against the default that was timed beside it: minutes later a card has other clocks."""
    op = ops.get(record.op)
    spec, sizes = op.spec_type.from_dict(record.spec), op.sizes_type.from_dict(record.sizes)
    serving = lookup.lookup(op, spec, sizes, GPUS[record.gpu.id]).record
    if serving is not None and serving.default_time_us is not None:
        assert serving.time_us.median <= serving.default_time_us * 1.02
