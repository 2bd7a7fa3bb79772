"""Configs pinned by hand come before everything, and say so when they cannot be."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from dsa_codegen import ops
from dsa_codegen.command import doctor, show
from dsa_codegen.errors import OverrideError
from dsa_codegen.gpu import resolve
from dsa_codegen.ops.quantize import QuantizeSizes, QuantizeSpec
from dsa_codegen.records import overrides
from dsa_codegen.records.default import default_of, default_sha
from dsa_codegen.records.explain import explain
from dsa_codegen.runtime import dispatch

H100 = resolve("H100")
OP = ops.get("quantize")
SPEC, OTHER = QuantizeSpec(128, 1), QuantizeSpec(64, 1)
FEW, MANY = QuantizeSizes(16), QuantizeSizes(4096)
CONFIG = {"block_t": 2, "num_warps": 4}
ENTRY = {"op": "quantize", "backend": "triton", "config": CONFIG}


@pytest.fixture
def pin(tmp_path, monkeypatch):
    def write(content):
        path = tmp_path / "overrides.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        monkeypatch.setenv("DSA_OVERRIDES", str(path))
        dispatch.reset()

    yield write
    monkeypatch.delenv("DSA_OVERRIDES", raising=False)
    dispatch.reset()


def chosen(spec=SPEC, sizes=FEW):
    return dispatch.chosen(OP, spec, sizes, H100)


def test_the_first_entry_that_matches_serves(pin):
    pin([{**ENTRY, "spec": {"width": 64}}, {**ENTRY, "config": {"block_t": 4, "num_warps": 4}}])
    assert (chosen().origin, chosen().config.to_dict()) == ("override", {"block_t": 4, "num_warps": 4})
    assert chosen(OTHER).config.to_dict() == CONFIG


def test_stats_and_explain_say_so(pin, monkeypatch):
    """A call on a GPU that is not here, whose kernel is not built: what counts is where its config comes from."""
    pin([ENTRY])
    text = io.StringIO()
    show.explanation(OP, FEW, H100, [(SPEC, chosen(), explain(OP, SPEC, FEW, H100))])(Console(file=text, width=200))
    assert "override" in text.getvalue()
    loaded = []
    monkeypatch.setattr(dispatch.gpus, "detect", lambda device: H100)
    monkeypatch.setattr(dispatch.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(dispatch, "_built", lambda *args: loaded.append(args[4]) or SimpleNamespace(rehearse=str))
    monkeypatch.setattr(dispatch.compiled, "module", lambda: None)
    dispatch._first_call(OP, SPEC, FEW, (OP.name, SPEC, FEW.bucket(), 0))
    assert loaded[0].to_dict() == CONFIG
    assert dispatch.stats()["quantize: override"] == 1


def test_what_no_entry_means_is_served_by_records(pin):
    pin([{**ENTRY, "spec": {"width": 128}, "sizes": {"tokens": [0, 600]}}])
    assert (chosen().origin, chosen(sizes=MANY).origin, chosen(OTHER).origin) == ("override", "tuned", "default")
    pin([{**ENTRY, "sizes": {"tokens": [0, 100]}}])  # a bucket is served whole or not at all
    assert chosen().origin == "tuned"
    pin([{**ENTRY, "sizes": {"tokens": [0, None]}}])
    assert chosen(sizes=MANY).origin == "override"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- {", "cannot be read"),
        ("op: quantize", "is no list of entries"),
        ([{"op": "quantize"}], "entry 1: needs op, backend, config"),
        ([{**ENTRY, "ops": 1}], "entry 1: needs op, backend, config"),
        ([ENTRY, {**ENTRY, "op": "quantise"}], "entry 2: unknown operation 'quantise'"),
        ([{**ENTRY, "backend": "cuda"}], "entry 1: unknown backend of quantize 'cuda'"),
        ([{**ENTRY, "config": {**CONFIG, "block_t": 3}}], r"entry 1: quantize\.triton\.block_t = 3"),
        ([{**ENTRY, "config": 7}], "entry 1: "),
        ([{**ENTRY, "spec": {"heads_": 1}}], r"entry 1: spec\.heads_ is no field; the fields are width"),
        ([{**ENTRY, "sizes": {"tokens": 5}}], r"entry 1: sizes\.tokens = 5; expected \[lowest, highest\]"),
    ],
    ids=["yaml", "mapping", "lacking", "unknown", "op", "backend", "value", "config", "field", "range"],
)
def test_a_file_that_pins_what_cannot_be_is_an_error(pin, content, words):
    pin(content)
    with pytest.raises(OverrideError, match=words):
        chosen()
    (found,) = [each for each in doctor.diagnose() if each.what == "configs by hand"]
    assert not found.ok and "unset DSA_OVERRIDES" in found.remedy


def test_a_config_that_breaks_a_limit_is_an_error(pin, monkeypatch):
    pin([ENTRY])
    violation = type("Violation", (), {"reason": "too many values a thread"})()
    monkeypatch.setattr(type(OP), "violations", lambda *args: [violation])
    with pytest.raises(OverrideError, match="entry 1: too many values a thread"):
        chosen()


def test_without_a_file_nothing_is_pinned(monkeypatch):
    monkeypatch.delenv("DSA_OVERRIDES", raising=False)
    assert overrides.find(OP, SPEC, FEW.bucket(), H100) is None


def test_explain_says_by_how_much_the_runner_up_lost():
    found = chosen()
    record = found.record
    assert record is not None and record.runners_up
    text = io.StringIO()
    show.explanation(OP, FEW, H100, [(SPEC, found, explain(OP, SPEC, FEW, H100))])(Console(file=text, width=200))
    behind = 100 * (record.runners_up[0].time_us / record.time_us.median - 1)
    assert f"runner-up {behind:.1f} % behind" in text.getvalue()


@pytest.mark.parametrize("known", [True, False])
def test_explain_says_whether_the_default_is_still_one(known):
    found = chosen()
    assert found.record is not None
    sizes = OP.sizes_type.from_dict(found.record.sizes)
    sha = default_sha(OP, SPEC, default_of(OP, SPEC, sizes, H100)) if known else "0" * 64
    found = replace(found, record=replace(found.record, default_sha=sha))
    text = io.StringIO()
    show.explanation(OP, FEW, H100, [(SPEC, found, explain(OP, SPEC, FEW, H100))])(Console(file=text, width=200))
    assert ("the default then" in text.getvalue()) is not known
    assert " behind" in text.getvalue()
