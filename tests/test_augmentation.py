"""Augmentation: documents with their middle at the end, merges left out, inputs dropped; evaluation sees none of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import config
import prepare
import sample
from config import UserError
from data import Loader, Split, objective_for
from fim import FIM_TOKENS, FillInTheMiddle
from interop.tokenizer import hub_json, write_tokenizer
from objective import IGNORE, Masked, NextToken, ObjectiveConfig
from order import TrainOrder
from ranks import records, run, settings, write_data
from text.tokenizer import FIM_SPECIALS, SPECIALS, FileTokenizer, load_tokenizer, train_bpe
from world import World

V = 53
IDS = {name: V - 8 + i for i, name in enumerate(SPECIALS + FIM_SPECIALS)}
END = IDS["<|endoftext|>"]
PREFIX, SUFFIX, MIDDLE = (IDS[name] for name in FIM_TOKENS[0])
META = {"vocab_size": V, "specials": IDS, "tokenizer": "byte_fim"}
SIGMAS = 5  # chance alone fails one figure of two million


def windows(number, width, ends=0.0, seed=0):
    """Rows of ordinary tokens, in which a share ends documents."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, V - 8, (number, width))
    return np.where(random.random((number, width)) < ends, END, rows).astype(np.int64)


def documents_of(row):
    """The documents of a window without their ends; the last may have none."""
    return [part[part != END].tolist() for part in np.split(row, np.flatnonzero(row == END) + 1)]


def undone(document):
    """(the text of a transformed document, its pieces, its order), read by the tokens alone; None where it is plain."""
    if PREFIX not in document:
        return None
    assert document[0] == PREFIX and all(document.count(token) == 1 for token in (PREFIX, SUFFIX, MIDDLE))
    suffix, middle = document.index(SUFFIX), document.index(MIDDLE)
    assert suffix < middle
    if suffix == 1:  # the prefix has no end of its own: it stands before the middle
        return document[middle + 1 :] + document[2:middle], document[2:middle], "spm"
    first, last, between = document[1:suffix], document[suffix + 1 : middle], document[middle + 1 :]
    return first + between + last, last, "psm"


def assert_share(count, n, share):
    assert n * min(share, 1 - share) > 50  # else the bound says nothing
    assert abs(count - n * share) < SIGMAS * np.sqrt(n * share * (1 - share)), (count, n, share)


# ---- fill-in-the-middle


@pytest.mark.parametrize("width", [5, 9, 33, 64])
@pytest.mark.parametrize("ends", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("spm_rate", [0.0, 0.5, 1.0])
def test_pieces_of_each_document_put_in_order_are_its_text_and_windows_keep_their_width(width, ends, spm_rate):
    rows = windows(40, width, ends)
    filled = FillInTheMiddle(0.7, spm_rate, 1, IDS)(rows, 17)
    assert filled.shape == rows.shape and filled.dtype == rows.dtype
    n_transformed = 0
    for row, new in zip(rows, filled):
        originals, documents = documents_of(row), documents_of(new)
        for i, document in enumerate(documents[: len(documents) - (new[-1] == END)]):
            found = undone(document)
            text = found[0] if found else document
            n_transformed += bool(found)
            assert text == originals[i][: len(text)]
            if i + 1 < len(documents) and len(text) < len(originals[i]):  # cut: by the window's end alone
                assert found and sum(map(len, documents[: i + 1])) + i + 1 == width
    assert n_transformed > 10


def test_the_rates_are_those_of_documents_and_of_orders():
    filled = FillInTheMiddle(0.3, 0.8, 5, IDS)(windows(6000, 40), 0)
    found = [undone(documents_of(row)[0]) for row in filled]
    orders = [each[2] for each in found if each]
    assert_share(len(orders), len(found), 0.3)
    assert_share(orders.count("spm"), len(orders), 0.8)


def test_cuts_are_uniform_and_pieces_may_be_empty():
    """n tokens have n + 1 places for a cut. Two are drawn, so a suffix has k with chance (2 (n - k) + 1) / (n + 1)**2."""
    filled = FillInTheMiddle(1.0, 0.5, 5, IDS)(windows(20_000, 9), 0)
    lengths = np.array([len(undone(documents_of(row)[0])[1]) for row in filled])
    for k in range(6):
        assert_share((lengths == k).sum(), len(lengths), (2 * (5 - k) + 1) / 36)


def test_rate_1_transforms_each_document_with_room_and_rate_0_none():
    for row in FillInTheMiddle(1.0, 0.5, 5, IDS)(windows(99, 64, 0.1), 0):
        is_plain = [not undone(document) and bool(document) for document in documents_of(row)]
        first = is_plain.index(True) if any(is_plain) else len(is_plain)
        assert sum(len(document) + 1 for document in documents_of(row)[first:]) <= 5  # 4 tokens, and no end behind
    assert NextToken.build(ObjectiveConfig(fim_rate=0.0), 7, 1, META).fill_in is None


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_window_depends_on_seed_and_number_not_on_its_batch(batch_size):
    fill_in, rows = FillInTheMiddle(0.5, 0.5, 3, IDS), windows(10, 40, 0.1)
    whole = fill_in(rows, 1001)
    parts = [fill_in(rows[i : i + batch_size], 1001 + i) for i in range(0, 10, batch_size)]
    assert np.array_equal(whole, np.concatenate(parts)) and not np.array_equal(whole, rows)
    row = np.repeat(windows(1, 200), 1, axis=0)
    others = [(seed, number) for seed in (0, 1, 3, 2**62) for number in (0, 1, 17, 2**40)]
    made = {tuple(FillInTheMiddle(1.0, 0.5, seed, IDS)(row, number)[0]) for seed, number in others}
    assert len(made) == len(others)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), specials=IDS, vocab_size=V, tokenizer="byte_fim")


def loaded(data, windows, steps, seen=0, size=1, micro_batch_size=4):
    """Each step's (ids, targets) over all ranks, in the order of the sequences' numbers."""
    order, by_rank = TrainOrder(Split(data, "train", V), windows.stride, 1), []
    for rank in range(size):
        world = World(rank, size, torch.device("cpu"), "fp32")
        loader = Loader(order, windows, seen, 4 // (size * micro_batch_size), micro_batch_size, world)
        by_rank.append([loader.next()[0] for _ in range(steps)])
        loader.close()
    return [
        [torch.cat(parts) for parts in zip(*(batch for m in zip(*step, strict=True) for batch in m), strict=True)]
        for step in zip(*by_rank, strict=True)
    ]


def equal(a, b):
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def test_ranks_and_a_run_that_goes_on_read_the_same_windows(data):
    fim = NextToken.build(ObjectiveConfig(fim_rate=0.5), 20, 1, META)
    alone = loaded(data, fim, 5)
    assert any((ids == MIDDLE).any() for ids, _ in alone)
    for size, micro_batch_size in ((2, 2), (2, 1), (4, 1)):
        assert equal(alone, loaded(data, fim, 5, size=size, micro_batch_size=micro_batch_size))
    assert equal(alone[2:], loaded(data, fim, 3, seen=8))


def test_a_document_mask_has_a_transformed_document_as_one():
    rows = windows(6, 41, 0.1)
    plain = NextToken.build(ObjectiveConfig(fim_rate=1.0), 40, 1, META)
    masked = NextToken.build(ObjectiveConfig(fim_rate=1.0, document_mask=True), 40, 1, META)
    ids, targets, *_, documents = masked.batch(rows, 3)
    assert torch.equal(ids, plain.batch(rows, 3)[0])
    starts = [int(start) for start in documents.unique() if start < ids.numel()]
    begins = [i * 40 for i in range(6)] + [i + 1 for i in (ids.flatten() == END).nonzero().flatten().tolist()]
    assert starts == sorted({begin for begin in begins if begin < ids.numel()})
    assert (targets[ids == END] == IGNORE).all()


def test_evaluation_sees_text_as_it_is(data, tmp_path):
    cfg = settings(data, tmp_path, vocab_size=V, fim_rate=0.9)
    assert objective_for(cfg, 1).fill_in
    assert objective_for(replace(cfg, objective=cfg.objective.without_augmentation()), 1).fill_in is None
    changed = [run(data, tmp_path / str(rate), vocab_size=V, fim_rate=rate, max_steps=2) for rate in (0, 0.9)]
    before = [records(folder, "val_loss")[0] for folder in changed]  # the first step
    assert before[0] == before[1] and records(changed[0])[1] != records(changed[1])[1]


def test_a_run_that_goes_on_ends_with_the_weights_of_one_that_was_never_stopped(data, tmp_path):
    def tensors(folder):
        [end] = (tmp_path / folder).glob("ckpt/step_*4")
        return {name: tensor for file in end.glob("*.safetensors") for name, tensor in load_file(file).items()}

    for folder, max_steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        run(
            data,
            tmp_path / folder,
            vocab_size=V,
            fim_rate=0.5,
            max_steps=max_steps,
            block_size=20,
            seq_len=20,
            batch_tokens=120,
        )
    whole, parts = tensors("whole"), tensors("parts")
    assert len(whole) > 50 and whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


@pytest.mark.parametrize("names", FIM_TOKENS, ids=[names[0] for names in FIM_TOKENS])
def test_tokens_are_found_under_their_usual_names(names):
    fill_in = FillInTheMiddle(1.0, 0.5, 1, {"<|endoftext|>": 0} | dict(zip(names, (5, 6, 7))))
    assert (fill_in.prefix, fill_in.suffix, fill_in.middle) == (5, 6, 7)


@pytest.mark.parametrize(
    "objective, changes, specials, told",
    [
        ("clm", {"fim_rate": 0.5}, {"<|endoftext|>": 0}, "fim_rate is 0.5; it needs .* has only .*--tokenizer=bpe_fim"),
        ("clm", {"fim_rate": 0.5}, dict(zip(FIM_TOKENS[0], (5, 6, 7))), "fim_rate is 0.5; it needs .* end-of-text"),
        ("clm", {"word_dropout": 0.1}, IDS, "word_dropout is 0.1, but it replaces inputs of masked models .*leave it"),
        ("mlm", {"fim_rate": 0.5}, IDS, "fim_rate is 0.5, but it makes causal models .*; leave it out"),
    ],
)
def test_data_and_objectives_that_do_not_fit_are_refused_in_a_line(objective, changes, specials, told):
    build = {"clm": NextToken, "mlm": Masked}[objective].build
    with pytest.raises(UserError, match=told) as error:
        build(ObjectiveConfig(**changes), 20, 1, META | {"specials": specials})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong, rule",
    [
        ({"fim_rate": 1.1}, "fim_rate is 1.1; it must be at least 0 and at most 1"),
        ({"fim_spm_rate": -0.1}, "fim_spm_rate is -0.1; it must be at least 0 and at most 1"),
        ({"word_dropout": 1.0}, "word_dropout is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_rates_out_of_range_are_refused(wrong, rule):
    with pytest.raises(UserError, match=rule):
        ObjectiveConfig(**wrong)


# ---- tokenizers with the tokens of fill-in-the-middle


def test_own_tokenizers_reserve_the_tokens_behind_the_others_and_hugging_face_reads_them(tmp_path):
    texts = ["to be or not to be, that is the question " * 9]
    train_bpe(texts, 300, tmp_path / "with.json", with_fim=True)
    train_bpe(texts, 297, tmp_path / "without.json")
    with_fim, without = (load_tokenizer(str(tmp_path / name)) for name in ("with.json", "without.json"))
    assert type(with_fim) is type(without) and with_fim.vocab_size == without.vocab_size + 3
    for more, fewer in ((with_fim, without), (load_tokenizer("byte_fim"), load_tokenizer("byte"))):
        assert [*more.specials.items()][:5] == [*fewer.specials.items()]
        assert [*more.specials][5:] == [*FIM_SPECIALS] and more.vocab_size == fewer.vocab_size + 3
        for text in (texts[0], "<|fim_prefix|>a<|fim_suffix|>"):
            assert np.array_equal(more.encode(text), fewer.encode(text)) and more.decode(more.encode(text)) == text
        assert more.byte_counts() == fewer.byte_counts() + [0] * 3
        write_tokenizer(more, tmp_path, "clm", 64)  # raises where theirs gives other ids


def test_a_bpe_too_small_for_the_tokens_is_refused(tmp_path):
    with pytest.raises(UserError, match="bpe_vocab_size is 263; with bpe_fim it must be at least 264"):
        train_bpe(["a"], 263, tmp_path / "x.json", with_fim=True)


# ---- BPE-dropout

LINES = [f"Document {i}: to be or not to be, über {i * i} 🙂 that is the question\n" * 3 for i in range(30)]


def prepared(folder, *more):
    """(meta.json, {split: its documents' texts, each with the number of its tokens}) of LINES."""
    (folder.parent / "in").mkdir(exist_ok=True)
    for i, line in enumerate(LINES):
        (folder.parent / "in" / f"{i:02d}.txt").write_text(line, encoding="utf-8")
    given = [f"--input={folder.parent / 'in'}", f"--data_dir={folder}", "--workers=1", "--val_fraction=0.2", *more]
    prepare.main(config.load(prepare.Settings, given))
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer, splits = load_tokenizer(str(folder / "tokenizer.json")), {}
    for split in ("train", "val"):
        tokens = np.concatenate([np.asarray(shard) for shard in Split(folder, split, 10**6).shards])
        parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot) + 1)[:-1]
        splits[split] = [(tokenizer.decode(part[:-1]), len(part)) for part in parts]
    return meta, splits


def test_each_copy_of_a_training_document_is_its_text_in_other_tokens_and_validation_is_plain(tmp_path):
    plain, once = prepared(tmp_path / "plain", "--tokenizer=bpe", "--bpe_vocab_size=320")
    again, copies = prepared(
        tmp_path / "copies", f"--tokenizer={tmp_path / 'plain/tokenizer.json'}", "--bpe_dropout=0.3", "--copies=3"
    )
    assert copies["val"] == once["val"] and again["splits"]["val"] == plain["splits"]["val"]
    n = len(once["train"])
    assert [text for text, _ in copies["train"]] == [text for text, _ in once["train"]] * 3
    assert all(copies["train"][i][1] > once["train"][i % n][1] for i in range(3 * n))
    assert any(copies["train"][i][1] != copies["train"][i + n][1] for i in range(n))
    before, after = plain["splits"]["train"], again["splits"]["train"]
    assert [after[k] for k in ("documents", "bytes")] == [3 * before[k] for k in ("documents", "bytes")]
    # bits per byte are right, since tokens have as many bytes as their text
    tokens = np.concatenate([np.asarray(s) for s in Split(tmp_path / "copies", "train", 10**6).shards])
    assert np.array(again["token_bytes"])[tokens].sum() == after["bytes"] and again["vocab_size"] == plain["vocab_size"]
    assert (again["settings"]["bpe_dropout"], again["settings"]["copies"]) == (0.3, 3)


def test_a_share_of_0_leaves_out_no_merge_and_almost_1_all(tmp_path):
    train_bpe(LINES, 320, tmp_path / "x.json")
    plain = load_tokenizer(str(tmp_path / "x.json"))
    for saved in (plain.saved, hub_json(plain)):
        ids = {}
        for share in (0.0, 0.5, 1 - 2**-20):
            dropping = FileTokenizer("x", saved)
            dropping.drop_merges(share)
            ids[share] = dropping.encode(LINES[0])
            assert dropping.decode(ids[share]) == LINES[0]
        assert np.array_equal(ids[0.0], plain.encode(LINES[0]))
        assert len(ids[0.0]) < len(ids[0.5]) < len(ids[1 - 2**-20]) == len(LINES[0].encode())


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "document"]


@pytest.mark.parametrize(
    "given, told",
    [
        (["--tokenizer=byte", "--bpe_dropout=0.1"], "bpe_dropout is 0.1, but the tokenizer .*it is no BPE; leave it"),
        (["--tokenizer=vocab.txt", "--bpe_dropout=0.1"], "bpe_dropout is 0.1, but the tokenizer .*it is no BPE"),
        (["--tokenizer=bpe", "--bpe_dropout=1"], "bpe_dropout is 1.0; it must be at least 0 and below 1"),
        (["--tokenizer=bpe", "--copies=0", "--bpe_dropout=0.1"], "copies is 0; it must be at least 1"),
        (["--tokenizer=bpe", "--copies=2"], "copies is 2, but without bpe_dropout all are equal; add --bpe_dropout"),
    ],
)
def test_dropout_that_cannot_be_is_refused_and_leaves_no_shard(tmp_path, monkeypatch, given, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    with pytest.raises(UserError, match=told) as error:
        prepared(tmp_path / "data", *given)
    assert "\n" not in str(error.value) and not [*tmp_path.glob("data/*.bin*"), *tmp_path.glob("data/meta.json")]


# ---- word dropout


@pytest.mark.parametrize("document_mask", [False, True])
def test_dropped_inputs_are_those_that_are_no_targets_and_the_rest_is_as_without(document_mask):
    rows = windows(4000, 18, 0.05)
    plain, dropped = (
        Masked(20, 0.15, 1, V, IDS, document_mask=document_mask, word_dropout=share).batch(rows, 7)
        for share in (0.0, 0.2)
    )
    assert all(a is b or torch.equal(a, b) for a, b in zip(plain[1:], dropped[1:], strict=True))
    ids, new, mask = plain[0].numpy(), dropped[0].numpy(), IDS["<|mask|>"]
    is_target = np.zeros(ids.shape, bool)
    np.put_along_axis(is_target, plain[2].numpy(), plain[1].numpy() != IGNORE, 1)
    special = np.isin(ids, [*IDS.values()])
    assert (new[ids != new] == mask).all() and not (ids != new)[is_target | special].any()
    assert_share((ids != new).sum(), (~is_target & ~special).sum(), 0.2)


def test_dropped_inputs_depend_on_the_sequences_number_alone_and_evaluation_has_none(data, tmp_path):
    rows, windows_of = windows(6, 18), Masked(20, 0.15, 1, V, IDS, word_dropout=0.3)
    whole = windows_of.batch(rows, 50)[0]
    assert torch.equal(whole, torch.cat([windows_of.batch(rows[i : i + 2], 50 + i)[0] for i in (0, 2, 4)]))
    cfg = settings(data, tmp_path, vocab_size=V, objective="mlm", word_dropout=0.3)
    assert objective_for(cfg, 1).word_dropout == 0.3
    assert objective_for(replace(cfg, objective=cfg.objective.without_augmentation()), 1).word_dropout == 0


# ---- a gap is filled


@pytest.fixture(scope="module")
def filler(tmp_path_factory):
    """A run in bytes with fill-in-the-middle that has learned little."""
    folder = tmp_path_factory.mktemp("fill")
    names = SPECIALS + FIM_SPECIALS
    data = write_data(folder / "data", specials={n: 256 + i for i, n in enumerate(names)}, vocab_size=264, tokenizer="byte_fim")  # fmt: skip
    return run(
        data, folder / "run", vocab_size=None, max_steps=3, fim_rate=0.5, block_size=40, seq_len=40, batch_tokens=240
    )


def sampled(capsys, *args):
    sample.main(config.load(sample.Settings, ["--device=cpu", "--precision=fp32", *args]))
    return capsys.readouterr()


def test_a_gaps_prompt_has_the_order_that_training_has():
    tokenizer = load_tokenizer("byte_fim")
    first, last = [*b"def f("], [*b"): pass"]
    for is_spm in (False, True):
        made = FillInTheMiddle(1, 0, 1, tokenizer.specials).transformed(np.array([*first, *b"x", *last]), 6, 7, is_spm)
        assert (
            sample.gap_ids(tokenizer, "def f(", "): pass", is_spm) == made[:-2].tolist()
        )  # but the middle and its end


def test_a_gap_is_filled_between_prompt_and_suffix(filler, capsys):
    args = f"--out_dir={filler}", "--prompt=def f(", "--suffix=): pass", "--num_samples=2"
    out = sampled(capsys, *args, "--max_new_tokens=4").out
    assert len(parts := out.split("-" * 40)) == 2
    assert all(part.strip("\n").startswith("def f(") and part.endswith("): pass\n") for part in parts)
    assert "warning" not in sampled(capsys, *args, "--max_new_tokens=4").err
    told = sampled(capsys, *args).err  # 16 of 40 tokens are given; past a full context the prefix is forgotten
    assert "max_new_tokens: 256 -> 25; the context of 40 tokens has room for 25" in told
    assert "max_new_tokens" not in sampled(capsys, *args, "--max_new_tokens=25").err
    assert sum(int(line.split()[0]) for line in told.splitlines() if " tokens in " in line) <= 2 * 25


def test_a_suffix_that_cannot_be_filled_before_is_refused(filler, tmp_path, capsys):
    for args, told in (
        (["--suffix=" + "x" * 40], "the prompt has 43 tokens, the model's context is 40; shorten it"),
    ):
        with pytest.raises(UserError, match=told):
            sampled(capsys, f"--out_dir={filler}", *args)
    data = write_data(tmp_path / "data", vocab_size=261)
    plain = run(data, tmp_path / "run", vocab_size=None, max_steps=1)
    with pytest.raises(
        UserError, match="suffix needs the tokens <|fim_prefix|>, .* the tokenizer byte lacks; train with"
    ):
        sampled(capsys, f"--out_dir={plain}", "--prompt=a", "--suffix=b")
