"""What bounds a kernel: the cases have stages, and a profiler's page becomes a table."""

from __future__ import annotations

import csv

import pytest

from dsa_codegen.bench.problems import stage_of
from scripts import counters

MARKED = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
STALL = "smsp__pcsamp_warps_issue_stalled_"


@pytest.fixture
def raw(tmp_path):
    """Two kernels of ours and one of a peer, as ncu prints them: messages first, then names, units and values."""
    names = ["ID", MARKED, "gpu__time_duration.sum", "sm__cycles_elapsed.max", "dram__throughput" + counters._SHARE]
    names += [STALL + "wait", STALL + "barrier", STALL + "barrier_not_issued", STALL + "selected"]
    calls = [
        ("ours", ["2,500", "4000", "90", "5", "5", "9", "0"]),
        ("ours", ["12,345", "20000", "37.4", "30", "60", "70", "10"]),
        ("peer (padded)", ["20000", "40000", "n/a", "75", "25", "0", "0"]),
    ]
    rows = [[str(number), f"case|one-case|{who}:none:none", *values] for number, (who, values) in enumerate(calls)]
    file = tmp_path / "raw.csv"
    with file.open("w") as out:
        out.write("==PROF== Disconnected\n")
        csv.writer(out, quoting=csv.QUOTE_ALL).writerows([names, ["", "", "ns", "cycle", "%", "", "", "", ""], *rows])
    return file


def test_a_call_is_its_longest_kernel(raw):
    *_, line = counters.table([raw])
    case, us, clocks, *shares, waits = (each.strip() for each in line.strip("|").split("|"))
    assert (case, us, clocks) == ("one-case", "12.35 + 2.5 / 20", "20 at nan / 40 at nan")
    assert shares[-1] == "37 / nan"
    assert waits == "barrier 60, wait 30 / wait 75, barrier 25"


def test_every_case_is_one_of_the_benchmarks_stages():
    cases = counters.cases()
    assert len({each.id for each in cases}) == len(cases)
    for each in cases:
        assert stage_of(each.stage).parts(each)


def test_what_a_table_shows_is_counted():
    assert {name + counters._SHARE for name in counters.COLUMNS.values()} <= set(counters.METRICS)
