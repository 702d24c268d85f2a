"""Speed of devices: data sheets, the share of them that training reaches, and the time of collectives."""

import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from config import UserError
from data import divisors
from devices import DTYPES, device_name


@dataclass(frozen=True)
class Device:
    """A device by its data sheet; None stands for an unknown figure."""

    name: str
    family: str
    tflops: float  # dense bf16 matmuls, or fp16 where there is no bf16, with float32 sums
    fp32_tflops: float
    memory_gib: float
    memory_gbs: float  # 1e9 bytes/s
    link_gbs: float = 0.0  # 1e9 bytes/s to GPUs in the same node, one way
    network_gbs: float = 3.1  # 1e9 bytes/s to other nodes
    watts: float | None = None
    price: float | None = None  # dollars an hour, with its share of the host
    sustained: float = 1.0  # share of tflops that its power limit allows
    device_type: str = "cuda"
    machine: dict | None = None  # bench.py's figures of this machine

    @property
    def has_bf16(self):
        """Whether its matmuls compute in bf16."""
        return self.family not in ("volta", "turing")

    def peak_tflops(self, precision):
        """The data sheet's TFLOP/s for matmuls in a precision."""
        return self.fp32_tflops if precision == "fp32" else self.tflops

    @property
    def nvls(self):
        """Share of its links that reductions in NVSwitches use; 0 without NVSwitches."""
        return NVLS.get(self.family, 0) if self.link_gbs > PCIE_GBS else 0

    @property
    def usable_memory_gib(self):
        """GiB that torch reports: 79.1 for an H100's 80, 39.4 for an A100's 40."""
        return self.memory_gib * (1 if self.machine else 0.985)


# Peaks, memory, links, watts: data sheets, as quoted by nanochat (92d63d4), torchtitan (b5bcd76), Lightning (0810121)
# and ml-engineering (744d01e); float32: the makers' pages. Network: servers with that GPU (ml-engineering); a guess for
# cards. Prices: on demand, spring 2026: Lambda for the H100s, A100-40 and A10, Modal for T4 and L4 (techbytes.app,
# 7 May), RunPod for the rest (deploybase.ai, 10 March); they change, and some were not found.
TABLE = (
    Device("v100", "volta", 125, 15.7, 32, 900, 150, 12.5, 300),
    Device("t4", "turing", 65, 8.1, 16, 320, 16, 6.25, 70, 0.59),
    Device("rtx3090", "ampere", 71, 35.6, 24, 936, 31, 3.1, 350, 0.39),
    Device("rtx4090", "ada", 165.2, 82.6, 24, 1008, 31, 3.1, 450, 0.60),
    # Ada's rates: its matmul units are like the 4090's, not a B200's.
    Device("rtx5090", "ada", 209.5, 104.8, 32, 1792, 63, 3.1, 575, 1.22),
    # 150 W do not sustain the data sheet's 125 TFLOP/s; llm-analysis has 70.
    Device("a10", "ampere", 125, 31.2, 24, 600, 31, 6.25, 150, 0.86, sustained=0.56),
    Device("a10g", "ampere", 70, 31.2, 24, 600, 31, 3.1, 300),
    Device("a100-40", "ampere", 312, 19.5, 40, 1555, 300, 25, 400, 1.48),
    Device("a100-80", "ampere", 312, 19.5, 80, 2039, 300, 25, 400, 2.45),
    Device("l4", "ada", 121, 30.3, 24, 300, 31, 6.25, 72, 0.80),
    Device("l40s", "ada", 362, 91.6, 48, 864, 31, 12.5, 350, 1.40),
    Device("h100-pcie", "hopper", 756, 51, 80, 2000, 63, 50, 350, 2.86),
    Device("h100-sxm", "hopper", 989, 67, 80, 3350, 450, 50, 700, 3.78),
    Device("h200", "hopper", 989, 67, 141, 4800, 450, 50, 700, 6.35),
    Device("b200", "blackwell", 2250, 80, 180, 8000, 900, 50, 1000, 10.57),
    Device("gb200", "blackwell", 2500, 80, 186, 8000, 900, 50, 1200),
    # One of a card's two dies: torch counts each as a device.
    Device("mi250x", "cdna2", 191.5, 24, 64, 1640, 175, 25, 250),
    Device("mi300x", "cdna3", 1307, 163.4, 192, 5300, 448, 50, 750),
)
DEVICES = {device.name: device for device in TABLE}
Names = Literal[(*DEVICES, "this", "other")]
# Words in the name that torch reports, where ours differ. The first device whose words are all in a name is meant.
WORDS = {"a100-40": "A100 40GB", "a100-80": "A100", "h100-sxm": "H100"}
WORDS |= {f"rtx{number}": f"RTX {number}" for number in (3090, 4090, 5090)}
OTHER_PEAK = {"NVL", "LAPTOP", "MAX", "MIG", "TI", "D"}  # words in the names of slower or faster variants


def known_device(torchs_name):
    """The Device with the name that torch reports; None for an unknown one."""
    found = set(torchs_name.upper().replace("-", " ").split())
    words = {name: WORDS.get(name, name.upper().replace("-", " ")).split() for name in DEVICES}
    return next((DEVICES[name] for name in DEVICES if found.issuperset(words[name]) and not found & OTHER_PEAK), None)


def peak_flops(device, precision, earlier=None):
    """(FLOP/s, its source): the data sheet's for a known device, else the best of two measurements.

    earlier: a measurement from before, such as the start of a benchmark. The source says so where the measurements
    differ by more than a fifth: MFU relative to such a peak means little.
    """
    known = known_device(device_name(device))
    if known and precision != "fp32":
        return known.tflops * 1e12, f"{device_name(device)}, data sheet"
    first = earlier or measured_matmul_flops(device, precision)
    low, high = sorted((first, measured_matmul_flops(device, precision)))
    busy = f", two measurements differ by {high / low - 1:.0%}: the machine is busy" if high > 1.2 * low else ""
    return high, f"measured {precision} matmul{busy}"


def measured_matmul_flops(device, precision):
    """FLOP/s of a square matmul on this device, the best of three, of the largest size that is measured quickly.

    On a CPU a single matmul may take 10 ms: every start of a run measures the peak twice.
    """
    sizes, limit_s = ((256, 512, 1024, 1536), 0.01) if device.type == "cpu" else ((1024, 8192), 1)
    for n, larger in zip(sizes, (*sizes[1:], math.inf)):
        a = torch.randn(n, n, device=device).to(DTYPES[precision])
        times = []
        for _ in range(4):
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # item waits for the device
            times.append(time.perf_counter() - start)
        if min(times) * (larger / n) ** 3 > limit_s:
            return 2 * n**3 / min(times[1:])


# ---- rates


@dataclass(frozen=True)
class Rates:
    """Shares of a device's data sheet that training reaches; of bench.py's figures for this machine.

    matmul, attention: of peak FLOP/s. memory: of memory bandwidth in norms, activations and residual sums. The others
    are measured for this machine alone.
    """

    matmul: float
    attention: float
    memory: float
    head: float | None = None  # share of peak FLOP/s in the head with its loss; None: by matmul and memory
    muon: float | None = None  # share of peak FLOP/s in Muon's matmuls; None: matmul's
    optimizer: float = 0.77  # share of memory bandwidth in the optimizer: A100 1580 of 2039 GB/s, H100 2520 of 3350
    layer_s: float = 0.0  # seconds of the device in a layer's forward and backward on next to no data
    overhead_s: float = 0.0  # seconds of the host to launch a layer's forward and backward
    step_overhead_s: float = 0.0  # seconds of the host in the rest of a step: clipping, the optimizer, the log


# Fitted by tests/fit_rates.py to llm-foundry's table (8c8dd48): 68 rows of H100, 138 of A100, eager, from 2023, with
# the first flash attention. In both families the matmul rate is 0.9 of what large bf16 matmuls reach (ml-engineering's
# MAMF: A100 0.869, H100 0.803). Other families take 0.9 of theirs: B200 0.776, MI300X 0.51; their attention scales
# with matmuls, their memory with copies (A100 0.775, H100 0.752, GB200 0.727). Volta, Turing and Ada have no such
# figure and take Ampere's.
AMPERE, HOPPER = Rates(0.791, 0.318, 0.423), Rates(0.730, 0.182, 0.302)
CDNA = Rates(0.459, 0.116, 0.304)
EAGER = {
    "volta": AMPERE, "turing": AMPERE, "ampere": AMPERE, "ada": AMPERE, "hopper": HOPPER,
    "blackwell": Rates(0.698, 0.176, 0.294), "cdna2": CDNA, "cdna3": CDNA,
}  # fmt: skip
# Compiled code's rates as multiples of these (matmul, attention, memory): it moves fewer bytes, and has a recent
# attention kernel. Ampere's: flash attention 2 (arXiv 2307.08691, about 180 TFLOP/s forward and backward), and
# tests/fit_rates.py's, from published compiled rows. Hopper's: one H100's (torch 2.11), where GPT-2 1558M's matmuls
# reach 695 TFLOP/s and its attention 225, and a copy 2960 of 3350 GB/s. Other families gain what their eager rates
# follow. LAYER_S, for what is left, is fitted to timings of a prototype of this code on that H100 (fit_rates.py).
COMPILED_AMPERE, COMPILED_HOPPER = (1, 1.8, 1.5), (0.703 / 0.730, 0.228 / 0.182, 0.884 / 0.302)
LAYER_S = 0.29e-3
# Seconds in which that H100's host launches a layer's kernels, forward and backward: compiled block by block, and as a
# few segments; then the rest of a step's. They put nine timings (fit_rates.py) within 15 %. Eager code, which was not
# timed, launches more kernels than blocks: taken as theirs. A CUDA graph's time is a guess.
LAUNCH_S = {"eager": 2.9e-3, "blocks": 2.9e-3, "segments": 2.25e-3}
STEP_LAUNCH_S, GRAPH_LAUNCH_S = 7e-3, 1e-4
# Cost of overlapped collectives, as a multiple of their bytes at the link's data-sheet speed: they take memory
# bandwidth and multiprocessors. From tests/fit_rates.py, H100 and A100 alike.
CONTENTION = 1.0
NVLS = {"hopper": 0.85, "blackwell": 0.74}  # share of links that reductions in switches use (NCCL, src/graph/tuning.cc)


def compiled_gains(family):
    """Compiled code's rates as multiples of eager code's: (matmul, attention, memory)."""
    return COMPILED_AMPERE if EAGER[family] is AMPERE else COMPILED_HOPPER


def rates_of(gpu, compiled, launched):
    """The Rates of torch code on a GPU with a data sheet; launched: a key of LAUNCH_S."""
    rates = EAGER[gpu.family]
    if compiled:
        matmul, attention, memory = compiled_gains(gpu.family)
        rates = Rates(matmul * rates.matmul, attention * rates.attention, memory * rates.memory, layer_s=LAYER_S)
    return replace(rates, overhead_s=LAUNCH_S[launched], step_overhead_s=STEP_LAUNCH_S)


# ---- collectives

# NCCL's own model (src/graph/tuning.cc, commit 5067397c), by protocol: microseconds to start, then per step over
# NVLink, PCIe, network; last the share of the bandwidth that the protocol leaves.
RING = {"LL": (6.6, 0.6, 1.0, 2.7, 0.5), "LL128": (14, 1.9, 2.5, 4, 0.92), "Simple": (8.4, 3.4, 5.7, 14, 1)}
TREE = {"LL": (6.8, 0.6, 1.0, 5, 0.5), "LL128": (14, 1.25, 1.9, 8.5, 0.92), "Simple": (8.4, 4, 4, 14, 1)}
NVLS_US, NVLS_TREE_STEP_US, TREE_SHARE = 25, 20.9, 0.92  # from the same file
# Fitted over a coarse grid to 96 nccl-tests timings (stas00/ml-engineering, network/README.md), then set to what large
# rows reach. The grid's best, 0.76, 0.95, 30 and 4, has a mean error of 9 %; these have 10 %, equal for all systems.
LINK_SHARE = 0.78  # share of the data sheet, rings at 1 GiB or more: A100 0.78, H200 0.81, B200 0.76, MI300X 0.7-0.75
NETWORK_SHARE = 0.9  # share of the line rate: mean of five rows at 1 GiB or more, two systems of 4 nodes
LAUNCH_US = 30  # beyond NCCL's model: 32 to 256 KiB on three kinds of 8 GPUs, minus its 15 us
SIMPLE_FILL = 3  # factor on Simple's step times until its pipeline of large chunks is full
STEP_BYTES = 2 * 2**20  # bytes of a ring's step when its pipeline is full: half NCCL's buffer; chosen, not fitted
PCIE_GBS = 64  # PCIe 5 x16: a link that is no faster is not NVLink
ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "send": 2}  # over the ring of ranks; send: of two


def collective_s(kind, n_bytes, ranks, ranks_per_node, link_gbs, network_gbs, nvls=0.0):
    """Seconds of a collective: NCCL's model of ring, tree and NVLS (in switches), each in its protocols; the fastest.

    n_bytes: the whole tensor's, which all ranks have after all_gather. ranks_per_node: ranks of this group in one node,
    1 for replicas that fill nodes. link_gbs, network_gbs: 1e9 bytes/s that a GPU sends inside a node, between nodes.
    nvls: the share of links that reductions in NVSwitches use.
    """
    if ranks == 1:
        return 0.0
    if not link_gbs:
        raise UserError("the bandwidth between these GPUs is unknown; give --gpu_link_gbs")
    n_rounds = ROUNDS[kind]
    local = divisors(ranks, ranks_per_node)[-1]  # as many in each node
    nodes, hop = ranks // local, 2 if link_gbs <= PCIE_GBS else 1
    inside, between = LINK_SHARE * link_gbs * 1e3, NETWORK_SHARE * network_gbs * 1e3 * local  # bytes/us, all NICs
    # A ring passes each node once, its channels use the NICs of all GPUs: it moves as many bytes between as inside.
    bandwidth = inside if nodes == 1 else between if local == 1 else min(inside, between)
    # LL and LL128 need a network that keeps order, which not all do, and LL128 needs NVLink.
    protocols = ["Simple"] if nodes > 1 else ["Simple", "LL"] if hop == 2 else ["Simple", "LL", "LL128"]
    times_us = []
    for protocol in protocols:
        fill = SIMPLE_FILL if protocol == "Simple" else 1
        steps, steps_between = n_rounds * (ranks - 1), n_rounds * (nodes - 1)
        start, *per_step, share = RING[protocol]
        latency = start + (steps - steps_between) * per_step[hop - 1] + steps_between * per_step[2]
        filled = 1 + (fill - 1) * min(1, n_bytes / ranks / STEP_BYTES)  # steps of a long ring carry little each
        times_us.append(filled * latency + n_rounds * (ranks - 1) / ranks * n_bytes / (share * bandwidth))
        if kind == "all_reduce":
            start, *per_step, share = TREE[protocol]
            latency = start + 2 * ((local - 1) * per_step[hop - 1] + math.log2(nodes) * per_step[2])
            times_us.append(fill * latency + 2 * n_bytes / (share * TREE_SHARE * bandwidth))
    if kind == "all_reduce" and nvls and local > 1:  # NCCL gathers and scatters by rings even with NVLS
        # A GPU sends everything to the switches, which add, and then its reduced share: the more GPUs, the less each.
        move = (1 + 1 / local) * n_bytes / (nvls * inside)
        if nodes > 1:  # a tree over nodes, each NIC with its share: up and down; between two nodes one way only
            move = max(move, min(2, nodes - 1) * n_bytes / between)
        times_us.append(SIMPLE_FILL * (NVLS_US + 2 * math.log2(nodes) * NVLS_TREE_STEP_US) + move)
    return (LAUNCH_US + min(times_us)) * 1e-6


# ---- this machine


def this(figures):
    """The Device that bench.py's figures describe: measured rates stand for a data sheet."""
    tflops = {dtype: max(rates[0] for rates in by_size.values()) for dtype, by_size in figures["matmul_tflops"].items()}
    links = figures["collectives_gb_per_s"].get("all-gather", {})
    known = known_device(figures["device"])
    return Device(
        "this", known.family if known else "ampere", tflops[figures["precision"]], tflops["fp32"],
        figures["memory_gib"], figures["bandwidth_gb_per_s"]["memory copy"][0],
        link_gbs=max((rates[0] for rates in links.values()), default=0.0) / LINK_SHARE,
        watts=known.watts if known else None, price=known.price if known else None,
        device_type=figures["device_type"], machine=figures,
    )  # fmt: skip


def measured_rates(gpu, cfg, s):
    """The Rates of this machine for a model (a ModelConfig) in a Setup, between the sizes that bench.py measured."""
    figures, width = gpu.machine, cfg.n_embd
    if s.precision != figures["precision"]:
        ways = f"run python bench.py --precision={s.precision}, or plan with --precision={figures['precision']}"
        raise UserError(f"precision is {s.precision}, but python bench.py measured {figures['precision']}; {ways}")
    if s.tp > 1:
        raise UserError(f"tp is {s.tp}, and python bench.py measures no tensor parallelism; name a GPU by --gpu")
    rates, kind = figures["rates"], kind_of_block(cfg)
    peak, bandwidth = gpu.peak_tflops(s.precision), gpu.memory_gbs
    is_fused = s.compiled and gpu.device_type == "cuda"
    return Rates(
        between(rates["matmul_tflops"], width) / peak,
        between(rates["attention_tflops"], s.seq_len) / peak,
        between(rates["memory_gb_per_s"][kind], width) / bandwidth * (compiled_gains(gpu.family)[2] if is_fused else 1),
        between(rates["head_tflops"], width) / peak,
        between(rates["muon_tflops"], width) / gpu.tflops,
        1.0,  # the measured bandwidth is what a copy reaches
        overhead_s=rates["overhead_ms"][kind] / 1e3,
    )


def kind_of_block(cfg):
    """The kind of block that bench.py measures whose element-wise work is most like a model's."""
    if cfg.dropout:
        return "dropout"
    return "modern" if (cfg.position == "rope") + cfg.qk_norm + cfg.is_gated >= 2 else "plain"


def between(rates, size):
    """The rate at a size, from {size: rate}: on straight lines of size's logarithm, and constant beyond the ends."""
    points = sorted((math.log(int(n)), rate) for n, rate in rates.items())
    return float(np.interp(math.log(size), *zip(*points)))
