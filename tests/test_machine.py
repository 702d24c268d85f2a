"""What is measured of a machine is sound, is told, and leaves nothing behind."""

import contextlib
import json
import os
import types

import pytest
import torch

from perf import machine
from ranks import on_ranks
from world import WorldConfig, init_world

SMALL = {
    "MATMUL_SIZES": ((16, 33), ()), "MESSAGES": ((64, 4096), ()), "SHARD_TOKENS": 2**20, "CHECKPOINT_BYTES": 2**16,
    "LOADER_SECONDS": 0.05, "COPIED": 2**16,
}  # fmt: skip


@contextlib.contextmanager
def small_sizes():
    before = {name: getattr(machine, name) for name in SMALL}
    for name, value in SMALL.items():
        setattr(machine, name, value)
    yield
    for name, value in before.items():
        setattr(machine, name, value)


def measured_on_ranks(folder):
    with small_sizes(), init_world(WorldConfig(device="cpu", precision="fp32")) as world:
        figures = machine.measure(world, folder)
        return figures if world.is_main else list(figures)


def triples(figures):
    """All that looks like [median, least, most]."""
    if isinstance(figures, dict):
        return [triple for value in figures.values() for triple in triples(value)]
    return [figures] if isinstance(figures, list) else []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_figures_are_sound_are_told_and_leave_nothing_behind(precision, tmp_path):
    with small_sizes(), init_world(WorldConfig(device="cpu", precision=precision)) as world:
        figures = machine.measure(world, tmp_path)
    assert len(triples(figures)) == 2 * 2 + 1 + 2 + 1  # matmuls, copies, loader, disk
    assert all(0 < least <= median <= most for median, least, most in triples(figures))
    assert os.listdir(tmp_path) == [] and figures["precision"] == precision
    text = "\n".join(machine.table(json.loads(json.dumps(figures))))
    for word in (f"torch {torch.__version__}", "matmul", "33 x 33", "GB/s", "cold file", "synced"):
        assert word in text


def test_a_known_devices_data_sheet_stands_beside_what_it_reaches():
    figures = {"device": "NVIDIA H100 PCIe", "ranks": 2, "memory_gib": 79.1, "torch": "2.13", "threads": 8,
               "cuda": "13.0", "driver": "580", "data_sheet": {"tflops": 756, "fp32_tflops": 51, "memory_gbs": 2000,
               "link_gbs": 63}, "matmul_tflops": {"bf16": {"8192": [600, 590, 610]}, "fp32": {"8192": [40, 39, 41]}},
               "bandwidth_gb_per_s": {"memory copy": [1500, 1, 2], "host to device, pinned": [50, 1, 2]},
               "collectives_gb_per_s": {"all-reduce": {"1024": [20, 1, 2]}},
               "disk": {"checkpoint_gb": 0.3, "write_gb_per_s": [1, 1, 1]}}  # fmt: skip
    lines = list(machine.table(figures))
    for start, sheet in (("           bf16", "756"), ("           fp32", "51"), ("memory     memory copy", "2000"),
                         ("network    all-reduce of 1,024", "63")):  # fmt: skip
        assert next(line for line in lines if line.startswith(start)).endswith(sheet)
    assert "data sheet" not in next(line for line in lines if "host to device" in line)


def test_ranks_measure_what_connects_them(tmp_path):
    [[figures, others]] = on_ranks(2, (measured_on_ranks, str(tmp_path)))
    assert figures["ranks"] == 2 and "disk" not in others
    assert list(figures["collectives_gb_per_s"]) == ["all-reduce", "all-gather", "reduce-scatter"]
    assert all(least > 0 for _, least, _ in triples(figures["collectives_gb_per_s"]))
    assert "all-reduce of 64 bytes" in "\n".join(machine.table(figures))


def test_bus_bandwidth_is_what_nccl_tests_count(monkeypatch):
    """All-reduce sends 2 (n - 1) / n of the message, the others (n - 1) / n of all that the ranks hold together."""
    monkeypatch.setattr(machine, "timed", lambda work, world, **_: [1.0, 0.5, 2.0])
    monkeypatch.setattr(machine, "MESSAGES", ((4_000_000_000 // 10**6,), ()))
    world = types.SimpleNamespace(size=4, rank=1, device=torch.device("cpu"), barrier=lambda: None)
    found = machine.collectives(world)
    assert found["all-reduce"]["4000"] == pytest.approx([1.5 * 4e-6, 0.75 * 4e-6, 3 * 4e-6])
    assert found["all-gather"]["4000"] == found["reduce-scatter"]["4000"] == pytest.approx([3e-6, 1.5e-6, 6e-6])


def test_a_full_disk_is_left_its_space(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=4096))
    with init_world(WorldConfig(device="cpu")) as world:
        found = machine.disk(world, tmp_path)
    assert found["checkpoint_gb"] == 1024 / 1e9 and "loader_tokens_per_s" not in found
