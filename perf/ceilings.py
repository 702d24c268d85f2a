"""What a training step's parts take on this machine, measured, and the time of a step by them.

Each ceiling is a table of points [amount, seconds], or of [amount, table], between which `at` draws straight lines.
"""

import bisect
import statistics
import types

import torch
import torch.nn.functional as F

from model import ACTIVATIONS, Block, ModelConfig, Transformer
from ops import LayerNorm, Linear, RMSNorm, attend, linear_cross_entropy, rope_table, rotate
from optim import OptimConfig, build_optimizer
from parallel import recompute_blocks
from perf.machine import on, timed

# What is measured: (on a CPU, on an accelerator). Widths of square layers, rows, lengths of sequences, vocabularies.
WIDTHS = (128, 256, 512, 768, 1024, 2048), (256, 768, 1024, 2048, 4096, 8192)
ROWS = (64, 512, 1024, 4096), (1024, 4096, 16384)
HEAD_WIDTHS, LENGTHS = ((32, 64), (64, 128)), (64, 128, 256, 512, 768, 1024, 2048)
VOCABULARIES, HIDDEN, LOSS_ROWS = (256, 4096, 50304), (128, 768), ((512, 2048), (2048, 8192))
NUMBERS = (2**10, 2**17, 2**19, 2**22), (2**10, 2**20, 2**24, 2**26)  # of element-wise work
PARAMS = (2**12, 2**18, 2**22, 2**25), (2**12, 2**22, 2**25, 2**27)
BYTES = {  # that forward and backward of element-wise work must move for each number
    "layernorm": 20, "rmsnorm": 20, "qk_norm": 14, "residual": 24, "dropout": 10, "rope": 12,
    "gelu": 10, "gelu_tanh": 10, "relu2": 10, "swiglu": 16,
}  # fmt: skip
MUON_STACK = 4
MODERN = {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "position": "rope", "bias": False}
BLOCKS = {"plain": {}, "modern": MODERN}
OTHERS = 1536  # rows and columns of a matrix, more than cores cache
ROUNDS, SECONDS = 3, 0.03  # of all ceilings, of one of them


def ceilings_table(c):
    """Lines of text that tell the ceilings of training's parts, mostly at the largest size of each."""
    rows = {"linear, TFLOP/s": [(round(w**0.5), 6e-12 * w * p[-1][0] / p[-1][1]) for w, p in c["linear"][1:]]}
    for kind, (*_, (D, lengths)) in c["attention"].items():
        rates = [(round(t**0.5), 12e-12 * D * t * p[-1][0] / p[-1][1]) for t, p in lengths]
        rows[f"{kind} attention, TFLOP/s"] = rates
    for n, _ in c["residual"][-2:]:
        rows[f"GB/s, {n / 2**20:g} Mi numbers"] = [(kind, 1e-9 * BYTES[kind] * n / at(c[kind], n)) for kind in BYTES]
    rows["loss, G logits/s"] = [(f"{V} x {C}", 1e-9 * V * p[-1][0] / p[-1][1]) for V, sub in c["loss"] for C, p in sub]
    rows["adamw, GB/s, Mi numbers"] = [(f"{n / 2**20:g}", 32e-9 * n / s) for n, s in c["adamw"][0][1][1:]]
    rows["muon, TFLOP/s"] = [(round(w ** (1 / 3)), 30e-12 * w / s) for w, s in c["muon"]]
    rows["overhead, ms"] = [(kind, 1e3 * s) for kind, s in c["least"].items() if kind.startswith("block")]
    return [
        "step       forward and backward of a model's parts, the median of several rounds, by width, length or size"
    ] + [
        f"           {name:27} {', '.join(f'{label}: {rate:.3g}' for label, rate in rates)}"
        for name, rates in rows.items()
    ]


def measure_ceilings(world):
    """The ceilings of _ceilings, of ROUNDS rounds, and of each point the median: what disturbs one lasts no longer."""

    def median(tables):
        if isinstance(tables[0], dict):
            return {key: median([table[key] for table in tables]) for key in tables[0]}
        if isinstance(tables[0], list):
            return [[points[0][0], median([y for _, y in points])] for points in zip(*tables)]
        return statistics.median(tables)

    return median([_ceilings(world) for _ in range(ROUNDS)])


def _ceilings(world):
    """{part: table of seconds} of forward and backward of the model's parts, at sizes that span models."""

    others = torch.randn(OTHERS, OTHERS, device=world.device, dtype=world.dtype)

    x = torch.zeros(1, 2, 8, device=world.device, requires_grad=True)
    with world.device:
        tiny = Block(ModelConfig(n_embd=8, n_head=2))

    def between():
        """What leaves clock and caches as a step does: a large matmul, then a stream of small operators."""
        with world.autocast():
            y = tiny((others @ others).sum() * 0 + x)
        y.sum().backward()

    def median(work):
        return timed(work, world, SECONDS, at_least=2, between=between)[0]

    def part(function, *shapes, floats=(), parameters=()):
        """Seconds of forward and backward of function(*inputs); the inputs of these numbers are float32."""
        inputs = [
            torch.randn(shape, device=world.device).mul_(0.02)  # as weights are; from larger logits come denormals
            for shape in shapes
        ]
        inputs = [x.to(torch.float32 if i in floats else world.dtype).requires_grad_() for i, x in enumerate(inputs)]

        def work():
            with world.autocast():
                outputs = function(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs], allow_unused=True)

        wanted = [*inputs, *parameters, *(function.parameters() if isinstance(function, torch.nn.Module) else ())]
        return median(work)

    def linear(width, rows):
        return part(Linear(width, width, device=world.device), (rows, width), floats=(0,))

    def attention(causal, D, T, heads):
        def attended(q, k, v):  # lies in memory, and goes back there, as in the model
            return attend(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal).transpose(1, 2).flatten(2)

        return part(attended, *[(max(1, heads // 8), T, min(8, heads), D)] * 3)

    def loss(V, C, rows):
        ids = torch.randint(V, (rows,), device=world.device)

        def head(weight):  # tied to the embedding
            return linear_cross_entropy(F.embedding(ids, weight), weight, ids, V)

        return part(head, (V, C), floats=(0,))

    def elementwise(kind, numbers):
        shape = (numbers // 64, 64) if kind == "qk_norm" else (max(1, numbers // 512), min(512, numbers))
        make = {
            "qk_norm": lambda: part(RMSNorm(64, device=world.device), shape),
            "layernorm": lambda: part(LayerNorm(shape[-1], device=world.device), shape, floats=(0,)),
            "rmsnorm": lambda: part(RMSNorm(shape[-1], device=world.device), shape, floats=(0,)),
            # A sum, and that of the gradients of what went two ways.
            "residual": lambda: part(lambda x, y: (x + y, x.view_as(x)), shape, shape, floats=(0,)),
            "dropout": lambda: part(lambda x: F.dropout(x, 0.1), shape),
            "rope": lambda: part(lambda x: rotate(x, rope).to(world.dtype), (numbers // 64, 64), floats=(0,)),
            "swiglu": lambda: part(lambda x, y: F.silu(x) * y, shape, shape),
        }
        rope = rope_table(torch.arange(numbers // 64, device=world.device), 64, 1e4)
        return make[kind]() if kind in make else part(ACTIVATIONS[kind], shape)

    def block(recomputed, kind):
        cfg = ModelConfig(n_embd=8, n_head=2, **kind)
        rope = rope_table(torch.arange(2, device=world.device), 4, 1e4) if cfg.position == "rope" else None
        with world.device:
            tiny = Block(cfg)
        if recomputed != "none":
            recompute_blocks(types.SimpleNamespace(blocks=[tiny], cfg=cfg), recomputed)
        return part(lambda x: tiny(x, rope), (1, 2, 8), floats=(0,), parameters=list(tiny.parameters()))

    def adamw(n_tensors, numbers):
        tensors = [
            torch.nn.Parameter(torch.zeros(numbers // n_tensors, 1, device=world.device)) for _ in range(n_tensors)
        ]
        return step_of(torch.nn.ParameterList(tensors), "adamw")

    def muon(width):
        with world.device:
            linears = torch.nn.ModuleList(Linear(width, width, bias=False) for _ in range(MUON_STACK))
        model = torch.nn.Module()
        model.blocks = linears
        return step_of(model, "muon") / MUON_STACK

    def step_of(model, name):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e-3)
        optimizer = build_optimizer(model, OptimConfig(optimizer=name))

        def work():
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return median(work)

    def attention_by_length(causal, D):
        heads = {T: (2, max(8, 2**22 // T**2)) for T in LENGTHS}
        return [[T * T, [[h, attention(causal, D, T, h)] for h in heads[T]]] for T in LENGTHS]

    least = {kind: elementwise(kind, 64) for kind in BYTES}  # of next to nothing
    least |= {"linear": linear(8, 1), "attention": attention(True, 8, 2, 2)}
    for recomputed in ("none", "full", "selective"):  # which costs operators, too
        least |= {f"block, {name}, {recomputed}": block(recomputed, kind) for name, kind in BLOCKS.items()}
    return {
        "least": least,
        "linear": [[w * w, [[n, linear(w, n)] for n in on(ROWS, world)]] for w in (8, *on(WIDTHS, world))],
        "attention": {
            kind: [[D, attention_by_length(kind == "causal", D)] for D in on(HEAD_WIDTHS, world)]
            for kind in ("causal", "full")
        },
        "loss": [[V, [[C, [[n, loss(V, C, n)] for n in on(LOSS_ROWS, world)]] for C in HIDDEN]] for V in VOCABULARIES],
        **{kind: [[n, elementwise(kind, n)] for n in on(NUMBERS, world)] for kind in BYTES},
        "adamw": [[n, [[size, adamw(n, size)] for size in on(PARAMS, world)]] for n in (8, 128)],
        "muon": [[w**3, muon(w)] for w in on(WIDTHS, world)[:-1]],
    }


def at(table, *amounts):
    """Seconds at these amounts, one for each level of a table, on straight lines between and beyond its points."""
    if not amounts:
        return table
    xs = [x for x, _ in table]
    i = min(max(1, bisect.bisect(xs, amounts[0])), len(xs) - 1)
    low, high = (at(table[j][1], *amounts[1:]) for j in (i - 1, i))
    share = (amounts[0] - xs[i - 1]) / (xs[i] - xs[i - 1])
    return max(low + share * (high - low), min(low, high) * min(1.0, amounts[0] / xs[i - 1]))


def step_seconds(m, s, figures):
    """{matmul_s, attention_s, memory_s, head_s, overhead_s, optimizer_s} of a step, from measured figures alone.

    memory_s is element-wise work, head_s the loss. m, s: a ModelConfig and a Setup. Of several ranks it is what each
    computes; communication and tensor parallelism are no part of it.
    """
    c, is_cuda, rows, heads = figures["ceilings"], not s.on_cpu, s.tokens, s.micro_batch_size * m.n_head
    masked, head_rows = m.objective == "mlm", s.tokens * s.head_share
    with torch.device("meta"):
        model = Transformer(m)
    weights = [layer.weight.numel() for layer in model.blocks.modules() if isinstance(layer, Linear)]
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2 and s.optimizer == "muon"]
    params, by_muon = [p.numel() for p in model.parameters()], sum(p.numel() for p in matrices)

    def extra(part, table, *amounts):
        """Seconds beyond those of next to nothing, which are in the block's overhead."""
        return max(0.0, at(table, *amounts) - c["least"][part])

    def elementwise(kind, numbers):
        if is_cuda and s.compiled:  # the compiler leaves of it what must be moved
            return BYTES[kind] * numbers / (1e9 * figures["bandwidth_gb_per_s"]["memory copy"][0])
        return extra(kind, c[kind], numbers)

    # What a block does to so many numbers, one by one; gradients meet where q, k and v, or gate and up, share an input.
    of_heads, swiglu = rows * (m.n_head + m.kv_heads) * m.head_width, m.mlp == "swiglu"
    work = {m.norm: 2 * rows * m.n_embd, m.mlp: rows * m.inner_width, "residual": (3 + swiglu / 2) * rows * m.n_embd}
    work |= {"qk_norm": of_heads} if m.qk_norm else {}
    work |= {"rope": of_heads} if m.position == "rope" else {}
    work |= {"dropout": 2 * rows * m.n_embd + heads * s.seq_len**2} if m.dropout else {}
    is_modern = (m.position == "rope") + m.qk_norm + swiglu >= 2
    # Shares of forward and backward that are computed again: of matmuls, of attention, of element-wise work. Selective
    # keeps what torch's kernel gives, not what matmuls of short sequences on a CPU do.
    again = {"none": (0, 0, 0), "selective": (0, s.attends_by_matmuls / 3, 0.4), "full": (1 / 3, 1 / 3, 0.4)}[
        s.recomputed
    ]
    attention = c["attention"]["full" if masked else "causal"]
    of_micro_step = {
        "matmul_s": (1 + again[0]) * sum(extra("linear", c["linear"], n, rows) for n in weights),
        "attention_s": (1 + again[1]) * m.n_layer * extra("attention", attention, m.head_width, s.seq_len**2, heads),
        "memory_s": (1 + again[2]) * m.n_layer * sum(elementwise(kind, n) for kind, n in work.items())
        + extra(m.norm, c[m.norm], rows * m.n_embd),  # the last norm, or the embedding's
        "head_s": at(c["loss"], m.padded_vocab_size, m.n_embd, head_rows),
        "overhead_s": m.n_layer * c["least"][f"block, {'modern' if is_modern else 'plain'}, {s.recomputed}"],
    }
    if masked:  # BERT's transform before the head
        of_micro_step["head_s"] += at(c["linear"], m.n_embd**2, head_rows)
        of_micro_step["head_s"] += sum(at(c[kind], head_rows * m.n_embd) for kind in ("gelu", m.norm))
    seconds = {part: s.micro_steps * each for part, each in of_micro_step.items()}
    seconds["memory_s"] += (s.micro_steps - 1) * elementwise("residual", sum(params) / 2)  # sums of gradients
    # Square matrices of equal work, each.
    cubes = [min(p.shape) ** 2 * (2 * max(p.shape) + min(p.shape)) / 3 for p in matrices]
    seconds["optimizer_s"] = at(c["adamw"], len(params) - len(matrices), sum(params) - by_muon)
    seconds["optimizer_s"] += sum(at(c["muon"], n) for n in cubes)
    if is_cuda:  # the host, whose overhead it is, runs ahead of the device
        on_device = sum(seconds.values()) - seconds["overhead_s"]
        seconds["overhead_s"] = max(0.0, seconds["overhead_s"] - on_device)
    return seconds
