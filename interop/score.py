"""Log-likelihoods of given texts under a causal model.

They equal the results of two requests of EleutherAI's evaluation harness (lm-eval), in the model's precision.
Where they differ, the text spells a special token and the harness's tokenizer, unlike ours, makes it one: see its
split_special_tokens.
"""

import json
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from config import UserError
from ops import IGNORE


class Score(NamedTuple):
    log_likelihood: float  # natural logarithm, summed over tokens
    n_tokens: int
    is_greedy: bool  # whether each token is the likeliest after those before


def loglikelihood(model, tokenizer, pairs):
    """A Score of each continuation in [(context, continuation)]; of an empty context, the one after end-of-text.

    Of what is longer than the model, the context's first tokens are left out.
    """
    requests = [encode_pair(tokenizer, *pair) for pair in pairs]
    for (_, continuation), (_, text) in zip(requests, pairs):
        if not 0 < len(continuation) <= model.cfg.block_size:
            raise UserError(
                f"the continuation {_start(text)} has {len(continuation)} tokens of its own, which must be "
                f"1 to {model.cfg.block_size} (block_size); lengthen or shorten it, or score it as a text"
            )
    return score_tokens(model, requests)


def loglikelihood_rolling(model, tokenizer, texts):
    """A Score of each whole text, in windows of block_size; tokens that begin a text are scored with it."""
    counts, requests = [], []
    for text in texts:
        ids = [*tokenizer.begin, *tokenizer.encode(text).tolist()]
        cut = windows(ids, before_text(tokenizer), model.cfg.block_size)
        counts.append(len(cut))
        requests += cut
    parts = iter(score_tokens(model, requests))
    return [_total([next(parts) for _ in range(count)]) for count in counts]


def encode_pair(tokenizer, context, continuation):
    """Ids of a context, at least one, and of its continuation: those of both as one text, without the context's.

    Blanks that end the context go to the continuation, whose first token may begin with one.
    """
    ids = tokenizer.encode(context.rstrip()).tolist()
    both = tokenizer.encode(context + continuation).tolist()
    begin = list(tokenizer.begin) if context else []
    return begin + ids or [before_text(tokenizer)], both[len(ids) :]


def before_text(tokenizer):
    """Id of what stands before a text's first token: end-of-text, or what a Hugging Face model has for it."""
    if tokenizer.before_text is None and tokenizer.eot is None:
        raise UserError(
            f"the tokenizer {tokenizer.name} has no end-of-text, which must stand before a text's first token; "
            f'score what follows a context: {{"context": ..., "continuation": ...}} in a .jsonl file'
        )
    return tokenizer.eot if tokenizer.before_text is None else tokenizer.before_text


def windows(ids, prefix, block_size):
    """A text's ids as [(context, continuation)]: each id in one continuation, each pair block_size + 1 long at most.

    The first continues the prefix. Others continue a single token, but the last, which is short, all that fits.
    """
    ids, cut = [prefix, *ids], []
    for start in range(1, len(ids), block_size):
        end = min(start + block_size, len(ids))
        cut.append((ids[max(0, end - block_size - 1) : start], ids[start:end]))
    return cut


@torch.inference_mode()
def score_tokens(model, requests):
    """A Score of each continuation in [(ids of the context, of the continuation)], in batches of like length."""
    device, block_size, scores = model.wte.weight.device, model.cfg.block_size, [None] * len(requests)
    sequences = [(context + continuation)[-block_size - 1 :] for context, continuation in requests]
    order = sorted(range(len(requests)), key=lambda i: len(sequences[i]), reverse=True)
    batch_tokens = min(2**13, 2**26 // model.cfg.vocab_size)  # at most 256 MiB of float32 logits
    end = 0
    while end < len(order):
        start, end = end, end + max(1, batch_tokens // len(sequences[order[end]]))
        batch = order[start:end]
        T, K = len(sequences[batch[0]]) - 1, max(len(requests[i][1]) for i in batch)
        ids = torch.zeros(len(batch), T, dtype=torch.long)  # B T, padded on the right, where causal models do not look
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


# ---- in and out


def read_requests(prompt, text):
    """[(context, continuation)] of the text that --prompt names; a text to score whole has None for a context.

    FILE:x.jsonl holds an object a line, {"text": ...} or {"context": ..., "continuation": ...}; all else is one text.
    """
    if not (prompt or "").startswith("FILE:") or not prompt.endswith(".jsonl"):
        if not text:
            raise UserError('there is no text to score; give one, as in --prompt="import os" or --prompt=FILE:x.jsonl')
        return [(None, text)]
    lines = text.removeprefix("\ufeff").split("\n")  # splitlines would also cut at a U+2028 inside a string
    requests = [_request(line, f"{prompt[5:]} line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not requests:
        raise UserError(f'{prompt[5:]} has no texts; write one a line, as in {{"text": "import os"}}')
    return requests


def _request(line, place):
    """A line's request, as read_requests yields it; place: file and line, for errors."""
    shape = 'write {"text": ...} or {"context": ..., "continuation": ...}, with strings, on a line of its own'
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is no JSON ({error}); {shape}") from error
    names = {"text", "context", "continuation"} & set(fields if isinstance(fields, dict) else ())
    if names not in ({"text"}, {"context", "continuation"}) or not all(isinstance(fields[name], str) for name in names):
        raise UserError(f"{place} is neither a text nor a context with its continuation; {shape}")
    context, continuation = (None, fields["text"]) if "text" in fields else (fields["context"], fields["continuation"])
    if not continuation:
        raise UserError(f"{place} has an empty text; leave the line out")
    return context, continuation


def print_scores(model, tokenizer, requests):
    """Scores what read_requests returns and prints a line for each, then their sum.

    Perplexity is per token; bits per byte, for whole texts, do not depend on the tokenizer; greedy says of a
    continuation whether the model, always taking the likeliest token, would write it.
    """
    if not model.cfg.is_causal:
        raise UserError(
            "a masked model has no log-likelihood of a text, since it sees both sides of a token; "
            "score with a model of --objective=clm"
        )
    whole, pairs = [r for r in requests if r[0] is None], [r for r in requests if r[0] is not None]
    scores_whole = iter(loglikelihood_rolling(model, tokenizer, [text for _, text in whole]))
    scores_pairs = iter(loglikelihood(model, tokenizer, pairs))
    print(f"{'log_likelihood':>16} {'tokens':>9} {'perplexity':>11} {'bits/byte':>10} {'greedy':>9}  text")
    scores = []
    for context, text in requests:
        scores.append(next(scores_whole if context is None else scores_pairs))
        n_bytes = len(text.encode(errors="replace")) if context is None else None
        greedy = None if context is None else "yes" if scores[-1].is_greedy else "no"
        print(_row(scores[-1], n_bytes, greedy, _start(text)))
    n_bytes = sum(len(text.encode(errors="replace")) for _, text in whole) if not pairs else None
    n_greedy = sum(score.is_greedy for (context, _), score in zip(requests, scores) if context is not None)
    print(_row(_total(scores), n_bytes, f"{n_greedy}/{len(pairs)}" if pairs else None, f"sum of {len(requests)}"))


def _row(score, n_bytes, greedy, text):
    nats = -score.log_likelihood / score.n_tokens
    perplexity = math.exp(nats) if nats < 700 else math.inf
    bits = "-" if n_bytes is None else f"{-score.log_likelihood / math.log(2) / n_bytes:.4f}"
    return (
        f"{score.log_likelihood:>16.4f} {score.n_tokens:>9} {perplexity:>11.5g} {bits:>10} {greedy or '-':>9}  {text}"
    )


def _total(scores):
    """The Score of several together."""
    return Score(
        sum(s.log_likelihood for s in scores), sum(s.n_tokens for s in scores), all(s.is_greedy for s in scores)
    )


def _start(text):
    """The beginning of a text, on one line."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
