"""Continues a prompt with a trained model, fills the gap before a suffix or a prompt's [MASK]s, or scores it.

python sample.py --out_dir=out/quickstart --prompt="def main(" --num_samples=3
python sample.py --out_dir=out/quickstart_bert --prompt="for i in [MASK](10):"
python sample.py --out_dir=out/quickstart --prompt=FILE:prompt.txt
python sample.py --out_dir=out/fim --prompt="def add(" --suffix="return a + b"
echo "import os" | python sample.py --out_dir=out/quickstart --prompt=-
python sample.py --out_dir=out/quickstart --score --prompt="import os"
"""

import codecs
import math
import re
import sys
import time
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path

import torch

from config import Config, Count, NotNegative, UpToOne, UserError, only, run_script
from interop.pretrained import load_model, load_tokenizer_of, model_location
from interop.score import print_scores, read_requests
from launch import Captured
from model import Cache
from objective import FIM_TOKENS, fim_tokens, special_id
from run.folder import RunConfig
from world import DTYPES, WorldConfig, pick_device, pick_precision

GROUP = 16  # steps that a GPU computes between two waits of the host


@dataclass(frozen=True)
class SampleConfig(Config):
    prompt: str = ""  # text to continue, or to fill at each [MASK]; FILE:path reads a file, - reads stdin
    suffix: str | None = None  # text behind a gap that follows the prompt, to fill by a model trained with fim_rate
    score: bool = False  # print the prompt's log-likelihood instead; with FILE:x.jsonl, each line's
    num_samples: Count = 1  # continuations of the prompt, in one batch
    max_new_tokens: Count = 256  # tokens per continuation, at most; a token that ends texts ends it earlier
    temperature: NotNegative = 0.8  # divides the logits; 0: greedy
    top_k: Count | None = None  # sample from the k likeliest tokens; for a [MASK], print k of them (none: 5)
    top_p: UpToOne | None = None  # nucleus sampling: from the fewest tokens whose probabilities sum to at least this


@dataclass(frozen=True)
class Settings:
    sample: SampleConfig
    run: RunConfig = only("out_dir", "init_from", "seed")
    world: WorldConfig = only("device", "precision")
    presets: tuple = ()


def main(cfg):
    device = pick_device(cfg.world.device)
    model, source = load_model(model_location(cfg), device)
    precision = "fp32" if cfg.sample.score and cfg.world.precision == "auto" else cfg.world.precision
    dtype = generation_dtype(precision, device, model.num_params())
    model.to(dtype)  # not autocast, which would cast all weights for each token
    tokenizer = load_tokenizer_of(source)
    print(f"{source.name}, {model.num_params():,} parameters on {device} in {dtype}", file=sys.stderr)
    prompt, suffix = read_prompt(cfg.sample.prompt), cfg.sample.suffix and read_prompt(cfg.sample.suffix)
    if suffix is not None and (cfg.sample.score or not model.cfg.is_causal):
        what = "--score gives a text's likelihood" if cfg.sample.score else "a masked model fills each [MASK]"
        raise UserError(f"suffix is given, but {what}; leave it out")
    if cfg.sample.score:
        return print_scores(model, tokenizer, read_requests(cfg.sample.prompt, prompt))
    if not model.cfg.is_causal:
        return print_candidates(model, tokenizer, prompt, cfg.sample.top_k or 5, device)
    ids = [*tokenizer.begin, *tokenizer.encode(prompt).tolist()] or [tokenizer.eot]
    most = cfg.sample.max_new_tokens
    if suffix is not None:
        settings = getattr(source, "manifest", {}).get("settings", {"fim_rate": 1})  # the hub's models have none
        if not settings.get("fim_rate"):
            print("warning: this run was trained without fim_rate; expect no good middle", file=sys.stderr)
        ids = gap_ids(tokenizer, prompt, suffix, settings.get("fim_spm_rate") == 1)
        most = max(1, min(most, model.cfg.block_size - len(ids) + 1))  # later tokens would no longer see the prefix
    if ids == [None]:
        raise UserError(f"the tokenizer {tokenizer.name} has no end-of-text token to start from; give a --prompt=")
    ids = as_batch(ids, model, device).repeat(cfg.sample.num_samples, 1)  # B T
    never = [token for token in tokenizer.specials.values() if token not in tokenizer.stops]  # no part of text
    start = time.perf_counter()
    steps = generate(model, ids, replace(cfg.sample, max_new_tokens=most), cfg.run.seed, tokenizer.vocab_size, never)
    n_tokens = sum(map(len, stream(steps, tokenizer, prompt, cfg.sample.num_samples, suffix or "")))
    seconds = time.perf_counter() - start
    print(f"{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:,.0f} tokens/s", file=sys.stderr)


def generation_dtype(precision, device, n_params):
    """The weights' dtype; auto is the device's fastest, but float32 for a small model on a CPU."""
    if precision == "auto" and device.type == "cpu" and n_params < 2**24:
        precision = "fp32"  # bf16 halves the memory traffic per token, but its kernels take longer to start
    return DTYPES[pick_precision(precision, device)]


@torch.inference_mode()
def print_candidates(model, tokenizer, prompt, k, device):
    """Prints the k likeliest tokens at each [MASK] of a prompt, and the prompt with the likeliest filled in."""
    ids, mask = masked_ids(tokenizer, prompt), special_id(tokenizer.specials, "mask")
    if mask not in ids:
        raise UserError('a masked model fills in each [MASK]; write at least one, as in --prompt="import [MASK]"')
    ids = as_batch(ids, model, device)  # 1 T
    positions = (ids == mask).nonzero()[:, 1][None]  # 1 K
    logits = model(ids, positions=positions)[0, :, : tokenizer.vocab_size].float()  # K V
    logits[:, list(tokenizer.specials.values())] = -math.inf  # special tokens are never targets in training
    k = min(k, tokenizer.vocab_size - len(tokenizer.specials))
    for number, top in enumerate(zip(*logits.softmax(-1).topk(k)), start=1):
        print(f"[MASK] {number}" if len(logits) > 1 else "[MASK]")
        for p, token in zip(*map(torch.Tensor.tolist, top)):
            print(f"  {p:6.1%}  {tokenizer.decode([token])!r}")
    ids[0, positions[0]] = logits.argmax(-1)
    print(tokenizer.decode(ids[0, 1:-1].tolist()))


def masked_ids(tokenizer, prompt):
    """Token ids of [CLS] prompt [SEP]; [MASK] or <|mask|> in the prompt becomes the mask token."""
    parts = re.split(r"\[MASK]|<\|mask\|>", prompt)
    cls, sep, mask = (special_id(tokenizer.specials, role) for role in ("cls", "sep", "mask"))
    ids = [cls]
    for i, part in enumerate(parts):
        if tokenizer.space_begins_word and i + 1 < len(parts):
            part = part.removesuffix(" ")  # the space belongs to the masked word
        ids += [*tokenizer.encode(part).tolist(), mask]
    return [*ids[:-1], sep]


def gap_ids(tokenizer, prompt, suffix, is_spm=False):
    """Token ids that ask for the text between prompt and suffix: prefix, suffix, middle, or suffix, prefix, middle."""
    if (tokens := fim_tokens(tokenizer.specials)) is None:
        rule = f"suffix needs the tokens {', '.join(FIM_TOKENS[0])}, which the tokenizer {tokenizer.name} lacks"
        raise UserError(f"{rule}; train with --fim_rate=0.5 on data with --tokenizer=bpe_fim or byte_fim")
    before, after, middle = tokens
    prefix, suffix = (tokenizer.encode(text).tolist() for text in (prompt, suffix))
    parts = (after, *suffix, middle, *prefix) if is_spm else (*prefix, after, *suffix, middle)
    return [*tokenizer.begin, before, *parts]


def as_batch(ids, model, device):
    """A prompt's token ids as a batch of one, (1, T); UserError where they exceed the model's context."""
    if len(ids) > (context := model.cfg.block_size):
        raise UserError(f"the prompt has {len(ids)} tokens, the model's context is {context}; shorten it")
    return torch.tensor([ids], device=device)


def read_prompt(prompt):
    """The prompt's text: the setting's own, or read from the file or stdin that it names; UserError where it has none."""
    where = f"prompt file {prompt[5:]}" if prompt.startswith("FILE:") else "stdin" if prompt == "-" else "prompt"
    try:
        if prompt.startswith("FILE:"):
            text = Path(prompt[5:]).read_bytes().decode("utf-8")  # keeps line ends
        else:
            # Python keeps bytes that it cannot decode, in the C locale all but ASCII, as halves of surrogate pairs.
            text = sys.stdin.read() if prompt == "-" else prompt
            text = text.encode("utf-8", "surrogateescape").decode("utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{where} cannot be read as UTF-8 text ({error})") from error
    if prompt and not text:
        raise UserError(f"{where} is empty; leave --prompt out to start from nothing")
    return text


def generate(model, ids, cfg, seed, vocab_size, never=()):
    """Yields the tokens (B,) that follow ids (B, T), step by step, on the CPU: below vocab_size, and none of `never`.

    UserError where the logits are not finite.
    """
    if ids.device.type == "cuda":  # a GPU would idle, had the host to launch each kernel and to wait for each token
        steps = on_host(next_tokens(model, ids, cfg, seed, vocab_size, never, record=Captured))
    else:
        steps = next_tokens(model, ids, cfg, seed, vocab_size, never)
    for tokens in steps:
        if (tokens < 0).any():
            raise UserError("the model's logits are not finite; take an earlier checkpoint, or train at a lower rate")
        yield tokens


@torch.inference_mode()
def next_tokens(model, ids, cfg, seed, vocab_size, never=(), record=None):
    """Yields the tokens of generate on the model's device, without waiting for it; -1 where logits are not finite.

    At block_size, the cache is cleared and the model continues from the last half of the sequence. record, such as
    Captured, turns the step after one token, a function of tensors alone, into a faster one; attention then covers the
    whole cache, masked. Without record it covers the tokens so far, which is faster on a CPU.
    """
    block_size, device = model.cfg.block_size, ids.device
    generator = torch.Generator(device).manual_seed(seed)
    n_tokens = min(block_size, ids.shape[1] + cfg.max_new_tokens)
    n_tokens += -n_tokens % 64  # GPU kernels want rows of masks aligned
    cache = Cache(model.cfg, len(ids), device, model.wte.weight.dtype, n_tokens)
    never = torch.tensor(never, dtype=torch.long, device=device)

    def following(unread, uniform, place=None):
        logits = model(unread.clamp(min=0), cache=cache, place=place)[:, -1, :vocab_size].float()  # B V
        return draw(logits.index_fill_(1, never, -math.inf), cfg, uniform)

    recorded = record(following) if record else None
    unread = recent = ids
    for _ in range(cfg.max_new_tokens):
        if recent.shape[1] > block_size:
            cache.clear()
            unread = recent = recent[:, -max(1, block_size // 2) :]
        uniform = torch.rand(len(ids), 1, device=device, generator=generator)
        if record and unread.shape[1] == 1:
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
    """Probabilities (B, V) at the temperature, up to a factor, 0 beyond top_k and top_p; the largest logit is 0."""
    probs = torch.softmax(logits / cfg.temperature, dim=-1)  # a tiny temperature overflows to -inf, not inf
    if cfg.top_k is not None and cfg.top_k < probs.shape[-1]:
        top = probs.topk(cfg.top_k)  # exactly k tokens, even where some are equally likely
        probs = torch.zeros_like(probs).scatter(-1, top.indices, top.values)
    if cfg.top_p is not None:
        ordered, order = (probs / probs.sum(-1, keepdim=True)).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= cfg.top_p  # likelier tokens already sum to top_p
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(beyond, 0.0))
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


def stream(steps, tokenizer, prompt, num_samples, suffix=""):
    """Prints the samples, the first while it is generated, the others at the end; returns the token ids of each."""
    samples, ended = [[] for _ in range(num_samples)], [False] * num_samples
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # keeps back a character until its last byte arrives
    print(prompt, end="", flush=True)
    for tokens in steps:
        for i, token in enumerate(tokens.tolist()):
            ended[i] = ended[i] or token in tokenizer.stops
            if not ended[i]:
                samples[i].append(token)
                if i == 0:
                    print(utf8.decode(tokenizer.decode_bytes([token])), end="", flush=True)
        if all(ended):
            break
    print(utf8.decode(b"", final=True) + suffix)
    for sample in samples[1:]:
        print("-" * 40)
        print(prompt + tokenizer.decode(sample) + suffix)
    return samples


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
