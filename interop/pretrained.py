"""Initial weights, from a run or from a Hugging Face model, behind one interface."""

import contextlib
from dataclasses import fields, replace
from pathlib import Path

import torch

from checkpoint import (
    ATTEMPTS,
    Removed,
    checkpoints,
    config_of_checkpoint,
    context_of,
    newest_checkpoint,
    read_manifest,
    reading,
    tensor_reader,
)
from config import UserError, preset_value
from data import prepare_command, seq_len_of, vocab_size_of
from interop.families import family_of, resolved, tensors_of
from interop.hub import HubModel, folder_of, open_tensors, read_config, save_tensors
from model import TRAINING_ONLY, ModelConfig, parameter_shapes
from run.folder import run_dir_of, tokenizer_of, writing_to
from text.tokenizer import load_tokenizer

EXTRA_FILE = "carried.safetensors"
SOME_TEXT = "Two words, 3 dots..."


class RunModel:
    """The model of a run's newest checkpoint, read a tensor at a time, with HubModel's interface.

    cfg.block_size is the longest sequence that it was trained on, which bounds sampling, scores and exports.
    """

    dtype = "float32"

    def __init__(self, run_dir, world=None):
        self.folder, self.path = Path(run_dir), newest_checkpoint(run_dir, world)
        with reading(self.path):
            self.manifest = read_manifest(self.path)
        whole = config_of_checkpoint(self.path, self.manifest)
        # A tensor by its name, whole; UserError where the checkpoint is damaged, Removed where it has gone.
        self.read = tensor_reader(self.path, whole)
        self.name = f"{run_dir}, step {self.manifest['step']}"
        self.cfg = replace(whole, block_size=context_of(self.manifest, whole))
        if self.cfg != whole:
            self.name += f", trained on sequences of {self.cfg.block_size} tokens (block_size {whole.block_size})"

    def load_tokenizer(self):
        """The tokenizer of the run's data; UserError where it is unknown."""
        return load_tokenizer(tokenizer_of(self.folder))

    @property
    def extra(self):
        """{name: tensor}: extra tensors of the Hugging Face model that the run started from."""
        path = self.folder / EXTRA_FILE
        return open_tensors(path) if path.exists() else {}


def model_location(cfg):
    """Where a command's model is: init_from, or the run in out_dir or under the last preset's name.

    The run comes first where a preset names init_from, since the run starts there, and the run has a checkpoint.
    """
    run_dir = run_dir_of(cfg)
    has_begun = run_dir is not None and bool(checkpoints(run_dir))
    if cfg.run.init_from and not (has_begun and preset_value(cfg.presets, "init_from") == cfg.run.init_from):
        return cfg.run.init_from
    if run_dir is None:
        raise UserError("out_dir is none; name the folder of a trained run, as in --out_dir=out/quickstart")
    if not has_begun:  # a run's folder is never a name on the hub
        there = "holds no checkpoint of flatlm's (ckpt/step_*)" if Path(run_dir).is_dir() else "does not exist"
        raise UserError(f"{run_dir} {there}; train.py makes one, in its out_dir; --init_from= names other models")
    return run_dir


def open_model(where, world=None):
    """The model of a run's folder, which has checkpoints, or of a Hugging Face folder or name."""
    return RunModel(where, world) if checkpoints(where) else HubModel(folder_of(where))


def with_model(where, use, world=None):
    """use(the opened model), again with a newer checkpoint where the run that writes them removes the one being read."""
    for _ in range(ATTEMPTS):
        answer = removed = None
        try:
            answer = use(open_model(where, world))
        except Removed as error:
            removed = error
        if not any(world.gather(bool(removed)) if world else [removed]):
            return answer
    raise removed or Removed(f"the checkpoints of {where} were removed while they were read; try again")


def starting_config(where, wanted, given):
    """The settings of a model that starts from weights: the weights' own, with block_size and training's as wanted.

    given: names of the settings that the user has set. UserError where one of them differs from the weights' own, or
    block_size exceeds their longest sequence. Of several objectives the first one, clm or mlm, must be theirs.
    """
    if checkpoints(where):
        source = run_config(where)
        longest = source.block_size if source.position == "learned" else None
    else:
        _, source, longest = read_config(folder_of(where))
    automatic = {"vocab_size"} if wanted.vocab_size is None else set()
    free = TRAINING_ONLY | {"block_size", "pooling"}
    names = ({field.name for field in fields(ModelConfig)} & set(given) - automatic) | TRAINING_ONLY
    cfg = replace(source, **{name: getattr(wanted, name) for name in names})
    found, here = (resolved(model) | {"objective": model.base} for model in (source, cfg))
    fixed = sorted(names - free)
    if wrong := [f"{name} {found[name]} there, {here[name]} here" for name in fixed if here[name] != found[name]]:
        raise UserError(f"{where} has another model: {', '.join(wrong)}; leave these settings out")
    if longest and cfg.block_size > longest:
        raise UserError(f"block_size is {cfg.block_size}, but {where} holds at most {longest} tokens; lower it")
    return cfg


def resolve(cfg):
    """A script's settings, with the model's and seq_len filled in where they are left open."""
    if cfg.run.init_from:
        has_begun = cfg.run.out_dir and checkpoints(cfg.run.out_dir)
        model = starting_config(cfg.run.out_dir if has_begun else cfg.run.init_from, cfg.model, cfg.given)
    else:
        vocab_size = cfg.model.vocab_size or vocab_size_of(cfg.data.folder, prepare_command(cfg))
        model = replace(cfg.model, vocab_size=vocab_size)
    cfg = replace(cfg, model=model)
    cfg = replace(cfg, data=replace(cfg.data, seq_len=seq_len_of(cfg)))
    cfg.parallel.check_tensor_parallel(cfg.model, cfg.data.seq_len)
    return cfg


def run_config(run_dir):
    """The settings of a run's model, from the newest checkpoint with a readable manifest."""
    for _ in range(ATTEMPTS):
        for path in reversed(checkpoints(run_dir)):
            with contextlib.suppress(UserError):
                return config_of_checkpoint(path, read_manifest(path))
        path = newest_checkpoint(run_dir)  # raises, and says what is wrong, unless it has come since
    return config_of_checkpoint(path, read_manifest(path))


@torch.no_grad()
def load_weights(source, model):
    """Copies an opened model's weights into a model, sharded or not; a shorter position table takes the first rows.

    Returns the names of the model's weights that stay as they are, since the source has none: heads of objectives.
    """
    own, heads = parameter_shapes(source.cfg).keys(), heads_in(source, model.cfg)
    for name, param in model.named_parameters():
        if name not in own and name not in heads:
            continue
        read = source.read(name) if name in own else source.extra[heads[name]]
        weight = torch.zeros(param.shape)  # rows that pad the vocabulary stay zero
        n_rows = min(len(weight), len(read))
        weight[:n_rows] = read[:n_rows]
        if hasattr(param, "placements"):
            from parallel import fill_shard  # here, since DTensor takes half a second to import

            fill_shard(param, weight)
        else:
            param.copy_(weight)
    return [name for name, _ in model.named_parameters() if name not in own and name not in heads]


def heads_in(source, cfg):
    """{our name: theirs}: the source's extra tensors that its own model lacks, and a model of settings cfg has."""
    own, extra, found = parameter_shapes(source.cfg), source.extra, {}
    for theirs in tensors_of(family_of(cfg), cfg) if extra else ():
        if theirs.name in extra and not theirs.ours.keys() & own:
            if (shape := [*extra[theirs.name].shape]) != theirs.shape:
                what = f"has the shape {shape}, where the model's is {theirs.shape}"
                raise UserError(f"{source.folder}: {theirs.name!r} {what}; its files do not belong to its config.json")
            found |= dict.fromkeys(theirs.ours, theirs.name)
    return found


def load_model(where, device, world=None):
    """(model ready to evaluate, its opened source), of a run's folder, or of a Hugging Face folder or name.

    world: its ranks read the same checkpoint.
    """

    def load(source):
        with torch.device("meta"):
            model = source.cfg.build()
        model.to_empty(device=device)
        model.tie_weights()
        load_weights(source, model)
        return model.eval(), source

    return with_model(where, load, world)


def load_tokenizer_of(source, may_lack=False):
    """The tokenizer of an opened model; UserError where it has more ids than the model, or is unknown.

    may_lack: an unknown tokenizer is None, and the reason is printed.
    """
    try:
        tokenizer = source.load_tokenizer()
    except UserError as error:
        if not may_lack:
            raise
        print(f"the tokenizer is unknown: {error}")
        return None
    return check_ids(tokenizer, source.cfg.vocab_size, source.folder)


def check_ids(tokenizer, vocab_size, folder):
    """The tokenizer, where a model of this vocab_size knows its ids; UserError where not. folder: where it comes from."""
    if tokenizer.vocab_size > vocab_size:
        sizes = f"has {tokenizer.vocab_size} ids, the model a vocab_size of {vocab_size}"
        remedy = f"let {folder} name or hold the tokenizer that the model was trained with"
        raise UserError(f"the tokenizer {tokenizer.name} {sizes}; {remedy}")
    return tokenizer


def start_from(cfg, model, world):
    """Loads the weights that init_from names, if any; reports data in another tokenizer's tokens.

    Sets model.context, the longest sequence that the model will have been trained on.
    """
    model.context = cfg.data.seq_len
    if not cfg.run.init_from:
        return

    def load(source):
        return source, load_weights(source, model)

    source, new = with_model(cfg.run.init_from, load, world)
    model.context = min(cfg.model.block_size, max(cfg.data.seq_len, source.cfg.block_size))
    if world.is_main:
        with writing_to(cfg.run.out_dir):
            path = Path(cfg.run.out_dir) / EXTRA_FILE
            path.unlink(missing_ok=True)  # an earlier run without a checkpoint left it
            used = heads_in(source, model.cfg).values()
            if extra := {name: tensor for name, tensor in source.extra.items() if name not in used}:
                save_tensors(extra, path)
        print(f"weights    from {source.name}")
        if new:
            print(f"weights    not there, drawn anew: {', '.join(new)}")
        if unused := [name for name in parameter_shapes(source.cfg) if name not in parameter_shapes(model.cfg)]:
            print(f"weights    left out, since no objective uses them: {', '.join(unused)}")
        if line := tokenizer_mismatch(source, cfg.data.folder):
            print(f"warning    {line}")


def tokenizer_mismatch(source, data_dir):
    """A line on data in another tokenizer's tokens than the weights'; None where both agree or one is unknown."""
    with contextlib.suppress(UserError):  # no tokenizer, or one of characters that lacks some
        theirs, ours = source.load_tokenizer(), load_tokenizer(tokenizer_of(data_dir))
        if theirs.encode(SOME_TEXT).tolist() != ours.encode(SOME_TEXT).tolist():
            return f"{data_dir} has tokens of {ours.name}, the weights know tokens of {theirs.name}: ids do not agree"
    return None
