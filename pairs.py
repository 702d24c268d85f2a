"""Pairs of sentences from windows of documents: the halves of a document's text, or those of two documents."""

import itertools

import numpy as np

AHEAD = 4096  # tokens read at a time in search of a document's end


class Partners:
    """A batch's second windows, (B, W): each may give the text that stands behind its row's own.

    split, places, others: the split and where in it, (shard, start, length), rows and partners come from, fewer than B
    where a batch is padded; without them no two belong to one document.
    """

    def __init__(self, rows, split=None, places=(), others=()):
        self.rows, self.split, self.places, self.others = rows, split, places, others

    def row(self, i):
        """The tokens of a row's partner."""
        return self.rows[i, : self.others[i][2]] if i < len(self.others) else self.rows[i]

    def share_document(self, i, place, end):
        """Whether the tokens at one place in row i and its partner belong to one document of the split."""
        if not self.places:
            return False
        ends = sorted((shard, start + place) for shard, start, _ in (self.places[i], self.others[i]))
        (shard, first), (other_shard, last) = ends
        if shard != other_shard:
            return False
        stretches = itertools.pairwise([*range(first, last, AHEAD), last])
        return not any((self.split.shards[shard][start:stop] == end).any() for start, stop in stretches)


def cuts(row, end):
    """Whether each place of a window lies inside a document: it and the token before it are none of its ends."""
    is_text = row != end
    return is_text & np.concatenate([[False], is_text[:-1]])


def halves(row, cut, end):
    """The parts of the document around a cut that stand before and behind it in a window."""
    ends = np.flatnonzero(row == end)
    n_before = np.searchsorted(ends, cut)
    start, stop = np.concatenate([[-1], ends])[n_before] + 1, np.concatenate([ends, [len(row)]])[n_before]
    return row[start:cut], row[cut:stop]


def drawn(inside, place):
    """One of the places where a mask is True, by a random number; None where there is none."""
    choices = np.flatnonzero(inside)
    return int(choices[place % len(choices)]) if len(choices) else None


def neighbours(row, end, place):
    """(A, B): the halves of a document in a window, cut where the random number `place` says; None without a cut."""
    cut = drawn(cuts(row, end), place)
    return None if cut is None else halves(row, cut, end)


def pair_of(row, end, place, is_other, partners, i):
    """(A, B, label): the halves of a document in a window, 0, or B from row i's partner, 1; None without a cut.

    place: a random number, which draws the cut among the places inside a document, of both windows. B has the length of
    the shorter second half, so that a length tells nothing of the label. is_other: whether B shall be the partner's;
    where the partner's text belongs to the same document, it is A's own.
    """
    other = partners.row(i)
    common = min(len(row), len(other))
    cut = drawn(cuts(row, end)[:common] & cuts(other, end)[:common], place)
    if cut is None:
        return None
    a, b = halves(row, cut, end)
    theirs = halves(other, cut, end)[1]
    is_other = bool(is_other) and not partners.share_document(i, cut, end)
    return a, (theirs if is_other else b)[: min(len(b), len(theirs))], int(is_other)
