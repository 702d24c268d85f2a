"""Plans a model's size, batch, learning rate and steps for a budget of tokens, hours or text."""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from config import UserError, as_dict, comments, load, preset_text
from data import Split, prepare_command
from perf import cost
from perf.settings import kinds_beside

TOKENS_PER_PARAMETER, OF_SMALL_TEXT = 20, 1
EPOCHS, OF_SHORT_TEXT, SHORT_TEXT = 4, 16, 250_000  # the last in tokens
SIZE_LAW = "Chinchilla's 20 tokens a parameter (arXiv 2203.15556); nanochat takes 12 (scripts/base_train.py, 92d63d4)"
SMALL_TEXT_LAW = "1 where a small text is the limit, not the hours: measured (docs/plan.md)"
EPOCH_LAW = "up to 4 epochs, repeated text is worth nearly as much as new text (arXiv 2305.16264)"
SHORT_TEXT_LAW = "of 1, 4 and 16, 16 were best on three texts of 50 KB (docs/plan.md)"
STEP_LAW, TABLE = "Step Law (arXiv 2503.04715)", "GPT-3's table 2.1 (arXiv 2005.14165)"
FIT = "this project's fit to runs of 0.1 to 3 M weights (docs/plan.md)"
CHOSEN = ("n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "batch_tokens", "micro_batch_size", "optimizer",
          "learning_rate", "min_lr", "schedule", "max_steps", "max_tokens", "warmup_steps", "lr_decay_steps")  # fmt: skip
DEPTHS, HEAD = range(1, 97), 64  # a layer more is a head more, of 64: GPT-2 124M has 12 layers, width 768

# log2 of the best learning rate of small models is linear in log2 of these, each relative to CENTER. Fitted to
# tests/learning_rates.csv by tests/test_budget.py.
CENTER = {"n_embd": 64, "n_layer": 4, "batch_tokens": 1024, "max_steps": 200}
RATE_AT_CENTER = 0.0038
EXPONENTS = {"n_embd": -0.77, "n_layer": -0.2, "batch_tokens": 0.38, "max_steps": 0.6}
MEASURED = {"n_embd": (64, 256), "n_layer": (2, 8), "batch_tokens": (256, 4096), "max_steps": (50, 800)}
LARGEST_MEASURED = 4 * 12 * 256**2  # weights in blocks; Step Law and GPT-3's table: from here, to there
FROM_STEP_LAW, TO_STEP_LAW = 46e6, 872e6  # where tests/published_rates.csv agrees with it within a factor of 2.2
GPT3 = (  # parameters, learning rate, tokens a step: arXiv 2005.14165, table 2.1
    (125e6, 6e-4, 0.5e6), (350e6, 3e-4, 0.5e6), (760e6, 2.5e-4, 0.5e6), (1.3e9, 2e-4, 1e6), (2.7e9, 1.6e-4, 1e6),
    (6.7e9, 1.2e-4, 2e6), (13e9, 1e-4, 2e6), (175e9, 0.6e-4, 3.2e6),
)  # fmt: skip
FROM_GPT3 = 2.7e9


def asks(plan):
    """Whether the settings ask what a budget is best spent on."""
    return plan.tokens is not None or plan.hours is not None or plan.preset is not None


def check(cfg):
    """UserError where a budget, or the file to write, cannot be."""
    p, path = cfg.plan, cfg.plan.preset
    rule = "but a budget plans the model itself; leave one of them out"
    wrong = [f"{name} is on, {rule}" for name in kinds_beside(cfg)]
    if cfg.run.init_from:
        wrong.append(f"init_from is {cfg.run.init_from}, but a budget chooses the model's size; leave one of them out")
    if cfg.model.objective != "clm":
        wrong.append(f"objective is {cfg.model.objective}, but the laws for a budget are known for clm alone")
    if "gpu" not in cfg.given:
        wrong.append("a budget needs a GPU, whose speed and memory bound the model; add --gpu=NAME, or --gpu=this")
    if p.tokens is None and p.hours is None and not cfg.data.data_dir:
        wrong.append("preset is set without a budget; add --tokens, --hours or --data_dir")
    if p.tokens and p.tokens < 64:
        wrong.append(f"tokens is {p.tokens}, fewer than the 64 of the shortest step; raise it")
    for folder in filter(None, cfg.data.folders):
        if not os.path.isdir(folder):
            wrong.append(f"data_dir {folder} does not exist; make it: {prepare_command(cfg, folder)}")
    if path and (os.path.lexists(path) or not path.endswith(".py")):
        wrong.append(f"preset is {path}; it must name a new .py file; name another, or remove it")
    if wrong:
        raise UserError(*wrong)


def spend(cfg, figures_of):
    """(settings, figures, the text's tokens or None) of the run whose size and length are nearest to the laws.

    figures_of(settings): them with the best micro-batch, and the planner's figures, or None where nothing fits.
    """
    text, hours = tokens_of_text(cfg), cfg.plan.hours
    limit = cfg.plan.tokens or (epochs_of(text) * text if text else math.inf)
    found = []
    for depth in DEPTHS:
        trial = with_depth(cfg, depth)
        trial = with_length(trial, min(TOKENS_PER_PARAMETER * cost.num_params(trial.model), limit))
        n_params, (_, figures) = cost.num_params(trial.model), figures_of(trial)
        if figures is None:
            break  # nor does a larger one fit
        tokens = min(limit, math.inf if hours is None else tokens_in(hours, figures))
        wanted = n_params * (OF_SMALL_TEXT if text_is_limit(trial, tokens, text) else TOKENS_PER_PARAMETER)
        found.append((abs(math.log(tokens / wanted)), depth, tokens))
        if tokens < wanted / 4:
            break
    if not found:
        raise UserError(f"even one layer does not fit into the memory of {cfg.plan.gpu}; take a larger GPU")
    _, depth, tokens = min(found)
    for _ in range(9):  # the length sets the batch, and that the speed
        chosen, figures = figures_of(with_length(with_depth(cfg, depth), tokens))
        if figures and not (hours and 24 * figures["days"] > hours):
            return chosen, figures, text
        tokens = 0.999 * (tokens_in(hours, figures) if figures else tokens)
    raise UserError(f"hours is {hours:g}, too few for one step of a model of one layer; raise it")


def epochs_of(text):
    """Passes over a text of so many tokens."""
    return OF_SHORT_TEXT if text <= SHORT_TEXT else EPOCHS


def text_is_limit(cfg, tokens, text):
    """Whether a model of a size that was measured reads all epochs of a text."""
    is_small = cfg.model.n_layer * cost.block_weights(cfg.model) <= LARGEST_MEASURED
    return is_small and text and not cfg.plan.tokens and tokens > 0.9 * epochs_of(text) * text


def tokens_in(hours, figures):
    """Tokens that a run reads in so many hours."""
    return figures["tokens"] * hours / (24 * figures["days"])


def tokens_of_text(cfg):
    """Training tokens of the data folders; None without any."""
    vocab_size = cfg.model.vocab_size
    return sum(Split(folder, "train", vocab_size).tokens for folder in cfg.data.folders) if cfg.data.data_dir else None


def with_depth(cfg, depth):
    """Settings of the model with so many layers, each a head wide; its kind of block stays."""
    m, width = cfg.model, depth * HEAD
    n_inner = m.n_inner and 16 * round(m.n_inner / m.n_embd * width / 16)
    sizes = {"n_layer": depth, "n_head": depth, "n_embd": width, "n_inner": n_inner}
    return replace(cfg, model=replace(m, **sizes, n_kv_head=None, head_dim=None))


def with_length(cfg, tokens):
    """Settings that read so many tokens: batch, context, steps and learning rate. At least one step."""
    ranks, batch = cfg.plan.n_gpus // cfg.parallel.ranks_of_sequence, 0.58 * tokens**0.571
    seq_len = cfg.data.seq_len or cfg.model.block_size
    if not {"block_size", "seq_len"} & cfg.given:  # 16 sequences at least, as in the grid
        seq_len = min(seq_len, max(64, 2 ** round(math.log2(batch / 16))))
    batch = seq_len * ranks * 2 ** max(0, round(math.log2(batch / (seq_len * ranks))))
    steps = max(1, int(tokens // batch))
    cfg = replace(
        cfg,
        model=replace(cfg.model, block_size=max(seq_len, cfg.model.block_size * ("block_size" in cfg.given))),
        data=replace(cfg.data, seq_len=seq_len, batch_tokens=batch, micro_batch_size=batch // (seq_len * ranks)),
    )
    rate = float(f"{learning_rate(cfg, steps)[0]:.2g}")
    same = {"optimizer": "adamw", "schedule": "cosine", "min_lr": 0.0, "max_tokens": None, "lr_decay_steps": None}
    optim = replace(cfg.optim, **same, learning_rate=rate, max_steps=steps, warmup_steps=min(2000, steps // 10))
    return replace(cfg, optim=optim)


def learning_rate(cfg, steps):
    """(the best peak learning rate of a run with AdamW, where the number comes from), by the weights in blocks."""
    run = vars(cfg.model) | vars(cfg.data) | {"max_steps": steps}
    weights = cfg.model.n_layer * cost.block_weights(cfg.model)
    fit, outside = RATE_AT_CENTER, []
    for name, (low, high) in MEASURED.items():
        fit *= (min(max(run[name], low), high) / CENTER[name]) ** EXPONENTS[name]
        outside += [] if low <= run[name] <= high else [f"{name} {low} to {high}"]
    fitted = FIT + (f"; held at the end of what was measured: {', '.join(outside)}" if outside else "")
    law = 1.79 * weights**-0.713 * (steps * run["batch_tokens"]) ** 0.307
    table = math.exp(np.interp(math.log(weights), *(np.log([row[i] for row in GPT3]) for i in (0, 1))))
    known = [(0, fit, fitted), (LARGEST_MEASURED, fit, FIT), (FROM_STEP_LAW, law, STEP_LAW)]
    known += [(TO_STEP_LAW, law, STEP_LAW), (FROM_GPT3, table, TABLE), (math.inf, table, TABLE)]
    i = next(i for i, (most, *_) in enumerate(known) if weights <= most)
    (low, rate, source), (high, next_rate, next_source) = known[i - 1], known[i]
    if i % 2:
        return rate, source
    share = math.log(weights / low) / math.log(high / low)
    return rate ** (1 - share) * next_rate**share, f"between {source} and {next_source}; not measured at this size"


def report_budget(cfg, gpu, f, text):
    """Yields the lines of a budget's best run, each number with its source."""
    p, o, n_params = cfg.plan, cfg.optim, f["n_params"]
    weights = cfg.model.n_layer * cost.block_weights(cfg.model)
    steps = f"{o.max_steps:,} steps of {cfg.data.batch_tokens:,} tokens at learning rate {o.learning_rate:g}"
    layers = f"{cfg.model.n_layer} layer{'s' * (cfg.model.n_layer > 1)}, width {cfg.model.n_embd}"
    hours = f"{24 * f['days']:.3g}{f' of {p.hours:g}' if p.hours else ''} hours"
    yield f"answer     {layers}, {n_params / 1e6:,.2f} M parameters; {steps}: {hours} on {f['n_gpus']} x {gpu.name}"
    law = SMALL_TEXT_LAW if text_is_limit(cfg, f["tokens"], text) else SIZE_LAW
    yield f"size       {f['tokens'] / n_params:.3g} tokens a parameter; {law}"
    yield f"batch      {STEP_LAW}: 0.58 x tokens^0.571, then a power of two of sequences of {cfg.data.seq_len}"
    yield f"rate       {learning_rate(cfg, o.max_steps)[1]}"
    if LARGEST_MEASURED < weights < FROM_GPT3:
        n, rate, batch = min(GPT3, key=lambda row: abs(math.log(row[0] / n_params)))
        yield f"           more careful: {rate:g}, with {batch:,.0f} tokens a step, {n / 1e6:,g} M parameters, {TABLE}"
    warmup = f"{o.warmup_steps:,} steps, a tenth as in the fit's runs, at most Llama's 2,000 (arXiv 2302.13971)"
    yield f"           AdamW, cosine to {o.min_lr:g}; warmup {warmup}"
    if text:
        yield f"epochs     {f['tokens'] / text:.3g} of the text's {text:,} tokens; {SHORT_TEXT_LAW if text <= SHORT_TEXT else EPOCH_LAW}"
    if replaced := [name for name in CHOSEN if name in cfg.given]:
        yield f"replaced   {', '.join(replaced)}: a budget's plan chooses them"
    fill = f"{f['memory_gib']['reserved']:.3g} of {f['memory_gib']['available']:.3g} GiB"
    speed = f"{f['tokens_per_s']:,.0f} tokens/s, micro-batch {f['micro_batch_size']}, {fill}"
    yield f"speed      {speed}: the planner's formulas (docs/plan.md)"


def write(cfg, lines):
    """Writes a run's settings as a preset, the report as its comment; returns the command that trains by it."""
    plain, values, path = as_dict(load(type(cfg), [])), as_dict(cfg), Path(cfg.plan.preset)
    others = {*vars(cfg.plan), *vars(cfg.output)} | ({"seq_len"} if cfg.data.seq_len == cfg.model.block_size else set())
    chosen = {*CHOSEN, "block_size"}
    changed = {k: v for k, v in values.items() if k not in others and (v != plain[k] or k in chosen and v is not None)}
    every = max(1, cfg.optim.max_steps // 10)
    text = "".join(f"# {line}\n" for line in lines) + "\n" + preset_text(changed, comments(type(cfg)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + f"eval_interval = {every}\nsave_interval = {every}\n", encoding="utf-8")
    return f"python train.py {path}" + ("" if cfg.data.data_dir else " --data_dir=FOLDER")
