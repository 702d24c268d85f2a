"""Fill-in-the-middle: documents whose middle moves behind their suffix, and the special tokens that mark it."""

import numpy as np

from config import UserError
from shards import end_of_text

# Prefix, suffix and middle under their usual names: own and Qwen's, StarCoder's, SantaCoder's, DeepSeek's.
FIM_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


class FillInTheMiddle:
    """Moves the middle of documents behind their suffix, so that a causal model learns to fill gaps.

    Bavarian et al. 2022, at the context level: of each document, or its part in a window, a share `rate` is cut at two
    random places. Between them lies the middle. A share spm_rate of these has the order suffix, prefix, middle
    (their variant 2, which has the same tokens around), the others prefix, suffix, middle. Cuts lie between tokens,
    since a window holds ids alone. What is drawn is a function of the seed and a sequence's number.
    """

    def __init__(self, rate, spm_rate, seed, specials):
        """specials: {name: id} of the tokenizer; UserError where it lacks the tokens of fill-in-the-middle."""
        self.rate, self.spm_rate, self.end = rate, spm_rate, end_of_text(specials)
        if (tokens := fim_tokens(specials)) is None or self.end is None:
            has = f"the data's tokenizer has only {', '.join(specials) or 'none'}"
            remedy = "make the data with --tokenizer=bpe_fim or byte_fim"
            raise UserError(f"fim_rate is {rate}; it needs {', '.join(FIM_TOKENS[0])} and end-of-text, {has}; {remedy}")
        self.prefix, self.suffix, self.middle = tokens
        self.key = np.random.SeedSequence((seed, 4)).generate_state(2, np.uint64)

    def __call__(self, rows, first):
        """Windows of the same shape, (B, W), with some documents transformed; first: number of the first sequence."""
        return np.stack([self._window(row, first + i) for i, row in enumerate(rows)])

    def _window(self, row, number):
        """A window whose end is cut by as many tokens as it gets.

        The cut comes before the transformation: a middle is whole, and end-of-text follows it even where the document
        goes on behind the window. So the model learns where a middle ends.
        """
        random = np.random.Generator(np.random.Philox(key=self.key, counter=int(number) << 64))
        pieces, room = [], len(row)
        for document in np.split(row, np.flatnonzero(row == self.end) + 1):
            transforms, is_spm, *cuts = random.random(4)
            text = document[document != self.end][: max(0, room - 4)]
            if transforms < self.rate and len(text):
                start, stop = sorted(int(cut * (len(text) + 1)) for cut in cuts)
                document = self.transformed(text, start, stop, is_spm < self.spm_rate)
            pieces.append(document[:room])
            room -= len(pieces[-1])
        return np.concatenate(pieces)

    def transformed(self, text, start, stop, is_spm=False):
        """The ids of a text without its end, an array, whose middle is text[start:stop]; 4 tokens longer."""
        if is_spm:
            parts = [self.prefix, self.suffix], text[stop:], [self.middle], text[:stop]
        else:
            parts = [self.prefix], text[:start], [self.suffix], text[stop:], [self.middle], text[start:stop]
        return np.concatenate([*parts, [self.end]]).astype(text.dtype)


def fim_tokens(specials):
    """The ids before prefix, suffix and middle; None where a tokenizer lacks one. specials: {name: id}."""
    return next(([specials[n] for n in names] for names in FIM_TOKENS if specials.keys() >= set(names)), None)
