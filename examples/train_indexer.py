"""DeepSeek Sparse Attention trained as its report says: dense first, then the indexer's warm-up, then sparse; with the curves.

    python examples/train_indexer.py                                       # seconds on a CPU
    python examples/train_indexer.py small cuda --seed 1 --plot curves.png   # a minute or two on a GPU

The text is made here: pairs of a key and its value, which differ from text to text. Whoever reads a key knows its value from
where the key stood before, so that attention has somewhere to look, and the indexer something to find.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import dsa_codegen as dsa

LATENT, ROPE, VALUE = 576, 64, 512  # channels of a token, those with rotary position, those that are its value
SCALE = LATENT**-0.5


@dataclass(frozen=True)
class Size:
    """Of the model, the texts and the three stages."""

    width: int
    heads: int
    layers: int
    texts: int
    steps: tuple[int, int, int]
    rate: float
    keys: int  # and as many values
    length: int = 512
    topk: int = 64
    index_heads: int = 8
    index_dim: int = 64


SIZES = {
    "tiny": Size(64, 8, 1, 1, (130, 30, 20), rate=4e-3, keys=8, length=128, index_dim=32),
    "small": Size(128, 8, 2, 8, (400, 250, 150), rate=2e-3, keys=32),
}


@dataclass
class Batch:
    """Texts packed into one row of tokens: windows say which tokens belong together."""

    tokens: Tensor
    targets: Tensor
    before: Tensor
    position: Tensor
    starts: Tensor
    ends: Tensor


def batches(size: Size, device: str, seed: int) -> Iterator[Batch]:
    """Endless fresh texts."""
    random = torch.Generator().manual_seed(seed)
    pairs = size.length // 2
    position = torch.arange(size.length).repeat(size.texts)
    starts = (torch.arange(size.texts) * size.length).repeat_interleave(size.length)
    windows = starts.int(), (starts + position + 1).int()
    while True:
        keys = torch.randint(size.keys, (size.texts, pairs), generator=random)
        value_of = torch.rand(size.texts, size.keys, generator=random).argsort(1) + size.keys
        text = torch.stack([keys, value_of.gather(1, keys)], 2).flatten(1)
        targets = text.roll(-1, 1).where(torch.arange(size.length) % 2 == 0, -100)  # a key cannot be foreseen
        before = text.roll(1, 1).where(torch.arange(size.length) > 0, 2 * size.keys)
        rows = text.flatten(), targets.flatten(), before.flatten(), position, *windows
        yield Batch(*(each.to(device) for each in rows))


def rotated(x: Tensor, position: Tensor, channels: int) -> Tensor:
    """Rotary position in the last channels of [rows, …, width]."""
    half = channels // 2
    angle = position[:, None] * 10000.0 ** -(torch.arange(half, device=x.device) / half)
    angle = angle.view(len(x), *[1] * (x.dim() - 2), half)
    a, b = x[..., -channels:-half], x[..., -half:]
    turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return torch.cat([x[..., :-channels], *turned], -1)


class Indexer(nn.Module):
    """Few narrow heads that share a key; it learns from the attention and sends nothing back."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.ask = nn.Linear(size.width, size.index_heads * size.index_dim, bias=False)
        self.key = nn.Sequential(nn.Linear(size.width, size.index_dim, bias=False), nn.LayerNorm(size.index_dim))
        self.weigh = nn.Linear(size.width, size.index_heads, bias=False)

    def forward(self, x: Tensor, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(queries, keys, weights) of the rows."""
        x, heads, dim = x.detach(), self.size.index_heads, self.size.index_dim
        q = rotated(self.ask(x).view(len(x), heads, dim), position, dim // 2).to(dtype)
        k = rotated(self.key(x), position, dim // 2).to(dtype)
        return q, k, self.weigh(x) * heads**-0.5


class Block(nn.Module):
    """Multi-head latent attention in its MQA form, then an MLP."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size, width = size, size.width
        self.before, self.between, self.latent_norm = nn.RMSNorm(width), nn.RMSNorm(width), nn.RMSNorm(LATENT)
        self.ask = nn.Linear(width, size.heads * LATENT, bias=False)
        self.latent = nn.Linear(width, LATENT, bias=False)
        self.out = nn.Linear(size.heads * VALUE, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.indexer = Indexer(size)

    def forward(self, x: Tensor, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        """(rows, the indexer's loss)."""
        rows = self.before(x)
        dtype = torch.bfloat16 if x.is_cuda else torch.float32
        q = rotated(self.ask(rows).view(len(x), self.size.heads, LATENT), batch.position, ROPE).to(dtype)
        kv = rotated(self.latent_norm(self.latent(rows)), batch.position, ROPE)[:, None].to(dtype)
        attended, loss = self._attend(rows, q, kv, batch, stage)
        x = x + self.out(attended.flatten(1).to(x.dtype))
        return x + self.mlp(self.between(x)), loss

    def _attend(self, rows: Tensor, q: Tensor, kv: Tensor, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        windows = {"starts": batch.starts, "ends": batch.ends}
        if stage != "sparse":
            out, lse = dsa.train.dense_attention(q, kv, SCALE, **windows)
            if stage == "dense":
                return out, q.new_zeros(())
            indexer = self.indexer(rows, batch.position, q.dtype)
            return out, dsa.train.indexer_loss(q, kv, lse, *indexer, SCALE, **windows)
        indexer = self.indexer(rows, batch.position, q.dtype)
        chosen = choose(indexer, batch, self.size.topk)[:, None]
        out, lse = dsa.train.sparse_attention(q, kv, chosen, SCALE)
        return out, dsa.train.indexer_loss(q, kv, lse, *indexer, SCALE, indices=chosen)

    @torch.no_grad()
    def activations(self, x: Tensor, batch: Batch, name: str) -> dsa.quality.Activations:
        """Of the first text, for ``dsa quality``."""
        rows, length = self.before(x)[: self.size.length], self.size.length
        position, dtype = batch.position[:length], torch.bfloat16 if x.is_cuda else torch.float32
        q = rotated(self.ask(rows).view(length, self.size.heads, LATENT), position, ROPE).to(dtype)
        kv = rotated(self.latent_norm(self.latent(rows)), position, ROPE)[:, None].to(dtype)
        windows = batch.starts[:length], batch.ends[:length]
        return dsa.quality.Activations(q, kv, *self.indexer(rows, position, dtype), *windows, SCALE, name=name)

    @torch.no_grad()
    def recall(self, x: Tensor, batch: Batch) -> Tensor:
        """(attention's mass in the indexer's choice, in the best choice): over queries that have a choice."""
        rows, dtype = self.before(x), torch.bfloat16 if x.is_cuda else torch.float32
        q = rotated(self.ask(rows).view(len(x), self.size.heads, LATENT), batch.position, ROPE)
        kv = rotated(self.latent_norm(self.latent(rows)), batch.position, ROPE)
        token = torch.arange(len(x), device=x.device)
        seen = (token >= batch.starts[:, None]) & (token < batch.ends[:, None])
        score = torch.einsum("qhd,kd->qhk", q, kv) * SCALE
        mass = score.masked_fill(~seen[:, None], float("-inf")).softmax(-1).mean(1)
        chosen = choose(self.indexer(rows, batch.position, dtype), batch, self.size.topk).long()
        found = mass.gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, 0).sum(1)
        best = mass.topk(self.size.topk, dim=1).values.sum(1)
        longer = batch.position >= self.size.topk
        return torch.stack([found[longer].mean(), best[longer].mean()])


@torch.no_grad()
def choose(indexer: tuple[Tensor, Tensor, Tensor], batch: Batch, topk: int) -> Tensor:
    """The tokens of the highest scores, as serving chooses them."""
    q, k, weights = (each.detach().contiguous() for each in indexer)
    return dsa.index_select(q, k, None, weights, batch.starts, batch.ends, topk, scores="bf16")


class Model(nn.Module):
    """A small transformer: an embedding of a token and of the one before it, blocks, the next token."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embed, self.embed_before = (nn.Embedding(2 * size.keys + 1, size.width) for _ in range(2))
        for table in (self.embed, self.embed_before):  # with 1.0 some seeds find nothing in 500 steps
            nn.init.normal_(table.weight, std=0.3)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.head = nn.Sequential(nn.RMSNorm(size.width), nn.Linear(size.width, 2 * size.keys))

    def forward(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        """(the language's loss, the indexers' loss)."""
        x, learned = self.embed(batch.tokens) + self.embed_before(batch.before), 0.0
        for block in self.blocks:
            x, loss = block(x, batch, stage)
            learned = learned + loss / len(self.blocks)
        return nn.functional.cross_entropy(self.head(x), batch.targets), learned

    @torch.no_grad()
    def recall(self, batch: Batch) -> float:
        """The share of what the best choice captures that the indexers' choice does, over all layers."""
        x, masses = self.embed(batch.tokens) + self.embed_before(batch.before), []
        for block in self.blocks:
            masses.append(block.recall(x, batch))
            x, _ = block(x, batch, "dense")
        found, best = torch.stack(masses).sum(0).tolist()
        return found / best

    @torch.no_grad()
    def activations(self, batch: Batch, name: str) -> dsa.quality.Activations:
        """Of the last layer."""
        x = self.embed(batch.tokens) + self.embed_before(batch.before)
        for block in self.blocks[:-1]:
            x, _ = block(x, batch, "dense")
        return self.blocks[-1].activations(x, batch, name)

    def indexers(self) -> list[nn.Parameter]:
        """What the warm-up trains."""
        return [each for block in self.blocks for each in block.indexer.parameters()]

    def others(self) -> list[nn.Parameter]:
        """What the language's loss trains."""
        own = {id(each) for each in self.indexers()}
        return [each for each in self.parameters() if id(each) not in own]


@dataclass
class Curves:
    """What was measured on the way, by step."""

    language: dict[str, list[float]] = field(default_factory=dict)
    indexer: list[float] = field(default_factory=list)
    recall: list[tuple[int, float]] = field(default_factory=list)
    activations: dict[str, dsa.quality.Activations] = field(default_factory=dict)


def train(
    model: Model, texts: Iterator[Batch], stage: str, steps: int, parameters: Sequence[nn.Parameter], note: Callable
) -> None:
    """Some steps of one stage."""
    optimizer = torch.optim.AdamW(parameters, lr=model.size.rate, weight_decay=0.0)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    for step in range(steps):
        language, indexer = model(next(texts), stage)
        loss = {"dense": language, "warm-up": indexer, "sparse": language + indexer}[stage]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        warm.step()
        note(step, language, indexer)


@torch.no_grad()
def validated(model: Model, size: Size, device: str, stage: str, count: int) -> float:
    """The language's loss on texts that nobody trained on."""
    texts = batches(size, device, 10**6)
    return sum(model(next(texts), stage)[0].item() for _ in range(count)) / count


def run(size: Size, device: str, seed: int) -> tuple[dict[str, float], Curves]:
    """All stages; (what came of them, the curves)."""
    torch.manual_seed(seed)
    model, texts, curves = Model(size).to(device), batches(size, device, seed), Curves()
    probe, passed = next(batches(size, device, 10**6)), [0]

    def note(name: str) -> Callable[[int, Tensor, Tensor], None]:
        losses = curves.language.setdefault(name, [])

        def write(step: int, language: Tensor, indexer: Tensor) -> None:
            losses.append(language.detach())
            if name in ("warm-up", "sparse"):
                curves.indexer.append(indexer.detach())
                if step % 20 == 19 or step == size.steps[1 if name == "warm-up" else 2] - 1:
                    curves.recall.append((passed[0] + step + 1, model.recall(probe)))

        return write

    dense, warm_up, sparse = size.steps
    train(model, texts, "dense", dense, model.others(), note("dense"))
    untrained = model.recall(probe)
    curves.recall.append((dense, untrained))
    curves.activations["untrained"] = model.activations(probe, "small model, untrained indexer")
    passed[0] = dense
    train(model, texts, "warm-up", warm_up, model.indexers(), note("warm-up"))
    fitted, passed[0] = model.recall(probe), dense + warm_up
    curves.activations["fitted"] = model.activations(probe, "small model, fitted indexer")
    rival = copy.deepcopy(model)
    train(model, batches(size, device, seed + 1000), "sparse", sparse, list(model.parameters()), note("sparse"))
    train(rival, batches(size, device, seed + 1000), "dense", sparse, rival.others(), note("dense, as long"))
    count = 1 if size is SIZES["tiny"] else 8
    found = {
        "untrained recall": untrained,
        "fitted recall": fitted,
        "recall after sparse training": model.recall(probe),
        "dense loss": validated(rival, size, device, "dense", count),
        "sparse loss": validated(model, size, device, "sparse", count),
    }
    curves.language = {name: torch.stack(losses).tolist() for name, losses in curves.language.items()}
    curves.indexer = torch.stack(curves.indexer).tolist()
    return found, curves


def draw(curves: Curves, size: Size, path: str) -> None:
    """Losses and recall by step, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense, warm_up, _ = size.steps
    begins = {"dense": 0, "warm-up": dense, "sparse": dense + warm_up, "dense, as long": dense + warm_up}
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for name, losses in curves.language.items():
        style = {"dense, as long": "--"}.get(name, "-")
        left.plot(range(begins[name], begins[name] + len(losses)), losses, style, label=name)
    middle.plot(range(dense, dense + len(curves.indexer)), curves.indexer, color="tab:purple")
    right.plot(*zip(*sorted(curves.recall), strict=True), marker=".", color="tab:purple")
    right.set_ylim(0, 1.02)
    right.axhline(0.9, color="grey", linewidth=0.8, linestyle=":")
    titles = (
        "language's loss (nats)",
        "indexer's loss: KL (nats)",
        f"recall: mass in the {size.topk} chosen / in the best {size.topk}",
    )
    for axes, title in zip((left, middle, right), titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        for stage in (dense, dense + warm_up):
            axes.axvline(stage, color="grey", linewidth=0.8)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, print what came of it, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", nargs="?", default="tiny", choices=list(SIZES))
    parser.add_argument("device", nargs="?", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", default="", help="where to draw the curves (needs matplotlib)")
    parser.add_argument("--activations", type=Path, help="a folder for those of the last layer, which `dsa quality` reads")
    arguments = parser.parse_args()
    found, curves = run(SIZES[arguments.size], arguments.device, arguments.seed)
    if arguments.plot:
        draw(curves, SIZES[arguments.size], arguments.plot)
    if arguments.activations:
        arguments.activations.mkdir(parents=True, exist_ok=True)
        for name, each in curves.activations.items():
            dsa.quality.save(each, arguments.activations / f"{name}.pt")
    print(json.dumps({name: round(value, 4) for name, value in found.items()}, indent=1))


if __name__ == "__main__":
    main()
