"""Every operation is found by the name of its folder, and no other is."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from dsa_codegen import ops
from dsa_codegen.errors import UnknownName

FOLDERS = sorted(path.parent.name for path in Path(ops.__file__).parent.glob("*/__init__.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_operation_is_called_as_its_folder(folder):
    op = ops.get(folder)
    assert op is importlib.import_module(f"dsa_codegen.ops.{folder}").OP
    assert op.name == folder


def test_all_are_listed_and_no_others():
    assert list(ops.all_ops()) == FOLDERS
    with pytest.raises(UnknownName, match="indexer_paged"):
        ops.get("softmax")
