"""Windows of tokens to what a model learns from: the next token, or masked ones."""

from dataclasses import dataclass

import numpy as np
import torch

from config import UserError

IGNORE = -100  # a target that takes no part in the loss


@dataclass(frozen=True)
class ObjectiveConfig:
    mask_prob: float = 0.15  # mlm: share of a sequence's tokens to predict
    whole_word_masking: bool = False  # mlm: mask whole words; of the tokenizers WordPiece alone knows them

    def __post_init__(self):
        if not 0 < self.mask_prob < 1:
            raise UserError(f"mask_prob is {self.mask_prob}; it must be above 0 and below 1")


def windows_of(objective, cfg, seq_len, seed, meta):
    """How windows of tokens become batches of an objective, clm or mlm; meta: what meta.json says of the data."""
    if objective == "clm":
        return NextToken(seq_len)
    if not meta:
        raise UserError("mlm needs to know the special tokens of its data, which has no meta.json; use prepare.py")
    if cfg.whole_word_masking and not meta.get("continuations"):
        raise UserError(
            f"whole_word_masking is on, but the tokenizer of the data, {meta.get('tokenizer')}, does not tell where "
            f"words start, as only WordPiece does; leave it off, or make the data with --tokenizer=vocab.txt, BERT's"
        )
    continuations = meta["continuations"] if cfg.whole_word_masking else ()
    return Masked(seq_len, cfg.mask_prob, seed, meta["vocab_size"], meta.get("specials", {}), continuations)


class NextToken:
    """Windows whose every token's target is the one that follows: `stride` tokens each, and `extra` ones read."""

    def __init__(self, seq_len):
        self.stride, self.extra = seq_len, 1

    def batch(self, rows, first, lengths=None):
        """(ids, targets), both (B, T), of windows (B, T + 1); what lies beyond lengths (B,) is no target."""
        ids, targets = rows[:, :-1], rows[:, 1:]
        if lengths is not None:
            targets = np.where(np.arange(self.stride) < lengths[:, None], targets, IGNORE)
        return torch.from_numpy(ids).contiguous(), torch.from_numpy(targets).contiguous()


class Masked:
    """Windows that become [CLS] tokens [SEP], of which round(mask_prob * T) are to be predicted (BERT, section 3.1).

    Of these 80 % are masked, 10 % become a random token and 10 % stay as they are; special tokens are neither predicted
    nor drawn, and ends of documents become [SEP]. What happens to a sequence is a function of the seed and its number
    alone. Given the ids that continue words, whole words are masked; the last is cut where it exceeds the number.
    """

    extra = 0

    def __init__(self, seq_len, mask_prob, seed, vocab_size, specials, continuations=()):
        """specials: {name: id} of the tokenizer, which has a mask, cls, sep and pad token by either's usual name."""
        if seq_len < 3:
            raise UserError(f"seq_len is {seq_len}; masked training needs at least 3: [CLS], a token and [SEP]")
        if (count := n_masked(seq_len, mask_prob)) > seq_len - 2:
            raise UserError(
                f"mask_prob {mask_prob} of seq_len {seq_len} is {count} tokens, and between [CLS] and [SEP] are only "
                f"{seq_len - 2}; lower mask_prob"
            )
        self.stride, self.mask_prob = seq_len - 2, mask_prob
        self.mask, self.cls, self.sep, self.pad = (special_id(specials, role) for role in ("mask", "cls", "sep", "pad"))
        self.eot = specials.get("<|endoftext|>", self.sep)
        self.is_special = np.isin(np.arange(vocab_size), list(specials.values()))
        self.continues = np.isin(np.arange(vocab_size), continuations)
        self.replacements = np.flatnonzero(~self.is_special)
        if not len(self.replacements):
            raise UserError(
                f"vocab_size is {vocab_size}, special tokens alone; masked training needs others to predict"
            )
        self.key = np.random.SeedSequence((seed, 2)).generate_state(2, np.uint64)

    def batch(self, rows, first, lengths=None):
        """(ids (B, T), targets (B, K), positions (B, K)) of windows (B, T - 2) of the sequences from number first on.

        Windows may hold fewer tokens, by lengths (B,); a fourth part is then attention_mask (B, T), False where a
        sequence has ended.
        """
        B, T = len(rows), self.stride + 2
        lengths = np.full(B, self.stride) if lengths is None else lengths
        ids, attention_mask = self._framed(rows, lengths)
        # Philox gives 4 numbers a count, which is one token's share: so each sequence has counts of its own.
        random = np.random.Philox(key=self.key, counter=first * T).random_raw(4 * B * T).reshape(B, T, 4)
        K = n_masked(T, self.mask_prob)
        positions = self._order(random[..., 0], ids).argsort(axis=1, kind="stable")[:, :K]  # B K
        old, action, drawn = (np.take_along_axis(a, positions, 1) for a in (ids, random[..., 1], random[..., 2]))
        wanted = np.array([[n_masked(length + 2, self.mask_prob)] for length in lengths])  # B 1
        predicted = ~self.is_special[old] & (np.arange(K) < wanted)  # B K
        share, other = action / 2.0**64, self.replacements[drawn % np.uint64(len(self.replacements))]
        new = np.where(share < 0.8, self.mask, np.where(share < 0.9, other, old))
        np.put_along_axis(ids, positions, np.where(predicted, new, old), 1)
        batch = ids, np.where(predicted, old, IGNORE), positions
        return tuple(map(torch.from_numpy, batch if attention_mask.all() else (*batch, attention_mask)))

    def _framed(self, rows, lengths):
        """[CLS] tokens [SEP] and padding, (B, T), and where there is none of the latter."""
        place, end = np.arange(self.stride + 2), lengths[:, None] + 1  # end: where [SEP] stands
        ids = np.pad(rows, ((0, 0), (1, 1)), constant_values=self.cls)
        ids[ids == self.eot] = self.sep
        ids = np.where(place < end, ids, np.where(place == end, self.sep, self.pad))
        return ids, place <= end

    def _order(self, random, ids):
        """What positions are sorted by: a random number for each, or for each word; special tokens come last."""
        if self.continues.any():
            start = np.where(self.continues[ids], 0, np.arange(ids.shape[1]))
            random = np.take_along_axis(random, np.maximum.accumulate(start, axis=1), 1)
        return np.where(self.is_special[ids], np.iinfo(np.uint64).max, random)


def n_masked(seq_len, mask_prob):
    """How many tokens of a sequence are to be predicted, of seq_len with [CLS] and [SEP]."""
    return max(1, round(mask_prob * seq_len))


def head_share(objective, cfg, seq_len):
    """Share of a sequence's tokens that go through the model's head: of a masked model those to predict alone."""
    return n_masked(seq_len, cfg.mask_prob) / seq_len if objective == "mlm" else 1.0


def special_id(specials, role):
    """The id of a special token by its role, mask, cls, sep or pad, under either of its usual names."""
    for name in (f"<|{role}|>", f"[{role.upper()}]"):
        if name in specials:
            return specials[name]
    raise UserError(
        f"masked models need a {role} token, and the data's tokenizer has only {', '.join(specials) or 'none'}; "
        f"make the data with --tokenizer=bpe, byte or BERT's vocab.txt"
    )
