"""Generation: the tokens that follow a prompt, drawn one by one."""

import math
from dataclasses import dataclass
from itertools import chain, islice, pairwise

import torch

from cache import Cache
from config import Config, Count, NotNegative, UpToOne, UserError
from launch import Captured
from ops import matmul_dtype

GROUP = 16  # steps that a GPU computes between two waits of the host


@dataclass(frozen=True)
class GenerationConfig(Config):
    max_new_tokens: Count = 256  # tokens per continuation, at most; a token that ends texts ends it earlier
    temperature: NotNegative = 0.8  # divides the logits; 0: greedy
    top_k: Count | None = None  # sample from the k likeliest tokens; for a [MASK], print k of them (none: 5)
    top_p: UpToOne | None = None  # nucleus sampling: from the fewest tokens whose probabilities sum to at least this
    min_p: UpToOne | None = None  # sample from tokens with at least this share of the likeliest one's probability


@torch.inference_mode()
def generate(model, ids, cfg, seed, vocab_size, never=(), lengths=None):
    """Yields the tokens (B,) that follow ids (B, T), step by step, on the CPU: below vocab_size, and none of `never`.

    lengths (B,): the prompts' own, where ids are padded on the right; they and what follows must fit in block_size.
    UserError where the logits are not finite.
    """
    if ids.device.type == "cuda":  # a GPU would idle, had the host to launch each kernel and to wait for each token
        steps = on_host(next_tokens(model, ids, cfg, seed, vocab_size, never, lengths, record=Captured))
    else:
        steps = next_tokens(model, ids, cfg, seed, vocab_size, never, lengths)
    for tokens in steps:
        if (tokens < 0).any():
            raise UserError("the model's logits are not finite; take an earlier checkpoint, or train at a lower rate")
        yield tokens


@torch.no_grad()  # not inference_mode: FSDP would keep the weights that it gathers for training
def next_tokens(model, ids, cfg, seed, vocab_size, never=(), lengths=None, record=None):
    """Yields the tokens of generate on the model's device, without waiting for it; -1 where logits are not finite.

    At block_size, the cache is cleared and the model continues from the last half of the sequence. record, such as
    Captured, turns the step after one token, a function of tensors alone, into a faster one; attention then covers the
    whole cache, masked. Without record it covers the tokens so far, which is faster on a CPU.
    """
    block_size, device = model.cfg.block_size, ids.device
    generator = torch.Generator(device).manual_seed(seed)
    n_tokens = min(block_size, ids.shape[1] + cfg.max_new_tokens)
    n_tokens += -n_tokens % 64  # GPU kernels want rows of masks aligned
    cache = Cache(model.cfg, len(ids), device, matmul_dtype(model.wte.weight), n_tokens)
    never = torch.tensor(never, dtype=torch.long, device=device)
    ends = None if lengths is None else lengths[:, None] - 1  # B 1, the prompts' last tokens

    def following(unread, uniform, place=None):
        positions = ends if place is None else None
        logits = model(unread.clamp(min=0), positions=positions, cache=cache, place=place)[:, -1]  # B V
        logits = logits[:, :vocab_size].float()
        return draw(logits.index_fill_(1, never, -math.inf), cfg, uniform)

    recorded = record(following) if record else None
    unread = recent = ids
    for step in range(cfg.max_new_tokens):
        if recent.shape[1] > block_size:
            cache.clear()
            unread = recent = recent[:, -max(1, block_size // 2) :]
        uniform = torch.rand(len(ids), 1, device=device, generator=generator)
        if ends is not None and step:  # padding is hidden until a new token overwrites it
            tokens = (recorded or following)(unread, uniform, ends + step)
        elif record and unread.shape[1] == 1 and ends is None:
            tokens = recorded(unread, uniform, torch.full((1,), recent.shape[1] - 1, device=device))
        else:
            tokens = following(unread, uniform)
        recent = torch.cat([recent, tokens[:, None]], dim=1)
        unread = recent[:, -1:]
        yield unread[:, 0]


def draw(logits, cfg, uniform):
    """Draws a token for each row of logits (B, V) by a number in [0, 1), uniform (B, 1); returns them (B,).

    A token is -1 where the logits are not finite. Nothing here may wait for a GPU or move a Python number to it.
    """
    largest = logits.amax(-1, keepdim=True)
    if cfg.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        # Inverse transform sampling: one number per row; multinomial would draw one per token of the vocabulary.
        sums = kept_probabilities(logits - largest, cfg).cumsum(-1)
        tokens = torch.searchsorted(sums, (1 - uniform) * sums[:, -1:])[:, 0]  # 1 - uniform is above 0
    return tokens.masked_fill(~largest[:, 0].isfinite(), -1)


def kept_probabilities(logits, cfg):
    """Probabilities (B, V) at the temperature, up to a factor, 0 beyond top_k, top_p, min_p; the largest logit is 0.

    min_p: Nguyen et al. 2024, arXiv 2407.01082. They apply in this order, as in transformers.
    """
    probs = torch.softmax(logits / cfg.temperature, dim=-1)  # a tiny temperature overflows to -inf, not inf
    if cfg.top_k is not None and cfg.top_k < probs.shape[-1]:
        top = probs.topk(cfg.top_k)  # exactly k tokens, even where some are equally likely
        probs = torch.zeros_like(probs).scatter(-1, top.indices, top.values)
    if cfg.top_p is not None:
        ordered, order = (probs / probs.sum(-1, keepdim=True)).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= cfg.top_p  # likelier tokens already sum to top_p
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    if cfg.min_p is not None:
        probs = probs.masked_fill(probs < cfg.min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs


def on_host(steps):
    """Yields the CUDA tensors of steps on the CPU; waits for a group of them, once it has launched the next group."""

    def launched():
        size = 1  # the first few tokens come sooner
        while group := list(islice(steps, size)):
            yield torch.stack(group).to("cpu", non_blocking=True), torch.cuda.current_stream().record_event()
            size = min(2 * size, GROUP)

    try:
        for (tokens, copied), _ in pairwise(chain(launched(), [None])):
            copied.synchronize()
            yield from tokens
    finally:
        torch.cuda.synchronize()  # an early stop must not free a graph that still runs


class UntilStop:
    """The bytes of a continuation as its tokens come, up to the stop string that is complete first."""

    def __init__(self, stops=()):
        self.stops = [stop.encode("utf-8", "surrogateescape") for stop in stops]
        self.held = b""  # bytes that may begin a stop string; after the last token, the rest of the text
        self.has_ended = False

    def add(self, new):
        """The bytes that are now sure to come before any stop string; new: the next token's."""
        text, self.held = self.held + new, b""
        if found := [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]:
            self.has_ended = True
            return text[: min(found)[1]]  # the first that is complete, as if bytes came one by one
        n = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - n :]
        return text[: len(text) - n]
