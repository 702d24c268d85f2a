"""A model's teacher: checked before a run, the source of initial layers, and part of each step's loss."""

import hashlib
import itertools
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import checkpoints
from config import UserError
from distill import DistillConfig, Teaching
from interop.families import resolved
from interop.hub import folder_of, read_config
from interop.pretrained import (
    SOME_TEXT,
    check_predicts_tokens,
    load_model,
    load_weights,
    open_model,
    run_config,
    with_model,
)
from launch import compile_model
from model import TRAINING_ONLY
from objective import windows_of
from ops import IGNORE, Linear
from perf import cost
from run.folder import tokenizer_of
from text.tokenizer import load_tokenizer

# Settings in which a teacher whose layers initialize a student may differ from it
FREE = {"n_layer", "block_size", "window", "global_every", "objective", "pooling", "vocab_size", *TRAINING_ONLY}


# ---- before a run


def check_teacher(cfg):
    """UserError, a line for each reason, where the teacher of a run's settings, if any, cannot teach its model."""
    if not (where := cfg.distill.teacher):
        return
    source = open_model(where)
    check_predicts_tokens(where, source.cfg)
    if wrong := [line for is_wrong, line in rules(cfg, f"teacher {where}", source.cfg) if is_wrong]:
        raise UserError(*wrong)
    check_tokenizer(source, cfg.data.folder)


def check_tokenizer(source, folder):
    """UserError where an opened model's tokenizer is not that of a data folder; returns why one is unknown, or None."""
    try:
        theirs, ours = source.load_tokenizer(), load_tokenizer(tokenizer_of(folder))
    except UserError as error:
        return error
    if (there := tokenizer_hash(theirs)) != (here := tokenizer_hash(ours)):
        what = f"teacher {source.folder} knows the tokens of {theirs.name} (hash {there}), {folder} has those of"
        raise UserError(f"{what} {ours.name} (hash {here}); take a teacher that was trained with the data's tokenizer")


def tokenizer_hash(tokenizer):
    """A hash of the texts of a tokenizer's ids, special ones aside, and of the ids of a text."""
    special = {*tokenizer.specials.values()}
    texts = [(id_, tokenizer.decode_bytes([id_])) for id_ in range(tokenizer.vocab_size) if id_ not in special]
    return hashlib.sha256(repr((texts, tokenizer.encode(SOME_TEXT).tolist())).encode()).hexdigest()[:12]


def rules(cfg, name, theirs):
    """[(whether it is broken, a line)] for each rule that a teacher of this name and these settings must keep."""
    ours, distill, parallel = cfg.model, cfg.distill, cfg.parallel
    hides = "document_mask" if cfg.objective.document_mask else "window" if ours.window or theirs.window else None
    hidden, attention = distill.distill_hidden > 0, distill.distill_attention > 0
    layers, inside = distill.init_layers or (), "distill_attention" if attention else "distill_hidden"
    named = layers if layers != ("even",) else ()
    strange = ", ".join(n for n in named if not (n.isdecimal() and int(n) < theirs.n_layer))
    here, there = resolved(ours), resolved(theirs)
    others = [key for key in sorted(here.keys() & there.keys() - FREE) if here[key] != there[key]]
    differing = ", ".join(f"{key} {there[key]} there, {here[key]} here" for key in others)
    return [
        (ours.objectives != {ours.base: 1.0},
         f"objective is {ours.objective}, but a model with {name} has one alone; set it to {ours.base}"),
        (theirs.base != ours.base,
         f"{name} was trained for {theirs.base}, this model for {ours.base}; take a teacher of this objective"),
        (theirs.vocab_size != ours.vocab_size,
         f"{name} has a vocab_size of {theirs.vocab_size}, this model one of {ours.vocab_size}; they must be equal"),
        (theirs.block_size < cfg.data.seq_len,
         f"{name} sees at most {theirs.block_size} tokens, and seq_len is {cfg.data.seq_len}; lower seq_len"),
        (theirs.n_embd != ours.n_embd and (hidden or distill.distill_cosine),
         f"{name} has n_embd {theirs.n_embd}, this model {ours.n_embd}; leave distill_cosine and distill_hidden out"),
        (theirs.n_layer % ours.n_layer and (hidden or attention),
         f"{name} has {theirs.n_layer} layers, no multiple of this model's {ours.n_layer}; leave {inside} out"),
        (distill.distills and parallel.pp * parallel.cp > 1,
         f"{name} computes whole sequences in all layers, which pp {parallel.pp} and cp {parallel.cp} divide; set both to 1"),
        (parallel.tp > 1 and (hidden or attention),
         f"{inside} compares whole layers, which tp {parallel.tp} splits; leave it out, or set tp to 1"),
        (attention and theirs.n_head != ours.n_head,
         f"{name} has n_head {theirs.n_head}, this model {ours.n_head}; leave distill_attention out"),
        (attention and parallel.strategy == "fsdp",
         "distill_attention reads weights of blocks outside of them, which strategy fsdp shards; set it to ddp"),
        (attention and hides,
         f"distill_attention compares the scores of all pairs of tokens, and {hides} hides some; leave one out"),
        (layers and cfg.run.init_from,
         f"init_from is {cfg.run.init_from}, and init_layers names initial weights, too; leave one of them out"),
        (layers and differing, f"init_layers copies layers of {name}, which are others: {differing}; leave it out"),
        (strange, f"init_layers names {strange}; {name} has the layers 0 to {theirs.n_layer - 1}"),
        (named and len(named) != ours.n_layer,
         f"init_layers names {len(named)} layers, this model has n_layer {ours.n_layer}; name one for each"),
    ]  # fmt: skip


def teacher_config(cfg):
    """The ModelConfig of the teacher that takes part in a run's steps, of which no tensor is read; None without one."""
    if not cfg.distill.distills:
        return None
    where = cfg.distill.teacher
    return alone(run_config(where) if checkpoints(where) else read_config(folder_of(where))[1])


def alone(theirs):
    """A teacher's ModelConfig with its first objective alone, which it is asked for."""
    return replace(theirs, objective=theirs.base)


# ---- initial weights


def start_from_layers(cfg, model, world):
    """Copies the teacher's layers that init_layers names into the model's blocks, and what surrounds them."""
    if not cfg.distill.init_layers:
        return

    def load(source):
        n, n_theirs = cfg.model.n_layer, source.cfg.n_layer
        even = cfg.distill.init_layers == ("even",)
        layers = [i * n_theirs // n for i in range(n)] if even else [*map(int, cfg.distill.init_layers)]

        def read(name):
            parts = name.split(".")
            if parts[0] == "blocks":
                parts[1] = str(layers[int(parts[1])])
            return source.read(".".join(parts))

        load_weights(SimpleNamespace(cfg=replace(source.cfg, n_layer=n), read=read, extra={}), model)
        return f"weights    layers {', '.join(map(str, layers))} of {source.name}"

    told = with_model(cfg.distill.teacher, load, world)
    if world.is_main:
        print(told)


# ---- training


def teach(cfg, model, world):
    """Makes a model that is ready to train learn from its teacher, if any; returns a hash of the teacher's weights.

    Each rank holds the whole teacher, outside the model's modules.
    """
    if not cfg.distill.distills:
        return None
    teacher, source = load_model(cfg.distill.teacher, world.device, world)
    teacher.requires_grad_(False)
    digest = hashlib.sha256()
    for name, param in teacher.named_parameters():
        digest.update(name.encode())
        digest.update(param.detach().cpu().numpy())
    in_precision(teacher, world)
    if cfg.parallel.compiles(world.device.type):
        compile_model(teacher, len(teacher.blocks), world)
    make_student(model, teacher, cfg.distill)
    if world.is_main:
        held = sum(p.nbytes for p in teacher.parameters()) / 2**20
        parts = " + ".join(f"{weight:g} {name}" for name, weight in model.objectives.items())
        print(f"teacher    {source.name}: {teacher.num_params():,} parameters, {held:,.1f} MiB per rank")
        share = windows_of(cfg.model.objective).head_share(cfg.objective, cfg.data.seq_len)
        flops = cost.flops_per_token(alone(teacher.cfg), cfg.data.seq_len, share) / 3e6  # forward's third
        print(f"loss       {parts}; mfu leaves out the teacher's {flops:,.1f} MFLOPs per token")
        if unknown := check_tokenizer(source, cfg.data.folder):
            print(f"warning    whether the teacher knows the data's tokens is unknown: {unknown}")
    return digest.hexdigest()


def in_precision(teacher, world):
    """Casts a teacher's matrices in the blocks to the run's precision; the rest stays float32, as it is in training."""
    for linear in teacher.blocks.modules():
        if isinstance(linear, Linear):
            linear.weight.data = linear.weight.data.to(world.dtype)


def make_student(model, teacher, distill):
    """Gives a model a teacher, a model in evaluation, which is to be no part of it. distill: a DistillConfig."""
    vars(model)["teacher"] = teacher  # no submodule: it is not sharded, saved, counted or trained
    model.distill, model.objectives = distill, distill.weights(model.cfg.base)
    model.__class__ = type("Student", (Student, type(model)), {})
    for one in (teacher, model) if distill.compared else ():
        keep_states(one, in_training=one is model)


class Student:
    """Goes before a Transformer's class: training adds the losses that the teacher gives, as a vector (M,)."""

    teacher: nn.Module
    distill: DistillConfig
    training: bool

    def forward(
        self, ids, targets=None, positions=None, attention_mask=None, token_types=None, documents=None, **options
    ):
        """Transformer's; in training with targets the sums of losses in the order of `objectives`."""
        about_ids = attention_mask, token_types, documents
        if targets is None or not self.training:
            return super().forward(ids, targets, positions, *about_ids, **options)
        teacher, wanted = self.teacher, self.distill
        with torch.no_grad():
            hidden = teacher.transform(teacher.selected(teacher.states(ids, *about_ids), positions)).flatten(0, 1)
        weight, bias = teacher.head_of_vocabulary()[:2]
        self.teaching = Teaching(hidden, weight, bias, wanted.distill_weight, wanted.distill_temperature)
        losses = super().forward(ids, targets, positions, *about_ids, **options)
        self.teaching = None
        if not wanted.compared:
            return losses
        errors = differences(self, teacher, wanted.compared, attention_mask)
        seen = torch.ones_like(ids) if attention_mask is None else attention_mask
        n_targets = (targets != IGNORE).sum(1)  # so that a token counts as much as in the other losses
        means = [(error * seen).sum(1) / seen.sum(1) for error in errors]
        return torch.cat([losses, torch.stack([(mean * n_targets).sum() for mean in means])])


def keep_states(model, in_training):
    """Makes a model keep the states between its blocks, and rope's table, as `kept`, in training or in evaluation."""

    def run_blocks(x, rope=None, masks=None, caches=None):
        states = [x]
        for block, cache in zip(model.blocks, caches or itertools.repeat(None)):
            states.append(block(states[-1], rope, masks, cache))
        if model.training == in_training:
            model.kept = states, rope
        return states[-1]

    model.run_blocks = run_blocks


def differences(student, teacher, names, attention_mask=None):
    """The errors (B, T) of a student's tokens by the names of DistillConfig.compared, from what both models kept.

    cosine: 1 - the cosine of the last norm's outputs (Sanh et al. 2019, section 3). hidden and attention: the squared
    errors of the embedding's and the blocks' outputs, and of the attention scores before the softmax; summed over the
    layers of the student, m of which stands for m * (teacher's layers / student's) (TinyBERT, Jiao et al. 2020, arXiv
    1909.10351, equations 7 to 9, without its projection).
    """
    (ours, rope), (theirs, their_rope), student.kept, teacher.kept = student.kept, teacher.kept, None, None
    step, found = len(teacher.blocks) // len(student.blocks), []
    if "cosine" in names:
        last, wanted = student.norm_f(ours[-1]).float(), teacher.norm_f(theirs[-1]).float()
        found.append(1 - F.cosine_similarity(last, wanted, dim=-1))
    if "hidden" in names:
        pairs = zip(ours, theirs[::step], strict=True)
        found.append(sum((own.float() - wanted.float()).square().mean(-1) for own, wanted in pairs))
    if "attention" in names:
        seen = None if attention_mask is None else attention_mask[:, None, None]
        blocks = zip(student.blocks, ours, teacher.blocks[step - 1 :: step], theirs[step - 1 :: step])
        found.append(sum(
            _error_of_scores(attention_scores(one, x, rope), attention_scores(other, y, their_rope), seen, one.attn)
            for one, x, other, y in blocks
        ))  # fmt: skip
    return found


def attention_scores(block, x, rope=None):
    """The attention scores (B, H, T, T) of a block's input x (B, T, C), before masks and softmax, float32."""
    q, k, _ = block.attn.heads(block.norm1(x) if block.pre else x, rope)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q @ k.mT).float() * q.shape[-1] ** -0.5


def _error_of_scores(own, wanted, seen, attention):
    """The mean over heads and the keys that a query sees of the squared error of scores (B, H, T, T): (B, T)."""
    T = own.shape[-1]
    sees = torch.ones(T, T, dtype=torch.bool, device=own.device)
    sees = (sees.tril() if attention.causal else sees)[None, None]
    sees = sees if seen is None else sees & seen.bool()
    error = (own - wanted).square() * sees
    return (error.sum(-1) / sees.sum(-1).clamp(min=1)).mean(1)
