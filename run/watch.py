"""Looks into the model at evaluations: samples, norms by layer, and at the end of the file a forker's own figures."""

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils import get_total_norm

from config import Config, Count, UserError
from data import each, eval_batches
from generation import GenerationConfig, next_tokens
from launch import refresh_copies
from objective import count_targets, weighted_sum
from ops import Packed, locate, mask_of
from parallel import has_gradient_buckets, reshard, sync_gradients
from run.folder import tokenizer_of
from text.files import texts_of
from text.tokenizer import load_tokenizer

SEQUENCES = 4  # of validation that figures are computed on, at most: uncompiled, a micro-batch may need more memory


@dataclass(frozen=True)
class WatchConfig(Config):
    watch: Literal["norms"] | None = None  # at evaluations: norms by layer, attention entropy, scale of the logits
    sample_prompts: str | None = None  # text that the model continues at evaluations; several as JSON: ["One", "Two"]
    sample_tokens: Count = 64  # tokens that it adds to each, at temperature 0.8, drawn alike each time

    def __post_init__(self):
        super().__post_init__()
        if self.sample_prompts is not None:
            texts_of(self.sample_prompts, "sample_prompts")  # raises where it is not what it must be


class Watch:
    """What a run looks at in its model at evaluations; nothing of it changes training, to the bit."""

    def __init__(self, cfg, world, model, val_data, val_objective):
        """UserError where the settings ask for what this model, its layout or its tokenizer does not have."""
        self.cfg, self.world, self.model = cfg, world, model
        self.first_batch = functools.partial(eval_batches, val_data[0], val_objective, cfg.data.eval_tokens)
        asked = {"watch": cfg.watch.watch, "sample_prompts": cfg.watch.sample_prompts}
        asked = [f"{name} is {value}" for name, value in asked.items() if value]
        if asked and world.tp * world.cp * world.pp > 1:
            rule = f"tp is {world.tp}, cp {world.cp} and pp {world.pp}: it needs whole layers and texts on each rank"
            raise UserError(f"{asked[0]}, but {rule}; leave it out, or use --strategy=fsdp alone")
        self.prompts = texts_of(cfg.watch.sample_prompts, "sample_prompts") if cfg.watch.sample_prompts else []
        if self.prompts:
            self._read_prompts()

    def _read_prompts(self):
        cfg, n_new = self.cfg, self.cfg.watch.sample_tokens
        if not cfg.model.is_causal:
            rule = "but a masked model continues no text"
            raise UserError(f"sample_prompts is {cfg.watch.sample_prompts}, {rule}; leave it out")
        self.tokenizer = load_tokenizer(tokenizer_of(cfg.data.folder))
        rows = [[*self.tokenizer.begin, *self.tokenizer.encode(prompt).tolist()] for prompt in self.prompts]
        rows = [ids or [self.tokenizer.eot or 0] for ids in rows]
        for prompt, ids in zip(self.prompts, rows):
            if (n := max(ids)) >= cfg.model.vocab_size:
                rule = f"sample_prompts has {prompt!r} with the id {n}, vocab_size is {cfg.model.vocab_size}"
                raise UserError(f"{rule}; let {cfg.data.folder} name the data's tokenizer")
            if len(ids) + n_new > cfg.data.seq_len:
                rule = f"sample_prompts has a text of {len(ids)} tokens and sample_tokens is {n_new}"
                raise UserError(f"{rule}, but seq_len is {cfg.data.seq_len}; shorten the text, or lower sample_tokens")
        self.lengths = torch.tensor([*map(len, rows)], device=self.world.device)
        padded = [ids + [0] * (max(map(len, rows)) - len(ids)) for ids in rows]
        self.ids = torch.tensor(padded, device=self.world.device)  # B T

    def __call__(self):
        """{name: number or text} of all that is looked at now, on all ranks; they do the same."""
        with self._looking():
            found = self.samples() if self.prompts else {}
            if self.cfg.watch.watch == "norms":
                found |= self.norms()
            return found | own_figures(self.model, self.batch)

    @functools.cached_property
    def batch(self):
        """The arguments of the model that the figures are computed on: the first sequences of validation."""
        batch = next(self.first_batch(min(SEQUENCES, self.cfg.data.micro_batch_size), 0, 1))
        return each(batch, lambda part: part.to(self.world.device))

    @contextlib.contextmanager
    def _looking(self):
        """A context in which the model is in evaluation and runs eagerly; gradients are as before afterwards."""
        model, eager = self.model, contextlib.nullcontext()
        if self.cfg.parallel.compiles(self.world.device.type):  # it would compile for hooks, and for each length
            eager = torch.compiler.set_stance("force_eager")
        model.eval()
        try:
            with self.world.autocast(), eager:
                yield
        finally:
            model.zero_grad(set_to_none=not (has_gradient_buckets(model) or model.graphs is not None))
            model.train()
            reshard(model)

    def samples(self):
        """{"sample/0": text, ...}: each prompt and what the model adds to it, up to a token that ends texts."""
        tokenizer, cfg = self.tokenizer, GenerationConfig(max_new_tokens=self.cfg.watch.sample_tokens)
        never = [token for token in tokenizer.specials.values() if token not in tokenizer.stops]
        args = self.ids, cfg, self.cfg.run.seed, tokenizer.vocab_size, never, self.lengths
        new = torch.stack([*next_tokens(self.model, *args)], dim=1).tolist()  # B, sample_tokens
        found = {}
        for i, (prompt, ids) in enumerate(zip(self.prompts, new)):
            end = next((at for at, token in enumerate(ids) if token in tokenizer.stops or token < 0), len(ids))
            found[f"sample/{i}"] = prompt + tokenizer.decode_bytes(ids[:end]).decode("utf-8", errors="replace")
        return found

    def norms(self):
        """Norms of weights and gradients by layer, entropy of attention by layer, and the scale of the logits.

        But for the weights' all are figures of the batch, whose loss is that of evaluation.
        """
        model, objectives, seen = self.model, self.model.cfg.objectives, {}
        refresh_copies(model)
        sync_gradients(model, last=not has_gradient_buckets(model))  # ranks have equal gradients: DDP need not send
        n_targets = count_targets(objectives, *self.batch).clamp(min=1)
        with watching(model, seen):
            losses = model(*self.batch).view(-1) / n_targets
        scale = float(n_targets.max())  # in fp16 the gradients of a mean would be 0
        (scale * weighted_sum(losses, objectives)).backward()
        gradients = by_layer(model, lambda param: param.grad)
        found = {f"weight_norm/{layer}": norm for layer, norm in by_layer(model, torch.Tensor.detach).items()}
        found |= {f"val_grad_norm/{layer}": norm / scale for layer, norm in gradients.items()}
        return found | {name: figure.item() for name, figure in seen.items()}


def by_layer(model, tensor_of):
    """{layer: norm of all tensor_of(param) together}, for "blocks.0", "blocks.1", ..., "wte" and so on."""
    layers = {}
    for name, param in model.named_parameters():
        parts = name.split(".")
        if (tensor := tensor_of(param)) is not None:
            layers.setdefault(".".join(parts[: 2 if parts[0] == "blocks" else 1]), []).append(tensor)
    norms = {layer: get_total_norm(tensors) for layer, tensors in layers.items()}
    return {layer: (n.full_tensor() if hasattr(n, "full_tensor") else n).item() for layer, n in norms.items()}


@contextlib.contextmanager
def watching(model, seen):
    """A context in which a forward writes figures of attention and logits, as tensors, into the dict seen."""

    def attend(block, name, q, k, v, mask=None, causal=False, dropout=0.0):
        seen[f"val_attention_entropy/{name}"] = attention_entropy(q, k, mask, block.attn.causal)
        return attends[name](q, k, v, mask, causal, dropout)

    @torch.no_grad()
    def look_at_logits(module, inputs, x):
        parts = x.flatten(0, 1).split(256)  # all logits would be gigabytes
        logits = (model.head(part)[:, : model.cfg.vocab_size].float() for part in parts)
        squares, largest = zip(*((part.square().mean(1).sum(), part.abs().max()) for part in logits))
        seen["val_logit_scale"] = (sum(squares) / sum(map(len, parts))).sqrt()
        seen["val_logit_max"] = torch.stack(largest).max()

    blocks = {f"blocks.{i}": block for i, block in enumerate(model.blocks)}
    attends = {name: block.attn.attend for name, block in blocks.items()}
    hook = model.transform.register_forward_hook(look_at_logits)
    for name, block in blocks.items():
        block.attn.attend = functools.partial(attend, block, name)
    try:
        yield
    finally:
        hook.remove()
        for name, block in blocks.items():
            block.attn.attend = attends[name]


@torch.no_grad()
def attention_entropy(q, k, mask=None, causal=False):
    """The entropy in nats of the weights by which a query looks at keys, mean over queries and heads.

    It is 0 where each looks at a single token. Arguments as in ops.attend; causal counts where there is no mask.
    """
    B, H, T, D = q.shape
    if isinstance(mask, Packed):
        starts, window = mask.starts, None if mask.before < 0 else mask.before + 1
        mask = mask_of(q, q[:, 0, :, 0].shape, causal, window, (starts, *locate(starts, q[:, 0, :, 0].shape)))
    elif mask is None and causal:
        mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=q.device).tril()
    total = 0.0
    with torch.autocast(q.device.type, enabled=False):
        for head in range(H):  # one by one, since all heads' weights would be gigabytes
            scores = q[:, head].float() @ k[:, head * k.shape[1] // H].float().mT / math.sqrt(D)  # B T T
            if mask is not None:
                hidden = scores.new_full((), torch.finfo(scores.dtype).min)
                scores = scores.where(mask[:, 0], hidden) if mask.dtype == torch.bool else scores + mask[:, 0]
            total += torch.special.entr(scores.softmax(-1)).sum(-1).mean()
    return total / H


def own_figures(model, batch):
    """Figures of your own, {name: number or text}: edit here. They go to log.jsonl and the dashboards.

    Called at each evaluation, on all ranks. model: in evaluation; its gradients are watch=norms' where that is on, and
    a sharded model's parameters are DTensors. batch: the model's arguments for a few sequences of validation.
    """
    return {}
