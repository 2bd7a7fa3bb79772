"""Kernels for a shape that nobody has tuned: state it, generate its kernels, verify them, and run the layer.

    python examples/new_shape.py           # no GPU: the kernels are written, and the layer runs on the CPU reference
    python examples/new_shape.py tiny cuda # a GPU: they are also compiled, checked and run

The shape is that of the preset with other heads; any YAML file of the fields of ``Model`` will do. To tune it, on the GPU:
``python cli.py tune --gpu auto --spec my-model.yaml --budget 10m``.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import dsa_codegen as dsa
from dsa_codegen.cli import app
from dsa_codegen.problem.presets import dump


def main(preset: str = "tiny", device: str = "cpu") -> None:
    model = replace(dsa.preset(preset), name="mine", heads=12, topk=128)
    with tempfile.TemporaryDirectory() as folder:
        stated, kernels = Path(folder) / "mine.yaml", Path(folder) / "kernels"
        stated.write_text(dump(model))
        of_it = ["--spec", str(stated), "--op", "attention", "--gpu", "auto" if device == "cuda" else "H100"]
        commands = [["generate", *of_it, "--out", str(kernels)]]
        commands += [["verify", *of_it]] if device == "cuda" else []  # without a GPU it would interpret them, for minutes
        for command in commands:
            print("$ dsa", *command)
            app(command, standalone_mode=False)
        model = dsa.load(stated)
        print(*(path.name for path in sorted(kernels.glob("attention*"))), sep="\n")
    rows, d = {"dtype": torch.bfloat16, "device": device}, model.d_nope + model.d_rope
    keys, scales = dsa.quantize_index_k(torch.randn(300, model.index_head_dim, **rows))
    ends = torch.arange(293, 301, dtype=torch.int32, device=device)
    attended = dsa.Layer(model).prefill(
        q=torch.randn(8, model.heads, d, **rows),
        kv=torch.randn(300, 1, d, **rows),
        index_q=torch.randn(8, model.index_heads, model.index_head_dim, **rows),
        index_weights=torch.randn(8, model.index_heads, device=device),
        index_k=keys,
        index_k_scale=scales,
        starts=torch.zeros_like(ends),
        ends=ends,
    )
    print(f"out {list(attended.out.shape)}, {int((attended.chosen[0] >= 0).sum())} tokens chosen by the first query")


if __name__ == "__main__":
    main(*sys.argv[1:])
