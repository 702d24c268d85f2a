"""How hardware.py's rates were found, and how far the planner is off: python tests/fit_rates.py

Rates of H100 and A100 are fitted to llm-foundry's table; CONTENTION, the memory factor of COMPILED_AMPERE and LAYER_S
are read off the grids that this prints. Other code gets one number, its efficiency, the one that makes its largest
error smallest.
"""

import csv
import sys
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import ModelConfig
from perf import cost, hardware, timing
from perf.hardware import DEVICES, Rates

PUBLISHED = Path(__file__).parent / "published.csv"
FITTED = {"hopper": ("h100-sxm",), "ampere": ("a100-80", "a100-40")}  # llm-foundry's GPUs
CARDS = {  # in published rows only
    "a100-40-pcie": replace(DEVICES["a100-40"], link_gbs=31, watts=250),
    "h100-96-500w": replace(DEVICES["h100-sxm"], memory_gib=96, memory_gbs=2400, watts=500),  # torchtitan's
}


def model_of(row):
    """The model of a published row."""
    numbers = ("n_layer", "n_embd", "n_head", "n_kv_head", "n_inner", "vocab_size")
    modern = {"norm": "rmsnorm", "position": "rope", "bias": False} if row["mlp"] == "swiglu" else {}
    return ModelConfig(
        **{name: int(row[name]) for name in numbers if row[name]},
        block_size=int(row["seq_len"]),
        mlp="swiglu" if row["mlp"] == "swiglu" else "gelu",
        objective=row["objective"] or "clm",
        tie_embeddings=row["tie_embeddings"] != "0",
        **modern,
    )


def setup_of(row):
    """The Setup of a published row; other projects keep the residual stream in bf16."""
    n_gpus, tp = int(row["n_gpus"]), int(row["tp"] or 1)
    data_ranks = n_gpus // tp
    shards = 1 if row["strategy"] == "ddp" else min(int(row["shard_size"] or data_ranks), data_ranks)
    return cost.Setup(
        seq_len=int(row["seq_len"]),
        micro_batch_size=int(row["micro_batch_size"]),
        micro_steps=int(row["micro_steps"] or 1),
        replicas=data_ranks // shards,
        shards=shards,
        tp=tp,
        strategy=row["strategy"],
        reshard=row["reshard"] != "0",
        accumulate=row["accumulate"] or "sharded",
        checkpointing=row["activation_checkpointing"] or "none",
        compiled=row["compiled"] == "1",
        head_share=float(row["head_share"] or 1),
        gradient_bytes=float(row["grad_bytes"] or 4),
        residual_bytes=2,
        tp_hidden=float(row["tp_hidden"] or 0),
    )


def gpu_of(row):
    """The Device of a published row, with its network where it was published."""
    gpu = DEVICES.get(row["gpu"]) or CARDS[row["gpu"]]
    return replace(gpu, network_gbs=float(row["network_gbit_s"]) / 8) if row["network_gbit_s"] else gpu


def read_published(path=PUBLISHED):
    """The scored rows: [(row, measured seconds a step)], of whole trainings their GPU-hours over their tokens."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["scored"] == "yes"]
    found = []
    for row in rows:
        s = setup_of(row)
        tokens = s.tokens * s.micro_steps * s.replicas * s.shards
        seconds = float(row["step_s"] or 0)
        found.append((row, seconds or float(row["gpu_hours"]) * 3600 / s.ranks * tokens / float(row["tokens_total"])))
    return found


def predicted(row, rates=None, efficiency=1.0):
    """Seconds of a step of a published row."""
    per_node = int(row["gpus_per_node"] or 8)
    return sum(timing.step_seconds(model_of(row), setup_of(row), gpu_of(row), per_node, efficiency, rates).values())


def log_ratios(rows, rates=None, efficiency=1.0):
    """log(predicted / measured) of rows."""
    return np.array([np.log(predicted(row, rates, efficiency) / seconds) for row, seconds in rows])


def fitted(rows):
    """Rates that fit rows best: Gauss-Newton on logarithms, errors beyond 8 % weighing as their size, not squared."""
    x = np.log([0.8, 0.3, 0.4])
    for _ in range(40):
        r = -log_ratios(rows, Rates(*np.exp(x)))
        moved = [log_ratios(rows, Rates(*np.exp(x + h))) + r for h in 1e-3 * np.eye(3)]
        slopes, weight = np.stack(moved, 1) / 1e-3, np.minimum(1, 0.08 / np.maximum(abs(r), 1e-9))
        step = np.linalg.solve(slopes.T @ (weight[:, None] * slopes) + 1e-6 * np.eye(3), slopes.T @ (weight * r))
        x += np.clip(step, -0.3, 0.3)
        if abs(step).max() < 1e-4:
            break
    return Rates(*np.exp(x))


def left_out_errors(rows):
    """Relative errors of rows, each predicted by a fit that has seen no row of its model size."""
    sizes = [(row["n_layer"], row["n_embd"]) for row, _ in rows]
    errors = np.zeros(len(rows))
    for size in set(sizes):
        rates = fitted([row for row, other in zip(rows, sizes) if other != size])
        inside = [i for i, other in enumerate(sizes) if other == size]
        errors[inside] = np.expm1(log_ratios([rows[i] for i in inside], rates))
    return errors


def best_efficiency(rows):
    """The one efficiency of a code that makes its largest relative error smallest, by bisection."""
    low, high = 0.1, 10.0
    for _ in range(30):
        middle = np.sqrt(low * high)
        errors = np.expm1(log_ratios(rows, efficiency=middle))
        low, high = (middle, high) if errors.max() > -errors.min() else (low, middle)
    return middle


# One H100 80GB SXM, torch 2.11, bf16, random tokens. Prototypes of this code as one compiled graph, captured as a CUDA
# graph but for 1558M: (model, tokens a sequence, sequences, micro-steps, bytes per number of the residual stream,
# whether clipping and AdamW are included, milliseconds).
GPT2 = {"vocab_size": 50257}
MODELS = {
    "124M": ModelConfig(**GPT2),
    "1558M": ModelConfig(**GPT2, n_layer=48, n_head=25, n_embd=1600),
    "6 x 384": ModelConfig(vocab_size=256, block_size=256, n_layer=6, n_head=6, n_embd=384),
    "BERT base": ModelConfig(
        vocab_size=30522, block_size=512, norm_position="post", mlp="gelu", n_token_types=2, objective="mlm"
    ),
}
PROTOTYPES = (
    ("124M", 1024, 16, 1, 4, False, 33.7), ("124M", 1024, 16, 1, 2, False, 31.9),
    ("1558M", 1024, 8, 1, 2, False, 179.3),
    ("BERT base", 128, 128, 1, 4, True, 27.5), ("BERT base", 128, 16, 8, 4, True, 49.5),
    ("6 x 384", 256, 64, 1, 4, True, 5.84),
)  # fmt: skip
# The same without graphs, where the host is the limit: (model, tokens, sequences, micro-steps, how launched,
# milliseconds). BERT base at 32 sequences is train.py's step at a7f8210, by bench.py: 326 to 378; 6 x 384: 24 to 27.
LAUNCHED = (
    ("6 x 384", 256, 64, 1, "blocks", 24.0), ("6 x 384", 256, 64, 1, "blocks", 27.0),
    ("6 x 384", 256, 64, 1, "segments", 20.4), ("BERT base", 128, 32, 8, "blocks", 326.0),
    ("BERT base", 128, 16, 8, "blocks", 255.6), ("BERT base", 128, 16, 8, "segments", 223.6),
    ("BERT base", 128, 128, 1, "blocks", 38.1), ("BERT base", 128, 128, 1, "segments", 35.8),
    ("124M", 1024, 16, 1, "blocks", 40.4),
)  # fmt: skip


def timings_of_one_h100():
    """[(name, measured milliseconds, predicted / measured - 1)] of PROTOTYPES, and of LAUNCHED."""
    tables = []
    for table in (PROTOTYPES, LAUNCHED):
        tables.append([])
        for name, T, B, micro_steps, *how, ms in table:
            share = 1 / 6 if name == "BERT base" else 1.0
            setup = cost.Setup(T, B, micro_steps, compiled=True, cuda_graphs=True, head_share=share)
            if table is PROTOTYPES:
                setup = replace(setup, residual_bytes=how[0])
            else:
                setup = replace(setup, cuda_graphs=False, strategy="fsdp" if how[0] == "blocks" else "ddp")
                assert setup.launched == how[0]
            parts = timing.step_seconds(MODELS[name], setup, DEVICES["h100-sxm"])
            left_out = 0.0 if how[-1] else parts["optimizer_s"]
            error = 1e3 * (sum(parts.values()) - left_out) / ms - 1
            tables[-1].append((f"{name}, {micro_steps} x {B} x {T}, {how[0]}", ms, error))
    return tables


def of_group(rows, *groups, gpus=None):
    """Rows of some groups, and of some GPUs."""
    return [r for r in rows if r[0]["group"] in groups and (gpus is None or r[0]["gpu"] in gpus)]


def errors_text(errors):
    """median, 90th percentile and largest absolute error, in percent."""
    sizes = 100 * abs(np.asarray(errors))
    return f"{np.median(sizes):6.1f} {np.quantile(sizes, 0.9):6.1f} {sizes.max():6.1f}"


# KF11 fills 128 of 141 GiB and is slower than KF10, the same model on four times as many GPUs. Of NVIDIA's BERT, BE3
# and BE7 count padding, half of Wikipedia's 512 (arXiv 2107.02027), that is faster than their 128 without it could be.
OUTLIERS = {"KF11", "BE3", "BE7"}


def table_of_groups(rows):
    """Lines: of each group its rows, its efficiency, errors in percent with it, and with an efficiency of 1."""
    yield f"{'group':<17} {'rows':>4} efficiency  {'with it':^20}  {'with 1':^20}  median, 90th percentile, largest, %"
    for group in dict.fromkeys(row["group"] for row, _ in rows):
        some = of_group(rows, group)
        some = [r for r in some if r[0]["step_s"]] or some  # steps, not whole trainings with their stops
        efficiency = 1.0 if group == "llm-foundry" else best_efficiency(some)
        own, one = (errors_text(np.expm1(log_ratios(some, efficiency=e))) for e in (efficiency, 1.0))
        yield f"{group:<17} {len(some):4} {efficiency:10.2f}  {own:>20}  {one:>20}"
    others = [r for r in rows if r[0]["step_s"] and r[0]["group"] != "llm-foundry"]
    kept = [r for r in others if r[0]["id"] not in OUTLIERS]
    by_group = [of_group(kept, group) for group in dict.fromkeys(row["group"] for row, _ in kept)]
    own = np.concatenate([np.expm1(log_ratios(some, efficiency=best_efficiency(some))) for some in by_group])
    yield f"other code, without {', '.join(sorted(OUTLIERS))}: {len(kept)} rows, {errors_text(own)} with its efficiency"
    yield f"other code: {len(others)} rows, {errors_text(np.expm1(log_ratios(others)))} with 1"


def main():
    rows = read_published()
    print("llm-foundry: rates (matmul, attention, memory); errors in %: median, 90th percentile, largest | left out")
    for gpus in (*FITTED.values(), ("a100-80",), ("a100-40",)):
        some = of_group(rows, "llm-foundry", gpus=gpus)
        rates = fitted(some)
        inside, outside = errors_text(np.expm1(log_ratios(some, rates))), errors_text(left_out_errors(some))
        print(f"  {' + '.join(gpus):18s} {len(some):3d} rows {np.round(astuple(rates)[:3], 3)} {inside} | {outside}")
    print("contention: errors as above, sizes left out, of H100 | A100")
    kept = cost.CONTENTION
    for cost.CONTENTION in (0, 0.5, 1.0, 1.5, 2.0):
        tables = [of_group(rows, "llm-foundry", gpus=gpus) for gpus in FITTED.values()]
        print(f"  {cost.CONTENTION:4.2f} " + " | ".join(errors_text(left_out_errors(table)) for table in tables))
    cost.CONTENTION = kept
    plain = [r for r in rows if setup_of(r[0]).compiled and setup_of(r[0]).tp == 1]
    plain = [r for r in plain if gpu_of(r[0]).family == "ampere"]
    print(f"compiled, memory's factor: bias, mean absolute logarithm of {len(plain)} rows of A100")
    kept = hardware.COMPILED_AMPERE
    for factor in (1, 1.25, 1.5, 1.75, 2, 2.5):
        hardware.COMPILED_AMPERE = (*kept[:2], factor)
        logs = log_ratios(plain)
        print(f"  {factor:4.2f} {100 * np.expm1(np.median(logs)):+5.1f} % {np.mean(np.abs(logs)):.3f}")
    hardware.COMPILED_AMPERE = kept
    print("a layer's milliseconds on next to no data: largest error in % of the prototypes on one H100")
    kept = hardware.LAYER_S
    for ms in (0.2, 0.25, 0.29, 0.35, 0.4):
        hardware.LAYER_S = ms / 1e3
        print(f"  {ms:4.2f} {100 * max(abs(error) for _, _, error in timings_of_one_h100()[0]):5.1f}")
    hardware.LAYER_S = kept
    print(
        "one H100: milliseconds, error in %",
        *(f"  {name:34} {ms:6.1f} {100 * error:+5.1f}" for table in timings_of_one_h100() for name, ms, error in table),
        sep="\n",
    )
    print(*table_of_groups(rows), sep="\n")
    print("GPU-hours of whole trainings: million hours, predicted with efficiency 1 and no time lost, error in %")
    for row, seconds in rows:
        if row["gpu_hours"]:
            hours, error = float(row["gpu_hours"]) / 1e6, predicted(row) / seconds - 1
            print(f"  {row['id']} {row['group']:16s} {hours:.3f} {hours * (1 + error):.3f} {100 * error:+.0f}")


if __name__ == "__main__":
    main()
