"""The measured records that ship: each fits its GPU and renders today to the source that was measured."""

from __future__ import annotations

import pytest

from dsa_codegen import ops, paths
from dsa_codegen.gpu import GPUS
from dsa_codegen.kernels.render import render, template_name, template_sha
from dsa_codegen.problem import presets
from dsa_codegen.records import files as records
from dsa_codegen.records import lookup
from dsa_codegen.records.record import MEASURED

EVERYTHING = [record for name in ops.all_ops() for record in records.read_all(paths.shipped_records(), name)]
SHIPPED = [record for record in EVERYTHING if record.evidence == MEASURED]  # tuning without a GPU adds modelled ones


def name(record) -> str:
    low = "-".join(str(bounds[1]) for bounds in record.bucket)
    return f"{record.gpu.id}-{record.op}-{record.backend}-{'-'.join(map(str, record.spec.values()))}-{low}"


UNMEASURED = {"h100": set(), "h200": {"attention_paged", "indexer_paged", "select"}}  # changed since measured there: borrowed


@pytest.mark.parametrize("gpu", UNMEASURED)
def test_there_are_records_for_hopper(gpu):
    assert {record.op for record in SHIPPED if record.gpu.id == gpu} == set(ops.all_ops()) - UNMEASURED[gpu]


@pytest.mark.parametrize("name", sorted(UNMEASURED["h200"]))
def test_what_is_not_measured_on_a_gpu_is_borrowed_from_the_other(name):
    """The fastest config of the other's records serves, not a default."""
    op = ops.get(name)
    spec = op.specs(presets.preset("deepseek-v3.2"))[0]
    found = lookup.lookup(op, spec, op.workloads(spec)[0].sizes, GPUS["h200"])
    backend = {"select": "tilelang"}.get(name, "gluon")
    assert (found.origin, found.config.backend, found.record.gpu.id) == ("borrowed", backend, "h100")


@pytest.mark.parametrize("record", SHIPPED, ids=name)
def test_a_shipped_record_holds(record):
    op = ops.get(record.op)
    spec, config = op.spec_type.from_dict(record.spec), record.config_for(op)
    assert record.policy is not None
    assert record.accuracy is not None
    assert record.time_us.n >= 3
    assert not op.violations(spec, config, GPUS[record.gpu.id], record.bucket)
    assert record.template == template_sha(template_name(op, record.backend)), "the template changed: tune again"
    measured = render(op, spec, config, record.toolchain.get("triton", ""))
    assert record.source_sha == measured.sha, "the source changed: tune again"


@pytest.mark.parametrize("record", SHIPPED, ids=name)
def test_a_shipped_record_is_no_slower_than_the_default(record):
    fastest = min(
        r.time_us.median
        for r in SHIPPED
        if (r.gpu, r.op, r.spec, r.bucket) == (record.gpu, record.op, record.spec, record.bucket)
    )
    assert record.default_time_us is None or fastest <= record.default_time_us * 1.02
