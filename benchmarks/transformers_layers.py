"""DeepSeek-V3.2's first two layers in transformers by these kernels: distance, time and memory beside its own attentions.

    python benchmarks/transformers_layers.py [--out benchmarks/transformers]

The two dense layers have the model's dimensions and random weights in bf16; prompts are random tokens. Each length is prefilled
by ``eager``, by ``sdpa`` and by the kernels, with unquantised and with FP8 scores; then one token is decoded. Times are
medians of whole forwards, host included; memory is the peak of torch's allocator, of which the weights are a constant part.
Writes ``<out>/<gpu>.json``, one row for each length and attention.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

import dsa_codegen as dsa
from dsa_codegen import gpu as gpus
from dsa_codegen import ops
from dsa_codegen.integrations.transformers import disable, enable
from dsa_codegen.ops.attention import AttentionSizes, AttentionSpec
from dsa_codegen.ops.indexer import IndexerSizes, IndexerSpec
from dsa_codegen.ops.indexer_paged import IndexerPagedSizes, IndexerPagedSpec
from dsa_codegen.ops.select import SelectSizes, SelectSpec
from dsa_codegen.problem.compare import similarity_gap

ROOT = Path(__file__).resolve().parents[1]
KEPT = 512
"""Positions at the end whose logits are compared."""
VOCABULARY = 8192
OURS = {"bf16": {"scores": "bf16"}, "fp8": {"scores": "fp8"}, "bf16-latents": {"scores": "bf16", "dense_below": 0}}
OWN = ("eager", "sdpa")


def model_of(layers: int = 2) -> Any:
    """DeepSeek-V3.2's first layers, with random weights, on the GPU; a small vocabulary, as all would take 4 GB."""
    config = transformers.AutoConfig.for_model(
        "deepseek_v32", num_hidden_layers=layers, mlp_layer_types=["dense"] * layers, vocab_size=VOCABULARY
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def warm(tokens: list[int]) -> None:
    """Build every kernel at once, instead of one after the other at first calls."""
    wanted: list[Any] = []
    for length in tokens:
        for queries in (length, 1):
            wanted.append((ops.get("select"), SelectSpec(2048), SelectSizes(queries, length)))
            wanted.append((ops.get("attention"), AttentionSpec(128, 576, 2048), AttentionSizes(min(queries, 4096), length)))
        for scores in ("fp8", "bf16"):
            wanted.append((ops.get("indexer"), IndexerSpec(64, 128, scores=scores), IndexerSizes(length, length)))
            wanted.append((ops.get("indexer_paged"), IndexerPagedSpec(64, 128, scores=scores), IndexerPagedSizes(1, length)))
    quantize = ops.get("quantize")
    wanted += [(quantize, spec, quantize.workloads(spec)[0].sizes) for spec in quantize.specs(dsa.preset("deepseek-v3.2"))]
    dsa.warmup(wanted)


def timed(run: Callable[[], Any], times: int) -> float:
    """Milliseconds, median, of a call that has run before."""
    spans = []
    for _ in range(times):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        spans.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(spans)


def prefilled(model: Any, ids: torch.Tensor, chunk: int) -> tuple[torch.Tensor, Any]:
    """(logits of the last positions, cache) of a prompt that comes in chunks."""
    cache = DynamicCache(config=model.config)
    for part in ids.split(chunk, dim=1):
        logits = model(part, use_cache=True, logits_to_keep=KEPT, **named(model, cache)).logits
    return logits, cache


def named(model: Any, cache: Any) -> dict[str, Any]:
    """The cache as an argument, under the name that this version has for it."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def attentions(model: Any, tokens: int, longest: int) -> Iterator[str]:
    """Put one attention after the other into the model; its own as far as they fit."""
    disable(model)
    for name in OWN if tokens <= longest else ():
        model.set_attn_implementation(name)
        yield name
    for name, options in OURS.items():
        if name != "bf16-latents" or tokens <= model.config.index_topk:
            enable(model, **options)
            yield name
    disable(model)


def row_of(model: Any, name: str, ids: torch.Tensor, times: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Time and peak memory of a prefill and of a decode step; in chunks where the whole prompt does not fit."""
    tokens = ids.shape[1]
    row: dict[str, Any] = {"tokens": tokens, "attention": name}
    for chunk in (tokens, tokens // 2, tokens // 4):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            logits, cache = prefilled(model, ids, chunk)
            row |= {"chunk": chunk, "prefill_ms": timed(functools.partial(prefilled, model, ids, chunk), times)}
            break
        except torch.cuda.OutOfMemoryError:
            row["out_of_memory_at_chunk"] = chunk
    else:
        raise SystemExit(f"{name}: {tokens} tokens do not fit, not even in chunks of {tokens // 4}")
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    row["decode_ms"] = timed(functools.partial(_step, model, ids[:, -1:], cache), 2 * times)
    return row, logits


def _step(model: Any, ids: torch.Tensor, cache: Any) -> None:
    """Decode one token, and forget it again."""
    model(ids, use_cache=True, **named(model, cache))
    cache.crop(-1)


def distance(logits: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """How far logits lie apart, and how often the most likely token is the same."""
    a, b = logits.float(), other.float()
    return {
        "max_abs": (a - b).abs().max().item(),
        "similarity_gap": similarity_gap(a, b),
        "same_token": (a.argmax(-1) == b.argmax(-1)).float().mean().item(),
        "largest": b.abs().max().item(),
    }


def overlap(model: Any, ids: torch.Tensor) -> float:
    """The share of the first layer's choices by bf16 scores that FP8 scores choose too, of queries with a choice."""
    chosen = []
    for scores in ("bf16", "fp8"):
        enable(model, scores=scores)
        indexer = model.model.layers[0].self_attn.indexer
        forward = indexer.forward
        indexer.forward = lambda *args, _inner=forward, **named: chosen.append(_inner(*args, **named)) or chosen[-1]
        prefilled(model, ids, ids.shape[1])
        indexer.forward = forward
    disable(model)
    member = torch.zeros(2, ids.shape[1] + 1, dtype=torch.bool, device="cuda")
    shares = []
    for query in range(model.config.index_topk, ids.shape[1], 61):
        member.zero_()
        for number, each in enumerate(chosen):
            member[number][each[0, query].long()] = True
        shares.append((member[0] & member[1]).sum() / model.config.index_topk)
    return torch.stack(shares).mean().item()


def measure(model: Any, tokens: list[int], longest: int, times: int) -> list[dict[str, Any]]:
    """All rows; distances are to eager where it fits, else to nothing."""
    rows = []
    for length in tokens:
        ids = torch.randint(2, VOCABULARY, (1, length), device="cuda")
        reference = None
        for name in attentions(model, length, longest):
            row, logits = row_of(model, name, ids, times)
            reference = logits if name == "eager" else reference
            if reference is not None and name != "eager":
                row["to_eager"] = distance(logits, reference)
            rows.append(row)
            print(shown(row), flush=True)
        if length > model.config.index_topk:
            rows.append({"tokens": length, "fp8_overlap": overlap(model, ids)})
            print(rows[-1], flush=True)
    return rows


def shown(row: dict[str, Any]) -> str:
    """A line for people."""
    far = row.get("to_eager")
    apart = "" if far is None else f"  gap {far['similarity_gap']:.1e}  max {far['max_abs']:.3f}  same {far['same_token']:.3f}"
    times = f"prefill {row['prefill_ms']:8.1f} ms  decode {row['decode_ms']:6.2f} ms  peak {row['peak_gib']:5.1f} GiB"
    return f"{row['tokens']:6d} {row['attention']:13s} {times}  chunk {row['chunk']}{apart}"


def rounded(value: Any) -> Any:
    """Numbers of four digits, wherever they lie."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/transformers")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 32768])
    parser.add_argument("--longest", type=int, default=8192, help="tokens that transformers' own attentions are asked for")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--commit", default="", help="of the sources, where they are no checkout")
    asked = parser.parse_args()
    gpu = gpus.detect()
    assert gpu is not None
    begin = time.perf_counter()
    warm(asked.tokens)
    model = model_of()
    print(f"built in {time.perf_counter() - begin:.0f} s", flush=True)
    with torch.no_grad():
        rows = measure(model, asked.tokens, asked.longest, asked.times)
    commit = asked.commit or subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=ROOT).strip()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    written = {
        "gpu": gpu.name,
        "commit": commit,
        "measured_at": datetime.now(timezone.utc).isoformat(),
        **versions,
        "rows": rows,
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / f"{gpu.id}.json").write_text(json.dumps(rounded(written), indent=1) + "\n")


if __name__ == "__main__":
    main()
