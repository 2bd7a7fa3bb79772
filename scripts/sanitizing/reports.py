"""What a tool's report says: errors, none, or only pairs of lines that another order holds than the tools see."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from dsa_codegen import paths
from dsa_codegen.kernels.build import Built

from . import source_lines
from .pieces import Piece

CLEAN = "clean"
_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")  # warnings too
_RACE = re.compile(r"(?:Race reported between|Potential invalid __shared__ read) .*?(?=\n=========\s*\n|\Z)", re.DOTALL)
_PLACE = re.compile(r" in (\w+\.py):(\d+)")
_UNTRACKED = "Detected overflow of tracked cuda::barrier structures"  # what the tool says may be wrong then, and the outputs
_ENDED = re.compile(r"^ended (\d+) of \d+ checks", re.MULTILINE)
ORDERED: dict[tuple[str, str], Sequence[source_lines.Group]] = {
    ("attention_paged", "gluon"): [
        ("def attention_paged(", "gl.warp_specialize(", "per_row."),
        ("bias.index(buffer).slice(part * SHARE, SHARE).store(", "bias.index(buffer).load("),
    ],
    ("attention_paged", "cuda"): [
        ("barrier_init(base + PARTS_IN", "barrier_expect(base + PARTS_IN"),
        ("load_float(base + AT_KEEP", "store_float(base + AT_KEEP"),
        ("load4(base + AT_MASK + 8 * value_stage)", "store1(base + AT_MASK + 8 * stage + mine / 32"),
        ("{load4(base + AT_MASK + 8 * stage)", "store1(base + AT_MASK + 8 * stage + warp - 8, tokens)"),
        ("load8(base + AT_MASK + half * (HALF_TILE / 2)", "store1(base + AT_MASK + warp / 8 * (HALF_TILE / 2)"),
        ("load_byte(its_mask)", "store1(base + AT_MASK + where * (PAIRS * FOURS)"),
        ("load_float(tops + 64 * 4)), load_float(sums)", "store_float(tops + SUMS"),
        ("theirs = *from.facts", "*to.facts = ", "(i < 16 ? from.low : from.high)[", "(i < 16 ? to.low : to.high)["),
        (
            "load_float(facts + 12",
            "load_float(facts + 20)",
            "store_float(mine + 12",
            "store_float(mine + 20",
            "store_float(mine + 28",
        ),
    ],
    ("indexer_paged", "gluon"): [("def indexer_paged(", "gl.warp_specialize(")],
    ("indexer_paged", "cuda"): [("store_float(held + about.w, score)", "load16(from + (column - first) * 4)")],
    ("attention", "cuda"): [
        ("load16(from), pass)", "copy_rows(copy16)"),
        ("load4(base + AT_MASK + 8 * value_stage)", "store4(base + AT_MASK + 8 * stage, valid)"),
        ("load_transposed(rows, from", "(source + u * 128), real, policy)"),
        ("load16(columns", "load8(inverses", "store_float(pair", "store_float(base + AT_COLUMNS"),
        ("load4(base + AT_MASK + 8 * stage", "store4(base + AT_MASK + 8 * stage"),
        ("load_float(fact(AT_PEAKS", "load_float(base + AT_CHANGES", "publish(AT_PEAKS", "publish(AT_CHANGES"),
        ("load_float(fact(AT_TOTALS", "publish(AT_TOTALS"),
        ("load_float(at), load_float(at + 4)", "publish(AT_FACTORS"),
        ("load16(base + AT_GROWN", "store4(base + AT_GROWN"),
    ],
    ("select", "cuda"): [
        ("s.local_totals[",),
        ("s.warp_counts[",),
        ("s.block_count[",),
        ("s.mine[",),
        ("need -= s.found.", "found.above =", "found.bin =", "found.count =", "s.output_count = at"),
        ("load_remote",),
        ("return s.found;", "s.range = {"),
    ],
}
"""Groups of lines between which racecheck (2025.3) misses the order; a report of others than one group's is an error.

Triton tells its roles what to run through shared memory: the first warp group writes, all warps meet at ``barrier.sync 1``, the
others read, all meet again; a meeting is another instruction for other warps. ``per_row`` passes from one warp group to another
under an mbarrier that one thread arrives at behind a ``bar.sync`` of its group, and all of the other wait for; ``bias`` does so
by ``ready``, and back by ``free``. All can be read off the PTX or the machine code.

In CUDA C++ the readers of a place are warps whose first lane arrives for all of them, and the gatherers wait for it before
they fill the place again. With few heads the warp has read the output that went through the place, and passed ``__syncwarp``.
In a cluster (paged attention's that split the channels, too) all lanes read a tile's mask at once, and its products, which the
warp issues together, need what came of it; the first lane arrives behind these. So it is where a block has a row to itself
(the third tile's mask is the first that takes another's place: 8 bytes of each block were reported). With one round of heads,
lanes write the mask of what their warp placed, and the first arrives at PLACED for all, behind a fence that all pass and
``__syncwarp``; it happens once, and all who read wait for it (of a block's 64 bytes 45 were reported, as many as three lanes
of 15 warps wrote). Warps with roles pass masks so both ways, tile by tile: two lanes write, all pass the fence (``MEMBAR`` in
the machine code, with no branch between it and the first lane's arrival at FULL), and all who read meet at a barrier of their
four warps before the first lane of each arrives at FREE. With FP8 products every place passes so, both ways and behind
``__syncwarp``: tiles, their scales and masks by FULL and EMPTY, peaks by PEAKED, changes, sums and factors by WEIGHED; these
are written anew when peaks of a later tile came that who read them signals behind that. The tool sees the order of the thread
that arrives only.

Where clusters split the channels, one group stores its sums and arrives (``bar.arrive 4``), and the other waits there before it
reads them (``bar.sync 4``); back by barrier 3. That is PTX's own example of producer and consumer; the tool counts no arrivals.

Thread 0 makes the barrier at which parts of other blocks are counted, and tells it how many bytes come: one thread's order.
What rescales sums passes from one group to another by WEIGHED, behind ``__syncwarp`` (of 1024 reads 896 were reported, all but
those of what the arriving lane stored), and back by USED, behind a vote of the warp that needs what its lanes have read.
Between what parts weigh and those who read it stands a barrier of all 512 threads, in a block where half of them have met at a
barrier of their own before, as in the selection's clusters; few of the reads are reported, and others in every run. So it is
with the sums of a round of heads, before they are sent or written: one ``BAR.SYNC 0`` in the machine code, on every way from
the line that stores them to the one that reads, and no way back.

In clusters of the selection that keep scores in registers, some warps meet at a barrier of their own before all meet at
``__syncthreads``, which stands between the lines of each group; the tool reports them all the same (not where a block has no
such barrier). ``found`` is read together with the word before it, ``output_count``. No block ends before the others have read
its bins: it waits for a word from each, which that one sends behind its reads, or for the cluster's barrier. The tool sees the
latter only; with it these reports were gone, and a choice among 64K took 6.0 us instead of 5.6.

Where rows come through rings, ``found`` is read together with the word before it (one ``LDS.128``), the key that this row's
range begins with, and the last warp writes the next row's there as soon as it is done. Only rows with a plateau use that key,
and their warps meet at ``__syncthreads`` between its use and that write.

Logits that the paged indexer gathers are stored by all lanes of a warp, whose first arrives at GATHERED_ALL behind
``__syncwarp``; all who write them out wait there.
"""


def ended(text: str) -> int:
    """How many of its checks, from the first on, a process ended before it said goodbye; 0 where it did not."""
    found = _ENDED.search(text)
    return int(found[1]) if found else 0


def first_look(status: int | None, text: str) -> str:
    """The verdict before reports are looked at: "clean", "N reports", "timeout" or "failed".

    Args:
        status: how the process ended; None where it was stopped.
    """
    if status is None:
        return "timeout"
    if _UNTRACKED in text:
        return "failed"
    errors = sum(int(one or other) for one, other in _SUMMARY.findall(text))
    if errors:
        return f"{errors} reports"
    return CLEAN if _ENDED.search(text) and not status else "failed"


def judged(piece: Piece, verdict: str, text: str, builds: Sequence[Built]) -> str:
    """The same with its reports looked at: "clean but for N reports of what is in order" or "N errors" beside others.

    Args:
        builds: what the piece may have launched.
    """
    if not verdict.endswith("reports"):
        return verdict
    found = _RACE.findall(text)
    ordered = sum(in_order(piece, race, builds) for race in found)
    errors = max(int(verdict.split()[0]), len(found)) - ordered
    if errors or not _ENDED.search(text):
        return f"{errors} errors" if errors else "failed"
    return f"{CLEAN} but for {ordered} reports of what is in order"


def in_order(piece: Piece, race: str, builds: Sequence[Built]) -> bool:
    """Whether a report is about lines between which the tool misses the order."""
    groups = ORDERED.get((piece.op, piece.backend), ())
    if piece.backend == "cuda":
        return source_lines.explained(race, groups, builds)
    lines = [line_of(file, int(line)) for file, line in _PLACE.findall(race)]
    return bool(lines) and any(all(any(part in line for part in group) for line in lines) for group in groups)


@functools.cache
def line_of(file: str, line: int) -> str:
    """A line of a rendered module, wherever in the build cache it lies."""
    found = next(paths.cache().glob(f"*/{file}"), None)
    return found.read_text().splitlines()[line - 1] if found else ""
