"""Every command of the documents runs here, with the small model and what is installed by then, or a table says why not."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from command_line import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
SHELL = re.compile(r"```(?:sh|bash|shell|console)\n(.*?)```", re.DOTALL)
YAML = re.compile(r"```yaml\n# (\S+)\n(.*?)```", re.DOTALL)
HERE = re.compile(r"^cat > (\S+) <<'END'\n(.*?)^END\n", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^ *```(\w+)", re.MULTILINE)

INSTALLS = "installs 3 GB: tests/command/test_install.py resolves it on the public index"
ITSELF = "what CI itself runs, .ci/run"
ELSEWHERE = {
    r"python3 -m venv .*\[test\]'( && .venv/bin/python -m pytest -n 2)?": ITSELF,
    r"\.venv/bin/python -m pytest -n 2": ITSELF,
    r"\.venv/bin/ruff check .*": ITSELF,
    r"pip install .*": "packages that are installed beside the environment of the tests; peers need a GPU",
    r"python -m pytest -m gpu.*": "needs a GPU",
    r"python scripts/sanitize\.py": "needs a GPU and compute-sanitizer",
    r"python scripts/several_gpus\.py .*": "needs several GPUs; tests/bench/test_bench_several.py has it run over gloo",
    r"git add .*": "commits",
    r"python cli\.py verify --(preset deepseek-v3\.2|spec my-\w+\.yaml( --op \w+)?)": "minutes of interpreter; tiny runs",
    r"python cli\.py tune --gpu auto .*": "for the GPU that serves; for one that is named it runs",
    r"python cli\.py tune .*--backend cuda.*": "a minute of nvcc; tests/tune/test_tune_search.py restricts a search",
    r"python cli\.py tune --dashboard .*": "serves a page until it is interrupted; tests/tune/test_tune_look.py",
    r"python cli\.py tune .*--(storage|ray) .*": "a server, a cluster; test_tune_shelf.py and test_tune_cluster.py start them",
    r"python cli\.py tune --replay .*": "half a minute of searching; tests/tune/test_tune_replay.py searches a smaller sweep",
    r"python cli\.py quality --activations .*": "a file that is captured of a model; tests/command/test_quality.py writes one",
    r"python cli\.py report --compare .*": "compares two runs on a GPU; tests/bench/test_bench_comparison.py",
    r"\(cd generated && python launch\.py .*": "a name that generate makes up; tests/command/test_generate.py launches",
}
"""What does not run here -> why."""
NEEDS_GPU = r"python cli\.py (bench|tune --(check|again)) .*"
"""Refused here, with the exit code and the remedy that the documents promise."""
LATER = {"report": (), "": ("matplotlib", "pytest", "xdist", "mypy", "ruff", "uv")}
"""command -> packages that a reader does not have yet who has followed the pages: report wants an extra of its own."""


def lines(page: str) -> list[str]:
    """The commands of a page, continued lines joined, remarks cut off."""
    text = HERE.sub("", "".join(SHELL.findall((ROOT / page).read_text()))).replace("\\\n", " ")
    return [line for each in text.splitlines() if (line := re.sub(r" +#.*", "", each).strip())]


def reason(line: str) -> str:
    """Why a line does not run here; empty where it does."""
    return next((why for pattern, why in ELSEWHERE.items() if re.fullmatch(pattern, line)), "")


def shortened(line: str) -> str:
    """The same command for the smallest model and operation, a candidate each: minutes become seconds."""
    line = line.split(" && ")[-1].replace(".venv/bin/python", "python")
    if re.search(r"cli\.py (build|verify|tune)", line) and not re.search(r"--(refresh|check|again)", line):
        line = re.sub(r" --(op|budget|trials) \S+", "", line) + f" --op {'resolve' if ' verify ' in line else 'quantize'}"
        line = re.sub(r"--preset \S+", "--preset tiny", line) + (" --trials 1" if " tune " in line else "")
    return line.removesuffix(" --out benchmarks/report.html")  # where report writes in any case


@pytest.fixture
def folder(tmp_path) -> Path:
    """What a reader's checkout holds that commands read and write, and the files that pages tell them to write."""
    for name in ("README.md", "docs", "benchmarks", "tuned"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    for page in PAGES:
        content = (ROOT / page).read_text()
        for name, text in (*YAML.findall(content), *HERE.findall(content)):
            (tmp_path / name).write_text(text)
    return tmp_path


def first_said() -> dict[str, list[str]]:
    """What runs of each page: commands that an earlier page has said, or that are the same once shortened, run once."""
    pages: dict[str, str] = {}
    for page in PAGES:
        for line in lines(page):
            if not reason(line):
                pages.setdefault(shortened(line), page)
    return {page: [line for line, of in pages.items() if of == page] for page in dict.fromkeys(pages.values())}


FIRST_SAID = first_said()


@pytest.mark.parametrize("page", FIRST_SAID)
def test_the_commands_of_a_page_run(page, folder):
    for line in FIRST_SAID[page]:
        run(line, folder)


def run(line: str, folder: Path) -> None:
    """Run a line in the reader's folder; it ends as the documents say."""
    given = re.fullmatch(r"((?:\w+=\S+ )*)python cli\.py (.*)", line)
    assert given, f"{line}: neither a command of this package nor in the table of what runs elsewhere"
    words = shlex.split(given[2])
    variables = dict(word.replace("$PWD", str(folder)).split("=", 1) for word in given[1].split())
    hidden = LATER.get(words[0], LATER[""])
    done = cli(*words, cwd=folder, hidden=hidden, DSA_TUNED_DIR=str(folder / "tuned"), **variables)
    if re.fullmatch(NEEDS_GPU, line):
        assert (done.returncode, "GPU" in done.stderr) == (3, True), (line, done.stderr)
    else:
        assert done.returncode == 0 and done.stdout.strip(), (line, done.stderr)


def test_the_table_holds_nothing_that_no_page_says():
    said = [line for page in PAGES for line in lines(page)]
    for pattern in (*ELSEWHERE, NEEDS_GPU):
        assert any(re.fullmatch(pattern, line) for line in said), pattern


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_kinds_that_tests_run(page):
    """Commands here, Python in test_docs.py; YAML is written for the commands; other text has no language."""
    assert set(FENCE.findall((ROOT / page).read_text())) <= {"sh", "python", "yaml"}
