"""Log-likelihoods of given texts under a causal model, in the model's precision.

EleutherAI's evaluation harness (lm-eval) gives the same, unless the text spells a special token: the harness's
tokenizer, unlike ours, makes it one (see its split_special_tokens).
"""

import json
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from config import UserError
from interop.pretrained import load_model, load_tokenizer_of
from ops import IGNORE
from world import pick_device


class Score(NamedTuple):
    log_likelihood: float  # natural logarithm, summed over tokens
    n_tokens: int
    is_greedy: bool  # whether each token is the likeliest after the ones before it


def loglikelihood(model, tokenizer, pairs):
    """A Score of each continuation in [(context, continuation)]; an empty context is end-of-text.

    Where the two together exceed block_size, the context loses its first tokens.
    """
    requests = [encode_pair(tokenizer, *pair) for pair in pairs]
    for (_, continuation), (_, text) in zip(requests, pairs):
        if not 0 < len(continuation) <= model.cfg.block_size:
            what = f"the continuation {_start(text)} has {len(continuation)} tokens of its own; it must have"
            raise UserError(f"{what} 1 to {model.cfg.block_size} (the model's context), or be scored as a text")
    return score_tokens(model, requests)


def loglikelihood_rolling(model, tokenizer, texts):
    """A Score of each whole text, in windows of block_size; the tokens that begin a text are scored too."""
    counts, requests = [], []
    for text in texts:
        ids = [*tokenizer.begin, *tokenizer.encode(text).tolist()]
        cut = windows(ids, before_text(tokenizer), model.cfg.block_size)
        counts.append(len(cut))
        requests += cut
    parts = iter(score_tokens(model, requests))
    return [_total([next(parts) for _ in range(count)]) for count in counts]


def encode_pair(tokenizer, context, continuation):
    """(ids of a context, at least one, ids of its continuation): both are encoded as one text, then divided.

    Blanks that end the context go to the continuation, whose first token may begin with one.
    """
    ids = tokenizer.encode(context.rstrip()).tolist()
    both = tokenizer.encode(context + continuation).tolist()
    begin = list(tokenizer.begin) if context else []
    return begin + ids or [before_text(tokenizer)], both[len(ids) :]


def before_text(tokenizer):
    """Id of the token before a text's first one: end-of-text, or a Hugging Face model's own."""
    id_ = tokenizer.eot if tokenizer.before_text is None else tokenizer.before_text
    if id_ is None:
        remedy = 'score what follows a context: {"context": ..., "continuation": ...} in a .jsonl file'
        raise UserError(f"the tokenizer {tokenizer.name} has no end-of-text, to precede a text; {remedy}")
    return id_


def windows(ids, prefix, block_size):
    """A text's ids as [(context, continuation)]: each id is in one continuation; a pair has at most block_size + 1.

    The first context is the prefix, the others are one token; the last continuation is short, its context what fits.
    """
    ids, cut = [prefix, *ids], []
    for start in range(1, len(ids), block_size):
        end = min(start + block_size, len(ids))
        cut.append((ids[max(0, end - block_size - 1) : start], ids[start:end]))
    return cut


@torch.inference_mode()
def score_tokens(model, requests):
    """A Score of each continuation in [(context's ids, continuation's ids)], in batches of similar length."""
    device, block_size, scores = model.wte.weight.device, model.cfg.block_size, [None] * len(requests)
    sequences = [(context + continuation)[-block_size - 1 :] for context, continuation in requests]
    order = sorted(range(len(requests)), key=lambda i: len(sequences[i]), reverse=True)
    batch_tokens = min(2**13, 2**26 // model.cfg.vocab_size)  # at most 256 MiB of float32 logits
    end = 0
    while end < len(order):
        start, end = end, end + max(1, batch_tokens // len(sequences[order[end]]))
        batch = order[start:end]
        T, K = len(sequences[batch[0]]) - 1, max(len(requests[i][1]) for i in batch)
        ids = torch.zeros(len(batch), T, dtype=torch.long)  # B T, padded on the right, unseen by a causal model
        positions = torch.zeros(len(batch), K, dtype=torch.long)  # B K
        targets = torch.full((len(batch), K), IGNORE)  # B K
        for row, i in enumerate(batch):
            sequence, n = torch.tensor(sequences[i]), len(requests[i][1])
            ids[row, : len(sequence) - 1] = sequence[:-1]
            positions[row, :n] = torch.arange(len(sequence) - 1 - n, len(sequence) - 1)
            targets[row, :n] = sequence[-n:]
        targets = targets.to(device)
        logits = model(ids.to(device), positions=positions.to(device)).float()  # B K V
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)  # B K
        greedy = ((logits.argmax(-1) == targets) | (targets == IGNORE)).all(1)  # B
        for i, loss, is_greedy in zip(batch, losses.double().sum(1).tolist(), greedy.tolist()):
            if not math.isfinite(loss):
                raise UserError("the model's logits are not finite; take an earlier checkpoint, or --precision=fp32")
            scores[i] = Score(-loss, len(requests[i][1]), is_greedy)
    return scores


def open_scorer(where):
    """A function of texts that returns the nats per token of each, under the model of a run or a Hugging Face folder."""
    model, source = load_model(where, pick_device("auto"))
    tokenizer = load_tokenizer_of(source)

    def nats_per_token(texts):
        scores = loglikelihood_rolling(model, tokenizer, texts)
        return [-score.log_likelihood / score.n_tokens for score in scores]

    return nats_per_token


# ---- in and out


def read_requests(prompt, text):
    """[(context, continuation)] of the text that --prompt names; the context is None for a text to score whole.

    FILE:x.jsonl has an object a line, {"text": ...} or {"context": ..., "continuation": ...}; any other is one text.
    """
    if not (prompt.startswith("FILE:") and prompt.endswith(".jsonl")):
        if not text:
            raise UserError('there is no text to score; give one, as in --prompt="import os" or --prompt=FILE:x.jsonl')
        return [(None, text)]
    lines = text.removeprefix("\ufeff").split("\n")  # splitlines would also cut at U+2028, which JSON allows in strings
    requests = [_request(line, f"{prompt[5:]} line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not requests:
        raise UserError(f'{prompt[5:]} has no texts; write one a line, as in {{"text": "import os"}}')
    return requests


def _request(line, place):
    """A line's (context, continuation); place: file and line, for errors."""
    shape = 'write {"text": ...} or {"context": ..., "continuation": ...}, with strings, on a line of its own'
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is no JSON ({error}); {shape}") from error
    names = {"text", "context", "continuation"} & set(fields if isinstance(fields, dict) else ())
    if names not in ({"text"}, {"context", "continuation"}) or not all(isinstance(fields[name], str) for name in names):
        raise UserError(f"{place} is neither a text nor a context with its continuation; {shape}")
    continuation = fields.get("continuation", fields.get("text"))
    if not continuation:
        raise UserError(f"{place} has an empty text; leave the line out")
    return fields.get("context"), continuation


def print_scores(model, tokenizer, requests):
    """Scores what read_requests returns and prints a line for each, then their sum.

    Perplexity is per token. Bits per byte, for whole texts, do not depend on the tokenizer. Greedy tells whether the
    model, always taking the likeliest token, would write the continuation.
    """
    if not model.cfg.is_causal:
        raise UserError("a masked model has no log-likelihood of a text; score with a model of --objective=clm")
    whole, pairs = [r for r in requests if r[0] is None], [r for r in requests if r[0] is not None]
    whole_scores = loglikelihood_rolling(model, tokenizer, [text for _, text in whole])
    pair_scores = loglikelihood(model, tokenizer, pairs)
    print(f"{'log_likelihood':>16} {'tokens':>9} {'perplexity':>11} {'bits/byte':>10} {'greedy':>9}  text")
    whole_left, pairs_left, scores = iter(whole_scores), iter(pair_scores), []
    for context, text in requests:
        scores.append(next(whole_left if context is None else pairs_left))
        if context is None:
            _print_row(scores[-1], _start(text), texts=[text])
        else:
            _print_row(scores[-1], _start(text), greedy="yes" if scores[-1].is_greedy else "no")
    greedy = f"{sum(score.is_greedy for score in pair_scores)}/{len(pairs)}" if pairs else "-"
    _print_row(_total(scores), f"sum of {len(requests)}", [] if pairs else [text for _, text in whole], greedy)


def _print_row(score, label, texts=(), greedy="-"):
    """Prints a line of the table; texts: the whole texts that were scored, whose bytes count."""
    nats, n_bytes = -score.log_likelihood / score.n_tokens, sum(len(text.encode(errors="replace")) for text in texts)
    perplexity = math.exp(nats) if nats < 700 else math.inf
    bits = f"{-score.log_likelihood / math.log(2) / n_bytes:.4f}" if n_bytes else "-"
    print(f"{score.log_likelihood:>16.4f} {score.n_tokens:>9} {perplexity:>11.5g} {bits:>10} {greedy:>9}  {label}")


def _total(scores):
    """The Score of several together."""
    log_likelihood, n_tokens = sum(score.log_likelihood for score in scores), sum(score.n_tokens for score in scores)
    return Score(log_likelihood, n_tokens, all(score.is_greedy for score in scores))


def _start(text):
    """The beginning of a text, on one line."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
