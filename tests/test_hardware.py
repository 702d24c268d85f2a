"""Devices are known by their names; collectives' times are NCCL's by its model, and those that were published."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from perf.hardware import DEVICES, ROUNDS, collective_s, known_device, peak_flops, rates_of

KINDS = ("all_reduce", "all_gather", "reduce_scatter")
A100, H100, B200, PCIE = (300, 25, 0), (450, 50, 0.85), (900, 50, 0.74), (31, 12.5, 0)  # link, network, nvls
TIMINGS = Path(__file__).parent / "collectives.csv"


def bus_bandwidth_gbs(kind, n_bytes, ranks, *where):
    """What nccl-tests calls busbw, 1e9 bytes/s: what each GPU would send in a ring, by the time; where as above."""
    return ROUNDS[kind] * (ranks - 1) / ranks * n_bytes / collective_s(kind, n_bytes, ranks, *where) / 1e9


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_waits_for_nothing(kind):
    assert collective_s(kind, 2**30, 1, 8, *H100) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 8, 16, 64])
@pytest.mark.parametrize("gpu", [A100, H100, B200, PCIE])
def test_more_bytes_take_longer_and_reach_more_bandwidth(kind, ranks, gpu):
    sizes = [2**power for power in range(42)]
    times = [collective_s(kind, n, ranks, 8, *gpu) for n in sizes]
    reached = [bus_bandwidth_gbs(kind, n, ranks, 8, *gpu) for n in sizes]
    assert times == sorted(times) and times[0] > 0
    assert reached == sorted(reached)


def test_large_messages_reach_the_bus_bandwidth():
    def reached(kind, ranks, *gpu):
        return bus_bandwidth_gbs(kind, 1e15, ranks, 8, *gpu)

    for ranks in (2, 5, 8):
        for kind in KINDS:
            assert reached(kind, ranks, *A100) == pytest.approx(0.78 * 300, rel=1e-3)
    assert reached("all_gather", 8, *H100) == pytest.approx(0.78 * 450, rel=1e-3)
    assert reached("all_reduce", 8, *H100) == pytest.approx(0.78 * 450 * 0.85 * 14 / 9, rel=1e-3)
    assert reached("all_gather", 64, *A100) == pytest.approx(0.9 * 8 * 25, rel=1e-3), "a NIC per GPU, all of them"
    assert bus_bandwidth_gbs("all_reduce", 1e15, 4, 1, *A100) == pytest.approx(0.9 * 25, rel=1e-3)


def test_reduce_scatter_and_all_gather_are_the_halves_of_a_ring_all_reduce():
    halves = [collective_s(kind, 1e12, 8, 8, *A100) for kind in KINDS[1:]]
    assert halves[0] == halves[1]
    assert sum(halves) == pytest.approx(collective_s("all_reduce", 1e12, 8, 8, *A100), rel=1e-3)


def test_nvls_pays_from_five_gpus_of_hopper_and_six_of_blackwell_on():
    for (link, network, nvls), first in ((H100, 5), (B200, 6)):
        gain = [
            collective_s("all_reduce", 2**33, n, 8, link, network)
            / collective_s("all_reduce", 2**33, n, 8, link, network, nvls)
            for n in range(1 + first, 9)
        ]
        assert gain == sorted(gain) and 1.04 < gain[0] < gain[-1] < 1.35


def test_trees_win_over_many_nodes_where_messages_are_small():
    few, many = (collective_s("all_reduce", 2**20, n, 8, *A100) for n in (16, 128))
    assert many < 4 * few, "a ring's latency would grow by eight"


def test_an_unknown_bandwidth_is_refused():
    with pytest.raises(ValueError, match="give --gpu_link_gbs"):
        collective_s("all_reduce", 1, 8, 8, 0, 50)


def test_ranks_that_do_not_fill_nodes_are_spread_over_more_of_them():
    assert collective_s("all_gather", 1e9, 12, 8, *A100) == collective_s("all_gather", 1e9, 12, 6, *A100)


# ---- published timings


def predicted(row):
    """Seconds of a row of the table; forced rings without NVLS."""
    system, ranks = row["system"], int(row["ranks"])
    if "MI300X" in system:
        gpu = (64 * (ranks - 1), 50, 0)  # a link of its own from each GPU to each
    else:
        gpu = next(numbers for name, numbers in {"A100": A100, "H200": H100, "B200": B200}.items() if name in system)
    if row["algo"].startswith("ring"):
        gpu = (*gpu[:2], 0)
    return collective_s(row["collective"], int(row["payload_bytes"]), ranks, ranks // int(row["nodes"]), *gpu)


def test_times_are_those_that_were_published():
    errors = {}
    with open(TIMINGS, newline="") as file:
        for row in csv.DictReader(file):
            large = int(row["payload_bytes"]) >= 2**20
            error = predicted(row) / (float(row["time_us"]) * 1e-6) - 1
            errors.setdefault((row["system"], large), []).append(error)
    print(f"\n{'system':42} {'MiB':>5} {'rows':>4} {'bias %':>7} {'median %':>8} {'p90 %':>6} {'max %':>6}")
    for (system, large), found in errors.items():
        off, bias = 100 * np.abs(found), 100 * np.median(found)
        figures = f"{bias:7.1f} {np.median(off):8.1f} {np.percentile(off, 90):6.1f} {off.max():6.1f}"
        print(f"{system:42} {'>= 1' if large else '< 1':>5} {len(found):4} {figures}")
    for (system, large), found in errors.items():
        if large:
            assert np.median(np.abs(found)) < 0.13 and np.percentile(np.abs(found), 90) < 0.26, system
        elif "EFA" not in system:  # two of its five rows are rounded to 0.01 and 0.04 GB/s, ten times slower than 1 MiB
            assert np.percentile(np.abs(np.log1p(found)), 90) < np.log(1.6), system


# ---- devices

@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA B200", 2250),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10G", 70),
    ("NVIDIA A10", 125), ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("Tesla V100-SXM2-16GB", 125), ("Tesla T4", 65),
    ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 3090", 71), ("AMD Instinct MI300X", 1307),
])
def test_peaks_of_known_devices_are_the_data_sheets(name, tflops):
    assert known_device(name).tflops == tflops


@pytest.mark.parametrize("name", [
    "NVIDIA GeForce GTX 1080", "NVIDIA L40", "NVIDIA A1000", "NVIDIA T400", "NVIDIA H20", "cpu", "",
    # Relatives of known devices, with other peaks.
    "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
])
def test_unknown_devices_have_no_data_sheet(name):
    assert known_device(name) is None


@pytest.mark.parametrize("gpu", DEVICES)
def test_compiled_code_moves_bytes_faster_and_multiplies_no_faster(gpu):
    eager, compiled = (rates_of(DEVICES[gpu], kind != "eager", kind) for kind in ("eager", "segments"))
    assert 0.95 * eager.matmul < compiled.matmul <= eager.matmul < 1
    assert eager.memory < compiled.memory < 0.9 and eager.attention < compiled.attention < compiled.matmul


def test_peak_of_an_unknown_device_is_measured_and_says_so():
    peak, name = peak_flops(torch.device("cpu"), "fp32")
    assert 1e9 < peak < 1e14
    assert "measured" in name and "fp32" in name


@pytest.mark.slow
def test_the_script_that_measures_a_gpu_runs_tiny_on_a_cpu():
    """Without nanoGPT: each work and part gives its figures."""
    command = [sys.executable, Path(__file__).parent / "measure_gpu.py", "--tiny", "--rounds=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row.count("|") for row in rows[:10]] == 10 * [10] and len(rows) == 22
    for row in rows[2:10]:
        assert float(row.split("|")[3].replace(",", "")) > 0
    assert "command to first step" in done.stdout and "ms checkpoint" in done.stdout
