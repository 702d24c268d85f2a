"""A machine's figures are sound, are printed, leave nothing behind, and take at most a minute on slow hardware."""

import contextlib
import json
import os
import time
import types
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import slow
from perf import hardware, machine, meters, rates
from perf.report_bench import flat as bench_flat
from ranks import on_ranks
from world import WorldConfig, init_world

SMALL = {
    machine: {
        "SIZES": {"cpu": {"matmuls": (16, 33), "messages": (64, 4096)}}, "SHARD_TOKENS": 2**20,
        "CHECKPOINT_BYTES": 2**16, "LOADER_SECONDS": 0.05, "COPIED": 2**16,
    },
    rates: {"SIZES": {"cpu": ((64, 128), (5, 520), 128, 64)}, "SECONDS": 60.0, "BLOCK_LENGTH": 16},
}  # fmt: skip


@contextlib.contextmanager
def small_sizes():
    """Measures at sizes that take no time."""
    with contextlib.ExitStack() as stack:
        for module, values in SMALL.items():
            stack.enter_context(mock.patch.multiple(module, **values))
        stack.enter_context(mock.patch.object(meters.timed, "__defaults__", (0.01, None)))  # seconds, repeats
        yield


def measured_on_ranks(folder):
    with small_sizes(), init_world(WorldConfig(device="cpu", precision="fp32")) as world:
        figures = machine.measure(world, folder)
        return figures if world.is_main else list(figures)


def triples(figures):
    """Every [median, least, most] among figures."""
    if isinstance(figures, dict):
        return [
            triple for name, value in figures.items() if name not in ("rates", "left_out") for triple in triples(value)
        ]
    return [figures] if isinstance(figures, list) else []


@pytest.mark.parametrize("precision", ["fp32", *slow("bf16")])
def test_figures_are_sound_are_printed_and_leave_nothing_behind(precision, tmp_path):
    with small_sizes(), init_world(WorldConfig(device="cpu", precision=precision)) as world:
        figures = machine.measure(world, tmp_path)
    assert len(triples(figures)) == 2 * 2 + 1 + 2 + 1  # matmuls, copies, loader, disk
    assert all(0 < least <= median <= most for median, least, most in triples(figures))
    assert os.listdir(tmp_path) == [] and figures["precision"] == precision and figures["left_out"] == []
    measured = json.loads(json.dumps(figures["rates"]))
    assert list(measured["matmul_tflops"]) == list(measured["head_tflops"]) == ["64", "128"]
    assert (
        list(measured["attention_tflops"]) == ["5", "520"] and measured["memory_gb_per_s"].keys() == rates.KINDS.keys()
    )
    assert min(bench_flat(measured).values()) > 0
    text = "\n".join(machine.table(json.loads(json.dumps(figures))))
    for word in (
        f"torch {torch.__version__}",
        "matmul_tflops fp32",
        "33: ",
        "bandwidth_gb_per_s",
        "cold: ",
        "checkpoint_gb: ",
        "memory_gb_per_s modern",
        "overhead_ms",
    ):
        assert word in text


def test_a_known_devices_data_sheet_stands_beside_what_it_reaches():
    figures = {"device": "NVIDIA H100 PCIe", "ranks": 2, "memory_gib": 79.1, "torch": "2.13", "threads": 8,
               "cuda": "13.0", "driver": "580", "data_sheet": {"tflops": 756, "fp32_tflops": 51, "memory_gbs": 2000,
               "link_gbs": 63}, "matmul_tflops": {"bf16": {"8192": [600, 590, 610]}, "fp32": {"8192": [40, 39, 41]}},
               "bandwidth_gb_per_s": {"memory copy": [1500, 1, 2]},
               "collectives_gb_per_s": {"all-reduce": {"1024": [20, 1, 2]}},
               "precision": "bf16", "disk": {"checkpoint_gb": 0.3, "write_gb_per_s": [1, 1, 1]},
               "rates": {"matmul_tflops": {}, "attention_tflops": {}, "memory_gb_per_s": {}, "head_tflops": {},
               "muon_tflops": {}, "overhead_ms": {}}, "left_out": ["fp32 matmuls of 16384 x 16384"]}  # fmt: skip
    lines = list(machine.table(figures))
    for start, sheet in (("matmul_tflops bf16", "756"), ("matmul_tflops fp32", "51"), ("bandwidth_gb_per_s", "2000"),
                         ("collectives_gb_per_s all-reduce", "63")):  # fmt: skip
        assert next(line for line in lines if line.startswith(start)).endswith(sheet)
    assert lines[-1] == "left out   too slow here: fp32 matmuls of 16384 x 16384"


@pytest.mark.slow
def test_ranks_measure_what_connects_them(tmp_path):
    [[figures, others]] = on_ranks(2, (measured_on_ranks, str(tmp_path)))
    assert figures["ranks"] == 2 and "disk" not in others
    assert list(figures["collectives_gb_per_s"]) == ["all-reduce", "all-gather", "reduce-scatter"]
    assert all(least > 0 for _, least, _ in triples(figures["collectives_gb_per_s"]))
    assert "collectives_gb_per_s all-reduce" in "\n".join(machine.table(figures))


def test_bus_bandwidth_is_what_nccl_tests_count(monkeypatch):
    """All-reduce sends 2 (n - 1) / n of the message, the others (n - 1) / n of all that the ranks hold together."""
    monkeypatch.setattr(machine, "timed", lambda work, world, **_: [1.0, 0.5, 2.0])
    monkeypatch.setattr(machine, "SIZES", {"cpu": {"messages": (4000,)}})
    world = types.SimpleNamespace(size=4, rank=1, device=torch.device("cpu"), barrier=lambda: None)
    found = machine.collectives(world, [])
    assert found["all-reduce"]["4000"] == pytest.approx([1.5 * 4e-6, 0.75 * 4e-6, 3 * 4e-6])
    assert found["all-gather"]["4000"] == found["reduce-scatter"]["4000"] == pytest.approx([3e-6, 1.5e-6, 6e-6])


def test_a_full_disk_is_left_its_space(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=4096))
    with init_world(WorldConfig(device="cpu")) as world:
        found = machine.disk(world, tmp_path)
    assert found["checkpoint_gb"] == 1024 / 1e9 and "loader_tokens_per_s" not in found


# ---- slow hardware


class SlowMatmuls(TorchDispatchMode):
    """A clock that matmuls move on as on a device with few FLOP/s, on top of this process's own time; they are not computed."""

    def __init__(self, flops_per_s):
        super().__init__()
        self.flops_per_s, self.spent, self.started = flops_per_s, 0.0, time.process_time()

    def perf_counter(self):
        return time.process_time() - self.started + self.spent

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.aten.bmm,
            torch.ops.aten.addmm,
            torch.ops.aten.baddbmm,
        ):
            a, b = args[-2:]
            flops = 2 * a.numel() * b.shape[-1]
            self.spent += flops / self.flops_per_s
            return a.new_zeros(*a.shape[:-1], b.shape[-1])
        return function(*args, **kwargs or {})


@pytest.mark.slow
def test_a_minute_is_enough_where_a_large_matmul_takes_ten_seconds(tmp_path, monkeypatch):
    """A bf16 matmul of 2048 x 2048 on an EPYC without bf16 units; what was left out is named."""
    with init_world(WorldConfig(device="cpu", precision="bf16")) as world, SlowMatmuls(2 * 2048**3 / 10) as clock:
        monkeypatch.setattr(meters, "time", clock)
        figures = machine.measure(world, tmp_path)
    assert 1 < clock.spent < 40
    measured = figures["matmul_tflops"]["bf16"]
    assert {"256", "512"} <= measured.keys() and "2048" not in measured
    assert measured["512"][0] == pytest.approx(2 * 2048**3 / 10 / 1e12, rel=0.2)
    for what in ("bf16 matmuls of 2048 x 2048", "blocks of width 512", "the loss at width 1024"):
        assert what in figures["left_out"]
    last = list(machine.table(json.loads(json.dumps(figures))))[-1]
    assert last.startswith("left out   too slow here: ") and "bf16 matmuls of 2048 x 2048" in last


def test_the_peak_of_mfu_is_measured_within_seconds_on_slow_hardware(monkeypatch):
    with SlowMatmuls(2 * 2048**3 / 10) as clock:
        monkeypatch.setattr(hardware, "time", clock)
        peak, name = hardware.peak_flops(torch.device("cpu"), "bf16")
    assert peak == pytest.approx(2 * 2048**3 / 10, rel=0.2) and name.startswith("measured bf16 matmul")
    assert clock.spent < 5


def stub_world(monkeypatch):
    """A world and a clock that only slow work moves on."""
    clock = types.SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(meters, "time", clock)
    world = types.SimpleNamespace(device=torch.device("cpu"), synchronize=lambda: None, worst=lambda value: value)
    return world, clock


@pytest.mark.parametrize(("seconds", "calls"), [(0.01, 15), (0.3, 2), (10.0, 1)])
def test_slow_work_is_timed_once_and_fast_work_often(seconds, calls, monkeypatch):
    world, clock = stub_world(monkeypatch)
    times = []

    def work():
        times.append(seconds)
        clock.now += seconds

    assert meters.timed(work, world, seconds=0.15) == pytest.approx([seconds] * 3)
    assert len(times) == calls


def test_sizes_that_would_outlast_the_budget_are_left_out(monkeypatch):
    world, clock = stub_world(monkeypatch)

    def measured(size):
        clock.now += size**3
        return size, size**3

    left_out = []
    found = meters.rising((1, 2, 4, 8), measured, 3, world, 100.0, left_out, "size {}")
    assert found == {"1": 1, "2": 2} and left_out == ["size 4", "size 8"] and clock.now == 9
