"""GPUs by name and by device: marketing names, several devices of different models, one that the table does not list."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsa_codegen import gpu
from dsa_codegen.errors import NoGpu, SpecError, UnknownName


def device(name: str, capability: int, sms: int = 132) -> SimpleNamespace:
    """A device as the driver describes it."""
    return SimpleNamespace(
        name=name,
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=sms,
        shared_memory_per_block_optin=227 * 1024,
        shared_memory_per_multiprocessor=228 * 1024,
        L2_cache_size=60 << 20,
        max_threads_per_multi_processor=2048,
    )


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
    ],
)
def test_names(name, found):
    assert gpu.resolve(name).id == found


@pytest.mark.parametrize("name", ["H1000x", "GH200", "NVIDIA GB200", "H2000", "L40", ""])
def test_other_names_are_not_taken_for_them(name):
    with pytest.raises(UnknownName, match="known: a100"):
        gpu.resolve(name)


def test_auto_without_a_device_says_what_to_do(devices):
    assert gpu.detect() is None
    with pytest.raises(NoGpu, match="--gpu H100"):
        gpu.resolve("auto")


def test_every_device_is_looked_at_by_itself(devices):
    devices += [device("NVIDIA H200", 90), device("NVIDIA L40S", 89), device("NVIDIA H20", 90, sms=78)]
    assert [found.id for found in map(gpu.detect, (0, 1, 2))] == ["h200", "l40s", "h20"]
    assert gpu.detect().id == gpu.resolve("auto").id == "h200"


def test_an_unlisted_device_has_its_own_limits(devices):
    devices.append(device("NVIDIA GH200 480GB", 90, sms=66))
    found = gpu.detect()
    assert (found.id, found.sms, found.arch) == ("nvidia-gh200-480gb", 66, "sm_90a")
    assert found.fp8 == pytest.approx(gpu.resolve("h100").fp8 / 2)


def test_a_device_older_than_the_table_is_none(devices):
    devices.append(device("Tesla V100", 70))
    assert gpu.detect() is None


def test_the_environment_names_a_device_of_its_architecture(devices, monkeypatch):
    devices += [device("NVIDIA Graphics Device", 90), device("NVIDIA L40S", 89)]
    assert gpu.detect().id == "nvidia-graphics-device"
    monkeypatch.setenv("DSA_GPU", "h200")
    assert gpu.detect().id == "h200"
    with pytest.raises(SpecError, match=r"DSA_GPU = 'h200'.*sm_89.*NVIDIA L40S \(cuda:1\)"):
        gpu.detect(1)
