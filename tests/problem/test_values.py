"""Buckets: which holds which sizes, which contains which, how wide one is."""

from __future__ import annotations

import math

import pytest

from dsa_codegen.ops.select import SelectSizes
from dsa_codegen.problem.values import contains, holds, octaves, upper

BUCKET = (("rows", 17, 65), ("columns", 8193, None))


def test_a_bucket_holds_the_sizes_that_map_to_it():
    for rows in (0, 1, 2, 8, 9, 16, 17, 256, 257, 4096):
        for columns in (0, 8192, 8193, 131072, 131073, 1 << 30):
            sizes = SelectSizes(rows, columns)
            assert holds(sizes.bucket(), sizes.to_dict()) and holds(sizes.point(), sizes.to_dict())
            assert contains(sizes.bucket(), sizes.point())
    assert not holds(SelectSizes(1, 8192).bucket(), {"rows": 1, "columns": 8193})
    assert not holds(SelectSizes(1, 8192).bucket(), {"columns": 8192})


@pytest.mark.parametrize(
    ("inner", "outcome"),
    [
        (BUCKET, True),
        ((("columns", 8193, None), ("rows", 17, 65)), True),
        ((("rows", 17, 33), ("columns", 16385, 32769)), True),
        ((("rows", 16, 65), ("columns", 8193, None)), False),
        ((("rows", 17, 66), ("columns", 8193, None)), False),
        ((("rows", 17, None), ("columns", 8193, None)), False),
        ((("rows", 17, 65),), False),
    ],
    ids=["itself", "reordered", "part", "lower", "higher", "unbounded", "unstated"],
)
def test_containment(inner, outcome):
    assert contains(BUCKET, inner) is outcome


def test_a_field_that_is_not_stated_may_have_any_value():
    assert contains((("rows", 17, 65),), BUCKET)
    assert contains((), BUCKET)


def test_width_in_octaves():
    assert octaves((("rows", 16, 64), ("columns", 0, 8))) == 5
    assert octaves((("rows", 0, None),)) == 31


def test_upper_bound():
    assert upper(BUCKET, "rows") == 64
    assert upper(BUCKET, "columns") == upper(BUCKET, "batch") == math.inf
