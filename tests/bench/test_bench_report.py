"""The report: one page that needs nothing else, the README's tables, the crossover; of made-up results."""

from __future__ import annotations

import re

import pytest
from optuna.trial import TrialState
from typer.testing import CliRunner

from dsa_codegen import cli
from dsa_codegen.bench import ceilings, command, hostcost, printing, report, results, sweep
from dsa_codegen.bench.cases import FP8_PRODUCTS, case, chosen
from dsa_codegen.bench.problems import Roofs
from dsa_codegen.bench.report import bars, control, labels, tables, theme
from dsa_codegen.errors import RecordError, UnknownName
from dsa_codegen.gpu import resolve
from dsa_codegen.proof.timing import Policy
from dsa_codegen.tune.history import histories
from dsa_codegen.tune.journal import Journal
from dsa_codegen.tune.study import FILES

import bench_fakes
from bench_support import SMALL, made_up_folder, made_up_histories, made_up_machine, made_up_rows, row

H200 = resolve("H200")
QUICK = Policy(cold_l2=False, reps=2, rounds=3, warmup_ms=0)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of made-up results."""
    folder = made_up_folder(tmp_path_factory.mktemp("benchmarks"))
    return report.write(folder, folder / "report.html", {"h200": made_up_histories()}).read_text()


def test_the_page_needs_no_network(page):
    assert len(page) < 2_000_000
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page)
    assert not re.findall(r"@import|url\((?!#)", page)


def test_the_page_has_every_stage_and_curve(page):
    for title in (
        *labels.TITLES.values(),
        "At a glance",
        "Roofline",
        "Time and memory over the context",
        "Tuning",
        "What mattered",
        "What a call costs the host",
    ):
        assert f"<h3>{title}</h3>" in page
    assert page.count("<svg role=") == len(labels.TITLES) + 5
    assert "abc1234" in page and "triton 3.6.0" in page
    assert "failed: made up" in page and "flashinfer is not installed" in page


def test_pictures_take_their_colours_from_the_page(page):
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--ours)" in pictures and "var(--ink)" in pictures
    assert not re.findall(r"(?:fill|stroke): #(?!ffffff)", pictures)
    identifiers = re.findall(r'\bid="([^"]+)"', pictures)
    assert len(set(identifiers)) == len(identifiers)


def test_the_page_is_the_same_every_time(page, tmp_path):
    again = report.write(made_up_folder(tmp_path), tmp_path / "again.html", {"h200": made_up_histories()}).read_text()
    assert again == page


def test_without_results_there_is_no_page(tmp_path):
    with pytest.raises(RecordError, match="bench --against all"):
        report.write(tmp_path, tmp_path / "report.html")


def test_the_readme_is_filled_between_its_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write", lambda folder, path, found: path)  # the page, 4 s each, is drawn in other tests
    folder, readme = made_up_folder(tmp_path / "benchmarks"), tmp_path / "README.md"
    readme.write_text(
        "# Title\n<!-- bench: summary -->\nold\n<!-- /bench -->\nbetween\n<!-- bench: select -->\n<!-- /bench -->\nend\n"
    )
    written = command.write_report(folder, tmp_path / "report.html", [readme], "h200", tmp_path / ".tune")
    assert written[1].endswith("summary, select rewritten")
    text = readme.read_text()
    assert "old" not in text and text.startswith("# Title\n") and text.endswith("<!-- /bench -->\nend\n")
    assert "| Selection |" in text and "64 rows of 32K, relu" in text
    assert command.write_report(folder, tmp_path / "report.html", [readme], "h200", tmp_path)[1].endswith("up to date")


def test_a_marker_of_no_table_is_an_error(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench: sumary -->\n<!-- /bench -->\n")
    with pytest.raises(UnknownName, match="sumary"):
        report.update(readme, {"summary": "x"})


def test_a_table_that_was_not_measured_leaves_its_place(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench: host -->\nearlier\n<!-- /bench -->\n")
    assert report.update(readme, {"host": ""}) == []
    assert "earlier" in readme.read_text()


def test_tables_say_who_was_the_best_and_what_is_missing():
    alone = row(SMALL, 5.0, {}, {"DeepGEMM": "does not serve 8 heads"})
    text = tables.stage([row(SMALL, 5.0, {"DeepGEMM": 6.0, "slow": 60.0}), alone], "indexer_prefill")
    assert "| 16 queries of 64, 8 heads, d 64 | 5.00 | DeepGEMM 6.00 |  | 1.20× |" in text
    assert "| DeepGEMM: does not serve 8 heads |  | – |" in text
    summary = tables.summary(made_up_rows())
    assert summary.count("\n") == 2 + len(labels.TITLES), "and all of them"


SELECT = case("select", "normal", {"rows": 1, "context": 8192, "k": 2048})
HEADLINE = case("select", "normal", {"rows": 1, "context": 65536, "k": 2048})


@pytest.mark.parametrize(
    ("ours", "peers", "standing"),
    [
        (10.0, {"a": 12.0, "b": 10.2}, labels.WON),
        (10.0, {"a": 10.09}, labels.EVEN),
        (10.0, {"a": 9.91}, labels.EVEN),
        (10.0, {"a": 30.0, "b": 5.0}, labels.LOST),
        (None, {"a": 5.0}, labels.LOST),
        (10.0, {}, None),
    ],
)
def test_a_case_is_won_even_or_lost_against_the_best(ours, peers, standing):
    assert labels.standing(row(SELECT, ours, peers)) == standing


def test_the_summary_counts_losses_too():
    rows = [row(SELECT, 8.2, {"SGLang topk_v2": 3.9}), row(HEADLINE, 8.0, {"SGLang topk_v2": 8.05, "fast_topk": 37.0})]
    assert "| Selection | 2 | 0 | 1 | 1 | 0.69× | 0.48 – 1.01 |" in tables.summary([*rows])
    rows.append(row(SMALL, 5.0, {"DeepGEMM": 6.0}))
    assert "| All | 3 | 1 | 1 | 1 |" in tables.summary(rows)


def test_a_sentence_says_when_of_what_and_how_it_ended():
    best = {"peer_facts": {"a": {"version": "sglang 0.5.23, sgl-deep-gemm 0.1"}, "b": {"version": "sglang 0.5.23"}}}
    rows = [{**row(SELECT, 8.0, {"a": 4.0}, date="2026-11-28T01:00:00Z"), **best}]
    said = "1 cases on one NVIDIA H100, 2026-11-28, at abc1234 beside sgl-deep-gemm 0.1, sglang 0.5.23: 0 won, 0 even, 1 lost."
    assert tables.measured(rows, "NVIDIA H100").startswith(said)
    earlier = {
        name: value
        for name, value in row(HEADLINE, 8.0, {"a": 9.0}, date="2026-11-26T01:00:00Z").items()
        if name != "peer_facts"
    }
    assert "2026-11-26 to 2026-11-28" in tables.measured([*rows, earlier], "H100")
    assert "1 of them were measured earlier, beside fewer peers." in tables.measured([*rows, earlier], "H100")


def test_cases_that_were_not_reached_are_counted():
    rows = made_up_rows()
    assert "no row yet" not in tables.measured(rows, "H200")
    assert tables.measured(rows[2:], "H200").endswith(" 2 cases of the list have no row yet.")


def test_a_glance_says_losses_as_plainly_as_wins():
    select = [row(HEADLINE, 8.0, {"fast_topk": 16.0}), row(SELECT, 8.0, {"SGLang topk_v2": 4.0})]
    assert tables.glance([*select, row(SMALL, 5.0, {"DeepGEMM": 6.0})], "H100").splitlines() == [
        "On one H100, the best library's time over ours, case by case:",
        "",
        "- **Faster in every case**: indexer, prefill 1.20× (one case).",
        "- **As many won as lost**: selection 0.50× – 2.00× (1 of 2 won).",
    ]
    lost = [row(HEADLINE, None, {"fast_topk": 16.0}), row(SELECT, 8.0, {"SGLang topk_v2": 4.0})]
    assert tables.glance(lost, "H100").endswith("\n- **Slower in every case**: selection 0.50× (2 cases).")
    assert tables.glance([row(HEADLINE, 8.0, {"PyTorch (unfused)": 800.0})], "H100") == "", "whom everyone is ahead of"


def test_the_worst_case_stands_beside_the_headline():
    rows = [row(HEADLINE, 8.0, {"fast_topk": 37.0}), row(SELECT, 8.2, {"SGLang topk_v2": 3.9})]
    beside = "| Selection | 1 row of 64K | 8.00 | fast_topk 37.0 | 4.62× | 1 row of 8K | 8.20 | SGLang topk_v2 3.90 | 0.48× |"
    assert beside in tables.headlines(rows)
    assert "| 8.00 | fast_topk 37.0 | 4.62× | the same |  |  |  |" in tables.headlines(rows[:1])
    failed = row(SELECT, None, {"SGLang topk_v2": 3.9})
    assert labels.worst([*rows, failed]) is failed, "no time is worse than any"
    assert labels.worst([row(SELECT, 8.2, {})]) is None


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"version": "sglang 1.2", "deterministic": False, "ordered": False}, "sglang 1.2; not deterministic, any order"),
        ({"version": "a 1", "deterministic": True, "ordered": True}, "a 1; deterministic, ordered"),
        ({"version": "sgl-flash-mla 1.0.0", "deterministic": True, "ordered": None}, "sgl-flash-mla 1.0.0"),
        ({}, ""),
    ],
)
def test_a_table_says_what_the_best_peer_promises(facts, words):
    found = {**row(SELECT, 8.2, {"best": 3.9, "other": 4.0}), "peer_facts": {"best": facts, "other": {"version": "9"}}}
    assert labels.promises(found) == words
    assert f"| best 3.90 | {words} | 0.48× |" in tables.stage([found], "select")


def test_rows_of_fp8_products_say_so():
    shape = {"queries": 512, "context": 32768, "heads": 128, "head_dim": 576, "k": 2048}
    assert labels.shape(row(case("attention_prefill", FP8_PRODUCTS, shape), 5.0, {})).endswith("FP8 products allowed")


def test_a_peer_that_is_not_there_is_told_once():
    gone = {"FlashInfer": "flashinfer is not installed", "FlashMLA": "failed: it cannot be launched"}
    rows = [row(SMALL, 5.0, {}, gone), row(SMALL, 5.0, {"DeepGEMM": 6.0}, {"DeepGEMM": "deep_gemm is not installed"})]
    assert labels.absent(rows) == {"FlashInfer": "flashinfer is not installed"}, "DeepGEMM has a time elsewhere"
    rows[0]["notes"]["CUB"] = "flashinfer is not installed"
    assert list(labels.absent_by_reason(rows).values()) == [["FlashInfer", "CUB"]]
    assert labels.notes(rows[0]) == {"FlashMLA": "failed: it cannot be launched"}
    assert labels.best_peer(rows[0]) == "FlashMLA: failed: it cannot be launched"


def test_every_peer_has_a_bar():
    def texts(*rows):
        figure = bars.bars(rows)
        shown = [text.get_text() for text in figure.axes[0].texts]
        lengths = [patch.get_width() for patch in figure.axes[0].patches]
        theme.plt.close(figure)
        return shown, lengths

    shown, lengths = texts(row(SMALL, 5.0, {"slow": 60.0, "DeepGEMM": 6.0}))
    assert [text for text in shown if text] == [
        "16 queries of 64, 8 heads, d 64",
        "5.00 µs · 1.20×",
        "DeepGEMM",
        "6.00 µs",
        "slow",
        "» 60.0 µs",
    ]
    assert lengths == pytest.approx([5 / 6, 1.0, 1.2]), "the slow one is cut"
    shown, lengths = texts(row(SMALL, None, {"DeepGEMM": 6.0}), row(SMALL, 5.0, {}))
    assert "failed: made up" in shown and "5.00 µs · no peer" in shown and lengths == [1.0, 1.0]


@pytest.mark.parametrize(("number", "text"), [(4096, "4K"), (1 << 20, "1M"), (98304, "96K"), (300, "300")])
def test_tokens_are_short(number, text):
    assert labels.tokens(number) == text


def test_rows_are_printed_in_a_line():
    text = printing.line(row(SMALL, 5.0, {"DeepGEMM": 6.0}, {"broken": "failed: x", "absent": "absent is not installed"}))
    assert text == "indexer_prefill: 16 queries of 64, 8 heads, d 64: 5.00 µs, DeepGEMM 6.00, 1.20×\n  broken: failed: x"


def test_the_crossover_is_where_dense_becomes_slower():
    rows = made_up_machine()["context"]["rows"]
    where = sweep.crossover(rows)
    assert where is not None and 4096 < where < 8192
    assert sweep.crossover([each for each in rows if each["context"] > 10_000]) == 16384
    assert sweep.crossover(rows, "window", "sparse") is None


def test_a_sweep_on_the_cpu_has_a_row_per_method(monkeypatch):
    monkeypatch.setattr(sweep, "_POLICY", QUICK)
    rows = sweep.sweep([64], "cpu", queries=2, heads=16, stopwatch=bench_fakes.Clock())
    assert [(each["method"], each["us"]) for each in rows] == [("dense", 10.0), ("window", 10.0), ("sparse", 10.0)]


def test_ceilings_are_rates_of_a_copy_and_of_products(monkeypatch):
    monkeypatch.setattr(ceilings, "_POLICY", QUICK)
    measured = ceilings.measure_ceilings("cpu", size=64, copied=1 << 20, stopwatch=bench_fakes.Clock())
    assert measured["copy_tb_s"] == pytest.approx(2 * 2**20 / 10 / 1e6)
    roofs = ceilings.roofs({"copy_tb_s": 4.0, "bf16_tflops": 700.0}, H200)
    assert roofs == Roofs({"fp8": 1979, "bf16": 700.0, "fp32": 66.9}, 4.0)


def test_host_costs_of_whoever_is_there(monkeypatch):
    ticks = iter(range(10**6))
    told = hostcost.host_us([lambda: None, lambda: next(ticks)], clock=lambda: next(ticks) / 1e6, calls=1)
    assert told == pytest.approx([1.0, 2.0])
    monkeypatch.setattr(hostcost, "_CALLS", 1)
    monkeypatch.setattr(hostcost, "_IN_GRAPH", QUICK)
    monkeypatch.setattr(hostcost, "CASES", (SMALL,))
    jobs, clock = hostcost.jobs(["bench_fakes"]), bench_fakes.Clock()
    assert [job.name for job in jobs] == ["plain", "ours", *(peer.name for peer in bench_fakes.PEERS)]
    rows = [row for job in jobs for row in hostcost.measure_host(job, H200, ["bench_fakes"], "cpu", clock)]
    found = {each.name: each for each in rows}
    assert found["torch add_"].host_us > 0 and found["ours: public function"].graph_us == 10.0
    assert all(each.add_us > 0 for each in rows if each.host_us), "whoever is timed is timed in turns with add_"
    assert found["missing"].note == "missing is not installed" and found["raising"].note.startswith("failed: ValueError")
    assert found["unwilling"].note == "does not serve the case"


def test_the_control_is_one_kernel_in_two_libraries():
    stages = ("attention_prefill", "attention_prefill_paged", "attention_decode")
    of = {stage: chosen([stage], per_stage=1)[0] for stage in stages}
    prefill = row(of["attention_prefill"], 3000.0, {"FlashMLA": 4000.0, "sgl-flash-mla": 4040.0})
    short = row(of["attention_prefill"], 300.0, {"FlashMLA": 400.0, "sgl-flash-mla": 500.0})
    both = {"gather_kv + FlashMLA": 4000.0, "gather_kv + sgl-flash-mla": 3880.0, "FlashMLA": 5000.0, "sgl-flash-mla": 6000.0}
    others = [row(of["attention_prefill_paged"], 3000.0, both), row(of["attention_decode"], 1e4, both)]
    assert control.differences([prefill, short, *others]) == pytest.approx([0.01, -0.03])
    told = "In 2 cases of a millisecond or longer their times differ by 2.0 % in the median and 3.0 % at most."
    assert control.control([prefill, *others]).endswith(told)
    assert control.control([short]) == ""


def test_machine_facts_reach_the_tables():
    named = tables.named(made_up_rows(), made_up_machine())
    assert "device copy, read and written | 4.27 TB/s" in named["ceilings"]
    assert "| select | fast_topk | 8.10 | – | 8.70 |  |" in named["host"]
    assert "| select | ours: public function | 8.50 | 1.25 | 5.20 |  |" in named["host"]
    assert set(named) == {*tables.NAMES, *labels.TITLES}
    assert "| 32K | 5.3 ms, 0.69 GB | 0.52 ms, 0.44 GB | 1.56 ms, 0.58 GB |" in named["context"]
    assert named["context"].endswith("Sparse is faster from about 6K tokens of context on.")
    assert named["headlines"].count("\n") == 1 + len(labels.TITLES)
    assert "| Sparse attention, prefill | 4096 queries of 32K, 128 heads |" in named["headlines"]
    assert results.REQUIRED[0] == "stage"


def test_the_tuning_history_is_read_from_journals(tmp_path):
    path = tmp_path / "h200" / "select" / "triton-0123.journal"
    path.parent.mkdir(parents=True)
    study = FILES.open(Journal(path, "0123", {}), "select.triton, rows 0-16 0123")
    for value in (5.0, 4.0, None, 4.5):
        trial = study.ask()
        study.tell(trial, value, state=TrialState.COMPLETE if value else TrialState.FAIL)
    (path.parent / "broken-4567.journal").write_text("{\n{}\n")
    with pytest.warns(UserWarning, match="broken-4567"):
        found = histories(tmp_path)
    assert found == {"h200": [{"name": "select.triton, rows 0-16", "times_us": [5.0, 4.0, 4.5], "importance": {}}]}


def test_the_command_line_writes_the_report(tmp_path, monkeypatch):
    """The page of what is shipped is drawn in tests/command/test_blocks.py."""
    monkeypatch.setattr(report, "write", lambda folder, path, found: (path.write_text("drawn"), path)[1])
    folder = made_up_folder(tmp_path)
    arguments = [
        "report",
        "--results",
        str(folder),
        "--out",
        str(tmp_path / "page.html"),
        "--readme",
        str(tmp_path / "none.md"),
    ]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "page.html").exists()
