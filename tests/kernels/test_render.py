"""Rendering: byte-stable, golden texts, strict about names, one text for configs that differ in the launch only."""

from __future__ import annotations

import ast
import dataclasses
import os
from pathlib import Path

import jinja2
import pytest

from dsa_codegen import ops
from dsa_codegen.kernels import render
from dsa_codegen.ops.indexer import OP as INDEXER
from dsa_codegen.ops.indexer import IndexerSpec
from dsa_codegen.ops.indexer.halves import CONFIG as HALVES
from dsa_codegen.problem.op import Config

from support import H200, of_preset

GOLDEN = Path(__file__).parent / "golden"
CONFIG = Config.of("triton", block_q=2, block_n=64, num_warps=4, num_stages=2, splits=2)
CASES = [
    ("indexer_plain", INDEXER, IndexerSpec(8, 64), CONFIG),
    ("indexer_bias_clean", INDEXER, IndexerSpec(16, 32, score="relu_bias", clean=True), CONFIG),
    ("indexer_halves", INDEXER, IndexerSpec(64, 128, clean=True), HALVES),
]


@pytest.mark.parametrize(("name", "op", "spec", "config"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_golden(name, op, spec, config):
    """``DSA_GOLDEN=write python -m pytest tests/kernels/test_render.py`` renews the texts after a template's change."""
    path = GOLDEN / f"{name}.py"
    text = render.render(op, spec, config).text
    if os.environ.get("DSA_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def everything():
    for op in ops.all_ops().values():
        for spec in of_preset(op, "deepseek-v3.2"):
            for backend in op.backends:
                yield pytest.param(op, spec, op.seed_config(spec, backend, H200), id=f"{op.name}-{spec.id}-{backend}")


@pytest.mark.parametrize(("op", "spec", "config"), list(everything()))
def test_every_template_renders_stable_valid_python(op, spec, config):
    first, second = render.render(op, spec, config), render.render(op, spec, config)
    assert first.text == second.text
    module = ast.parse(first.text)
    assert ast.get_docstring(module).startswith(op.summary)
    assert first.module_name.isidentifier()


# What Gluon calls a thing, by the first version of Triton that does.
NAMES = [
    ("gl.thread_barrier(", (3, 7), "gl.barrier("),
    ("._reinterpret(", (3, 9), ".reinterpret("),
    ("tma.async_copy_global_to_shared(", (3, 9), "tma.async_load("),
]
TRITONS = ["3.6.0", "3.7.1", "3.8.0", "3.9.0", "3.10.0+git1a2b3c"]


def gluon():
    for param in everything():
        if param.values[2].backend == "gluon":
            yield param


@pytest.mark.parametrize("version", TRITONS)
@pytest.mark.parametrize(("op", "spec", "config"), list(gluon()))
def test_gluon_has_the_names_of_the_version_that_is_asked_for(op, spec, config, version):
    text = render.render(op, spec, config, version).text
    for name, renamed, other in NAMES:
        absent = name if render.release(version) >= renamed else other
        assert absent not in text
        text = text.replace(other, name)
    assert text == render.render(op, spec, config, "3.6.0").text, "nothing but names differs"


@pytest.mark.parametrize(("op", "spec", "config"), list(everything()))
def test_other_languages_have_one_text_for_all_versions(op, spec, config):
    texts = {render.render(op, spec, config, version).text for version in TRITONS}
    assert len(texts) == 1 or config.backend == "gluon"


def test_the_text_is_for_the_installed_version_by_default():
    op, spec, config = next(gluon()).values
    assert render.render(op, spec, config) == render.render(op, spec, config, render.installed_triton())


def test_launch_only_parameters_do_not_reach_the_text():
    spec = IndexerSpec(8, 64)
    one, two = (render.render(INDEXER, spec, CONFIG.replace(splits=splits)) for splits in (1, 8))
    assert one.text == two.text
    assert one.sha != render.render(INDEXER, spec, CONFIG.replace(block_n=128)).sha


def test_a_name_that_nothing_gives_is_an_error(monkeypatch):
    monkeypatch.setattr(type(INDEXER), "derived", lambda self, spec, config: {})
    with pytest.raises(jinja2.UndefinedError, match="heads_padded"):
        render.render(INDEXER, IndexerSpec(8, 64), CONFIG)


def test_specs_are_hashable_values():
    spec = IndexerSpec(8, 64)
    assert {spec: 1}[dataclasses.replace(spec)] == 1
    assert IndexerSpec.from_dict(spec.to_dict()) == spec
