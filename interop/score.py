"""Log-likelihoods of given texts under a causal model, in the model's precision.

EleutherAI's evaluation harness (lm-eval) gives the same, unless the text spells a special token: the harness's
tokenizer, unlike ours, makes it one (see its split_special_tokens).
"""

import functools
import math
import operator
from typing import NamedTuple

import torch

from config import UserError
from devices import pick_device
from interop.pretrained import load_model, load_tokenizer_of
from ops import IGNORE
from world import World


class Score(NamedTuple):
    log_likelihood: float  # natural logarithm, summed over tokens
    n_tokens: int
    is_greedy: bool  # whether each token is the likeliest after the ones before it


def loglikelihood(model, tokenizer, pairs, score=None):
    """A Score of each continuation in [(context, continuation)]; an empty context is end-of-text.

    Where the two together exceed the model's context, theirs loses its first tokens. score: takes score_tokens' place,
    as a function of the requests alone.
    """
    requests, longest = [encode_pair(tokenizer, *pair) for pair in pairs], trained_context(model)
    for (_, continuation), (_, text) in zip(requests, pairs):
        if not 0 < len(continuation) <= longest:
            what = f"the continuation {start_of(text)} has {len(continuation)} tokens of its own; it must have"
            raise UserError(f"{what} 1 to {longest} (the model's context), or be scored as a text")
    return score(requests) if score else score_tokens(model, requests)


def loglikelihood_rolling(model, tokenizer, texts, score=None):
    """A Score of each whole text, in windows of the model's context; the tokens that begin a text are scored too."""
    counts, requests = [], []
    for text in texts:
        ids = [*tokenizer.begin, *tokenizer.encode(text).tolist()]
        cut = windows(ids, before_text(tokenizer), trained_context(model))
        counts.append(len(cut))
        requests += cut
    parts = iter(score(requests) if score else score_tokens(model, requests))
    return [total([next(parts) for _ in range(count)]) for count in counts]


def trained_context(model):
    """The longest sequence that a model was trained on: its block_size, but in training, where it may be less."""
    return getattr(model, "context", model.cfg.block_size)


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


@torch.no_grad()  # not inference_mode: FSDP would keep the weights that it gathers for training
def score_tokens(model, requests, world=None, batch_size=None):
    """A Score of each continuation in [(context's ids, continuation's ids)], in batches of similar length.

    world: its ranks share the batches; each has all requests, and gets all scores. batch_size: requests in a batch;
    None: 2**13 tokens, but at most 256 MiB of float32 logits.
    """
    world = world or World(0, 1, model.wte.weight.device, "fp32")
    longest, batch_tokens, batches, end = trained_context(model), min(2**13, 2**26 // model.cfg.vocab_size), [], 0
    sequences = [(context + continuation)[-longest - 1 :] for context, continuation in requests]
    order = sorted(range(len(requests)), key=lambda i: (len(sequences[i]), sequences[i]), reverse=True)
    while end < len(order):
        start, end = end, end + (batch_size or max(1, batch_tokens // len(sequences[order[end]])))
        batches.append(order[start:end])

    def run(batch):
        rows = {}  # {input: its row}: requests that differ in the last token alone have one input
        row_of = [rows.setdefault(tuple(sequences[i][:-1]), len(rows)) for i in batch]
        T, K = max(map(len, rows)), max(len(requests[i][1]) for i in batch)
        T += -T % world.tp  # tensor parallelism divides sequences
        ids = torch.zeros(len(rows), T, dtype=torch.long)  # B T, padded on the right, unseen by a causal model
        for row, input in zip(ids, rows):
            row[: len(input)] = torch.tensor(input)
        positions = (torch.tensor([*map(len, rows)])[:, None] + torch.arange(-K, 0)).clamp(min=0)  # B K, the last ones
        targets = torch.full((len(batch), K), IGNORE)  # N K, a request's in the last columns
        for row, i in zip(targets, batch):
            row[K - len(requests[i][1]) :] = torch.tensor(sequences[i][-len(requests[i][1]) :])
        ids, positions, targets, row_of = (
            x.to(world.device) for x in (ids, positions, targets, torch.tensor(row_of)[:, None])
        )
        logits = model(ids, positions=positions).float()  # B K V
        likeliest = logits.argmax(-1)[row_of[:, 0]]  # N K
        logits -= logits.amax(-1, keepdim=True)  # the difference below rounds less
        columns, is_target = torch.arange(K, device=world.device), targets != IGNORE
        log_p = logits[row_of, columns, targets.clamp(min=0)] - logits.logsumexp(-1)[row_of[:, 0]]  # N K
        sums = log_p.double().where(is_target, 0.0).sum(1).tolist()
        greedy = ((likeliest == targets) | ~is_target).all(1).tolist()
        return {i: Score(*score) for i, *score in zip(batch, sums, is_target.sum(1).tolist(), greedy)}

    scores = over_ranks(world, batches, run)
    if not all(math.isfinite(score.log_likelihood) for score in scores.values()):
        raise UserError("the model's logits are not finite; take an earlier checkpoint, or --precision=fp32")
    return [scores[i] for i in range(len(requests))]


def over_ranks(world, batches, run):
    """The dicts of run(batch) for all batches, as one, on each rank; ranks that read different data take turns.

    Each runs equally many, as FSDP needs, the last ones the last batch. What run raises on one rank, all raise.
    """
    from tqdm import tqdm

    turns, found = range(world.data_rank, len(batches) + -len(batches) % world.data_ranks, world.data_ranks), {}
    try:
        for turn in tqdm(turns, "evaluating", leave=False, disable=None if world.is_main else True):
            with world.phase("evaluation", f"batch {turn} of {len(batches)}"):
                found |= run(batches[min(turn, len(batches) - 1)])
    except Exception as error:
        found = error
    found = world.gather(found)
    if errors := [part for part in found if isinstance(part, Exception)]:
        raise errors[0]
    return functools.reduce(operator.or_, found)


def open_scorer(where):
    """A function of texts that returns the nats per token of each, under the model of a run or a Hugging Face folder."""
    model, source = load_model(where, pick_device("auto"))
    tokenizer = load_tokenizer_of(source)

    def nats_per_token(texts):
        scores = loglikelihood_rolling(model, tokenizer, texts)
        return [-score.log_likelihood / score.n_tokens for score in scores]

    return nats_per_token


def total(scores):
    """The Score of several together."""
    log_likelihood, n_tokens = sum(score.log_likelihood for score in scores), sum(score.n_tokens for score in scores)
    return Score(log_likelihood, n_tokens, all(score.is_greedy for score in scores))


def start_of(text):
    """The beginning of a text, on one line."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
