"""Listing: a record that serves any part of its bucket is said to serve."""

from __future__ import annotations

import pytest
from test_records import CASE, CONFIG, make

from dsa_codegen.ops.indexer import IndexerSizes
from dsa_codegen.problem.op import Case
from dsa_codegen.records import files as records
from dsa_codegen.records import listing as room

from toy import OP

WIDE = (("queries", 1025, None), ("context", 0, None))
SHORT = Case(IndexerSizes(4096, 8192), "causal")


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """What is said of the records that are put in a folder: (bucket, status, why)."""
    monkeypatch.setattr(room, "all_ops", lambda: {OP.name: OP})

    def put(*found):
        records.merge(tmp_path, found)
        return [(each.record.bucket, each.status, each.why) for each in room.listing("", {"tuned": tmp_path})]

    return put


def test_a_wide_record_serves_what_no_tighter_one_does(listed):
    wide, tight = make(bucket=WIDE, time_us=2000.0), make(CONFIG.replace(block_q=2))
    assert {bucket: status for bucket, status, _ in listed(wide, tight)} == {WIDE: "serves", CASE.sizes.bucket(): "serves"}
    shown = {bucket: (status, why) for bucket, status, why in listed(make(CONFIG.replace(block_q=2), case=SHORT))}
    assert shown[WIDE][0] == "shadowed" and shown[WIDE][1].startswith("by ")
    assert shown[SHORT.sizes.bucket()] == shown[CASE.sizes.bucket()] == ("serves", "")
