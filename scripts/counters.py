"""What bounds a kernel: hardware counters and sustained clocks of what the benchmark times, ours beside the best peer.

    python scripts/counters.py ready                             # compile everything, ours and the peers'
    python scripts/counters.py sustain OUT.json [--within 30]    # each alone for 0.6 s: time, clock, power, power cap
    python scripts/counters.py launch [--within 30]              # one warm call of each, between a profiler's marks
    python scripts/counters.py table RAW.csv...                  # the counters as a table

Counters come from Nsight Compute around ``launch``; the clock is left alone, and every kernel finds the L2 empty:

    ncu --profile-from-start off --clock-control none --nvtx --metrics "$(python scripts/counters.py metrics)" \\
        -o RAW python scripts/counters.py launch;  ncu --import RAW.ncu-rep --csv --page raw --print-units base >RAW.csv

``sustain`` replays graphs of calls that rotate over inputs which the L2 does not hold, as the benchmark does.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dsa_codegen.bench import ahead, contest  # noqa: E402
from dsa_codegen.bench.cases import LOCAL, BenchCase, case  # noqa: E402
from dsa_codegen.bench.deadline import Deadline  # noqa: E402
from dsa_codegen.bench.peers import Peer, load  # noqa: E402
from dsa_codegen.bench.problems import stage_of  # noqa: E402
from dsa_codegen.bench.stage import Stage, moved  # noqa: E402
from dsa_codegen.gpu import Gpu, resolve  # noqa: E402
from dsa_codegen.problem.draw import Draw  # noqa: E402
from dsa_codegen.problem.op import Inputs  # noqa: E402
from dsa_codegen.proof.measure import InputSet, nbytes, rotation  # noqa: E402
from dsa_codegen.proof.stopwatch import CudaStopwatch  # noqa: E402
from dsa_codegen.proof.verify import seed_of  # noqa: E402

PEERS = ("sgl_flash_mla", "padded_flash_mla", "deep_gemm", "topk_v2", "chain")
"""Modules of the peers that are ahead in most of the cases."""
NAMES = ("sgl-flash-mla", "FlashMLA, padded", "DeepGEMM + topk_v2", "DeepGEMM", "SGLang topk_v2")
_READY_S = 170.0
_SUSTAIN_S = 0.6
_SETTLE = 0.5  # of these seconds pass before anything counts
_GRAPH_MS = 10.0
_POLL_S = 0.008
_MARK = "case|"


def cases() -> list[BenchCase]:
    """What has been short of what was wanted, the shortest first."""
    found: list[BenchCase] = []

    def decode(batch: int, heads: int, stage: str = "attention_decode", name: str = "random", **other: int) -> None:
        shape = {"batch": batch, "next_n": 1, "context": 32768, "heads": heads, "head_dim": 576, "k": 2048, "page": 64}
        found.append(case(stage, name, {**shape, **other}))

    def prefill(context: int, heads: int, **other: int) -> None:
        shape = {"queries": 4096, "context": context, "heads": heads, "head_dim": 576, "k": 2048}
        found.append(case("attention_prefill", "random", {**shape, **other}))

    def indexer(queries: int, context: int, heads: int = 64) -> None:
        shape = {"queries": queries, "context": context, "heads": heads, "head_dim": 128}
        found.append(case("indexer_prefill", "causal", shape))

    paged = {"context": 65536, "heads": 64, "head_dim": 128, "page": 64}
    found.append(case("indexer_decode", "full", {"batch": 64, "next_n": 2, **paged}))
    indexer(4096, 32768, 8)
    for distribution in ("normal", "up"):
        found.append(case("select", distribution, {"rows": 4096, "context": 32768, "k": 2048}))
    prefill(32768, 128)
    prefill(32768, 64, head_dim=512, k=512)
    prefill(32768, 128, head_dim=512, k=1024)
    prefill(32768, 32)
    decode(64, 128)
    decode(64, 32)
    decode(64, 16)
    decode(64, 8)
    decode(64, 64)
    decode(128, 64)
    decode(8, 128)
    decode(8, 32)
    decode(128, 64, "model_decode", "deepseek-v4.1", head_dim=512, k=512)
    indexer(2048, 8192)
    indexer(4096, 131072)
    for batch in (1, 64):
        found.append(case("index_select_decode", "full", {"batch": batch, "next_n": 1, **paged, "k": 2048}))
    prefill(8192, 128)
    prefill(131072, 128)
    decode(64, 8, name=LOCAL, next_n=4)
    return found


METRICS = (
    "gpu__time_duration.sum",
    "sm__cycles_elapsed.max",
    "sm__cycles_elapsed.avg.per_second",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.sum",
    "sm__inst_executed.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "l1tex__data_bank_reads.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_bank_writes.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "lts__t_bytes.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.per_cycle_active",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block",
    "launch__block_size",
    "launch__grid_size",
    "group:smsp__pcsamp_warp_stall_reasons",
)
COLUMNS = {
    "tensor cores": "sm__pipe_tensor_cycles_active",
    "issue": "sm__inst_issued",
    "L1's data pipe": "l1tex__data_pipe_lsu_wavefronts",
    "L2": "lts__t_sectors",
    "memory": "dram__throughput",
}
"""What a table shows, in percent of what each could do."""
_DURATION, _SHARE = "gpu__time_duration.sum", ".avg.pct_of_peak_sustained_elapsed"
_STALL = "smsp__pcsamp_warps_issue_stalled_"


class Nvml:
    """Clock, power and what holds the clock back, as the driver tells them; nothing is ever set."""

    _POWER_INSTANT = 186
    _SW_POWER_CAP = 0x4

    class _Field(ctypes.Structure):
        _fields_ = (
            ("field", ctypes.c_uint),
            ("scope", ctypes.c_uint),
            ("timestamp", ctypes.c_longlong),
            ("latency", ctypes.c_longlong),
            ("type", ctypes.c_int),
            ("result", ctypes.c_int),
            ("value", ctypes.c_ulonglong),
        )

    def __init__(self) -> None:
        import torch

        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        at = torch.cuda.get_device_properties(0)  # the driver counts devices that are hidden from this process too
        place = f"{at.pci_domain_id:08x}:{at.pci_bus_id:02x}:{at.pci_device_id:02x}.0".encode()
        for failed in (
            self._library.nvmlInit_v2(),
            self._library.nvmlDeviceGetHandleByPciBusId_v2(place, ctypes.byref(self._device)),
        ):
            if failed:
                raise OSError(f"NVML says {failed}")

    def now(self) -> tuple[float, float, bool]:
        """MHz of the SMs, watts, and whether the software's power cap is at work."""
        clock, reasons = ctypes.c_uint(), ctypes.c_ulonglong()
        power = self._Field(field=self._POWER_INSTANT)
        self._library.nvmlDeviceGetClockInfo(self._device, 1, ctypes.byref(clock))
        self._library.nvmlDeviceGetCurrentClocksThrottleReasons(self._device, ctypes.byref(reasons))
        self._library.nvmlDeviceGetFieldValues(self._device, 1, ctypes.byref(power))
        watts = (power.value & 0xFFFFFFFF) / 1000 if power.result == 0 else float("nan")
        return float(clock.value), watts, bool(reasons.value & self._SW_POWER_CAP)

    def energy(self) -> float:
        """Joules since the driver was loaded."""
        millijoules = ctypes.c_ulonglong()
        self._library.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(millijoules))
        return millijoules.value / 1000


class Watch:
    """Samples of the driver's figures while something runs."""

    def __init__(self, nvml: Nvml) -> None:
        self._nvml, self._samples, self._end = nvml, [], threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._end.wait(_POLL_S):
            self._samples.append(self._nvml.now())

    def __enter__(self) -> list[tuple[float, float, bool]]:
        self._thread.start()
        return self._samples

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def sources() -> list[str]:
    """The import paths of the peers' modules."""
    return [f"dsa_codegen.bench.peers.{name}" for name in PEERS]


def best_peer(stage: str) -> list[Peer]:
    """Who is there of those that are worth comparing with, the best first."""
    found = [peer for peer in load(sources()) if stage in peer.stages and peer.name in NAMES and not peer.reason()]
    return sorted(found, key=lambda peer: NAMES.index(peer.name))


def contestants(stage: Stage, one: BenchCase, inputs: Inputs) -> Iterator[tuple[str, Callable[[Inputs], Any]]]:
    """Names, and what prepares a call of each for a set of inputs."""
    yield "ours", lambda each: stage.ours(one, each)
    for peer in best_peer(one.stage):
        try:
            prepared = peer.prepare(one, inputs)
        except Exception as error:  # a foreign library may fail in any way
            print(f"{one.id} {peer.name}: {type(error).__name__}: {error}"[:200], flush=True)
            continue
        if prepared is not None:
            yield prepared.label, lambda each, peer=peer: peer.prepare(one, each)  # type: ignore[misc]
            return


def each_case(within: float, first: int = 0) -> Iterator[tuple[BenchCase, Stage, Inputs]]:
    """Cases with fresh inputs, from a place in their order, until the seconds are up."""
    until = time.monotonic() + within
    for one in cases()[first:]:
        if time.monotonic() > until:
            print(f"left out: {one.id}", flush=True)
            continue
        stage = stage_of(one.stage)
        yield one, stage, stage.inputs(one, Draw(seed_of(one.id), "cuda"))
        give_back()


def give_back() -> None:
    """Let a case's memory go, which a profiler would save and restore."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def ready(gpu: Gpu) -> None:
    """Compile ours, and let the peers compile."""
    crashes = ahead.build(cases(), gpu, lambda one: best_peer(one.stage), sources(), "cuda", Deadline(_READY_S))
    print(f"crashed while they compiled: {crashes}" if crashes else "compiled", flush=True)


def launch(within: float, first: int) -> None:
    """One warm call of each contestant between a profiler's marks."""
    import torch

    for one, stage, inputs in each_case(within, first):
        for name, prepare in contestants(stage, one, inputs):
            began = time.monotonic()
            run = prepare(inputs).run
            for _ in range(4):
                run()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
            torch.cuda.nvtx.range_push(f"{_MARK}{one.id}|{name}")
            run()
            torch.cuda.synchronize()
            torch.cuda.nvtx.range_pop()
            torch.cuda.cudart().cudaProfilerStop()
            del run
            print(f"{one.id} {name}: {time.monotonic() - began:.2f} s", flush=True)
        del inputs, prepare


def sustain(out: Path, within: float, gpu: Gpu, first: int) -> None:
    """Each contestant alone for some tenths of a second; written as they come."""
    rows: list[dict[str, Any]] = []
    nvml = Nvml()
    for one, stage, inputs in each_case(within, first):
        size = nbytes(InputSet(inputs, {}))
        draws = lambda number: stage.inputs(one, Draw(seed_of(one.id) + number, "cuda"))  # noqa: B023, E731
        sets = rotation(draws, inputs, size, moved(stage.costs(one)), gpu)
        for name, prepare in contestants(stage, one, inputs):
            rows.append({"case": one.id, "who": name, **alone([prepare(each).run for each in sets], nvml)})
            print(json.dumps(rows[-1]), flush=True)
            out.write_text(json.dumps(rows))
            give_back()
        del inputs, sets, prepare, draws


def alone(calls: Sequence[Callable[[], Any]], nvml: Nvml) -> dict[str, float]:
    """Microseconds, MHz, watts, joules a call, and how often the power cap was seen."""
    import torch

    stopwatch = CudaStopwatch()
    for call in calls[:2]:
        call()
    one_us = min(stopwatch.time_us(calls[0]) for _ in range(3))
    count = max(len(calls), round(_GRAPH_MS * 1000 / one_us), 1)
    replay = stopwatch.capture([calls[number % len(calls)] for number in range(count)])
    if replay is None:
        return {"failed": 1.0}
    replay_us = min(stopwatch.time_us(replay) for _ in range(2))
    replays = max(3, round(_SUSTAIN_S * 1e6 / replay_us))
    settle = max(1, round(_SETTLE * replays))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for _ in range(settle):
        replay()
    marks[0].record()
    for _ in range(replays - settle):
        replay()
    marks[1].record()
    marks[0].synchronize()
    before = nvml.energy()
    with Watch(nvml) as samples:
        marks[1].synchronize()
    joules = nvml.energy() - before
    us = marks[0].elapsed_time(marks[1]) * 1000 / ((replays - settle) * count)
    seen = samples or [nvml.now()]
    clock, watts = mean(each[0] for each in seen), mean(each[1] for each in seen)
    return {
        "us": round(us, 3),
        "mhz": round(clock),
        "mhz_least": min(each[0] for each in seen),
        "watts": round(watts, 1),
        "capped": round(mean(each[2] for each in seen), 2),
        "joules": round(watts * us / 1e6, 6),
        "counted_joules": round(joules / ((replays - settle) * count), 6),
        "samples": len(seen),
    }


Kernel = dict[str, str]


def kernels_of(raw: Path) -> dict[str, dict[str, list[Kernel]]]:
    """What ncu's raw page says of the kernels of each call, by case and contestant."""
    found: dict[str, dict[str, list[Kernel]]] = {}
    for row in csv.DictReader(line for line in raw.read_text().splitlines() if line.startswith('"')):
        marked = next((value for value in row.values() if value and _MARK in value), "")  # the units' row has none
        if marked:
            one, who = marked[marked.find(_MARK) + len(_MARK) :].split(":")[0].split("|")
            found.setdefault(one, {}).setdefault(who, []).append(row)
    return found


def number(kernel: Kernel, name: str) -> float:
    """A metric of a kernel; nan where it was not counted."""
    try:
        return float(kernel.get(name, "").replace(",", ""))
    except ValueError:
        return float("nan")


def waits(kernel: Kernel) -> str:
    """What warps wait for most, in percent of the samples of all warps."""
    names = [name for name in kernel if name.startswith(_STALL) and not name.endswith("_not_issued")]
    found = {name.removeprefix(_STALL): number(kernel, name) for name in names}
    found = {name: value for name, value in found.items() if value == value}
    whole = sum(found.values()) or 1.0
    most = sorted((name for name in found if not name.endswith("selected")), key=lambda name: -found[name])[:3]
    return ", ".join(f"{name.replace('_', ' ')} {100 * found[name] / whole:.0f}" for name in most)


def cells(kernels: Sequence[Kernel]) -> list[str]:
    """The columns of one call: of its longest kernel, and how long the others took."""
    longest = max(kernels, key=lambda each: number(each, _DURATION))
    others = sum(number(each, _DURATION) for each in kernels if each is not longest) / 1000
    us, clocks = number(longest, _DURATION) / 1000, number(longest, "sm__cycles_elapsed.max") / 1000
    clock = number(longest, "sm__cycles_elapsed.avg.per_second") / 1e6
    shares = [f"{number(longest, name + _SHARE):.0f}" for name in COLUMNS.values()]
    return [f"{us:.4g}" + (f" + {others:.1f}" if others else ""), f"{clocks:.0f} at {clock:.0f}", *shares, waits(longest)]


def table(raws: Sequence[Path]) -> list[str]:
    """Lines of a table: a case each, ours / the peer."""
    lines = ["| | µs | thousand clocks at MHz | " + " | ".join(COLUMNS) + " | warps wait for |"]
    lines.append("|---|" + "---:|" * (2 + len(COLUMNS)) + "---|")
    for raw in raws:
        for one, calls in kernels_of(raw).items():
            columns = zip(*(cells(kernels) for kernels in calls.values()), strict=True)
            lines.append(f"| {one} | " + " | ".join(" / ".join(each) for each in columns) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ready", "sustain", "launch", "metrics", "table"))
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--within", type=float, default=30.0, help="seconds behind which no further case begins")
    parser.add_argument("--first", type=int, default=0, help="how many cases are left out")
    parser.add_argument("--gpu", default="auto")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.what == "metrics":
        print(",".join(METRICS))
    elif asked.what == "table":
        print("\n".join(table(asked.files)))
    elif asked.what == "launch":
        contest.get_ready(sources(), "cuda")
        launch(asked.within, asked.first)
    elif asked.what == "sustain":
        contest.get_ready(sources(), "cuda")
        sustain(asked.files[0], asked.within, resolve(asked.gpu), asked.first)
    else:
        ready(resolve(asked.gpu))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
