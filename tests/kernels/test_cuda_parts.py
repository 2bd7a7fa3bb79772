"""The parts of templates/cuda, each alone: on a GPU, and by the emulator, which so does what the instructions do."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from dsa_codegen.gpu import detect
from dsa_codegen.kernels import build, render
from dsa_codegen.kernels.tma import Tiled
from dsa_codegen.problem.checks import FP8
from dsa_codegen.problem.draw import Draw

import emulator
from support import H200, assert_policies_are_in_even_registers

TEXT = Path(__file__).parents[1] / "support" / "cuda_parts.jinja"
BF16, HALF, INT = torch.bfloat16, torch.float16, torch.int32
NAN, INF = torch.nan, torch.inf
HEADER = '"""The parts of templates/cuda."""\n'


@functools.cache
def rendered() -> render.Rendered:
    return render.Rendered("parts", "cuda", HEADER, render._environment().from_string(TEXT.read_text()).render())


class Emulated:
    device = "cpu"

    def __init__(self, folder):
        self.kernels = emulator.cuda_kernels(rendered(), folder, "shuffled")


class OnGpu:
    device = "cuda"

    def __init__(self, folder):
        self.kernels = build.build(rendered(), detect()).load()


@pytest.fixture(scope="module", params=[Emulated, pytest.param(OnGpu, marks=pytest.mark.gpu)])
def machine(request, tmp_path_factory):
    if request.param is Emulated and not emulator.AVAILABLE:
        pytest.skip("needs g++ on x86-64")
    return request.param(tmp_path_factory.mktemp("parts"))


def words(machine, *shape):
    """Memory for results, of a pattern that nobody computes."""
    return torch.full(shape, 0x5A5A5A5A, dtype=INT, device=machine.device)


def run(machine, name, *args, grid=1):
    """Launch; every tensor on the machine's device, and back."""
    machine.kernels[name]((grid, 1, 1), args)
    return [arg.cpu() for arg in args]


def given(machine, value):
    return value.to(machine.device).contiguous()


def same(found, expected):
    """NaN equals NaN, whichever it is."""
    return torch.equal(*(each.float().masked_fill(each.isnan(), 12345.0) for each in (found, expected)))


def test_they_compile_for_hopper_without_spills():
    built = build.build(rendered(), H200)
    assert {name: usage.spills for name, usage in built.resources.items()} == dict.fromkeys(built.resources, 0)
    assert_policies_are_in_even_registers(built)


def test_numbers(machine):
    x = Draw(1).normal(128, 4, scale=8.0)
    x[0], x[1], x[2] = (
        torch.tensor([NAN, 1.0, 2.0, 3.0]),
        torch.tensor([1.0, 2.0, 3.0, NAN]),
        torch.tensor([INF, -INF, 1.0, 5.0]),
    )
    x[3], x[4] = torch.tensor([1e4, -1e4, 3.0, 449.0]), torch.tensor([-INF, 0.0, -0.0, -5.0])
    x[5:9] = torch.tensor(
        [[2.0**-9], [2.0**-10], [3 * 2.0**-10], [0.0176]]
    )  # e4m3's smallest, halves of it, one below the normal ones
    x[9:13, 0] = torch.tensor([2.0**-149, 2.0**-112, 3e38, 32768.0])
    x.view(INT)[13:16, 0] = torch.tensor([0x3F8000FF, 0x3F800000, 0x3F800080])  # last bytes: NaN, none, 2
    out, powers = run(
        machine, "numbers", given(machine, x), words(machine, 128, 8), words(machine, 128, 4).view(torch.float32)
    )[1:]
    powers, lift, fall, scale = powers.unbind(1)
    a, b, c, d = x.unbind(1)
    pair, scaled, halves, less, quarter, low, high, most = out.unbind(1)
    assert same(pair[:, None].view(BF16), torch.stack([a, b], 1).to(BF16))
    assert same(scaled[:, None].view(BF16), (torch.stack([a, b], 1).to(BF16).float() * c[:, None].to(BF16).float()).to(BF16))
    assert same(halves[:, None].view(HALF), torch.stack([a, b], 1).to(HALF))
    assert same(less.view(torch.float32), a.to(HALF).float() - b.to(HALF).float())
    bytes_ = x.clamp(-448, 448).to(FP8)
    assert same(quarter[:, None].contiguous().view(FP8), bytes_)
    wide = torch.stack([low, high], 1).contiguous().view(BF16)
    assert same(wide, (bytes_.float() * c[:, None]).to(BF16))
    assert same(most.view(torch.float32), torch.maximum(a, d))
    expected = a.double().exp2()
    close = (powers.double() - expected).abs() <= 2.0**-21 * expected
    assert (close | (powers.isnan() & a.isnan()) | (powers == expected)).all()
    finite, largest = a.isfinite(), (a * lift).abs()
    assert (lift * fall == 1).all() and (lift[~finite] == 1).all() and (largest[finite] < 2.0**15).all()
    assert (largest >= 2.0**14)[finite & (a.abs() >= 2.0**-112)].all()
    byte = x[:, 0].contiguous().view(torch.uint8).view(128, 4)[:, 0].double()
    expected = torch.where(byte == 255, NAN, torch.where(byte == 0, 0.0, (byte - 127).exp2()))
    assert same(scale[finite], expected[finite])


def test_matrices(machine):
    matrix = Draw(2).integers(0, 1 << 15, 4, 8, 8).short()
    lane = torch.arange(32)
    held = matrix[:, lane // 4].view(4, 32, 4, 2)[:, lane, lane % 4]  # the pair (row l / 4, columns 2 (l % 4) and the next)
    stored, loaded = run(
        machine, "matrices", given(machine, held.contiguous().view(INT)), words(machine, 320), words(machine, 256)
    )[1:]
    stored = stored.view(torch.int16).view(10, 8, 8)
    assert torch.equal(stored[:4], matrix)
    assert torch.equal(stored[4:8], matrix.transpose(1, 2))
    assert torch.equal(stored[8:], matrix[2:].transpose(1, 2))
    turned = matrix.transpose(1, 2).contiguous()
    rows = turned[:, lane // 4].view(4, 32, 4, 2)[:, lane, lane % 4].contiguous()
    assert torch.equal(loaded[:128], rows.view(INT).flatten())
    both = torch.cat([rows[0], rows[1]], 1).contiguous().view(torch.uint8)
    assert torch.equal(loaded[128:160, None].view(torch.uint8), both[:, ::2])
    assert torch.equal(loaded[160:192, None].view(torch.uint8), both[:, 1::2])
    assert torch.equal(loaded[192:], rows[:2].view(INT).flatten())


def test_copies(machine):
    draw, i = Draw(3), torch.arange(128)
    rows = draw.integers(-(1 << 15), 1 << 15, 2, 128, 8).short()
    raw = draw.integers(0, 256, 128, 16).to(torch.uint8)
    out, pieces = run(
        machine, "copies", given(machine, rows), given(machine, raw), words(machine, 2, 128, 4), words(machine, 128, 8)
    )[2:]
    valid = torch.stack([i % 5 != 0, i % 3 != 0])[:, :, None]
    assert torch.equal(out.view(torch.int16), (rows * valid).flip(1))
    sixteen = (raw * (i % 4 != 0)[:, None]).flip(0).contiguous().view(INT)
    assert torch.equal(pieces[:, :4], sixteen)
    eight = (raw.flatten()[:1024].view(128, 8) * (i % 3 != 0)[:, None]).flip(0).contiguous().view(INT)
    assert torch.equal(pieces[:, 4:6], eight)
    four = (raw.flatten()[:512].view(128, 4) * (i % 2 != 0)[:, None]).flip(0).contiguous().view(INT)
    assert torch.equal(pieces[:, 6:7], four)
    assert torch.equal(pieces[:, 7], (i + (i + 1) * 256 + 255 * 65536 + 7 * 2**24 + i + 4 * i).flip(0).int())


def test_products(machine):
    """Of whole numbers, so that no order of summation shows."""
    draw = Draw(4)
    a, b, c = (draw.integers(-4, 5, 64, 64).to(BF16) for _ in range(3))
    turned = a.T.contiguous(), c.contiguous()  # a with k's as rows; another b with k's as rows
    args = [given(machine, each) for each in (a, b, *turned)]
    out = run(machine, "products", *args, words(machine, 4, 64, 64).view(torch.float32))[-1]
    a, b, c = a.float(), b.float(), c.float()
    assert torch.equal(out[0], a @ b.T)
    assert torch.equal(out[1], a @ b.T + a @ c)
    assert torch.equal(out[2], a @ b.T)
    assert torch.equal(out[3], a @ b.T)


def test_products_of_bytes(machine):
    draw = Draw(5)
    wide, narrow = ([draw.integers(-3, 4, 64, k).to(FP8) for _ in range(2)] for k in (128, 64))
    args = [given(machine, each) for each in (*wide, *narrow)]
    out = run(machine, "products8", *args, words(machine, 3, 64, 64).view(torch.float32))[-1]
    expected = wide[0].float() @ wide[1].float().T
    assert torch.equal(out[0], expected)
    assert torch.equal(out[1], narrow[0].float() @ narrow[1].float().T)
    assert torch.equal(out[2], expected)


def test_tiles(machine):
    """Rows beyond the end are zeros, and a box of four dimensions puts rows into its own order."""
    matrix = given(machine, Draw(8).integers(0, 256, 72, 128).to(torch.uint8))
    folded = Tiled(
        matrix, (4, 6, 2, 128), (256, 1536, 128, 1)
    )  # [heads / 2, queries, 2, channels] of [queries, heads, channels]
    out = words(machine, 80, 32)
    machine.kernels["tiles"]((1, 1, 1), (Tiled(matrix), folded, out))
    rows, matrix = out.cpu().view(torch.uint8), matrix.cpu()
    assert torch.equal(rows[:32], matrix[40:])
    assert not rows[32:64].any()
    wanted = torch.zeros(2, 4, 2, 128, dtype=torch.uint8)
    wanted[:, :3] = matrix.as_strided((4, 6, 2, 128), (256, 1536, 128, 1))[1:3, 3:]
    assert torch.equal(rows[64:].view(2, 4, 2, 128), wanted)


def test_sums_over_heads(machine):
    draw = Draw(9)
    x, weights = draw.normal(128, 68), draw.normal(128, 32)
    x[3, 6] = x[5, 49] = NAN
    weights[7, 2] = NAN
    out = run(machine, "heads", given(machine, x), given(machine, weights), words(machine, 128, 4, 2).view(torch.float32))[-1]
    pairs = x.double()[:, 4:].view(128, 16, 2, 2)  # group, row, column
    by = weights.double().view(128, 16, 1, 2)
    terms = pairs.abs() * by, pairs.relu() * by
    expected = torch.stack([each[:, :groups].sum((1, 3)) for groups in (4, 16) for each in terms], 1)
    assert torch.equal(out.isnan(), expected.isnan()) and 0 < out.isnan().sum() < 20
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5, equal_nan=True)


def test_pieces(machine):
    x = Draw(10).normal(128, 4) * 10.0 ** torch.arange(-32, 32).repeat(2)[:, None].clamp(-28, 37)
    x[0], x[1], x[2] = torch.zeros(4), torch.tensor([INF, 1.0, -INF, 2.0]), torch.tensor([NAN, 1.0, 2.0, 3.0])
    x[3] = 2.0 ** torch.tensor([10.0, 9.0, 2.0, -3.0])
    places = [
        words(machine, *shape).view(dtype)
        for shape, dtype in (((128,), torch.float32), ((128, 2), INT), ((128, 4), torch.float32))
    ]
    units, out, rest = run(machine, "pieces", given(machine, x), *places)[1:]
    peaks = x.abs().nan_to_num(0, posinf=INF).amax(1)
    usual = peaks.isfinite() & (peaks > 2.0**-99) & ~x.isnan().any(1)
    assert usual.sum() > 100
    parts = peaks[usual] / units[usual]
    assert (parts >= 128).all() and (parts < 256).all() and (units.view(INT) & 0x7FFFFF == 0).all()
    pieces = out.view(FP8).view(128, 2, 4).float()
    whole = x[usual] / units[usual, None]
    left = whole - pieces[usual, 0] - pieces[usual, 1] / 16
    assert torch.equal(left * 256, rest[usual])
    assert (left.abs() <= (whole.abs() / 256).clamp(min=2.0**-14)).all()
    assert not pieces[0].any() and pieces[1].isfinite().all()
    assert torch.equal(pieces[2].isnan(), torch.tensor([[True, False, False, False]] * 2))


def test_blocks_of_a_cluster_exchange(machine):
    x = Draw(6).integers(0, 1 << 30, 2, 128, 4)
    out = run(machine, "exchange", given(machine, x), words(machine, 2, 2, 128, 4), grid=2)[1]
    come = x.flip(0).flip(1)  # of the other block, of the other thread
    assert torch.equal(out[0], come)
    odd = torch.arange(128).flip(0) % 2 == 1
    assert torch.equal(out[1][:, odd], come[:, odd] + 1)
    assert (out[1][:, ~odd] == 0x5A5A5A5A).all()


def test_groups_wait_for_their_own(machine):
    x, counter = Draw(7).integers(0, 1 << 30, 128), torch.zeros(1, dtype=INT, device=machine.device)
    out, counter_after = run(machine, "groups", given(machine, x), words(machine, 256), counter)[1:]
    neighbours = torch.arange(128) ^ 1
    assert torch.equal(out, torch.cat([x[neighbours], x.flip(0)[neighbours] + 1]))
    assert counter_after.item() == 128  # group 1 alone has a thread that says so
    counted = run(machine, "counted", counter, words(machine, 32))[1]
    assert torch.equal(counted, 128 + torch.arange(32, dtype=INT))


def test_a_launch_that_starts_early_waits_for_what_was_written(machine):
    between, out = words(machine, 32), words(machine, 32)
    machine.kernels["early"]((1, 1, 1), (between,))
    machine.kernels["late"]((1, 1, 1), (between, out))
    expected = list(range(32))
    for _ in range(20000):
        expected = [(value * 1664525 + 1013904223) % (1 << 32) for value in expected]
    assert out.cpu().flip(0).to(torch.int64).remainder(1 << 32).tolist() == expected
