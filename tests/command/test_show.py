"""What people read on a console of 80 columns: no line is longer, nothing is said twice, and commands can be copied."""

from __future__ import annotations

import io

from rich.console import Console

from dsa_codegen import ops
from dsa_codegen.command import show
from dsa_codegen.command.doctor import Finding
from dsa_codegen.gpu import resolve
from dsa_codegen.records.lookup import Found

from toy import OP
from tune_support import CASE, SPEC

REMEDY = "kernels run on their CPU reference here; name a GPU to compile for one"


def printed(printer: show.Printer) -> list[str]:
    printer(Console(file=(text := io.StringIO()), width=80))
    return [line.rstrip() for line in text.getvalue().splitlines()]


def test_a_remedy_stands_below_what_is_amiss_alone():
    shown = printed(show.findings([Finding("GPU", "none", False, REMEDY), Finding("cuda", "nvcc 13.0", True, "unsaid")]))
    assert shown[0].split() == ["amiss", "GPU", "none"] and shown[-1].split() == ["ok", "cuda", "nvcc", "13.0"]
    assert " ".join(" ".join(shown[1:-1]).split()) == REMEDY
    assert all(len(line) <= 80 for line in shown)


def test_an_explanation_says_each_thing_once_and_goes_on_below_itself():
    gpu, note = resolve("H100"), "indexer.triton of h100 (measured) passed over: " + "slower, " * 9
    found = Found(OP.default_config(SPEC, CASE.sizes, gpu), "default", notes=(note, note))
    shown = printed(show.explanation(OP, CASE.sizes, gpu, [(SPEC, found, [])]))
    assert " ".join(shown).count("passed over") == 1
    assert shown[0].startswith("indexer heads=") and all(line.startswith("  ") and len(line) <= 80 for line in shown[1:])


def test_templates_that_cannot_serve_a_spec_are_named_with_what_keeps_them():
    """The reason that no choice of parameters would change, where a spec is served untuned."""
    attention, gpu = ops.get("attention"), resolve("H100")
    spec = attention.spec_type(64, 448, 256, d_v=336)
    size = attention.workloads(spec)[0].sizes
    found = Found(attention.default_config(spec, size, gpu), "default")
    shown = " ".join(" ".join(printed(show.explanation(attention, size, gpu, [(spec, found, [])]))).split())
    for backend in ("cuda", "tilelang"):
        assert f"not served by {backend}: channels: 448 of 336 are served by the Triton template" in shown
    assert "not served by triton" not in shown


def test_a_command_is_not_broken():
    line = f"Tune it: {show.command()} tune --gpu h200 " + "--op attention_paged " * 4
    assert printed(show.lines(line)) == [line.rstrip()]
