"""Training objectives: from windows of tokens to inputs and targets, for the next token, masked ones, or sentences."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from config import Config, Fraction, Rate, Share, UserError
from fim import FillInTheMiddle
from ops import IGNORE
from pairs import neighbours, pair_of
from shards import end_of_text


@dataclass(frozen=True)
class ObjectiveConfig(Config):
    mask_prob: Fraction = 0.15  # mlm: share of a sequence's tokens to predict
    whole_word_masking: bool = False  # mlm: mask whole words; needs a WordPiece tokenizer
    document_mask: bool = False  # each document as if alone: attention and positions begin anew behind end-of-text
    fim_rate: Rate = 0.0  # clm: share of documents whose middle moves behind their suffix, for fill-in-the-middle
    fim_spm_rate: Rate = 0.5  # clm: share of these in the order suffix, prefix, middle; others: prefix, suffix, middle
    word_dropout: Share = 0.0  # mlm: share of tokens that are no targets which become the mask token

    def without_augmentation(self):
        """These settings for evaluation, which sees the text as it is."""
        return replace(self, fim_rate=0.0, word_dropout=0.0)


class NextToken:
    """The next token as the target of each: windows start `stride` tokens apart, with `extra` tokens behind them."""

    causal, has_partners = True, False  # the model sees earlier tokens alone; a batch is made of its own windows
    document_end = None  # token id behind which a document begins that sees nothing before itself
    fill_in = None  # the FillInTheMiddle that windows go through first

    def __init__(self, seq_len):
        self.stride, self.extra = seq_len, 1

    @classmethod
    def build(cls, cfg, seq_len, seed, meta):
        """The objective of a run. cfg: an ObjectiveConfig; meta: the data's meta.json."""
        objective, specials = cls(seq_len), meta.get("specials", {})
        if cfg.word_dropout:
            rule = "it replaces inputs of masked models (--objective=mlm)"
            raise UserError(f"word_dropout is {cfg.word_dropout}, but {rule}; leave it out")
        if cfg.fim_rate:
            objective.fill_in = FillInTheMiddle(cfg.fim_rate, cfg.fim_spm_rate, seed, specials)
        if cfg.document_mask:
            objective.document_end = end_of_text(specials)
            if objective.document_end is None:
                rule = "whose meta.json names the token that ends documents among its specials; this data has none"
                raise UserError(f"document_mask is on; it needs data {rule}: use prepare.py, or leave it off")
        return objective

    @staticmethod
    def head_share(cfg, seq_len):
        """Share of a sequence's tokens that go through the model's head."""
        return 1.0

    def batch(self, rows, first, lengths=None):
        """(ids, targets), both (B, T), from windows (B, T + 1); targets beyond lengths (B,) are ignored.

        With document_end, targets that begin a document are ignored, and the model's argument `documents` comes last.
        """
        if self.fill_in:
            rows = self.fill_in(rows, first)
        ids, targets = rows[:, :-1], rows[:, 1:]
        if lengths is not None:
            targets = np.where(np.arange(self.stride) < lengths[:, None], targets, IGNORE)
        if self.document_end is None:
            return torch.from_numpy(ids).contiguous(), torch.from_numpy(targets).contiguous()
        ends = ids == self.document_end
        targets = torch.from_numpy(np.where(ends, IGNORE, targets))
        return torch.from_numpy(ids).contiguous(), targets, None, None, None, document_starts(ends)


class Masked:
    """Masked tokens as targets: [CLS] tokens [SEP], with round(mask_prob * T) tokens to predict (BERT, section 3.1).

    80 % of them are masked, 10 % become a random token and 10 % stay. Special tokens are neither predicted nor drawn,
    and ends of documents become [SEP]. A sequence's masks are a function of the seed and its number alone. With
    `continuations`, tokens that continue a word, whole words are masked; the last is cut at the number of targets.
    Of the tokens that are no targets, a share word_dropout becomes the mask token, too, as Bowman et al. 2016 (section
    3.1) do it to a decoder's inputs.
    """

    causal, has_partners, extra = False, False, 0
    frame, least = 2, (3, "[CLS], a token and [SEP]")  # special tokens of a sequence; tokens that it needs

    @classmethod
    def build(cls, cfg, seq_len, seed, meta):
        """The objective of a run; UserError where the data's tokenizer cannot serve it."""
        if not meta:
            raise UserError("mlm needs to know the special tokens of its data, which has no meta.json; use prepare.py")
        if cfg.fim_rate:
            rule = "it makes causal models (--objective=clm) fill gaps, as masked ones do anyway"
            raise UserError(f"fim_rate is {cfg.fim_rate}, but {rule}; leave it out")
        if cfg.whole_word_masking and not meta.get("continuations"):
            rule = f"the data's tokenizer, {meta.get('tokenizer')}, does not mark where words start, as WordPiece does"
            remedy = "leave it off, or prepare the data with --tokenizer=vocab.txt, BERT's"
            raise UserError(f"whole_word_masking is on, but {rule}; {remedy}")
        continuations = meta["continuations"] if cfg.whole_word_masking else ()
        rest = meta.get("specials", {}), continuations, cfg.document_mask, cfg.word_dropout
        return cls(seq_len, cfg.mask_prob, seed, meta["vocab_size"], *rest)

    @staticmethod
    def head_share(cfg, seq_len):
        """Share of a sequence's tokens that go through the model's head: the targets."""
        return n_masked(seq_len, cfg.mask_prob) / seq_len

    def __init__(
        self, seq_len, mask_prob, seed, vocab_size, specials, continuations=(), document_mask=False, word_dropout=0.0
    ):
        """specials: {name: id} of the tokenizer, with a mask, cls, sep and pad token under a usual name."""
        if seq_len < self.least[0]:
            raise UserError(f"seq_len is {seq_len}; masked training needs at least {self.least[0]}: {self.least[1]}")
        if (count := n_masked(seq_len, mask_prob)) > seq_len - self.frame:
            what = f"mask_prob {mask_prob} of seq_len {seq_len} is {count} tokens"
            raise UserError(f"{what}, and between [CLS] and [SEP] are only {seq_len - self.frame}; lower mask_prob")
        self.stride, self.mask_prob, self.document_mask = seq_len - self.frame, mask_prob, document_mask
        self.word_dropout = word_dropout
        self.mask, self.cls, self.sep, self.pad = (special_id(specials, role) for role in ("mask", "cls", "sep", "pad"))
        self.eot = end_of_text({"[SEP]": self.sep} | specials)
        self.is_special = np.isin(np.arange(vocab_size), list(specials.values()))
        self.continues = np.isin(np.arange(vocab_size), continuations)
        self.replacements = np.flatnonzero(~self.is_special)
        if not len(self.replacements):
            raise UserError(f"vocab_size is {vocab_size}, special tokens alone; masked training needs others")
        self.key = np.random.SeedSequence((seed, 2)).generate_state(2, np.uint64)

    def batch(self, rows, first, lengths=None):
        """(ids (B, T), targets (B, K), positions (B, K)) from windows (B, T - 2); first: number of the first sequence.

        Where windows hold fewer tokens, by lengths (B,), a fourth part is attention_mask (B, T), False after the end of
        a sequence. With document_mask the model's argument `documents` comes last instead: they end with [SEP], so that
        padding is a document of its own.
        """
        lengths = np.full(len(rows), self.stride) if lengths is None else lengths
        ids, attention_mask = self._framed(rows, lengths)
        batch = self._masked(ids, lengths + 2, first)
        if self.document_mask:
            return *map(torch.from_numpy, batch), None, None, document_starts(batch[0] == self.sep)
        return tuple(map(torch.from_numpy, batch if attention_mask.all() else (*batch, attention_mask)))

    def _masked(self, ids, lengths, first):
        """batch's first parts from sequences (B, T) that have so many tokens (B,) before their padding."""
        B, T = ids.shape
        # Philox gives 4 numbers per count, enough for a token: so each sequence has counts of its own.
        random = np.random.Philox(key=self.key, counter=first * T).random_raw(4 * B * T).reshape(B, T, 4)
        K = n_masked(T, self.mask_prob)
        positions = self._order(random[..., 0], ids).argsort(axis=1, kind="stable")[:, :K]  # B K
        old, action, drawn = (np.take_along_axis(a, positions, 1) for a in (ids, random[..., 1], random[..., 2]))
        wanted = np.array([[n_masked(length, self.mask_prob)] for length in lengths])  # B 1
        predicted = ~self.is_special[old] & (np.arange(K) < wanted)  # B K
        share, other = action / 2.0**64, self.replacements[drawn % np.uint64(len(self.replacements))]
        new = np.where(share < 0.8, self.mask, np.where(share < 0.9, other, old))
        if self.word_dropout:
            ids[~self.is_special[ids] & (random[..., 3] / 2.0**64 < self.word_dropout)] = self.mask
        np.put_along_axis(ids, positions, np.where(predicted, new, old), 1)
        return ids, np.where(predicted, old, IGNORE), positions

    def _framed(self, rows, lengths):
        """[CLS] tokens [SEP] and padding, (B, T), and a mask (B, T) that is False at padding."""
        place, end = np.arange(self.stride + 2), lengths[:, None] + 1  # end: position of [SEP]
        ids = np.pad(rows, ((0, 0), (1, 1)), constant_values=self.cls)
        ids[ids == self.eot] = self.sep
        ids = np.where(place < end, ids, np.where(place == end, self.sep, self.pad))
        return ids, place <= end

    def _order(self, random, ids):
        """Sort keys of positions: a random number for each token, or each word; special tokens come last."""
        if self.continues.any():
            start = np.where(self.continues[ids], 0, np.arange(ids.shape[1]))
            random = np.take_along_axis(random, np.maximum.accumulate(start, axis=1), 1)
        return np.where(self.is_special[ids], np.iinfo(np.uint64).max, random)


class NextSentence(Masked):
    """Masked tokens in [CLS] A [SEP] B [SEP], and whether B follows A in its document (BERT, section 3.1, task 2).

    Half of the sequences have another document's text as B (see pairs.py). Labels are BERT's: 0 where B follows, else
    1. Which sequences these are, and where A ends, is a function of the seed and a sequence's number alone.
    """

    name, has_partners = "nsp", True
    frame, least = 3, (5, "[CLS], two tokens and two [SEP]")

    @classmethod
    def build(cls, cfg, seq_len, seed, meta):
        """The objective of a run; UserError where the data has no documents to take sentences from."""
        if cfg.document_mask:
            raise UserError(f"document_mask is on, but with {cls.name} a sequence has to see two texts; leave it off")
        for split, facts in meta.get("splits", {}).items():
            if (n := facts.get("documents", 0)) < 2:
                needs = f"{cls.name} takes text from documents, and the {split} split of the data has {n or 'none'}"
                remedy = "make the data of several: files, records of .jsonl or .parquet, or .txt with --doc_separator"
                raise UserError(f"{needs}; {remedy}, and with --val_fraction large enough for both splits")
        return super().build(cfg, seq_len, seed, meta)

    def __init__(self, seq_len, mask_prob, seed, *rest):
        super().__init__(seq_len, mask_prob, seed, *rest)
        self.pair_key = np.random.SeedSequence((seed, 5)).generate_state(2, np.uint64)

    def batch(self, rows, first, lengths=None, partners=None):
        """(ids, targets, positions, attention_mask, token_types, None, labels (B,)) from windows (B, T - 3).

        partners: the windows that may give B's text. Where documents are too short for two sentences, A is the window's
        text, and the label IGNORE.
        """
        lengths = np.full(len(rows), self.stride) if lengths is None else lengths
        random = np.random.Philox(key=self.pair_key, counter=first).random_raw(4 * len(rows)).reshape(-1, 4)
        ids = np.full((len(rows), self.stride + 3), self.pad)
        types, labels, sizes = np.zeros_like(ids), np.full(len(rows), IGNORE), np.zeros(len(rows), np.int64)
        for i, (row, length) in enumerate(zip(rows, lengths)):
            row, (place, coin) = row[:length], map(int, random[i, :2])
            a, b, labels[i] = self._pair(row, place, coin, i, partners) or (row[row != self.eot], row[:0], IGNORE)
            sequence = np.concatenate([[self.cls], a, [self.sep], b, [self.sep]])
            sizes[i] = len(sequence)
            ids[i, : sizes[i]] = sequence
            types[i, len(a) + 2 : sizes[i]] = 1
        place = np.arange(self.stride + 3)
        masked = self._masked(ids, sizes, first)
        return *map(torch.from_numpy, (*masked, place < sizes[:, None], types)), None, torch.from_numpy(labels)

    def _pair(self, row, place, coin, i, partners):
        """(A, B, label) from a window and two random numbers; None where it holds no document of two tokens."""
        return pair_of(row, self.eot, place, coin & 1, partners, i)


class SentenceOrder(NextSentence):
    """Masked tokens in [CLS] A [SEP] B [SEP], and whether A and B, neighbours, are swapped (ALBERT, arXiv 1909.11942).

    The label is 1 where they are.
    """

    name, has_partners = "sop", False

    def _pair(self, row, place, coin, *_):
        pair = neighbours(row, self.eot, place)
        return pair and ((*pair[::-1], 1) if coin & 1 else (*pair, 0))


def document_starts(ends):
    """The starts (M + 1,) of documents, as ops.locate has them, from a mask (B, T) that is True where one ends.

    M is the same for most batches, so that compiled code and CUDA graphs serve them all. It doubles where a batch has
    more than 4 documents a row, or one for 128 tokens.
    """
    (B, T), begins = ends.shape, np.roll(ends, 1, axis=1)
    begins[:, 0] = True
    starts, size = np.flatnonzero(begins), B * max(4, T // 128)
    while size < len(starts):
        size *= 2
    padding = (0, size + 1 - len(starts))
    return torch.from_numpy(np.pad(starts, padding, constant_values=B * T).astype(np.int32))


def n_masked(seq_len, mask_prob):
    """Tokens to predict in a sequence of seq_len tokens, [CLS] and [SEP] included."""
    return max(1, round(mask_prob * seq_len))


def special_id(specials, role):
    """The id of a special token by its role (mask, cls, sep, pad), under either of its usual names."""
    for name in (f"<|{role}|>", f"[{role.upper()}]"):
        if name in specials:
            return specials[name]
    has = f"need a {role} token, and the data's tokenizer has only {', '.join(specials) or 'none'}"
    raise UserError(f"masked models {has}; make the data with --tokenizer=bpe, byte or BERT's vocab.txt")


# The objectives by name. A new one is a class and its line here; `causal` tells the model which tokens it may see.
OBJECTIVES = {"clm": NextToken, "mlm": Masked}
PAIRS = {"nsp": NextSentence, "sop": SentenceOrder}  # more, beside mlm
CONTRASTIVE = "contrastive"  # beside either; it needs no batches of its own


def weights_of(objective):
    """{name: weight} of the objectives that the setting names, clm or mlm first; UserError where they do not fit."""
    if isinstance(objective, str):
        return {objective: 1.0}
    wrong, known = [], [*OBJECTIVES, *PAIRS, CONTRASTIVE]
    bases, pairs = ([name for name in kind if name in objective] for kind in (OBJECTIVES, PAIRS))
    for name, weight in objective.items():
        if name not in known:
            wrong.append(f"objective names {name!r}; objectives are {', '.join(known)}")
        elif type(weight) not in (int, float) or not 0 <= weight < math.inf:
            wrong.append(f"objective gives {name} the weight {weight!r}; it must be a number above 0")
        elif not weight and not (name in OBJECTIVES and CONTRASTIVE in objective):
            wrong.append(f"objective gives {name} the weight 0; only clm or mlm may have it, beside contrastive")
    if len(bases) != 1:
        wrong.append(f"objective has {len(bases)} of {', '.join(OBJECTIVES)}; name one of them, for tokens")
    if "clm" in bases and pairs:
        wrong.append(f"objective has clm and {pairs[0]}, which needs a model that sees all tokens; use mlm with it")
    if len(pairs) > 1:
        wrong.append("objective has nsp and sop, which need different pairs of sentences; name one of them")
    if wrong:
        raise UserError(*wrong)
    return {name: float(objective[name]) for name in known if name in objective}


def count_targets(objectives, ids, targets, *context):
    """The targets (M,) of each objective in the model's arguments: tokens, labels, or sequences with targets."""
    parts = [
        context[-1] if name in PAIRS else targets.amax(1) if name == CONTRASTIVE else targets for name in objectives
    ]
    return torch.stack([(part != IGNORE).sum() for part in parts])


def windows_of(objective):
    """The class that makes batches for the objectives that the setting names."""
    names = weights_of(objective)
    return next((PAIRS[name] for name in names if name in PAIRS), OBJECTIVES[next(iter(names))])


class Loss(float):
    """The sum of the objectives' mean losses, each by its weight; parts: {name: mean loss}."""

    parts: dict

    @classmethod
    def of(cls, losses, weights):
        """The Loss of mean losses in the order of weights, {name: weight}; a part of weight 0 is left out."""
        loss = cls(weighted_sum(losses, weights))
        loss.parts = {name: part for name, part in zip(weights, losses) if weights[name]}
        return loss


def weighted_sum(losses, weights):
    """The sum of losses, numbers or tensors, in the order of weights, {name: weight}."""
    return sum(weight * loss for loss, weight in zip(losses, weights.values()))
