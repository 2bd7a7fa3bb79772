"""GPUs by name and by device: marketing names, several devices of different models, one that the table does not list."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsa_codegen import gpu
from dsa_codegen.errors import NoGpu, SpecError, UnknownName


def device(name: str, capability: int, sms: int = 132, memory: float = 80, smem: int = 227, l2: int = 50) -> SimpleNamespace:
    """A device as the driver describes it; memory in GiB, of which the driver keeps some, smem in KiB, L2 in MiB."""
    return SimpleNamespace(
        name=name,
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=sms,
        shared_memory_per_block_optin=smem * 1024,
        shared_memory_per_multiprocessor=(smem + 1) * 1024,
        L2_cache_size=l2 << 20,
        max_threads_per_multi_processor=2048,
        total_memory=int(0.99 * memory * 2**30),
    )


L40S = device("NVIDIA L40S", 89, sms=142, memory=45, smem=99, l2=96)


@pytest.fixture
def devices(monkeypatch):
    """Visible CUDA devices, none at first; the list may be changed. Device 0 is the current one."""
    found: list[SimpleNamespace] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    monkeypatch.delenv("DSA_GPU", raising=False)
    gpu._detect.cache_clear()
    yield found
    gpu._detect.cache_clear()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("H200", "h200"),
        ("h20", "h20"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("H100-SXM5", "h100"),
        ("H100SXM", "h100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("RTX5090", "rtx5090"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("h100-pcie", "h100-pcie"),
        ("H100 NVL", "h100-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
    ],
)
def test_names(name, found):
    assert gpu.resolve(name).id == found


@pytest.mark.parametrize(
    "name", ["H1000x", "NVIDIA GB200", "H2000", "L40", "", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100-pcie-57sm"]
)
def test_other_names_are_not_taken_for_them(name):
    with pytest.raises(UnknownName, match="known: a100"):
        gpu.resolve(name)


def test_auto_without_a_device_says_what_to_do(devices):
    assert gpu.detect() is None
    with pytest.raises(NoGpu, match="--gpu H100"):
        gpu.resolve("auto")


def test_every_device_is_looked_at_by_itself(devices):
    devices += [device("NVIDIA H200", 90, memory=140, l2=60), L40S, device("NVIDIA H20", 90, sms=78, memory=96, l2=60)]
    assert [found.id for found in map(gpu.detect, (0, 1, 2))] == ["h200", "l40s", "h20"]
    assert gpu.detect().id == gpu.resolve("auto").id == "h200"


FULL = device("NVIDIA H100 80GB HBM3", 90)
BOARDS = {
    "h100-80gb-hbm3-mig-1g-10gb-16sm": device("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 90, sms=16, memory=10, l2=6),
    "h100-80gb-hbm3-mig-1g-20gb-16sm": device("NVIDIA H100 80GB HBM3 MIG 1g.20gb", 90, sms=16, memory=20, l2=12),
    "h100-80gb-hbm3-mig-3g-40gb-60sm": device("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 90, sms=60, memory=40, l2=25),
    "h100-80gb-hbm3-66sm": device("NVIDIA H100 80GB HBM3", 90, sms=66),
    "h100-pcie": device("NVIDIA H100 PCIe", 90, sms=114),
    "h100-nvl": device("NVIDIA H100 NVL", 90, memory=94),
    "h100-63gb": device("NVIDIA H100", 90, memory=64),
    "gh200": device("NVIDIA GH200 480GB", 90, memory=96),
    "gh200-144g-hbm3e": device("NVIDIA GH200 144G HBM3e", 90, memory=144),
    "h20": device("NVIDIA H20", 90, sms=78, memory=96, l2=60),
    "h20-3e": device("NVIDIA H20-3e", 90, sms=78, memory=140, l2=60),
    "a100-sxm4-40gb": device("NVIDIA A100-SXM4-40GB", 80, sms=108, memory=40, smem=163, l2=40),
}


@pytest.mark.parametrize("own_id", BOARDS)
def test_another_board_is_not_taken_for_the_full_card(devices, own_id):
    """By its name alone each of these would be an H100 of 132 SMs, or another listed GPU."""
    devices += [BOARDS[own_id], FULL]
    found, full = gpu.detect(0), gpu.detect(1)
    told = BOARDS[own_id]
    assert found.id == own_id and full.id == "h100"
    assert (found.sms, found.l2, found.memory) == (told.multi_processor_count, told.L2_cache_size, told.total_memory)
    assert (found.smem_per_block, found.arch[:4]) == (told.shared_memory_per_block_optin, f"sm_{told.major}")
    assert gpu.resolve(own_id).id == own_id, "the device at hand can be named"


def test_the_roofs_of_a_slice_are_its_share(devices):
    devices += [BOARDS["h100-80gb-hbm3-mig-1g-10gb-16sm"], BOARDS["h100-pcie"]]
    part, full = gpu.detect(0), gpu.GPUS["h100"]
    assert part.fp8 == pytest.approx(full.fp8 * 16 / 132)
    assert part.bandwidth == pytest.approx(full.bandwidth / 8, rel=0.02)
    assert gpu.detect(1).fp8 == gpu.GPUS["h100-pcie"].fp8


def test_an_unlisted_device_has_its_own_limits(devices):
    devices.append(device("NVIDIA H800X", 90, sms=66))
    found = gpu.detect()
    assert (found.id, found.sms, found.arch) == ("nvidia-h800x", 66, "sm_90a")
    assert found.fp8 == pytest.approx(gpu.resolve("h100").fp8 / 2)


def test_a_device_older_than_the_table_is_none(devices):
    devices.append(device("Tesla V100", 70))
    assert gpu.detect() is None


def test_the_environment_names_a_device_of_its_architecture(devices, monkeypatch):
    devices += [device("NVIDIA Graphics Device", 90), L40S, device("NVIDIA Graphics Device", 90, sms=16)]
    assert gpu.detect().id == "nvidia-graphics-device"
    monkeypatch.setenv("DSA_GPU", "h200")
    assert gpu.detect().id == "h200"
    with pytest.raises(SpecError, match=r"DSA_GPU = 'h200'.*sm_89.*NVIDIA L40S \(cuda:1\)"):
        gpu.detect(1)
    assert (gpu.detect(2).id, gpu.detect(2).sms) == ("h200-16sm", 16), "its limits are the device's"


def test_the_environment_names_no_gpu(devices, monkeypatch):
    devices.append(FULL)
    monkeypatch.setenv("DSA_GPU", "h1000")
    with pytest.raises(UnknownName, match="h1000 \\(of DSA_GPU\\)"):
        gpu.detect()


@pytest.mark.gpu
def test_what_is_here_is_taken_from_the_device():
    """Grids are made for its SMs: those of a slice, where it is one."""
    found, here = gpu.detect(), torch.cuda.get_device_properties(0)
    assert found is not None
    assert (found.sms, found.capability) == (here.multi_processor_count, 10 * here.major + here.minor)
    assert found.smem_per_block == here.shared_memory_per_block_optin
    assert found.memory * 0.8 < here.total_memory <= found.memory * 1.05
