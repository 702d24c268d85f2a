"""What a run costs: parameters, FLOPs, and the peaks they are held against."""

import contextlib
import time

import torch

from optim import local
from parallel import memory_bytes


# Dense tensor-core peaks in TFLOP/s, bf16 (fp16 where there is no bf16), from the makers' data sheets; the first entry
# whose words all stand in the device's name holds.
PEAKS = {
    "GB200": 2500, "B200": 2250, "H200": 989, "H100 PCIE": 756, "H100": 989, "A100": 312, "A10G": 70, "A10": 125,
    "L40S": 362, "L4": 121, "V100": 125, "T4": 65, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
    "MI300X": 1307, "MI250X": 191.5,  # of the MI250X, one of the two dies that torch shows as devices
}  # fmt: skip
ALLOCATOR_SLACK = 1.1  # with what is kept of freed tensors
OTHER_PEAK = {"NVL", "LAPTOP", "MAX", "MIG", "TI", "D"}  # words that make a name that of a slower or faster relative


def num_params(cfg):
    """Parameters of a model in closed form, tied ones once, without padding: 124,439,808 for GPT-2 124M."""
    d, biases = cfg.n_embd, int(cfg.bias)
    q, kv = cfg.n_head * cfg.head_width, cfg.kv_heads * cfg.head_width
    matrices_up = 2 if cfg.mlp == "swiglu" else 1
    of_norm = 2 if cfg.norm == "layernorm" and cfg.bias else 1  # vectors of a norm
    norms = of_norm * 2 * (d + cfg.qk_norm * cfg.head_width)
    block = _matmul_weights(cfg) + biases * (q + 2 * kv + d + matrices_up * cfg.inner_width + d) + norms
    tables = cfg.vocab_size * (1 if cfg.tie_embeddings else 2) + (cfg.n_token_types or 0)
    tables += cfg.block_size if cfg.position == "learned" else 0
    transform = d * d + biases * (d + cfg.vocab_size) + of_norm * d if cfg.objective == "mlm" else 0
    return tables * d + cfg.n_layer * block + of_norm * d + transform


def flops_per_token(cfg, seq_len, head_share=1.0, causal=False):
    """FLOPs of forward and backward per token: 6 per weight in a matmul, and attention's.

    PaLM's convention (arXiv 2204.02311, appendix B) counts the whole seq_len x seq_len attention; causal counts the
    half that a causal model needs. head_share is the share of tokens that go through the head, of masked models the
    masked ones. Recomputation is never counted.
    """
    head = cfg.vocab_size * cfg.n_embd + (cfg.n_embd**2 if cfg.objective == "mlm" else 0)
    attention = 6 if causal and cfg.objective == "clm" else 12
    attention *= cfg.n_layer * cfg.n_head * cfg.head_width * seq_len
    return round(6 * (cfg.n_layer * _matmul_weights(cfg) + head_share * head) + attention)


def _matmul_weights(cfg):
    """Weights in a block's matmuls."""
    of_attention = 2 * (cfg.n_head + cfg.kv_heads) * cfg.head_width
    return cfg.n_embd * (of_attention + (3 if cfg.mlp == "swiglu" else 2) * cfg.inner_width)


def held(optimizer):
    """(parameters, bytes of them, their gradients and the optimizer's state) that this rank holds, all in float32.

    Adafactor's state, one number a row and a column, is left out.
    """
    numbers, n_bytes = 0, 0
    for group in optimizer.param_groups:
        n = sum(local(p).numel() for p in group["params"])
        numbers += n
        n_bytes += 4 * n * (2 + (2 if "betas" in group else 1 if "momentum" in group else 0))
    return numbers, n_bytes


def activation_bytes(cfg, tokens, precision, recomputed="none", head_share=1.0):
    """Bytes, about, that a micro-batch of so many tokens keeps on a device for backward, its logits included."""
    width = 4 if precision == "fp32" else 2
    d, q, kv, f = cfg.n_embd, cfg.n_head * cfg.head_width, cfg.kv_heads * cfg.head_width, cfg.inner_width
    matrices_up = 2 if cfg.mlp == "swiglu" else 1
    of_matmuls = 2 * q + 2 * kv + matrices_up * f  # queries, keys, values, what attention gives, the MLP's width
    whole = width * (of_matmuls + 2 * d + matrices_up * f + 2 * (q - kv)) + 4 * (2 * d + (d if width == 2 else 0))
    whole += 4 * (q + kv) * (cfg.qk_norm + (cfg.position == "rope"))
    kept = {"none": whole, "selective": width * (of_matmuls + 2 * d) + 4 * d, "full": 4 * d}[recomputed]
    again = 0 if recomputed == "none" else whole  # of the one block that is being computed again
    head = min(512, head_share * tokens) * cfg.vocab_size * (4 + width) + 8 * d * tokens  # in chunks of 512 rows
    return tokens * (cfg.n_layer * kept + again) + head


@contextlib.contextmanager
def explaining_out_of_memory(cfg, world):
    """Makes torch's error of memory that ran out a ValueError that names what would fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # of a CPU it is a plain RuntimeError
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        hint = "; the environment's MALLOC_MMAP_THRESHOLD_=65536 gives freed memory back, which costs time"
        text = f"out of memory on rank {world.rank}: {remedies(cfg, world)}{hint if world.device.type == 'cpu' else ''}"
        raise ValueError(text) from error


def remedies(cfg, world):
    """What would fit into this rank's memory, in words: the mildest setting of each kind, and about what it needs."""
    available = memory_bytes(world.device)
    sequences, now = cfg.data.micro_batch_size, cfg.parallel.activation_checkpointing
    copies, shards, tp = (1, 1, 1) if world.mesh is None else world.mesh.shape
    of_state = {"adamw": 16, "muon": 12, "sgd": 12, "adafactor": 8}[cfg.optim.optimizer] * num_params(cfg.model) / tp

    def need(micro_batch_size=sequences, activation_checkpointing=now, shard_size=shards):
        tokens = micro_batch_size * cfg.data.seq_len / tp
        activations = activation_bytes(cfg.model, tokens, world.precision, activation_checkpointing)
        return of_state / shard_size + ALLOCATOR_SLACK * activations

    def told(way):
        flags = " ".join(f"--{name}={value}" for name, value in way.items())
        return f"{flags}{' --strategy=fsdp' * ('shard_size' in way)} (about {need(**way) / 2**30:.2f} GiB)"

    kinds = ("none", "selective", "full")
    ways = {
        "micro_batch_size": [n for n in range(sequences - 1, 0, -1) if sequences % n == 0],
        "activation_checkpointing": kinds[kinds.index(now) + 1 :],
        "shard_size": [shards * copies] if copies > 1 else [],
    }
    fitting = []
    for name, values in ways.items():
        fitting += [{name: value} for value in values if need(**{name: value}) <= available][:1]
    all_of_them = {name: values[-1] for name, values in ways.items() if values}
    text = f"about {need() / 2**30:.2f} GiB are needed, of {available / 2**30:.2f}; "
    if fitting or (all_of_them and need(**all_of_them) <= available):
        return text + "what would fit: " + ", ".join(told(way) for way in fitting or [all_of_them])
    hopeless = f"even {told(all_of_them)} would not fit: " if all_of_them else ""
    return text + hopeless + "take a smaller model, or more devices"


def known_peak(device_name):
    """FLOP/s of the data sheet for a device by its name; None where it is not known."""
    words_of_name = set(device_name.upper().replace("-", " ").split())
    if words_of_name & OTHER_PEAK:
        return None
    return next((tflops * 1e12 for words, tflops in PEAKS.items() if set(words.split()) <= words_of_name), None)


def peak_flops(device, precision):
    """(FLOP/s, where that is from): the data sheet's where the device is known, else what a matmul reaches here."""
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        if (peak := known_peak(name)) is not None:
            return peak, f"{name}, data sheet"
    return measured_matmul_flops(device, precision), f"measured {precision} matmul"


def measured_matmul_flops(device, precision):
    """FLOP/s of a large square matmul on this device, the best of a few."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    n = 1536 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # item waits for the device
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times[1:])
