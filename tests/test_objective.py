"""Windows to masked sequences: how many tokens are predicted, which, what becomes of them, and on what it depends."""

import math

import numpy as np
import pytest
import torch

import ranks
from data import Loader, Split, eval_batches
from model import ModelConfig, Transformer
from objective import IGNORE, OBJECTIVES, Masked, NextToken, ObjectiveConfig, n_masked
from order import TrainOrder
from world import World

V = 53
BERT = {"[PAD]": 0, "[UNK]": 7, "[CLS]": 11, "[SEP]": 12, "[MASK]": 30}  # scattered, so that what is left has gaps
OURS = {"<|endoftext|>": 48, "<|pad|>": 49, "<|mask|>": 50, "<|cls|>": 51, "<|sep|>": 52}
ORDINARY = [i for i in range(V) if i not in BERT.values()]
CONTINUATIONS = [1, 2, 13, 14, 15, 29, 31, 44, 45, 52]
SIGMAS = 5  # chance alone fails one figure of two million


def masked(seq_len=20, mask_prob=0.15, seed=1, specials=BERT, continuations=()):
    return Masked(seq_len, mask_prob, seed, V, specials, continuations)


def rows_of(number, seq_len, ids=ORDINARY, seed=0):
    """Windows of tokens drawn from ids, as many as go between [CLS] and [SEP]."""
    return np.random.default_rng(seed).choice(np.array(ids), (number, seq_len - 2)).astype(np.int64)


def numpy_batch(windows, rows, first=0, lengths=None):
    """(ids, targets, positions) as numpy arrays, and the attention mask where there is one."""
    batch = windows.batch(rows.copy(), first, None if lengths is None else np.array(lengths))
    ids, _, _, *mask = batch
    assert all(part.dtype == torch.int64 for part in batch[:3])
    assert all(part.dtype == torch.bool and part.shape == ids.shape for part in mask)
    return tuple(part.numpy() for part in batch)


def framed(rows, specials=BERT):
    """[CLS] tokens [SEP], put together apart from the code."""
    names = ("[CLS]", "[SEP]") if specials is BERT else ("<|cls|>", "<|sep|>")
    cls, sep = (specials[name] for name in names)
    return np.stack([[cls, *(sep if t == specials.get("<|endoftext|>") else t for t in row), sep] for row in rows])


def restored(ids, targets, positions):
    """The sequences as they were before anything was masked."""
    ids = ids.copy()
    for row, target, position in zip(ids, targets, positions):
        row[position[target != IGNORE]] = target[target != IGNORE]
    return ids


def hits(ids, targets, positions):
    """(B, T) of whether a position is predicted."""
    predicted = np.zeros(ids.shape, dtype=bool)
    for row, target, position in zip(predicted, targets, positions):
        row[position[target != IGNORE]] = True
    return predicted


def assert_shares(counts, n, shares):
    """Counts out of n trials are as many as the shares say, within five standard deviations each."""
    shares = np.broadcast_to(shares, np.shape(counts))
    deviations = (np.asarray(counts) - n * shares) / np.sqrt(n * shares * (1 - shares))
    assert np.abs(deviations).max() < SIGMAS, deviations


# ---- what a sequence becomes

@pytest.mark.parametrize("specials", [BERT, OURS], ids=["bert's", "ours"])
def test_a_sequence_is_cls_tokens_sep_and_all_but_predicted_tokens_are_untouched(specials):
    rows = rows_of(77, 20, [i for i in range(V) if i not in specials.values()])
    ids, targets, positions = numpy_batch(masked(specials=specials), rows)
    assert ids.shape == (77, 20) and targets.shape == positions.shape == (77, 3)
    assert np.array_equal(restored(ids, targets, positions), framed(rows, specials))
    changed = ids != framed(rows, specials)
    assert changed.sum() > 150 and not (changed & ~hits(ids, targets, positions)).any()


def test_ends_of_documents_become_sep():
    rows = rows_of(40, 20, [1, 2, 3, OURS["<|endoftext|>"]])
    ids, targets, positions = numpy_batch(masked(specials=OURS), rows)
    assert OURS["<|endoftext|>"] not in ids and OURS["<|endoftext|>"] not in targets
    assert np.array_equal(restored(ids, targets, positions), framed(rows, OURS))
    assert (ids[:, 1:-1] == OURS["<|sep|>"]).sum() == (rows == OURS["<|endoftext|>"]).sum() > 100


def test_the_window_that_is_given_stays_as_it_is():
    rows = rows_of(5, 20)
    before = rows.copy()
    masked().batch(rows, 0)
    assert np.array_equal(rows, before)


@pytest.mark.parametrize("seq_len, mask_prob, number", [
    (3, 0.15, 1), (7, 0.15, 1), (13, 0.3, 4), (20, 0.15, 3), (64, 0.15, 10), (64, 0.4, 26), (101, 0.07, 7),
    (128, 0.15, 19), (512, 0.15, 77), (7, 0.7, 5),
])  # fmt: skip
def test_of_each_sequence_mask_prob_times_its_length_tokens_are_predicted(seq_len, mask_prob, number):
    ids, targets, positions = numpy_batch(masked(seq_len, mask_prob), rows_of(31, seq_len))
    assert targets.shape == (31, number) and (targets != IGNORE).all()
    assert all(len(set(row)) == number for row in positions.tolist())
    assert positions.min() >= 1 and positions.max() <= seq_len - 2
    cfg = ObjectiveConfig(mask_prob=mask_prob)
    assert n_masked(seq_len, mask_prob) == number
    assert OBJECTIVES["mlm"].head_share(cfg, seq_len) * seq_len == pytest.approx(number) and OBJECTIVES["clm"].head_share(cfg, seq_len) == 1


def test_all_between_the_frame_may_be_predicted_and_no_more():
    ids, targets, positions = numpy_batch(masked(7, 0.7), rows_of(31, 7))
    assert np.array_equal(hits(ids, targets, positions)[:, 1:-1], np.ones((31, 5), bool))
    assert ((targets != IGNORE).sum(1) == 5).all()
    with pytest.raises(ValueError, match="mask_prob 0.8 of seq_len 7 is 6 tokens, .* only 5; lower mask_prob"):
        masked(7, 0.8)


def test_next_tokens_are_the_targets_of_unmasked_training():
    rows = rows_of(4, 10)
    ids, targets = NextToken(7).batch(rows, 0)
    assert np.array_equal(ids, rows[:, :-1]) and np.array_equal(targets, rows[:, 1:])


# ---- 80, 10 and 10 %

@pytest.fixture(scope="module")
def many():
    """(ids, targets, positions, ids unmasked) of 20,000 sequences, 60,000 predictions."""
    rows = rows_of(20_000, 20)
    return *numpy_batch(masked(), rows), framed(rows)


def test_of_predicted_tokens_80_percent_are_masked_10_drawn_anew_and_10_left(many):
    ids, targets, positions, _ = many
    new = np.take_along_axis(ids, positions, 1)
    n, is_mask, is_old = new.size, new == BERT["[MASK]"], new == targets
    again = 1 / len(ORDINARY)  # a drawn token may be the one that was there
    counts = is_mask.sum(), is_old.sum(), n - is_mask.sum() - is_old.sum()
    assert_shares(counts, n, [0.8, 0.1 + 0.1 * again, 0.1 * (1 - again)])


def test_each_place_among_the_predicted_has_these_shares(many):
    """Were the order of positions and what is done to them of one random number, they would differ."""
    ids, targets, positions, _ = many
    new = np.take_along_axis(ids, positions, 1)
    assert_shares((new == BERT["[MASK]"]).sum(0), len(new), 0.8)
    assert_shares((new == targets).sum(0), len(new), 0.1 + 0.1 / len(ORDINARY))


def test_drawn_tokens_are_uniform_over_all_that_are_not_special(many):
    ids, targets, positions, _ = many
    new = np.take_along_axis(ids, positions, 1)
    drawn = new[(new != BERT["[MASK]"]) & (new != targets)]
    counts = np.bincount(drawn, minlength=V)
    assert set(np.flatnonzero(counts)) == set(ORDINARY)
    expected = len(drawn) / len(ORDINARY)
    chi_square, freedom = (((counts[ORDINARY] - expected) ** 2) / expected).sum(), len(ORDINARY) - 1
    assert expected > 100 and abs(chi_square - freedom) < SIGMAS * math.sqrt(2 * freedom)


def test_predicted_positions_are_uniform_over_ordinary_ones(many):
    predicted = hits(*many[:3])
    assert not predicted[:, [0, -1]].any()
    assert_shares(predicted[:, 1:-1].sum(0), len(predicted), 3 / 18)


def test_where_special_tokens_stand_others_are_predicted_as_much_oftener():
    rows = rows_of(9000, 20)
    special = np.zeros(18, bool)
    special[[0, 1, 5, 17]] = True
    rows[:, special] = [BERT["[UNK]"], BERT["[SEP]"], BERT["[UNK]"], BERT["[MASK]"]]
    predicted = hits(*numpy_batch(masked(), rows))[:, 1:-1]
    assert not predicted[:, special].any() and (predicted.sum(1) == 3).all()
    assert_shares(predicted[:, ~special].sum(0), len(rows), 3 / 14)


# ---- special tokens

def test_special_tokens_are_never_predicted_even_where_too_few_others_are_left():
    number_left = np.arange(400) % 19
    rows = rows_of(400, 20)
    for i, left in enumerate(number_left):
        where = np.random.default_rng(i).permutation(18)[left:]
        rows[i, where] = np.random.default_rng(i).choice(list(BERT.values()), 18 - left)
    ids, targets, positions = numpy_batch(masked(20, 0.3), rows)
    assert targets.shape == (400, 6) and not np.isin(targets, list(BERT.values())).any()
    assert np.array_equal((targets != IGNORE).sum(1), np.minimum(6, number_left))
    assert np.array_equal(restored(ids, targets, positions), framed(rows))
    assert not (ids != framed(rows))[~hits(ids, targets, positions)].any()
    assert all(len(set(row)) == 6 for row in positions.tolist())


def test_a_sequence_of_special_tokens_alone_is_left_as_it_is():
    rows = np.full((3, 18), BERT["[UNK]"])
    ids, targets, _ = numpy_batch(masked(), rows)
    assert np.array_equal(ids, framed(rows)) and (targets == IGNORE).all()


# ---- what it depends on

@pytest.mark.parametrize("continuations", [(), CONTINUATIONS], ids=["tokens", "words"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_what_happens_to_a_sequence_does_not_depend_on_the_batch_it_comes_in(batch_size, continuations):
    windows, rows = masked(continuations=continuations), rows_of(12, 20)
    whole = numpy_batch(windows, rows, first=1001)
    parts = [numpy_batch(windows, rows[i : i + batch_size], 1001 + i) for i in range(0, 12, batch_size)]
    for one, together in zip(whole, (np.concatenate(part) for part in zip(*parts)), strict=True):
        assert np.array_equal(one, together)


def test_what_happens_to_a_sequence_does_not_depend_on_the_length_of_others():
    windows, rows, lengths = masked(), rows_of(4, 20), [18, 3, 0, 11]
    together = numpy_batch(windows, rows, 5, lengths)
    for i, length in enumerate(lengths):
        alone = numpy_batch(windows, rows[i : i + 1], 5 + i, [length])
        assert len(alone) == (3 if length == 18 else 4)
        assert all(np.array_equal(part[0], whole[i]) for part, whole in zip(alone, together))


def test_what_happens_to_a_sequence_differs_by_seed_and_number():
    row = rows_of(1, 64)
    same = numpy_batch(masked(64, seed=3), row, 17)
    assert all(np.array_equal(a, b) for a, b in zip(same, numpy_batch(masked(64, seed=3), row, 17)))
    others = [(seed, number) for seed in (0, 1, 3, 4, 2**62) for number in (0, 1, 16, 17, 18, 2**40)]
    drawn = {tuple(numpy_batch(masked(64, seed=seed), row, number)[2][0]) for seed, number in others}
    assert len(drawn) == len(others)


def coinciding(a, b):
    """{lag: pairs of places p in a and p + lag in b that are both True}, over the rows of both."""
    width = a.shape[1]
    return {lag: (a[:, max(0, -lag) : width - max(0, lag)] & b[:, max(0, lag) : width + min(0, lag)]).sum()
            for lag in range(1 - width, width)}


@pytest.mark.parametrize("between", ["numbers", "seeds"])
def test_masks_of_consecutive_numbers_and_seeds_have_nothing_in_common(between):
    """Whatever the lag: random numbers that overlapped, but shifted, would show at one."""
    n, seq_len, K, width = 4000, 16, 5, 14
    rows = rows_of(n + 1, seq_len)
    predicted = hits(*numpy_batch(masked(seq_len, 0.3), rows))[:, 1:-1]
    other = predicted[1:] if between == "numbers" else hits(*numpy_batch(masked(seq_len, 0.3, 2), rows))[:n, 1:-1]
    for lag, pairs in coinciding(predicted[:n], other).items():
        mean = n * (width - abs(lag)) * (K / width) ** 2
        assert abs(pairs - mean) < SIGMAS * math.sqrt(2 * mean), lag  # twice Poisson's: pairs of rows share a row


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = ranks.write_data(tmp_path_factory.mktemp("data"), specials=OURS, vocab_size=V)
    return Split(folder, "train", V)


def loaded(split, steps, seen=0, micro_steps=1, micro_batch_size=1, rank=0, size=1):
    """[step][micro-step] of ids, targets, positions that a loader gives."""
    windows, world = masked(7, 0.3, specials=OURS), World(rank, size, torch.device("cpu"), "fp32")
    loader = Loader(TrainOrder(split, windows.stride, 1), windows, seen, micro_steps, micro_batch_size, world)
    try:
        return [loader.next()[0] for _ in range(steps)]
    finally:
        loader.close()


def by_number(split, numbers):
    """The same of sequences of these numbers, each made by itself."""
    windows = masked(7, 0.3, specials=OURS)
    batches = []
    for number, shard, start in zip(numbers, *TrainOrder(split, windows.stride, 1).locate(numbers)):
        row = split.read([(shard, start, windows.stride)], (1, windows.stride))
        batches.append(windows.batch(row, int(number)))
    return [torch.cat(parts) for parts in zip(*batches)]


@pytest.mark.parametrize("size, micro_batch_size", [(1, 12), (1, 1), (2, 3), (3, 4), (12, 1), (4, 3)])
def test_a_step_masks_the_same_tokens_however_it_is_divided(split, size, micro_batch_size):
    micro_steps = 12 // (size * micro_batch_size)
    of_rank = [loaded(split, 3, 24, micro_steps, micro_batch_size, rank, size) for rank in range(size)]
    for step in range(3):
        parts = zip(*(of_rank[rank][step][m] for m in range(micro_steps) for rank in range(size)), strict=True)
        for got, want in zip(map(torch.cat, parts), by_number(split, np.arange(12) + 24 + 12 * step), strict=True):
            assert torch.equal(got, want)


def test_the_number_of_a_sequence_goes_on_past_what_is_permuted_at_once(split):
    steps = loaded(split, 42, 30, micro_steps=2, micro_batch_size=51)  # 4080 sequences are permuted at once
    for step in (39, 40, 41):
        for m in (0, 1):
            want = by_number(split, 30 + 102 * step + 51 * m + np.arange(51))
            assert all(torch.equal(got, expected) for got, expected in zip(steps[step][m], want))


# ---- short windows

LENGTHS = [18, 0, 1, 4, 17]


def test_behind_a_short_windows_tokens_come_sep_and_padding_that_none_may_look_at():
    rows = rows_of(5, 20)
    ids, targets, positions, attended = numpy_batch(masked(), rows, 0, LENGTHS)
    whole = restored(ids, targets, positions)
    for row, length, tokens, mask in zip(whole, LENGTHS, rows, attended):
        used = [BERT["[CLS]"], *tokens[:length], BERT["[SEP]"]]
        assert row.tolist() == used + [BERT["[PAD]"]] * (20 - len(used))
        assert mask.tolist() == [True] * len(used) + [False] * (20 - len(used))


def test_of_a_short_window_mask_prob_times_its_own_length_tokens_are_predicted():
    lengths = np.arange(63)
    rows = rows_of(63, 64)
    ids, targets, positions, _ = numpy_batch(masked(64, 0.3), rows, 0, lengths)
    wanted = [min(length, max(1, round(0.3 * (length + 2)))) for length in lengths]
    assert (targets != IGNORE).sum(1).tolist() == wanted and targets.shape == (63, 19)
    for length, row in zip(lengths, hits(ids, targets, positions)):
        assert not row[0] and not row[length + 1 :].any()


def test_only_batches_with_a_short_window_have_an_attention_mask():
    assert len(masked().batch(rows_of(2, 20), 0, np.array([18, 18]))) == 3
    assert len(masked().batch(rows_of(2, 20), 0, np.array([18, 17]))) == 4


def tiny(**changes):
    torch.manual_seed(1)
    cfg = {"objective": "mlm", "vocab_size": V, "block_size": 23, "n_layer": 2, "n_head": 3, "n_embd": 12} | changes
    model = Transformer(ModelConfig(**cfg))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.7)  # wide, so that each token shows in all others
    return model


@pytest.mark.parametrize("changes", [{}, {"position": "rope"}, {"norm_position": "post", "n_token_types": 2}], ids=str)
def test_rows_that_only_fill_a_batch_up_give_no_loss_no_gradient_and_no_nan(changes):
    model, batch = tiny(**changes), masked().batch(rows_of(5, 20), 0, np.array(LENGTHS))
    loss = model(*batch)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())
    empty = masked().batch(rows_of(2, 20), 0, np.array([0, 0]))
    assert (empty[1] == IGNORE).all() and model(*empty) == 0
    with_empty = [torch.cat(parts) for parts in zip(batch, empty)]
    assert model(*with_empty).item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"position": "rope"}, {"norm_position": "post", "n_token_types": 2}], ids=str)
def test_a_short_sequence_has_the_loss_it_has_without_padding(changes):
    model = tiny(**changes)
    ids, targets, positions, attended = masked(mask_prob=0.3).batch(rows_of(1, 20), 0, np.array([9]))
    valid = targets != IGNORE
    cut = model(ids[:, :11], targets[valid][None], positions[valid][None]).item()
    assert model(ids, targets, positions, attended).item() == pytest.approx(cut, rel=1e-5)
    assert model(ids, targets, positions).item() != pytest.approx(cut, rel=1e-3)  # so that padding did count


# ---- whole words

def words_of(row):
    """Places of each word of a sequence, special tokens left out; one that has begun before stands for itself."""
    words = []
    for place, token in enumerate(row.tolist()):
        if token in BERT.values():
            continue
        if token in CONTINUATIONS and place > 1 and words:
            words[-1].append(place)
        else:
            words.append([place])
    return words


def test_tokens_of_a_word_are_predicted_together_but_for_one_word_that_is_cut():
    rows = rows_of(900, 33, ORDINARY + CONTINUATIONS * 3)  # words of 2.2 tokens
    batch = numpy_batch(masked(33, 0.3, continuations=CONTINUATIONS), rows)
    n_cut = n_whole = 0
    for sequence, predicted in zip(framed(rows), hits(*batch)):
        assert predicted.sum() == 10
        words = [[bool(predicted[place]) for place in word] for word in words_of(sequence)]
        cut = [word for word in words if 0 < sum(word) < len(word)]
        assert len(cut) <= 1
        assert all(word == sorted(word, reverse=True) for word in cut)  # its first tokens are the predicted ones
        n_cut, n_whole = n_cut + len(cut), n_whole + sum(len(word) > 1 and all(word) for word in words)
    assert n_cut > 200 and n_whole > 1500
    assert np.array_equal(restored(*batch), framed(rows))


def test_special_tokens_between_words_are_not_predicted_with_them():
    rows = rows_of(300, 33, ORDINARY + CONTINUATIONS * 3 + [BERT["[UNK]"], BERT["[SEP]"]] * 9)
    _, targets, _ = numpy_batch(masked(33, 0.3, continuations=CONTINUATIONS), rows)
    assert (targets != IGNORE).all() and not np.isin(targets, list(BERT.values())).any()


def test_a_window_that_starts_inside_a_word_has_its_rest_as_a_word():
    rows = np.tile(np.array([13, 44, 52, 1, 3, 4, 5, 6, 8, 9, 10, 16]), (900, 1))  # four that go on, then eight words
    predicted = hits(*numpy_batch(masked(14, 0.3, continuations=CONTINUATIONS), rows))[:, 1:-1]
    assert (predicted.sum(1) == 4).all()
    together = predicted[:, :4].sum(1)
    # It is chosen first in one case of nine: then whole, as the number is four.
    assert_shares((together == 4).sum(), 900, 1 / 9)
    # Second, third and fourth in one each: then it is cut.
    assert_shares([(together == k).sum() for k in (1, 2, 3)], 900, 1 / 9)


def test_words_are_predicted_equally_often_whatever_their_length():
    sizes = [1, 5, 2, 1, 3, 4, 2]
    row = np.concatenate([[16 + i, *CONTINUATIONS[: size - 1]] for i, size in enumerate(sizes)])
    windows = masked(len(row) + 2, 0.05, continuations=CONTINUATIONS)
    predicted = hits(*numpy_batch(windows, np.tile(row, (7000, 1))))[:, 1:-1]
    assert (predicted.sum(1) == 1).all()
    first = np.cumsum([0, *sizes[:-1]])
    assert_shares(predicted[:, first].sum(0), 7000, 1 / 7)


def test_whole_word_masking_shares_80_10_10_token_by_token():
    rows = rows_of(3000, 33, ORDINARY + CONTINUATIONS * 3)
    ids, targets, positions = numpy_batch(masked(33, 0.3, continuations=CONTINUATIONS), rows)
    new = np.take_along_axis(ids, positions, 1)
    assert_shares((new == BERT["[MASK]"]).sum(), new.size, 0.8)
    assert_shares(((new == BERT["[MASK]"]).all(1)).sum(), len(new), 0.8**10)  # each token is drawn for by itself


# ---- from settings and meta.json

META = {"vocab_size": V, "specials": BERT, "tokenizer": "tokenizer.json", "continuations": CONTINUATIONS}


def test_windows_are_those_of_the_objective_and_of_what_meta_json_says():
    cfg, rows = ObjectiveConfig(mask_prob=0.3), rows_of(9, 20)
    clm = OBJECTIVES["clm"].build(cfg, 20, 1, {})
    assert isinstance(clm, NextToken) and (clm.stride, clm.extra) == (20, 1)
    mlm = OBJECTIVES["mlm"].build(cfg, 20, 1, META)
    assert (mlm.stride, mlm.extra) == (18, 0)
    assert all(np.array_equal(a, b) for a, b in zip(numpy_batch(mlm, rows), numpy_batch(masked(20, 0.3), rows)))
    words = OBJECTIVES["mlm"].build(ObjectiveConfig(mask_prob=0.3, whole_word_masking=True), 20, 1, META)
    expected = numpy_batch(masked(20, 0.3, continuations=CONTINUATIONS), rows)
    assert all(np.array_equal(a, b) for a, b in zip(numpy_batch(words, rows), expected))
    assert not np.array_equal(words.batch(rows, 0)[2], mlm.batch(rows, 0)[2])


GPT2 = {"vocab_size": 50257, "specials": {"<|endoftext|>": 50256}, "tokenizer": "gpt2"}
BYTE = {"vocab_size": V, "specials": OURS, "tokenizer": "byte"}
REFUSED = {
    "no meta.json": ({}, {}, 20, "mlm needs to know the special tokens.* no meta.json; use prepare.py"),
    "gpt2": (GPT2, {}, 20, r"need a mask token.* only <\|endoftext\|>; .* the data with --tokenizer=bpe, byte or"),
    "no words": (BYTE, {"whole_word_masking": True}, 20, "whole_word_masking is on, .* byte, does not mark.*leave it"),
    "seq_len 2": (META, {}, 2, r"seq_len is 2; .* at least 3: \[CLS\], a token and \[SEP\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_cannot_be_masked_is_refused_with_value_rule_and_remedy(case):
    meta, changes, seq_len, told = REFUSED[case]
    with pytest.raises(ValueError, match=told) as error:
        OBJECTIVES["mlm"].build(ObjectiveConfig(**changes), seq_len, 1, meta)
    assert "\n" not in str(error.value)
    if case != "seq_len 2":
        OBJECTIVES["clm"].build(ObjectiveConfig(**changes), seq_len, 1, meta)  # which needs none of it


@pytest.mark.parametrize("mask_prob", [0, 1, -0.1, 1.5])
def test_mask_prob_that_masks_nothing_or_all_is_refused(mask_prob):
    with pytest.raises(ValueError, match=f"mask_prob is {mask_prob}; it must be above 0 and below 1"):
        ObjectiveConfig(mask_prob=mask_prob)


# ---- evaluation

def evaluated(split, seed=0, eval_tokens=10**9, batch_size=3, rank=0, size=1):
    """[(sequence with its masks, its predicted places, sequence restored)] that are no filling, and batches."""
    sequences, n_batches = [], 0
    windows = masked(9, 0.3, seed, specials=OURS)
    for batch in eval_batches(split, windows, eval_tokens, batch_size, rank, size):
        ids, targets, positions, *attended = (part.numpy() for part in batch)
        assert ids.shape == (batch_size, 9)
        n_batches += 1
        whole, predicted = restored(ids, targets, positions), hits(ids, targets, positions)
        for i in range(batch_size):
            end = attended[0][i].sum() if attended else 9
            assert whole[i, 0] == OURS["<|cls|>"] and whole[i, end - 1] == OURS["<|sep|>"]
            assert (whole[i, end:] == OURS["<|pad|>"]).all() and not predicted[i, end - 1 :].any()
            if end > 2:
                sequences.append((tuple(ids[i].tolist()), tuple(np.flatnonzero(predicted[i])), whole[i, 1 : end - 1]))
    return sequences, n_batches


def tokens_with_sep(split, number=None):
    tokens = np.concatenate(split.shards).astype(np.int64)[:number]
    return np.where(tokens == OURS["<|endoftext|>"], OURS["<|sep|>"], tokens)


def test_evaluation_covers_every_token_of_the_split_once(split):
    assert [len(shard) % 7 for shard in split.shards] == [4, 4, 4]  # each shard's last window is short
    sequences, _ = evaluated(split)
    assert np.array_equal(np.concatenate([tokens for *_, tokens in sequences]), tokens_with_sep(split))


@pytest.mark.parametrize("eval_tokens", [1, 6, 7, 8, 100, 1999, 2000, 2001])
def test_evaluation_stops_after_eval_tokens_tokens_or_at_the_splits_end(split, eval_tokens):
    sequences, _ = evaluated(split, eval_tokens=eval_tokens)
    assert np.array_equal(np.concatenate([tokens for *_, tokens in sequences]), tokens_with_sep(split, eval_tokens))


@pytest.mark.parametrize("batch_size, size", [(1, 1), (1, 2), (3, 2), (7, 3)])
def test_evaluation_has_the_same_sequences_with_the_same_masks_on_any_ranks(split, batch_size, size):
    of_ranks = [evaluated(split, 0, 500, batch_size, rank, size) for rank in range(size)]
    together = [sequence[:2] for sequences, _ in of_ranks for sequence in sequences]
    expected = [sequence[:2] for sequence in evaluated(split, 0, 500, 4)[0]]
    assert len(set(expected)) > 60 and sorted(together) == sorted(expected)
    assert len({n_batches for _, n_batches in of_ranks}) == 1  # ranks that reduce together must meet equally often


def test_masks_of_evaluation_differ_by_their_own_seed(split):
    a, b = ([mask for _, mask, _ in evaluated(split, seed)[0]] for seed in (0, 1))
    assert np.mean([one == other for one, other in zip(a, b)]) < 0.2
