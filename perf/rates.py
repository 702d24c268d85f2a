"""The rates of forward and backward on this machine, by which timing.step_seconds predicts a step."""

import functools

import torch

from model import Block, ModelConfig
from ops import Linear, Vocabulary, attend, linear_cross_entropy, loss_pass, rope_table
from optim import OptimConfig, build_optimizer
from perf import cost, timing
from perf.hardware import between
from perf.meters import rising, timed, timed_in_turn

# Sizes by device type: widths of blocks, lengths of sequences for attention, rows (tokens), vocabulary.
SIZES = {
    "cpu": ((128, 256, 512, 1024), (64, 512, 1024), 1024, 16384),
    "cuda": ((256, 1024, 2048, 4096), (256, 1024, 4096), 8192, 32768),
}
HEAD_WIDTH, BLOCK_LENGTH = 64, 128
SECONDS = 5.0  # to spend on blocks, attention, the head, and Muon, each
KINDS = {  # blocks whose element-wise work differs; the first one's matmuls are measured
    "plain": {},
    "modern": {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "position": "rope", "bias": False},
    "dropout": {"dropout": 0.1},
}


def training_rates(world, left_out):
    """Rates in the run's precision, by width, sequence length or kind; left_out gets sizes too slow to measure.

    Matmuls are the linear layers of a block. Memory is the time of a whole block minus its matmuls, attention and
    overhead, relative to the bytes that timing.work counts.
    """
    widths, lengths, rows, vocab_size = SIZES["cpu" if world.device.type == "cpu" else "cuda"]

    def rising_rates(what, sizes, measured, power):
        measured = functools.partial(measured, world, rows)
        return rising(sizes, measured, power, world, SECONDS, left_out, f"{what} {{}}")

    overhead = {kind: timed(one_block(kind, 8, world, 1, 2)[1], world)[0] for kind in KINDS}
    attention = rising_rates("attention over tokens:", lengths, attention_tflops, 1)
    blocks = rising_rates("blocks of width", widths, block_seconds, 2)
    memory = {kind: {} for kind in KINDS}
    for width, (tflops, by_kind) in blocks.items():
        for kind, (seconds, work) in by_kind.items():
            others = work.matmuls / tflops + work.attention / between(attention, BLOCK_LENGTH)
            rest = max(seconds - others / 1e12 - overhead[kind], 0.05 * seconds)
            memory[kind][width] = work.elementwise_bytes / 1e9 / rest
    return {
        "matmul_tflops": {width: tflops for width, (tflops, _) in blocks.items()},
        "attention_tflops": attention,
        "memory_gb_per_s": memory,
        "head_tflops": rising_rates("the loss at width", widths, functools.partial(head_tflops, vocab_size), 1),
        "muon_tflops": rising_rates("Muon at width", widths, muon_tflops, 3),
        "overhead_ms": {kind: 1e3 * seconds for kind, seconds in overhead.items()},
    }


def one_block(kind, width, world, micro_batch_size, seq_len=BLOCK_LENGTH):
    """(a block of a kind, its forward and backward of a micro-batch as a function, its Work)."""
    inner = -(-8 * width // 3 // 64) * 64 if kind == "modern" else None  # Llama's: a gated MLP of as many weights
    shape = {"n_embd": width, "n_head": max(1, width // HEAD_WIDTH), "n_inner": inner}
    cfg = ModelConfig(vocab_size=64, n_layer=1, **shape, **KINDS[kind])
    with world.device:
        block = Block(cfg)
        rope = rope_table(torch.arange(seq_len), cfg.head_width, 1e4) if cfg.position == "rope" else None
    run = forward_backward(block, world, residual(world, micro_batch_size, seq_len, width), rope)
    return block, run, work_of(cfg, world, micro_batch_size, seq_len)


def work_of(cfg, world, micro_batch_size, seq_len):
    """The Work of a micro-batch on this device."""
    on_cpu = world.device.type == "cpu"
    return timing.work(cfg, cost.Setup(seq_len, micro_batch_size, precision=world.precision, on_cpu=on_cpu))


def random(world, *shape, dtype=torch.float32):
    """A tensor of small random numbers that requires gradients."""
    return torch.randn(shape, device=world.device, dtype=dtype).mul_(0.02).requires_grad_()


def residual(world, *shape):
    """The same in the dtype of the residual stream."""
    return random(world, *shape, dtype=torch.bfloat16 if world.precision == "bf16" else torch.float32)


def forward_backward(function, world, *inputs):
    """A function of no arguments: function(*inputs) and backward, which adds to the gradients of parameters.

    In training the first micro-step of a step assigns them, which is quicker.
    """
    activations = [x for x in inputs if torch.is_tensor(x) and not isinstance(x, torch.nn.Parameter)]

    def work():
        for x in activations:
            x.grad = None
        with world.autocast():
            output = function(*inputs)
        output.backward(torch.ones_like(output))

    return work


# ---- each returns (figure, seconds of one run)


def block_seconds(world, rows, width):
    """((TFLOP/s of the linear layers, {kind: (seconds of a block, its Work)}), seconds)."""
    blocks, runs, works = zip(*(one_block(kind, width, world, max(1, rows // BLOCK_LENGTH)) for kind in KINDS))
    linears = [layer for layer in blocks[0].modules() if isinstance(layer, Linear)]
    matmuls = [forward_backward(layer, world, residual(world, rows, layer.in_features)) for layer in linears]
    in_turn = timed_in_turn([lambda: [work() for work in matmuls], *runs], world, 0.5)
    matmul_s, *seconds = (median for median, *_ in in_turn)
    flops = 6 * rows * sum(layer.weight.numel() for layer in linears)
    return (flops / 1e12 / matmul_s, dict(zip(KINDS, zip(seconds, works)))), matmul_s + sum(seconds)


def attention_tflops(world, rows, seq_len, n_heads=8):
    """TFLOP/s of causal attention, by the FLOPs that timing.work counts."""
    batch = max(1, rows // seq_len)
    q, k, v = (random(world, batch, seq_len, n_heads, HEAD_WIDTH, dtype=world.dtype) for _ in range(3))

    def attended(*heads):  # reads and writes the layout of the model
        return attend(*(x.transpose(1, 2) for x in heads), causal=True).transpose(1, 2).flatten(2)

    seconds = timed(forward_backward(attended, world, q, k, v), world)[0]
    cfg = ModelConfig(vocab_size=64, n_embd=n_heads * HEAD_WIDTH, n_head=n_heads, n_layer=1)
    return work_of(cfg, world, batch, seq_len).attention / 1e12 / seconds, seconds


def head_tflops(vocab_size, world, rows, width):
    """TFLOP/s of the head with its loss, by the FLOPs of its matmuls."""
    ids, vocabulary = torch.randint(vocab_size, (rows,), device=world.device), Vocabulary(vocab_size)
    hidden, weight = residual(world, rows, width), torch.nn.Parameter(random(world, vocab_size, width))
    one_pass = torch.compile(loss_pass) if world.device.type == "cuda" else loss_pass  # as in training
    loss = functools.partial(linear_cross_entropy, loss_pass=one_pass)
    seconds = timed(forward_backward(loss, world, hidden, weight, ids, vocabulary), world)[0]
    return 6e-12 * rows * vocab_size * width / seconds, seconds


def muon_tflops(world, rows, width, n_matrices=4):
    """TFLOP/s of Muon's step on square matrices."""
    model = torch.nn.Module()
    with world.device:
        model.blocks = torch.nn.ModuleList(Linear(width, width, bias=False) for _ in range(n_matrices))
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    seconds = timed(build_optimizer(model, OptimConfig(optimizer="muon")).step, world)[0]
    return n_matrices * 30e-12 * width**3 / seconds, seconds
