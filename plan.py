"""What a run costs: parameters, FLOPs, and the peaks they are held against."""

import time

import torch

from optim import local

# Dense tensor-core peaks in TFLOP/s, bf16 (fp16 where there is no bf16), from the makers' data sheets; the first entry
# whose words all stand in the device's name holds.
PEAKS = {
    "GB200": 2500, "B200": 2250, "H200": 989, "H100 PCIE": 756, "H100": 989, "A100": 312, "A10G": 70, "A10": 125,
    "L40S": 362, "L4": 121, "V100": 125, "T4": 65, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
    "MI300X": 1307, "MI250X": 191.5,  # of the MI250X, one of the two dies that torch shows as devices
}  # fmt: skip
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
