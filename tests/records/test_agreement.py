"""Ranks whose files differ choose alike once one of them has been followed."""

from __future__ import annotations

import json
import multiprocessing

import torch.distributed as dist

from dsa_codegen import ops, paths, records
from dsa_codegen.gpu import resolve
from dsa_codegen.ops.quantize import QuantizeSizes, QuantizeSpec
from dsa_codegen.records.lookup import lookup, search_path

CALL = QuantizeSpec(128, 1), QuantizeSizes(16)


def chosen() -> dict:
    found = lookup(ops.get("quantize"), *CALL, resolve("H100"))
    return {"config": found.config.to_dict(), "origin": found.origin}


def rank(number: int, store: str, own: str, results) -> None:
    import os

    os.environ["DSA_TUNED_DIR"] = own
    before = chosen()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    files = records.broadcast(source=1)
    dist.destroy_process_group()
    results.put((number, before, chosen(), files, sorted(search_path())))


def test_the_others_follow_one_rank(tmp_path):
    shipped = json.loads((paths.shipped_records() / "h100" / "quantize.json").read_text())
    for number, block in enumerate((2, 4)):  # each rank's own folder states another config of the same call
        content = json.loads(json.dumps(shipped))
        content["records"] = [each for each in content["records"] if each["spec"]["weights"] == "none"][:1]
        content["records"][0]["config"]["block_t"] = block
        content["records"][0]["source_sha"] = sha(block)
        folder = tmp_path / str(number) / "h100"
        folder.mkdir(parents=True)
        (folder / "quantize.json").write_text(json.dumps(content))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=rank, args=(number, str(tmp_path / "store"), str(tmp_path / str(number)), results))
        for number in range(2)
    ]
    for process in ranks:
        process.start()
    found = {number: rest for number, *rest in (results.get(timeout=120) for _ in ranks)}
    for process in ranks:
        process.join()
    assert [found[number][0]["config"]["block_t"] for number in (0, 1)] == [2, 4], "they differ before"
    for number in (0, 1):
        _, after, files, origins = found[number]
        assert (after["origin"], after["config"]["block_t"]) == ("user", 4)
        assert files > 1 and origins == ["tuned", "user"]


def sha(block: int) -> str:
    from dsa_codegen.kernels.render import render

    op = ops.get("quantize")
    return render(op, CALL[0], op.config("triton", {"block_t": block, "num_warps": 4}), "3.6.0").sha
