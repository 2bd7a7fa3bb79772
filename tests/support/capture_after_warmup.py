"""Run in a process of its own: warm up a layer, capture its steps in CUDA graphs at once, and compare what they replay."""

from __future__ import annotations

import sys

import torch

import dsa_codegen as dsa

from layer_inputs import decode_inputs, prefill_inputs


def main(name: str) -> None:
    model = dsa.preset(name)
    layer = dsa.Layer(model)
    # Made on the CPU: to make them on the GPU would already launch kernels of the package.
    steps = {
        "prefill": (layer.prefill, prefill_inputs(model, 40, 3000)),
        "decode": (layer.decode, decode_inputs(model, 3, 1, 3000)),
    }
    torch.cuda.init()
    assert layer.warmup(max_queries=64, max_batch=4, max_context=4096, next_n=(1,)) > 0
    loaded = {name: count for name, count in dsa.stats().items() if not name.endswith("calls")}
    for step, (call, inputs) in steps.items():
        inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(**inputs)
        for tensor in captured:
            tensor.view(torch.uint8).fill_(0x5A)
        graph.replay()
        again = call(**inputs)
        assert all(torch.equal(a, b) for a, b in zip(captured, again, strict=True)), step
        print(step)
    assert loaded == {name: count for name, count in dsa.stats().items() if not name.endswith("calls")}, "built after warmup"


if __name__ == "__main__":
    main(sys.argv[1])
