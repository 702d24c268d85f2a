"""The order of training sequences: which window of the data each sequence number is."""

import numpy as np

from config import UserError


def permute(index, n, key):
    """The images of indices under a random permutation of range(n), in O(1) memory.

    A Feistel network of 6 rounds on the smallest even number of bits that covers n, repeated until the result is below
    n. index: uint64 array; key: tuple of ints, the permutation's seed.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    factors = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9], dtype=np.uint64)  # odd constants that mix well
    rounds = np.random.SeedSequence(key).generate_state(6, np.uint64)
    out, todo = index.astype(np.uint64), np.ones(len(index), dtype=bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for round_key in rounds:
            mixed = (right ^ round_key) * factors[0]
            mixed = (mixed ^ (mixed >> np.uint64(29))) * factors[1]
            left, right = right, left ^ (mixed >> np.uint64(32)) & mask
        out[todo] = left << half | right
        todo[todo] = out[todo] >= n
    return out


class TrainOrder:
    """The order of training sequences, a pure function of the seed and the data.

    An epoch takes each window once, in permuted order. Windows of stride tokens lie end to end within a shard, from an
    offset that each epoch draws anew. So sequences_seen is all that a run must remember of its data.
    """

    def __init__(self, split, stride, seed):
        self.split, self.stride, self.seed = split, stride, seed
        # An offset may push the last window out of its shard: without it, all epochs have equally many.
        self.ends = np.cumsum([max(0, len(shard) // stride - 1) for shard in split.shards])
        self.per_epoch = int(self.ends[-1])
        if self.per_epoch == 0:
            lacks = f"no shard of 2 x {stride} tokens (its longest has {max(map(len, split.shards))})"
            where = f"the {split.name} split of {split.folder}"
            raise UserError(f"{where} has {lacks}; lower seq_len or block_size, or add text")

    def epochs(self, n):
        """{folder: how often n sequences read it}, for this order's folder."""
        return {self.split.folder: n * self.stride / self.split.tokens}

    def locate(self, numbers):
        """(shard, start) for each sequence number, as arrays."""
        numbers = np.asarray(numbers, dtype=np.uint64)
        window, offset = np.empty(len(numbers), dtype=np.int64), np.empty(len(numbers), dtype=np.int64)
        epochs = numbers // np.uint64(self.per_epoch)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            window[here] = permute(numbers[here] % np.uint64(self.per_epoch), self.per_epoch, (self.seed, int(epoch)))
            offset[here] = np.random.SeedSequence((self.seed, int(epoch), 1)).generate_state(1)[0] % self.stride
        shard = np.searchsorted(self.ends, window, side="right")
        first = np.concatenate([[0], self.ends])[shard]
        return shard, offset + (window - first) * self.stride
