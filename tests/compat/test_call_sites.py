"""Every call site that docs/engines.md lists binds to the drop-in's signature, and every function is called by some engine."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs/engines.md").read_text()
SECTION = re.compile(r"^### `(\w+)`\n(.*?)(?=^###|\Z)", re.DOTALL | re.MULTILINE)
ROW = re.compile(r"^\| `(\S+?)`.*? \| `(\w+)` \| (?:`(.*?)` )?\| ", re.MULTILINE)
SITES = [(module, *row) for module, text in SECTION.findall(PAGE.partition("## Call sites")[2]) for row in ROW.findall(text)]


def drop_in(module, function):
    return getattr(importlib.import_module(f"dsa_codegen.compat.{module}"), function)


def test_all_rows_of_the_tables_are_read():
    tables = PAGE.partition("## Call sites")[2]
    assert len(SITES) == sum(line.startswith("| `") for line in tables.splitlines())
    assert {file.partition("/")[0] for _, file, _, _ in SITES} == {"sglang", "vllm"}


@pytest.mark.parametrize(("module", "file", "function", "arguments"), SITES)
def test_a_call_binds(module, file, function, arguments):
    names = arguments.split(", ") if arguments else []
    positional = [name for name in names if not name.endswith("=")]
    keywords = {name[:-1]: None for name in names if name.endswith("=")}
    assert len(positional) + len(keywords) == len(names)
    inspect.signature(drop_in(module, function)).bind(*positional, **keywords)


def test_every_function_that_the_page_names_is_there_and_called():
    named = re.findall(r"^\| `compat/(\w+)\.py` \| .*? \| (.*?) \|$", PAGE, re.MULTILINE)
    listed = {(module, function) for module, cell in named for function in re.findall(r"`(\w+)`", cell)}
    assert all(drop_in(*function) for function in listed)
    called = {(module, function) for module, _, function, _ in SITES}
    assert listed - called == {("flash_mla", "FlashMLASchedMeta")}
