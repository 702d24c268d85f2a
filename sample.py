"""Continues a prompt with a trained model, or fills the gap before a suffix, or a prompt's [MASK]s; embeds texts.

python sample.py --out_dir=out/quickstart --prompt="def main(" --num_samples=3
python sample.py --out_dir=out/quickstart_bert --prompt="for i in [MASK](10):"
python sample.py --out_dir=out/quickstart --prompt=FILE:prompt.txt
python sample.py --out_dir=out/fim --prompt="def add(" --suffix="return a + b"
echo "import os" | python sample.py --out_dir=out/quickstart --prompt=-
python sample.py --out_dir=out/finetune --chat --prompt="What is the capital of France?"
python sample.py --out_dir=out/quickstart --embed=texts.txt
python sample.py --out_dir=out/quickstart --prompt="def main(" --min_p=0.1 --stop='["\\n\\n", "def "]'
"""

import codecs
import math
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from config import Config, Range, UserError, only, run_script
from devices import DTYPES, pick_device, pick_precision
from fim import FIM_TOKENS, fim_tokens
from generation import GenerationConfig, UntilStop, generate
from heads import embedding
from interop.chat import open_chat
from interop.pretrained import load_model, load_tokenizer_of, model_location
from objective import special_id
from run.folder import RunConfig
from shards import refusing_system_errors
from text.files import read_text, texts_of
from world import WorldConfig

Samples = Annotated[int, Range("at least 1 and at most 100,000", lambda n: 1 <= n <= 100_000)]


@dataclass(frozen=True)
class SampleConfig(Config):
    prompt: str = ""  # text to continue, or to fill at each [MASK]; FILE:path reads a file, - reads stdin
    suffix: str | None = None  # text behind a gap that follows the prompt, to fill by a model trained with fim_rate
    chat: bool = False  # the prompt is a user's message, the sample the answer, by the model's chat template
    num_samples: Samples = 1  # continuations of the prompt, in one batch
    embed: str | None = None  # file of texts, one a line, to embed instead, into a file of that name with .npy
    stop: str | None = None  # text that ends a continuation and is left out; several as JSON: ["\n\n", "User:"]

    def __post_init__(self):
        super().__post_init__()
        if self.chat and self.suffix is not None:
            raise UserError("chat is on and suffix is given, but an answer fills no gap; leave one of them out")
        _ = self.stops  # raises where stop is not what it must be

    @property
    def stops(self):
        """The texts of stop."""
        return [] if self.stop is None else texts_of(self.stop, "stop")


@dataclass(frozen=True)
class Settings:
    sample: SampleConfig
    generation: GenerationConfig
    run: RunConfig = only("out_dir", "init_from", "seed")
    world: WorldConfig = only("device", "precision")
    presets: tuple = ()


def main(cfg):
    device = pick_device(cfg.world.device)
    model, source = load_model(model_location(cfg), device)
    if cfg.sample.embed:
        return write_embeddings(model, load_tokenizer_of(source), cfg.sample.embed, device)
    dtype = generation_dtype(cfg.world.precision, device, model.num_params())
    model.to(dtype)  # not autocast, which would cast all weights for each token
    tokenizer = load_tokenizer_of(source)
    print(f"{source.name}, {model.num_params():,} parameters on {device} in {dtype}", file=sys.stderr)
    prompt, suffix = (
        read_text(cfg.sample.prompt, "prompt"),
        cfg.sample.suffix and read_text(cfg.sample.suffix, "suffix"),
    )
    if not model.cfg.is_causal:
        given = {
            "suffix": suffix,
            "stop": cfg.sample.stop,
            "min_p": cfg.generation.min_p,
            "chat": cfg.sample.chat or None,
        }
        if given := [name for name, value in given.items() if value is not None]:
            raise UserError(f"{' and '.join(given)}: a masked model fills each [MASK], without them; leave them out")
        return print_candidates(model, tokenizer, prompt, cfg.generation.top_k or 5, device)
    ids = [*tokenizer.begin, *tokenizer.encode(prompt).tolist()] or [tokenizer.eot]
    if cfg.sample.chat:
        chat = open_chat(source, tokenizer)
        ids, prompt = chat.prompt([{"role": "user", "content": prompt}], "the prompt").tolist(), ""
    most = cfg.generation.max_new_tokens
    if suffix is not None:
        settings = getattr(source, "manifest", {}).get("settings", {"fim_rate": 1})  # the hub's models have none
        if not settings.get("fim_rate"):
            print("warning: this run was trained without fim_rate; expect no good middle", file=sys.stderr)
        ids = gap_ids(tokenizer, prompt, suffix, settings.get("fim_spm_rate") == 1)
        room = model.cfg.block_size - len(ids) + 1  # later tokens would no longer see the prefix
        if 0 < room < most:
            rule = f"the context of {model.cfg.block_size} tokens has room for {room} between prompt and suffix"
            print(f"max_new_tokens: {most} -> {room}; {rule}", file=sys.stderr)
            most = room
    if ids == [None]:
        raise UserError(f"the tokenizer {tokenizer.name} has no end-of-text token to start from; give a --prompt=")
    ids = as_batch(ids, model, device).repeat(cfg.sample.num_samples, 1)  # B T
    never = [token for token in tokenizer.specials.values() if token not in tokenizer.stops]  # no part of text
    start = time.perf_counter()
    generation = replace(cfg.generation, max_new_tokens=most)
    steps = generate(model, ids, generation, cfg.run.seed, tokenizer.vocab_size, never)
    samples = stream(steps, tokenizer, prompt, cfg.sample.num_samples, cfg.sample.stops, suffix or "")
    n_tokens = sum(map(len, samples))
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


@torch.inference_mode()
def write_embeddings(model, tokenizer, path, device, batch_size=32):
    """Writes the embeddings (N, C) of a file's lines beside it as .npy: float32, by the model's pooling, not normalised.

    Texts are [CLS] text [SEP] for a masked model, and cut at the model's context.
    """
    before, after = list(tokenizer.begin), []
    if not model.cfg.is_causal:
        before, after = ([special_id(tokenizer.specials, role)] for role in ("cls", "sep"))
    room = model.cfg.block_size - len(before) - len(after)
    if (target := Path(path).with_suffix(".npy")) == Path(path):
        raise UserError(f"embed {path} would be overwritten by its embeddings; give the texts another ending")
    lines = read_text(f"FILE:{path}", "embed").replace("\r\n", "\n").removesuffix("\n").split("\n")
    texts = [tokenizer.encode(line).tolist() for line in lines]
    rows = [[*before, *text[:room], *after] or [tokenizer.eot or 0] for text in texts]
    found = []
    for first in range(0, len(rows), batch_size):
        here = rows[first : first + batch_size]
        lengths = torch.tensor([len(row) for row in here], device=device)
        ids = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in here], device=device)
        seen = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        found.append(embedding(model, model.states(ids, seen), seen).cpu().numpy())
    with refusing_system_errors(f"{target} cannot be written", "make room, or put the texts elsewhere"):
        np.save(target, np.concatenate(found))
    n_cut = sum(len(text) > room for text in texts)
    cut = f"; {n_cut} texts were cut at {model.cfg.block_size} tokens" if n_cut else ""
    print(f"{len(rows)} embeddings, by pooling {model.cfg.pooling}, are in {target}{cut}", file=sys.stderr)


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


def stream(steps, tokenizer, prompt, num_samples, stops=(), suffix=""):
    """Prints the samples, the first while it is generated, the others at the end; returns the token ids of each.

    stops: texts that end a sample; what is printed ends before the first of them.
    """
    samples, ended, texts = [[] for _ in range(num_samples)], [False] * num_samples, [b""] * num_samples
    ends = [UntilStop(stops) for _ in range(num_samples)]
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # keeps back a character until its last byte arrives
    print(prompt, end="", flush=True)
    for tokens in steps:
        for i, token in enumerate(tokens.tolist()):
            ended[i] = ended[i] or token in tokenizer.stops
            if not ended[i]:
                samples[i].append(token)
                new = ends[i].add(tokenizer.decode_bytes([token]))
                texts[i], ended[i] = texts[i] + new, ends[i].has_ended
                if i == 0:
                    print(utf8.decode(new), end="", flush=True)
        if all(ended):
            break
    print(utf8.decode(ends[0].held, final=True) + suffix)
    for text, end in list(zip(texts, ends))[1:]:
        print("-" * 40)
        print(prompt + (text + end.held).decode("utf-8", errors="replace") + suffix)
    return samples


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
