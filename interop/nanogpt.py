"""nanoGPT's checkpoints as runs."""

import itertools
import json
import math
import pickle
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import CheckpointConfig
from config import UserError
from data import DataConfig, sha256
from interop.families import GPT2, tensors_of
from interop.hub import is_plain, load_plain
from model import ModelConfig, parameter_shapes
from optim import OptimConfig
from run.folder import RunConfig, writing_to
from run.log import LogConfig
from run.resume import check_is_new, write_run
from text.tokenizer import load_tokenizer, write_character_tokenizer

MODEL_ARGS = {
    "n_layer": int, "n_head": int, "n_embd": int, "block_size": int, "vocab_size": int, "bias": bool, "dropout": float,
}  # fmt: skip
SETTINGS = {
    "dataset": str, "gradient_accumulation_steps": int, "batch_size": int, "eval_interval": int, "eval_iters": int,
    "log_interval": int, "learning_rate": float, "min_lr": float, "decay_lr": bool, "max_iters": int,
    "warmup_iters": int, "lr_decay_iters": int, "grad_clip": float, "device": str, "dtype": str, "wandb_log": bool,
    "wandb_project": str, "wandb_run_name": str,
}  # fmt: skip
KEYS = {"model": dict, "optimizer": dict, "model_args": dict, "iter_num": int, "best_val_loss": float, "config": dict}
GPT2_SIZES = (50257, 50304)  # the vocabulary of GPT-2's tokenizer, and nanoGPT's rounding of it


def import_nanogpt(path, out_dir, tokenizer=None):
    """Turns nanoGPT's ckpt.pt into a run in out_dir, to sample from or to continue; returns lines to print.

    `train.py out_dir/config.py` continues with nanoGPT's weights and moments, but in our order of the data, which
    nanoGPT draws at random. tokenizer: the data's meta.pkl, or what load_tokenizer takes; None: gpt2 for a vocabulary
    of its size. No code in the files runs. UserError where they are not nanoGPT's, or out_dir holds a run. Checkpoints
    from before June 2023 may have been trained with the tanh GELU, which they do not record.
    """
    check_is_new(out_dir)
    saved = _load(path)
    try:
        cfg = ModelConfig(mlp="gelu", **saved["model_args"])
        tensors, (decayed, _) = _tensors(saved, cfg)
        preset, lines = _preset(saved["config"], decayed, cfg, saved["iter_num"])
    except UserError as error:
        raise UserError(f"{path}: {'; '.join(error.args)}") from error
    preset["out_dir"] = str(out_dir)
    step, val_loss = saved["iter_num"], saved["best_val_loss"]
    state = {"step": step, "sequences_seen": step * preset["batch_tokens"] // cfg.block_size, "val_loss": val_loss}
    facts = {"model": asdict(cfg), "state": state, "settings": preset, "scaler": {}, "val_loss": val_loss}
    with writing_to(out_dir):
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        lines += _keep_tokenizer(tokenizer, cfg.vocab_size, out_dir)
    write_run(out_dir, step, tensors, facts, preset)
    return lines


def _load(path):
    """The checkpoint that nanoGPT's train.py saved, with its types checked and its weights by their plain names."""
    saved = _typed(load_plain(path), KEYS, path)
    if saved["iter_num"] < 1:
        raise UserError(f"{path} has iter_num {saved['iter_num']}; nanoGPT saves after step 1 at the earliest")
    # torch.compile adds a prefix to names; old files have a causal mask.
    weights = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()}
    saved["model"] = {name: tensor for name, tensor in weights.items() if not name.endswith(".attn.bias")}
    for name, kinds in (("model_args", MODEL_ARGS), ("config", SETTINGS)):
        saved[name] = _typed(saved[name], kinds, f"{path}: {name}")
    n_layer, found = saved["model_args"]["n_layer"], sum(name.endswith(".c_attn.weight") for name in weights)
    if found != n_layer:
        raise UserError(f"{path} has n_layer {n_layer} in model_args, but weights of {found} layers")
    return saved


def _typed(values, kinds, where):
    """The values that `kinds` names, checked and converted to their types; UserError where one is missing or wrong."""
    if missing := [name for name in kinds if name not in values]:
        raise UserError(f"{where} lacks {', '.join(missing)}, which nanoGPT's train.py saves; name its ckpt.pt")
    typed = {}
    for name, kind in kinds.items():
        value = values[name]
        value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        is_number = type(value) in (int, float) and math.isfinite(value) and (kind is float or value == int(value))
        if not (is_number if kind in (int, float) else isinstance(value, kind)):
            shown = repr(str(value)[:40])
            raise UserError(f"{where} has {name} {shown}, where nanoGPT has a value of type {kind.__name__}")
        typed[name] = kind(value)
    return typed


def _preset(theirs, decayed, cfg, step):
    """nanoGPT's settings under our names, and lines on those that differ.

    decayed: the optimizer's first group, whose settings nanoGPT continues with, whatever its config says.
    """
    sequences = theirs["gradient_accumulation_steps"] * theirs["batch_size"]  # over all processes
    floor = min(theirs["min_lr"], theirs["learning_rate"])
    preset = asdict(cfg) | {
        "data_dir": f"data/{theirs['dataset']}", "seq_len": cfg.block_size, "batch_tokens": sequences * cfg.block_size,
        "micro_batch_size": theirs["batch_size"],
        "eval_tokens": theirs["eval_iters"] * theirs["batch_size"] * cfg.block_size,
        "optimizer": "adamw", "learning_rate": theirs["learning_rate"], "max_steps": theirs["max_iters"],
        "weight_decay": decayed["weight_decay"], "beta1": decayed["betas"][0], "beta2": decayed["betas"][1],
        "grad_clip": theirs["grad_clip"] or None, "seed": 1337, "eval_interval": theirs["eval_interval"],
        "save_interval": theirs["eval_interval"], "log_interval": theirs["log_interval"],
        # nanoGPT's bf16 or fp16 is the machine's fastest, as auto is here; on a CPU it computes in float32.
        "precision": "fp32" if theirs["dtype"] == "float32" or theirs["device"] == "cpu" else "auto",
    }  # fmt: skip
    if theirs["wandb_log"]:
        preset |= {"log_to": ("wandb",)} | {name: theirs[name] for name in ("wandb_project", "wandb_run_name")}
    lines, warmup = [], theirs["warmup_iters"]
    if theirs["decay_lr"]:
        preset |= {"schedule": "cosine", "min_lr": floor, "warmup_steps": warmup}
        preset["lr_decay_steps"] = theirs["lr_decay_iters"]
        if floor < theirs["min_lr"]:
            lines.append(f"min_lr is {floor}, the learning_rate: nanoGPT's {theirs['min_lr']} is above it")
        if step < warmup:
            lines.append(f"to step {warmup} the learning rate is 1/{warmup} above nanoGPT's; after that it is the same")
    else:  # nanoGPT's warm-up is part of its decay
        preset |= {"schedule": "constant", "min_lr": 0.0, "warmup_steps": 0}
    for owner in (DataConfig, OptimConfig, RunConfig, CheckpointConfig, LogConfig):  # they refuse impossible values
        owner(**{field.name: preset[field.name] for field in fields(owner) if field.name in preset})
    if not (Path(preset["data_dir"]) / "train.bin").exists():
        lines.append(f"to train on, link or copy nanoGPT's {preset['data_dir']} here as it is, or give --data_dir=")
    return preset, lines


def _tensors(saved, cfg):
    """{name: tensor}, by checkpoint.py's names, and the optimizer's groups."""
    weights, parameters = saved["model"], _parameters(cfg)
    shapes = {name: shape for name, (shape, _) in parameters.items()}
    _check_shapes(shapes | {"lm_head.weight": shapes["transformer.wte.weight"]}, weights)
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise UserError("lm_head.weight is not transformer.wte.weight, which in nanoGPT are one")
    # AdamW's two groups are the matrices and the rest, each in the order of the model's parameters.
    names = [[name for name in shapes if (len(shapes[name]) > 1) == is_matrix] for is_matrix in (True, False)]
    groups, state = _groups(saved["optimizer"], [len(group) for group in names])
    tensors = {}
    for name, (_, parts) in parameters.items():
        tensors |= {f"model.{ours}": part for ours, part in _split(weights[name], parts, cfg)}
    for i, name in enumerate(itertools.chain(*names)):
        shape, parts = parameters[name]
        moments = {"exp_avg": shape, "exp_avg_sq": shape, "step": ()}
        _check_shapes(moments, state[i] if isinstance(state.get(i), dict) else {}, f"the optimizer's {name} ")
        for ours in parts:
            tensors[f"optimizer.state.{ours}.step"] = state[i]["step"].float().clone()  # no two may share memory
        for moment in ("exp_avg", "exp_avg_sq"):
            for ours, part in _split(state[i][moment], parts, cfg):
                tensors[f"optimizer.state.{ours}.{moment}"] = part
    return tensors, groups


def _parameters(cfg):
    """{name: (shape, {our name: shape} of its parts)} of nanoGPT's parameters, in its order, which is ours.

    It has Hugging Face's names for GPT-2, but its matrices are (out, in).
    """
    by_part = {next(iter(theirs.ours)): theirs for theirs in tensors_of(GPT2, cfg)}
    found = [by_part[name] for name in parameter_shapes(cfg) if name in by_part]
    return {s.name: (tuple(s.shape[::-1] if s.is_transposed else s.shape), s.ours) for s in found}


def _check_shapes(shapes, tensors, owner=""):
    """UserError with the first tensor that is missing, unexpected, or has another shape or dtype."""
    for name in [*shapes, *(name for name in tensors if name not in shapes)]:
        tensor, wanted = tensors.get(name), shapes.get(name)
        is_sound = is_plain(tensor) and tensor.is_floating_point()
        found = tuple(tensor.shape) if is_sound else "nothing" if tensor is None else "no tensor of floats"
        if found != wanted:
            by_args = "is not expected" if wanted is None else f"by model_args is {wanted}"
            raise UserError(f"{owner}{name} {by_args}, and there is {found}; weights and model_args disagree")


def _groups(optimizer, sizes):
    """The optimizer's two groups and {number of a parameter: its state}; UserError where they are not nanoGPT's.

    sizes: the numbers of parameters in the groups.
    """
    try:
        groups, state = optimizer["param_groups"], optimizer["state"]
        first, second = groups
        (beta1, beta2), decay = first["betas"], first["weight_decay"]
        numbers, found = [*first["params"], *second["params"]], [len(group["params"]) for group in groups]
        are_sound = isinstance(state, dict) and all(type(value) in (int, float) for value in (beta1, beta2, decay))
        are_sound = are_sound and numbers == [*range(len(numbers))] and second["weight_decay"] == 0
        are_sound = are_sound and first["eps"] == 1e-8 and not first.get("amsgrad")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"its optimizer is no AdamW of torch's in two groups ({type(error).__name__})") from error
    if not are_sound:
        raise UserError("its optimizer is not nanoGPT's AdamW: eps 1e-8, no amsgrad, weight_decay of matrices alone")
    if found != sizes:
        what = f"its optimizer's groups have {found} parameters, where nanoGPT has {sizes}"
        raise UserError(f"{what}; checkpoints from before May 2023, with another GELU, are not supported")
    return groups, state


def _split(tensor, parts, cfg):
    """Yields (our name, tensor) for the parts of one of nanoGPT's parameters or moments: views, unless padded."""
    for name, part in zip(parts, tensor.float().split([rows for rows, *_ in parts.values()])):
        padding = cfg.padded_vocab_size - cfg.vocab_size if name == "wte.weight" else 0
        yield name, F.pad(part, (0, 0, 0, padding)) if padding else part


# ---- its tokenizer


def _keep_tokenizer(tokenizer, vocab_size, out_dir):
    """Writes meta.json, and the tokenizer's file if it has one, into the run's folder; returns lines to print."""
    if tokenizer is None and vocab_size not in GPT2_SIZES:
        remedy = 'give nanoGPT\'s, as in --nanogpt_tokenizer=data/NAME/meta.pkl, or write {"tokenizer": NAME} into'
        return [f"its tokenizer is unknown, so it cannot be sampled from; {remedy} {Path(out_dir) / 'meta.json'}"]
    file, name = Path(out_dir) / "tokenizer.json", tokenizer or "gpt2"
    if name.endswith(".pkl"):
        characters = read_characters(tokenizer)
        if len(characters) != vocab_size:
            raise UserError(f"{tokenizer} has {len(characters)} characters, the model a vocab_size of {vocab_size}")
        write_character_tokenizer(characters, file)
        name = file.name
    elif tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        if loaded.vocab_size > vocab_size:
            raise UserError(f"tokenizer {name} has {loaded.vocab_size} ids, the model a vocab_size of {vocab_size}")
        if loaded.saved is not None:
            loaded.save(file)
            name = file.name
    meta = {"tokenizer": name} | ({"tokenizer_sha256": sha256(file)} if name == file.name else {})
    (Path(out_dir) / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return []


class _PlainUnpickler(pickle.Unpickler):
    """Reads only numbers, strings, lists and dicts: a pickle reaches anything else by looking up a name."""

    def find_class(self, module, name):
        raise UserError(f"it wants to call {module}.{name}")


def read_characters(path):
    """The characters, in the order of their ids, in the meta.pkl of nanoGPT's character-level data.

    UserError where the file is anything else; code in the pickle does not run.
    """
    try:
        with open(path, "rb") as file:
            itos = _PlainUnpickler(file).load()["itos"]
        characters = [itos[i] for i in range(len(itos))]
    except Exception as error:  # whatever a damaged pickle raises
        raise UserError(f"{path} is no meta.pkl of nanoGPT's ({type(error).__name__}: {error})") from error
    if not all(isinstance(c, str) and len(c) == 1 for c in characters) or len(set(characters)) < len(characters):
        raise UserError(f"{path} has ids that are not one character each, all different; give another meta.pkl")
    return characters
