"""Mixtures of data folders: how many sequences each gives, and which folder each sequence number takes its from."""

import itertools
import math

import numpy as np

WINDOW = 1000  # sequences; any so many in a row hold each source's share exactly


def faults(data_dir, schedule):
    """Lines on what is wrong with the shares {folder: share} and with a schedule {step: {folder: share}}, or [].

    data_dir may be one folder's name, or None.
    """
    if not isinstance(data_dir, dict):
        needs = f"data_schedule needs the shares of the start; write data_dir = {{{data_dir!r}: 1}}"
        return [needs] if schedule else []
    wrong = [
        f"data_schedule changes shares at {step!r}; it must be a step, a whole number of at least 1"
        for step in schedule or ()
        if type(step) is not int or step < 1
    ]
    for name, shares in [
        ("data_dir", data_dir),
        *((f"data_schedule at step {k}", v) for k, v in (schedule or {}).items()),
    ]:
        wrong += [f"{name} {line}" for line in _faults_of_shares(shares, data_dir)]
    return wrong


def _faults_of_shares(shares, folders):
    if not isinstance(shares, dict) or not shares:
        return [f"is {shares!r}; write {{folder: share of tokens}}"]
    if other := [folder for folder in shares if folder not in folders or not (folder and isinstance(folder, str))]:
        return [f"names {other[0]!r}; the folders of data_dir are {', '.join(map(repr, folders))}"]
    for folder, share in shares.items():
        if type(share) not in (int, float) or not 0 <= share < math.inf:
            return [f"gives {folder} the share {share!r}; a share is a number of at least 0"]
    if not (total := sum(shares.values())):
        return ["has shares of 0 alone; give one folder more"]
    small = [folder for folder, share in shares.items() if 0 < share / total < 1 / WINDOW]
    return [f"gives {small[0]} less than one sequence of {WINDOW:,}; raise its share, or make it 0"] if small else []


def per_window(shares, folders):
    """The sequences of WINDOW that each folder gives: its share, rounded by largest remainders."""
    total = sum(shares.values())
    exact = [WINDOW * shares.get(folder, 0) / total for folder in folders]
    counts = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: WINDOW - sum(counts)]:
        counts[i] += 1
    return counts


def shares_until(step, settings):
    """The shares that settings, as a manifest has them, give until a step, without the folders, which may move."""
    shares, schedule = settings.get("data_dir"), settings.get("data_schedule") or {}
    if not isinstance(shares, dict):
        return None
    by_step = {0: shares} | {int(k): v for k, v in schedule.items() if int(k) <= step}
    return {k: [v.get(folder, 0) for folder in shares] for k, v in by_step.items()}


class Mixture:
    """The order of training sequences from several folders, a pure function of seed, shares and data.

    Each WINDOW of sequences has the same places for each folder, drawn once by the seed; so any WINDOW in a row holds
    the shares exactly. A folder's sequences follow its own order, an epoch after the other.
    """

    def __init__(self, orders, split, phases, seed):
        """orders: a TrainOrder for each folder, whose shards stand one after the other in split.

        phases: [(number of the first sequence, sequences of each WINDOW by folder)], the first from 0 on.
        """
        self.orders, self.split, self.seed = orders, split, seed
        self._shards = np.cumsum([0, *(len(order.split.shards) for order in orders)])
        self._starts = np.array([first for first, _ in phases])
        places = np.random.default_rng(np.random.SeedSequence((seed, 3))).permutation(WINDOW)
        self._sources = [np.repeat(np.arange(len(orders)), counts)[places] for _, counts in phases]
        taken = [np.arange(len(orders))[:, None] == sources for sources in self._sources]
        self._before = [np.cumsum(t, axis=1) - t for t in taken]  # by folder, at each place of a window
        self._counts = np.array([counts for _, counts in phases])
        self._base = np.zeros_like(self._counts)  # sequences of each folder before a phase
        for phase, (first, end) in enumerate(itertools.pairwise(self._starts.tolist())):
            self._base[phase + 1] = self._base[phase] + self._within(phase, end - first)

    def _within(self, phase, n):
        """The sequences that each folder gives among the first n of a phase."""
        return n // WINDOW * self._counts[phase] + self._before[phase][:, n % WINDOW]

    def seen(self, n):
        """The sequences that each folder gives among the first n."""
        phase = int(np.searchsorted(self._starts, n, side="right")) - 1
        return self._base[phase] + self._within(phase, n - int(self._starts[phase]))

    def epochs(self, n):
        """{folder: how often n sequences read it}."""
        found = [order.epochs(int(seen)) for seen, order in zip(self.seen(n), self.orders)]
        return {folder: epochs for each in found for folder, epochs in each.items()}

    def locate(self, numbers):
        """(shard of split, start) for each sequence number, as arrays."""
        numbers = np.asarray(numbers, dtype=np.int64)
        source, index = np.empty_like(numbers), np.empty_like(numbers)
        phases = np.searchsorted(self._starts, numbers, side="right") - 1
        for phase in np.unique(phases):
            here = phases == phase
            window, place = np.divmod(numbers[here] - self._starts[phase], WINDOW)
            source[here] = sources = self._sources[phase][place]
            index[here] = self._base[phase][sources] + window * self._counts[phase][sources]
            index[here] += self._before[phase][sources, place]
        shard, start = np.empty_like(numbers), np.empty_like(numbers)
        for i, order in enumerate(self.orders):
            here = source == i
            shard[here], start[here] = order.locate(index[here])
            shard[here] += self._shards[i]
        return shard, start
