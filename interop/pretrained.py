"""Initial weights, from a run or from a Hugging Face model, behind one interface."""

import contextlib
import shutil
from dataclasses import fields, replace
from pathlib import Path

import torch

from checkpoint import (
    ATTEMPTS,
    Removed,
    check_is_float,
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
from foreign import read_json
from heads import TunedModel
from interop.families import family_of, resolved, tensors_of
from interop.hub import TOKENIZER_FILES, HubModel, copy_files, folder_of, open_tensors, read_config, save_tensors
from interop.hub_tokenizer import chat_settings, load_hub_tokenizer
from interop.quantized import fill, quantize, stored_shapes
from lora import AdaptedModel, merged
from model import TRAINING_ONLY, ModelConfig, parameter_shapes
from run.folder import keep_tokenizer, run_dir_of, tokenizer_of, writing_to
from text.tokenizer import load_tokenizer

EXTRA_FILE = "carried.safetensors"
CHAT_FILE = "chat.json"
TOKENIZER = "tokenizer"  # folder with a Hugging Face model's tokenizer, in a fine-tuning run's
SOME_TEXT = "Two words, 3 dots..."


class RunModel:
    """The model of a run's newest checkpoint, or of a fine-tuned one's best, with HubModel's interface.

    Tensors are read one at a time.

    cfg.block_size is the longest sequence that it was trained on, which bounds sampling, scores and exports.
    """

    dtype = "float32"

    def __init__(self, run_dir, world=None):
        self.folder, self.path = Path(run_dir), newest_checkpoint(run_dir, world)
        with reading(self.path):
            self.manifest = read_manifest(self.path)
            if "task" in self.manifest.get("settings", {}):  # of fine-tuning
                self.path = newest_checkpoint(run_dir, world, best=True)
                self.manifest = read_manifest(self.path)
        whole = config_of_checkpoint(self.path, self.manifest)
        self.quantize = self.manifest.get("quantize")  # how the blocks' matrices are stored; None: as floats
        shapes = stored_shapes(whole, self.quantize) if self.quantize else parameter_shapes(whole)
        # A tensor by its name, whole; UserError where the checkpoint is damaged, Removed where it has gone.
        self.read = tensor_reader(self.path, shapes)
        if isinstance(whole, AdaptedModel):
            self.read = merged(self.read, whole.lora_scale) if whole.lora_rank else self.read
            whole = whole.without_adapters()
        self.name = f"{run_dir}, step {self.manifest['step']}"
        self.cfg = replace(whole, block_size=context_of(self.manifest, whole))
        if self.cfg != whole:
            self.name += f", trained on sequences of {self.cfg.block_size} tokens (block_size {whole.block_size})"

    def load_tokenizer(self):
        """The tokenizer of the run's data; UserError where it is unknown."""
        is_theirs = (self.folder / TOKENIZER).is_dir()
        tokenizer = (
            load_hub_tokenizer(self.folder / TOKENIZER) if is_theirs else load_tokenizer(tokenizer_of(self.folder))
        )
        tokenizer.stops |= {*self.kept_chat.get("eos_token_id", [])}
        return tokenizer

    @property
    def chat(self):
        """(its chat template, None where it has none; {a template's variable, such as eos_token: the token})."""
        template, names = chat_settings(self.folder / TOKENIZER)
        return self.kept_chat.get("chat_template", template), names

    @property
    def kept_chat(self):
        """What interop.chat's keep_chat has written; empty where the run is not fine-tuned by conversations."""
        return read_json(self.folder / CHAT_FILE, {"chat_template!": str, "eos_token_id!": [int]}, lacking={})

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


def open_model(where, world=None, may_be_quantized=False):
    """The model of a run's folder, which has checkpoints, or of a Hugging Face folder or name."""
    if not checkpoints(where):
        return HubModel(folder_of(where))
    source = RunModel(where, world)
    if not may_be_quantized:
        check_is_float(where, source.manifest)
    return source


def with_model(where, use, world=None, may_be_quantized=False):
    """use(the opened model), again with a newer checkpoint where the run that writes them removes the one being read."""
    for _ in range(ATTEMPTS):
        answer = removed = None
        try:
            answer = use(open_model(where, world, may_be_quantized))
        except Removed as error:
            removed = error
        if not any(world.gather(bool(removed)) if world else [removed]):
            return answer
    raise removed or Removed(f"the checkpoints of {where} were removed while they were read; try again")


def starting_config(where, wanted, given):
    """The settings of a model that starts from weights: the weights' own, with block_size and training's as wanted.

    given: names of the settings that the user has set. A setting of training that is none stays as the weights have it.
    UserError where a given one differs from the weights' own, or block_size exceeds their longest sequence. Of several
    objectives the first one, clm or mlm, must be theirs.
    """
    if checkpoints(where):
        source = run_config(where)
        longest = source.block_size if source.position == "learned" else None
    else:
        _, source, longest = read_config(folder_of(where))
    automatic = {"vocab_size"} if wanted.vocab_size is None else set()
    training = {name for name in TRAINING_ONLY if getattr(wanted, name) is not None}
    names = ({field.name for field in fields(ModelConfig)} & set(given) - automatic) | training
    cfg = replace(source, **{name: getattr(wanted, name) for name in names})
    found, here = (resolved(model) | {"objective": model.base} for model in (source, cfg))
    fixed = sorted(names - TRAINING_ONLY - {"block_size", "pooling"})
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
        check_predicts_tokens(cfg.run.init_from, model)
    else:
        vocab_size = cfg.model.vocab_size or vocab_size_of(cfg.data.folder, prepare_command(cfg))
        model = replace(cfg.model, vocab_size=vocab_size)
    cfg = replace(cfg, model=model)
    cfg = replace(cfg, data=replace(cfg.data, seq_len=seq_len_of(cfg)))
    cfg.parallel.check_model(cfg.model, cfg.data.seq_len)
    return cfg


def check_predicts_tokens(where, cfg):
    """UserError where a model has a head for labels."""
    if isinstance(cfg, TunedModel):
        what = f"{where} was fine-tuned for the task {cfg.task} and predicts no tokens"
        raise UserError(f"{what}; use it by finetune.py, or take the weights that it started from")


def run_config(run_dir):
    """The settings of a run's model, from the newest checkpoint with a readable manifest."""
    for _ in range(ATTEMPTS):
        for path in reversed(checkpoints(run_dir)):
            with contextlib.suppress(UserError):
                return _merged_config(path)
        path = newest_checkpoint(run_dir)  # raises, and says what is wrong, unless it has come since
    return _merged_config(path)


def _merged_config(path):
    manifest = read_manifest(path)
    check_is_float(path, manifest)
    cfg = config_of_checkpoint(path, manifest)
    return cfg.without_adapters() if isinstance(cfg, AdaptedModel) else cfg


@torch.no_grad()
def load_weights(source, model):
    """Copies an opened model's weights into a model, sharded or not; a shorter position table takes the first rows.

    Returns the names of the model's weights that stay as they are: adapters, heads that the source has not, or for
    other labels.
    """
    own, heads, kept = parameter_shapes(source.cfg), heads_in(source, model.cfg), []
    for name, param in model.named_parameters():
        if name in heads:
            read = source.extra[heads[name]]
        elif name not in own or _is_of_other_labels(name, source.cfg, model.cfg):
            kept.append(name)
            continue
        else:
            read = source.read(name)
            if name.startswith("classifier."):
                read = read[[source.cfg.labels.index(label) for label in model.cfg.labels]]
        weight = torch.zeros(param.shape)  # rows that pad the vocabulary stay zero
        n_rows = min(len(weight), len(read))
        weight[:n_rows] = read[:n_rows]
        if hasattr(param, "placements"):
            from parallel import fill_shard  # here, since DTensor takes half a second to import

            fill_shard(param, weight)
        else:
            param.copy_(weight)
    return kept


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


def _is_of_other_labels(name, source, cfg):
    """Whether a weight of settings `source` belongs to a head for labels that a model of settings cfg has not."""
    if not isinstance(source, TunedModel) or not name.startswith(("pooler.", "classifier.")):
        return False
    return not isinstance(cfg, TunedModel) or source.task != cfg.task or {*source.labels} != {*cfg.labels}


def load_model(where, device, world=None):
    """(model ready to evaluate, its opened source), of a run's folder, or of a Hugging Face folder or name.

    world: its ranks read the same checkpoint.
    """

    def load(source):
        check_predicts_tokens(where, source.cfg)
        with torch.device("meta"):
            model = source.cfg.build()
        model.to_empty(device=device)
        model.tie_weights()
        if kind := getattr(source, "quantize", None):
            quantize(model, kind)  # of any weights, for the types of its tensors
            fill(model, source.read, kind)
        else:
            load_weights(source, model)
        return model.eval(), source

    return with_model(where, load, world, may_be_quantized=True)


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


def start_from(cfg, model, world, longest=None):
    """Loads the weights that init_from names, if any; reports data in another tokenizer's tokens.

    Sets model.context, the longest sequence that the model will have been trained on. longest: of the data; None:
    seq_len.
    """
    labels = isinstance(cfg.model, TunedModel)
    longest = cfg.model.block_size if labels else longest or cfg.data.seq_len
    model.context = longest
    if not cfg.run.init_from:
        return

    def load(source):
        return source, load_weights(source, model)

    source, new = with_model(cfg.run.init_from, load, world)
    model.context = min(cfg.model.block_size, max(longest, source.cfg.block_size))
    if world.is_main:
        with writing_to(cfg.run.out_dir):
            path = Path(cfg.run.out_dir) / EXTRA_FILE
            path.unlink(missing_ok=True)  # an earlier run without a checkpoint left it
            used = heads_in(source, model.cfg).values()
            extra = {name: tensor for name, tensor in source.extra.items() if name not in used}
            if extra and not labels:
                save_tensors(extra, path)
        print(f"weights    from {source.name}")
        unused = [name for name in parameter_shapes(source.cfg) if name not in parameter_shapes(model.cfg)]
        if new and (not labels or isinstance(source.cfg, TunedModel)):  # a head for other labels
            print(f"weights    not there, drawn anew: {', '.join(new)}")
        if unused and not labels:
            print(f"weights    left out, since no objective uses them: {', '.join(unused)}")
        if line := tokenizer_mismatch(source, cfg.data.folder):
            print(f"warning    {line}")


def keep_tokenizer_of(cfg, world):
    """Copies the tokenizer of the weights that init_from names into a fine-tuning run's folder."""
    if not world.is_main:
        return
    source, out_dir = open_model(cfg.run.init_from), Path(cfg.run.out_dir)
    with writing_to(out_dir):
        if isinstance(source, HubModel):
            (out_dir / TOKENIZER).mkdir(exist_ok=True)
            copy_files(source.folder, out_dir / TOKENIZER, ("config.json", *TOKENIZER_FILES))
        elif (source.folder / TOKENIZER).is_dir():
            shutil.copytree(source.folder / TOKENIZER, out_dir / TOKENIZER, dirs_exist_ok=True)
        else:
            keep_tokenizer(source.folder, out_dir)


def tokenizer_mismatch(source, data_dir):
    """A line on data in another tokenizer's tokens than the weights'; None where both agree or one is unknown."""
    with contextlib.suppress(UserError):  # no tokenizer, or one of characters that lacks some
        theirs, ours = source.load_tokenizer(), load_tokenizer(tokenizer_of(data_dir))
        if theirs.encode(SOME_TEXT).tolist() != ours.encode(SOME_TEXT).tolist():
            return f"{data_dir} has tokens of {ours.name}, the weights know tokens of {theirs.name}: ids do not agree"
    return None
