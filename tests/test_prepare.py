"""Text to token shards: every kind of input, the split, skipped documents and their counts, refusals."""

import contextlib
import functools
import gzip
import http.server
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

import config
import prepare
import shards
from config import UserError
from conftest import ROOT
from data import Split
from run.folder import keep_tokenizer, tokenizer_of
from shards import HEADER, ShardWriter, open_shard, read_meta
from text import corpus, files
from text.tokenizer import SPECIALS, load_tokenizer

SHARED = Path(ROOT).parent / "shared/data"
needs_gpt2 = pytest.mark.skipif(not (SHARED / "tiktoken_cache").is_dir(), reason="gpt2's tiktoken files are absent")

DOCUMENTS = [f"Document {i}, über {i * i} <|endoftext|>🙂\n" * (1 + i % 3) for i in range(40)]


def run(folder, *argv, tokenizer="byte", workers=1):
    """Prepares as the command line would; returns meta.json."""
    given = [f"--data_dir={folder}", f"--tokenizer={tokenizer}", f"--workers={workers}", *argv]
    prepare.main(config.load(prepare.Settings, given))
    return json.loads((Path(folder) / "meta.json").read_text())


def tokens_of(folder, split):
    return np.concatenate([np.asarray(shard) for shard in Split(folder, split, 10**6).shards])


def documents_of(folder, split, tokenizer="byte"):
    """The documents of a split, decoded from its shards."""
    tokenizer = load_tokenizer(tokenizer)
    tokens = tokens_of(folder, split)
    ends = np.flatnonzero(tokens == tokenizer.eot)
    assert ends[-1] == len(tokens) - 1  # end-of-text follows each document, the last one too
    return [tokenizer.decode(part[:-1]) for part in np.split(tokens, ends + 1)[:-1]]


def write_txt(folder, documents=DOCUMENTS):
    folder.mkdir(parents=True, exist_ok=True)
    for i, document in enumerate(documents):
        (folder / f"{i:03d}.txt").write_text(document, newline="")
    return folder


def write_jsonl(path, documents=DOCUMENTS, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"id": i, field: document}) + "\n" for i, document in enumerate(documents)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_parquet(path, documents=DOCUMENTS, field="text"):
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(documents))), field: documents}), path)
    return path


@pytest.fixture
def text_file(tmp_path):
    """Writes bytes to a file and returns it."""
    def write(data, name="text.txt"):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path
    return write


# ---- every kind of input

@pytest.mark.parametrize("kind", ["folder", "glob", "jsonl", "jsonl.gz", "parquet", "separator", "mixed"])
def test_documents_come_back_out_of_the_shards_whatever_file_they_were_in(tmp_path, kind):
    source, argv = tmp_path / "source", []
    source.mkdir()
    if kind in ("folder", "glob"):
        where = write_txt(source) if kind == "folder" else f"{write_txt(source / 'a').parent}/**/*.txt"
    elif kind in ("jsonl", "jsonl.gz"):
        where = write_jsonl(source / f"x.{kind}")
    elif kind == "parquet":
        where = write_parquet(source / "x.parquet")
    elif kind == "separator":
        where, argv = source / "x.txt", ["--doc_separator=\\n---\\n"]
        where.write_text("\n---\n".join(DOCUMENTS))
    else:
        where = source
        write_txt(source / "deep/er", DOCUMENTS[:10])
        write_jsonl(source / "a.jsonl", DOCUMENTS[10:20])
        write_jsonl(source / "b.jsonl.gz", DOCUMENTS[20:30])
        write_parquet(source / "c.parquet", DOCUMENTS[30:])
    meta = run(tmp_path / "data", f"--input={where}", "--val_fraction=0.3", *argv)
    train, val = (documents_of(tmp_path / "data", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(DOCUMENTS) and len(val) > 3
    for split, documents in (("train", train), ("val", val)):
        size = sum(len(document.encode()) for document in documents)
        assert meta["splits"][split]["documents"] == len(documents)
        assert meta["splits"][split]["bytes"] == size
        assert meta["splits"][split]["tokens"] == size + len(documents)


def test_other_fields_and_columns_are_read_by_name(tmp_path):
    write_jsonl(tmp_path / "in/a.jsonl", DOCUMENTS[:20], field="content")
    write_parquet(tmp_path / "in/b.parquet", DOCUMENTS[20:], field="content")
    run(tmp_path / "data", f"--input={tmp_path / 'in'}", "--text_field=content", "--val_fraction=0.3")
    train, val = (documents_of(tmp_path / "data", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(DOCUMENTS)


def test_file_of_any_other_name_is_text(text_file, tmp_path):
    run(tmp_path / "data", f"--input={text_file('print(7)' * 99, 'odd[1].py')}")  # brackets, which a glob would read
    assert documents_of(tmp_path / "data", "train")[0].startswith("print(7)")


@contextlib.contextmanager
def server(folder):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()


# ---- the split

def test_split_depends_neither_on_order_nor_on_workers_nor_on_what_else_there_is(tmp_path):
    many = [f"another {i}" for i in range(1500)]
    write_jsonl(tmp_path / "a.jsonl", many + DOCUMENTS)
    write_jsonl(tmp_path / "b.jsonl", DOCUMENTS[::-1] + many[:1000])
    for name, workers in (("a", 1), ("b", 2)):
        run(tmp_path / name, f"--input={tmp_path / name}.jsonl", "--val_fraction=0.1", workers=workers)
    val_a, val_b = (set(documents_of(tmp_path / name, "val")) for name in "ab")
    assert {d for d in val_a if d in DOCUMENTS + many[:1000]} == val_b
    assert 100 < len(val_a) < 210  # of 1540


def test_shards_are_the_same_for_every_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 99)
    monkeypatch.setattr(prepare, "TASK_BYTES", 99)  # so that many tasks are under way at once
    write_txt(tmp_path / "in")
    for workers in (1, 3):
        run(tmp_path / f"data{workers}", f"--input={tmp_path / 'in'}", "--shard_tokens=500", workers=workers)
    names = sorted(path.name for path in (tmp_path / "data1").glob("*.bin"))
    assert len(names) > 3 and names == sorted(path.name for path in (tmp_path / "data3").glob("*.bin"))
    for name in names:
        assert (tmp_path / "data1" / name).read_bytes() == (tmp_path / "data3" / name).read_bytes()


def test_equal_documents_fall_into_the_same_split(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", DOCUMENTS * 3)
    run(tmp_path / "data", f"--input={tmp_path / 'x.jsonl'}", "--val_fraction=0.3")
    assert set(documents_of(tmp_path / "data", "train")).isdisjoint(documents_of(tmp_path / "data", "val"))


def test_documents_that_are_all_equal_are_refused_with_a_remedy_that_helps(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", ["the same"] * 3)
    message = refused(tmp_path / "data", f"--input={tmp_path / 'x.jsonl'}")
    assert "x.jsonl are all equal: equal documents fall into the same split" in message
    assert "add other text" in message and "val_fraction" not in message


@pytest.mark.parametrize("documents", [["a", "b", "b"], ["a", "a", "b"], ["b", "b", "c", "c", "a"]])
@pytest.mark.parametrize("val_fraction", [0.01, 0.5, 0.99])
def test_small_corpus_with_equal_documents_has_one_in_each_split(tmp_path, documents, val_fraction):
    write_jsonl(tmp_path / "x.jsonl", documents)
    run(tmp_path / "data", f"--input={tmp_path / 'x.jsonl'}", f"--val_fraction={val_fraction}")
    train, val = (documents_of(tmp_path / "data", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(documents) and set(train).isdisjoint(val)


@pytest.mark.parametrize("number", [2, 3, 7])
@pytest.mark.parametrize("val_fraction", [0.01, 0.99])
def test_small_corpus_has_a_document_in_each_split(tmp_path, number, val_fraction):
    write_txt(tmp_path / "in", DOCUMENTS[:number])
    meta = run(tmp_path / "data", f"--input={tmp_path / 'in'}", f"--val_fraction={val_fraction}")
    counts = [meta["splits"][split]["documents"] for split in ("train", "val")]
    assert min(counts) >= 1 and sum(counts) == number


@pytest.mark.parametrize("piece_bytes", [1 << 20, 1000, 7])
def test_single_document_is_split_at_its_tail_as_nanogpt_does(text_file, tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(files, "PIECE_BYTES", piece_bytes)
    data = "".join(f"line {i} of a book\n" for i in range(777))
    run(tmp_path / "data", f"--input={text_file(data)}", "--val_fraction=0.1")
    n = len(data)
    assert documents_of(tmp_path / "data", "train") == [data[: int(n * 0.9)]]
    assert documents_of(tmp_path / "data", "val") == [data[int(n * 0.9) :]]


@pytest.mark.skipif(not (SHARED / "tinyshakespeare.txt").exists(), reason="tinyshakespeare.txt is absent")
def test_tiny_shakespeare_is_split_as_nanogpt_does(tmp_path):
    run(tmp_path / "data", f"--input={SHARED / 'tinyshakespeare.txt'}", "--val_fraction=0.1")
    data = (SHARED / "tinyshakespeare.txt").read_text()
    assert [len(tokens_of(tmp_path / "data", split)) - 1 for split in ("train", "val")] == [1_003_854, 111_540]
    assert documents_of(tmp_path / "data", "val") == [data[int(len(data) * 0.9) :]]


def test_split_of_a_single_document_does_not_cut_a_character(text_file, tmp_path):
    for blanks in range(4):
        data = "🙂" * 10 + " " * blanks
        run(tmp_path / f"data{blanks}", f"--input={text_file(data)}", "--val_fraction=0.45")
        parts = documents_of(tmp_path / f"data{blanks}", "train") + documents_of(tmp_path / f"data{blanks}", "val")
        assert "".join(parts) == data and len(parts) == 2


# ---- tokens

@pytest.mark.parametrize("tokenizer", ["byte", "bpe", pytest.param("gpt2", marks=needs_gpt2)])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_file_that_is_cut_into_pieces_has_the_ids_of_the_whole(tmp_path, monkeypatch, tokenizer, newline):
    text = (Path(ROOT / "prepare.py").read_text() + "日本語 ünd 12 🙂  \n\n\n   x'll 1\n" * 9).replace("\n", newline)
    write_txt(tmp_path / "in", [text, "another " * 9])
    folder = tmp_path / "data"
    whole_pieces = run(tmp_path / "whole", f"--input={tmp_path / 'in'}", "--bpe_vocab_size=400", tokenizer=tokenizer)
    monkeypatch.setattr(files, "PIECE_BYTES", 101)
    meta = run(folder, f"--input={tmp_path / 'in'}", "--bpe_vocab_size=400", tokenizer=tokenizer)
    assert len(list(corpus.FilePieces(files.TextFile(tmp_path / "in/000.txt").blocks))) > 50
    used = load_tokenizer(str(tmp_path / "whole/tokenizer.json") if tokenizer == "bpe" else tokenizer)
    if tokenizer == "bpe":  # which learns from the pieces
        assert meta["tokenizer_sha256"] == whole_pieces["tokenizer_sha256"]
    ids = np.concatenate([tokens_of(folder, "train"), tokens_of(folder, "val")])
    long, short = used.encode(text), used.encode("another " * 9)
    candidates = [np.concatenate([a, [used.eot], b, [used.eot]]) for a, b in ((long, short), (short, long))]
    assert any(np.array_equal(ids, candidate) for candidate in candidates)


@pytest.mark.parametrize("text", ["x" * 3000, " " * 3000, "a " * 999, "words " + "日本" * 999 + " more", "\n" * 700])
def test_bpe_is_trained_on_words_of_bounded_length_and_on_all_text(tmp_path, text):
    write_txt(tmp_path / "in", [text, "val"])
    cfg = config.load(prepare.Settings, [f"--input={tmp_path / 'in'}", "--val_fraction=0.01"]).prepare
    texts = list(corpus.training_texts(corpus.Corpus(cfg, tmp_path)))
    assert "".join(texts) in (text, "val")
    if text in texts[0] or len(texts) > 1:
        assert max(len(word) for part in texts for word in re.findall(r"\S+|\s+", part)) <= 256


def test_pieces_are_bounded_and_whole_characters_where_there_is_no_blank(text_file, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 10)
    path = text_file("日本語。" * 999)
    pieces = list(corpus.FilePieces(files.TextFile(path).blocks))
    assert b"".join(pieces) == path.read_bytes() and max(map(len, pieces)) <= 17 * 10
    assert "".join(piece.decode() for piece in pieces) == "日本語。" * 999
    assert b"".join(corpus.FilePieces(lambda: [b"\xa0" * 999])) == b"\xa0" * 999


def test_long_documents_between_separators_may_span_blocks(text_file, monkeypatch):
    documents = ["a" * 35, "b", "", "c" * 11, "d" * 10]
    path = text_file("<|sep|>".join(documents))
    for block in (1, 2, 7, 10, 1000):
        monkeypatch.setattr(files, "PIECE_BYTES", block)
        found = list(corpus._split_file(files.TextFile(path).blocks(), b"<|sep|>", 99))
        assert found == [d.encode() for d in documents]


def test_shards_hold_shard_tokens_each_but_the_last(tmp_path):
    write_txt(tmp_path / "in")
    meta = run(tmp_path / "data", f"--input={tmp_path / 'in'}", "--shard_tokens=333", "--val_fraction=0.3")
    for split in ("train", "val"):
        sizes = [len(open_shard(tmp_path / "data" / name)) for name in sorted(meta["splits"][split]["shards"])]
        assert sizes == list(meta["splits"][split]["shards"].values())
        assert set(sizes[:-1]) == {333} and 0 < sizes[-1] <= 333
        assert sum(sizes) == meta["splits"][split]["tokens"]


def test_meta_says_what_a_reader_must_know(tmp_path):
    write_txt(tmp_path / "in")
    meta = run(tmp_path / "data", f"--input={tmp_path / 'in'}")
    assert (meta["vocab_size"], meta["tokenizer"], meta["specials"]["<|endoftext|>"]) == (261, "byte", 256)
    assert meta["command"].startswith("python ")
    assert not list((tmp_path / "data").glob("*.part"))
    bpe = run(tmp_path / "bpe", f"--input={tmp_path / 'in'}", "--bpe_vocab_size=300", tokenizer="bpe")
    assert (bpe["vocab_size"], bpe["tokenizer"]) == (300, "tokenizer.json")
    assert load_tokenizer(str(tmp_path / "bpe/tokenizer.json")).eot == bpe["specials"]["<|endoftext|>"] == 295
    again = run(tmp_path / "again", f"--input={tmp_path / 'in'}", tokenizer=str(tmp_path / "bpe/tokenizer.json"))
    assert again["tokenizer_sha256"] == bpe["tokenizer_sha256"]
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "bpe/tokenizer.json").read_bytes()
    assert np.array_equal(tokens_of(tmp_path / "again", "train"), tokens_of(tmp_path / "bpe", "train"))


VOCAB = [
    "[PAD]", "the", "quick", "[UNK]", "brown", "##s", "[CLS]", "fox", "[SEP]", "jump", "##ed", "[MASK]", "over", ".",
    "a",
]  # fmt: skip
SENTENCES = ["the quick brown fox jumps over foxs. " * (1 + i % 4) + "a the " * (i % 3) + f"a.{i}" for i in range(25)]


def test_documents_in_wordpiece_end_in_sep_and_meta_has_the_continuations(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    write_txt(tmp_path / "in", SENTENCES)
    folder, vocab = tmp_path / "data", str(tmp_path / "vocab.txt")
    meta = run(folder, f"--input={tmp_path / 'in'}", "--val_fraction=0.3", tokenizer=vocab)
    specials = {"[PAD]": 0, "[UNK]": 3, "[CLS]": 6, "[SEP]": 8, "[MASK]": 11}
    assert (meta["vocab_size"], meta["specials"], meta["continuations"]) == (15, specials, [5, 10])
    assert meta["tokenizer"] == "tokenizer.json" and meta["settings"]["tokenizer"] == vocab
    tokenizer, n_documents = load_tokenizer(vocab), 0
    expected = {tuple(tokenizer.encode(text).tolist()) for text in SENTENCES}
    assert min(expected, key=len)[:5] == tuple(map(VOCAB.index, ("the", "quick", "brown", "fox", "jump")))
    for split in ("train", "val"):
        tokens = tokens_of(folder, split)
        ends = np.flatnonzero(tokens == 8)
        documents = [tuple(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]
        assert ends[-1] == len(tokens) - 1 and set(documents) <= expected
        assert meta["splits"][split]["documents"] == len(documents)
        n_documents += len(documents)
    assert n_documents == 25


def test_a_run_loads_the_wordpiece_of_its_data_when_vocab_txt_is_gone(tmp_path):
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(VOCAB))
    write_txt(tmp_path / "in", SENTENCES)
    folder, again = tmp_path / "data", tmp_path / "again"
    first = run(folder, f"--input={tmp_path / 'in'}", tokenizer=str(vocab))
    expected = load_tokenizer(str(vocab)).encode("the foxs jumped").tolist()
    vocab.unlink()
    (tmp_path / "run").mkdir()
    keep_tokenizer(folder, tmp_path / "run")
    for where in (folder, tmp_path / "run"):
        assert load_tokenizer(tokenizer_of(where)).encode("the foxs jumped").tolist() == expected
    second = run(again, f"--input={tmp_path / 'in'}", tokenizer=str(folder / "tokenizer.json"))
    for name in ("vocab_size", "specials", "continuations", "splits"):
        assert second[name] == first[name]
    assert np.array_equal(tokens_of(again, "train"), tokens_of(folder, "train"))
    with pytest.raises(UserError, match="vocab.txt is no readable tokenizer file"):
        run(tmp_path / "other", f"--input={tmp_path / 'in'}", tokenizer=str(vocab))


def hub_file(path, end="</s>"):
    """A tokenizer.json of words, as Hugging Face's libraries write it."""
    import tokenizers

    vocab = {token: i for i, token in enumerate(["[UNK]", "the", "quick", "fox", end, "a"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["[UNK]", end, "<extra>"])
    made.save(str(path))
    return str(path)


def test_any_tokenizer_json_is_copied_to_the_data_and_a_run_loads_it_from_there(tmp_path):
    file = Path(hub_file(tmp_path / "theirs.json"))
    documents = [f"the quick fox {'a ' * i}</s> the" for i in range(25)]
    source = f"--input={write_txt(tmp_path / 'in', documents)}"
    meta = run(tmp_path / "data", source, "--val_fraction=0.3", tokenizer=str(file))
    assert (meta["vocab_size"], meta["tokenizer"]) == (7, "tokenizer.json")
    assert meta["specials"] == {"[UNK]": 0, "</s>": 4, "<extra>": 6}
    seen = np.concatenate([tokens_of(tmp_path / "data", split) for split in ("train", "val")])
    assert (seen == 4).sum() == 25 and (seen == 0).sum() == 25  # "</s>" in text is what the words know nothing of
    file.unlink()
    (tmp_path / "run").mkdir()
    keep_tokenizer(tmp_path / "data", tmp_path / "run")
    loaded = load_tokenizer(tokenizer_of(tmp_path / "run"))
    assert loaded.encode("the quick </s> fox").tolist() == [1, 2, 0, 3] and loaded.eot == 4


def test_tokenizer_without_end_of_text_is_refused_with_those_that_would_do(tmp_path):
    file = hub_file(tmp_path / "theirs.json", end="<end>")
    message = r"no end-of-text token; its special tokens are \[UNK\], <end>, <extra>; use one"
    with pytest.raises(UserError, match=message):
        run(tmp_path / "data", f"--input={write_txt(tmp_path / 'in')}", tokenizer=file)
    assert not (tmp_path / "data/meta.json").exists()


@pytest.mark.parametrize("tokenizer", ["byte", pytest.param("gpt2", marks=needs_gpt2), "vocab.txt"])
def test_a_tokenizer_that_an_interrupted_prepare_left_is_not_taken_for_another(tmp_path, monkeypatch, tokenizer):
    write_txt(tmp_path / "in", SENTENCES)
    folder, source = tmp_path / "data", f"--input={tmp_path / 'in'}"

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(prepare, "tokenize", interrupted)
        run(folder, source, "--bpe_vocab_size=300", tokenizer="bpe")
    left = (folder / prepare.UNFINISHED_TOKENIZER).read_bytes()
    if tokenizer == "vocab.txt":
        (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
        tokenizer = str(tmp_path / "vocab.txt")
    meta = run(folder, source, tokenizer=tokenizer)
    used = load_tokenizer(tokenizer)
    assert (meta["vocab_size"], meta["specials"]) == (used.vocab_size, used.specials)
    assert meta["tokenizer"] == (tokenizer if used.name in ("byte", "gpt2") else "tokenizer.json")
    assert ("continuations" in meta) == ("vocab" in tokenizer)
    (tmp_path / "run").mkdir()
    keep_tokenizer(folder, tmp_path / "run")
    loaded = load_tokenizer(tokenizer_of(tmp_path / "run"))
    assert loaded.encode("the quick fox").tolist() == used.encode("the quick fox").tolist()
    assert loaded.encode("the quick fox").tolist() != load_tokenizer_of(left, tmp_path).encode("the quick fox").tolist()


def load_tokenizer_of(content, folder):
    (folder / "left.json").write_bytes(content)
    return load_tokenizer(str(folder / "left.json"))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
@pytest.mark.slow
def test_vocabulary_past_uint16_is_written_as_uint32(tmp_path, vocab_size, dtype):
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = [a + b for a in letters for b in letters]  # 256 * 256 of them
    ids = {token: i for i, token in enumerate([*letters, *pairs][: vocab_size - len(SPECIALS)])}
    specials = [{"content": name, "id": len(ids) + i, "special": True} for i, name in enumerate(SPECIALS)]
    path, merges = tmp_path / "large.json", [[*token] for token in ids if len(token) == 2]
    bpe = {"model": {"type": "BPE", "vocab": ids, "merges": merges}, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": specials}
    path.write_text(json.dumps(bpe))
    write_txt(tmp_path / "in", DOCUMENTS[:5])
    meta = run(tmp_path / "data", f"--input={tmp_path / 'in'}", tokenizer=str(path))
    tokens = tokens_of(tmp_path / "data", "train")
    assert meta["vocab_size"] == vocab_size and tokens.dtype == dtype
    assert tokens[-1] == meta["specials"]["<|endoftext|>"] == vocab_size - 5 and tokens.max() == tokens[-1]
    together = documents_of(tmp_path / "data", "train", str(path)) + documents_of(tmp_path / "data", "val", str(path))
    assert sorted(together) == sorted(DOCUMENTS[:5])


# ---- skipped text

def test_everything_left_out_is_counted_in_the_summary(tmp_path, capsys):
    source = tmp_path / "in"
    write_txt(source, ["", "good text" * 50])
    (source / "002.txt").write_bytes(b"bad \xff\xfe text")
    lines = [b'{"text": "fine"}', b"", b"not json", b'{"text": "cut', b'{"other": 1}', b'{"text": 7}', b"[1]", b'"x"',
             b'{"text": "bad \xff"}', b'{"text": ""}', b'{"text": "half a pair \\ud800."}']  # fmt: skip
    (source / "x.jsonl").write_bytes(b"\n".join(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["column", None, ""]}), source / "y.parquet")
    meta = run(tmp_path / "data", f"--input={source}", "--val_fraction=0.3")
    printed = capsys.readouterr().out
    for line in ("3 empty documents", "3 lines that are not JSON", "4 lines without text in the field 'text'",
                 "1 rows without text in the column 'text'", "1 pieces with bytes that are not UTF-8"):  # fmt: skip
        assert line in printed, printed
    documents = documents_of(tmp_path / "data", "train") + documents_of(tmp_path / "data", "val")
    assert sorted(documents) == sorted(["good text" * 50, "bad \ufffd\ufffd text", "fine", "half a pair ?.", "column"])
    assert sum(split["documents"] for split in meta["splits"].values()) == 5


@pytest.mark.parametrize("damage", ["cut", "changed", "no gzip"])
def test_damaged_gzip_file_is_reported_and_the_rest_is_read(tmp_path, capsys, damage):
    write_txt(tmp_path / "in", DOCUMENTS[:7])
    noise = np.random.default_rng(0).integers(32, 127, (300, 99), dtype=np.uint8)
    path = write_jsonl(tmp_path / "in/x.jsonl.gz", [row.tobytes().decode() for row in noise])
    data = bytearray(path.read_bytes())
    if damage == "changed":
        data[10] = 255  # the first byte of compressed data: a kind of block that there is not
    path.write_bytes({"cut": data[: len(data) // 2], "changed": data, "no gzip": b"plain text"}[damage])
    run(tmp_path / "data", f"--input={tmp_path / 'in'}", "--val_fraction=0.3")
    message = "1 lines that are not JSON" if damage == "no gzip" else f"files cut short, damaged or unreadable: {path}"
    assert message in capsys.readouterr().out
    documents = documents_of(tmp_path / "data", "train") + documents_of(tmp_path / "data", "val")
    assert set(DOCUMENTS[:7]) <= set(documents)


# ---- refusals

def refused(folder, *argv, **options):
    with pytest.raises(UserError) as caught:
        run(folder, *argv, **options)
    assert "\n" not in str(caught.value) and not (Path(folder) / "meta.json").exists()
    return str(caught.value)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
@pytest.mark.parametrize(("files", "remedy"), [
    ({"a.txt": b"", "b.txt": b""}, "2 empty documents; check --input="),
    ({"a.jsonl": b""}, "no documents; check --input="),
    ({"a.jsonl": b'{"txt": "x", "id": 3}\n{"txt": "y", "title": "z"}\n'},
     "2 lines without text in the field 'text'; set --text_field= to one of: txt, title"),
])  # fmt: skip
def test_corpus_without_text_is_one_clear_error(tmp_path, files, remedy, tokenizer):
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    message = refused(tmp_path / "data", f"--input={tmp_path / 'in'}", tokenizer=tokenizer)
    assert message == f"there is no text in {tmp_path / 'in'}: {remedy}"


def test_input_that_names_no_file_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"input {tmp_path}/nothing names no file" in refused(tmp_path / "data", f"--input={tmp_path}/nothing")
    assert not (tmp_path / "data").exists()
    assert "must hold .txt, .md, .jsonl" in refused(tmp_path / "data", f"--input={tmp_path}/empty")
    assert "put a glob in quotes" in refused(tmp_path / "data", f"--input={tmp_path}/*.txt")


def test_unknown_column_is_answered_with_the_columns_of_the_file(tmp_path):
    write_parquet(tmp_path / "x.parquet", field="content")
    message = refused(tmp_path / "data", f"--input={tmp_path / 'x.parquet'}")
    assert "x.parquet has no column 'text'; set --text_field to one of: id, content" in message


def test_damaged_parquet_file_is_named(text_file, tmp_path):
    message = refused(tmp_path / "data", f"--input={text_file(b'no parquet' * 9, 'x.parquet')}")
    assert "x.parquet is no readable parquet file" in message


@pytest.mark.parametrize(("argument", "expected"), [
    ("--val_fraction=0", "val_fraction is 0.0; it must be above 0 and below 1"),
    ("--val_fraction=1", "val_fraction is 1.0; it must be above 0 and below 1"),
    ("--shard_tokens=0", "shard_tokens is 0; it must be at least 1"),
    ("--bpe_vocab_size=260", "bpe_vocab_size is 260; it must be at least 261"),
    ("--bpe_vocab_size=0", "bpe_vocab_size is 0; it must be at least 261"),
    ("--doc_separator=", "--doc_separator must be text or none"),
    ("--tokenizer=gpt-2", "tokenizer 'gpt-2' is unknown"),
    ("--dataset=shakespeare", "dataset shakespeare are both set; give one"),
])  # fmt: skip
def test_impossible_setting_is_refused(tmp_path, text_file, argument, expected):
    assert expected in refused(tmp_path / "data", f"--input={text_file('x' * 99)}", argument)


def test_input_beside_a_dataset_that_was_added_by_hand_is_refused_not_ignored():
    with pytest.raises(UserError, match="input x and dataset mine are both set; give one"):
        prepare.PrepareConfig(dataset="mine", input="x")


def test_input_or_dataset_is_needed():
    with pytest.raises(UserError, match="neither input nor dataset is set"):
        config.load(prepare.Settings, [])


@pytest.mark.parametrize(("where", "folder"), [
    ("books/*.txt", "data/books"), ("books/**/*", "data/books"), ("books/", "data/books"), ("a/x.jsonl", "data/x"),
    ("../x.txt", "data/x"), ("*.txt", "data/text"), (".", "data/text"), ("..", "data/text"),
    ("http://h/x.txt", "data/x"), ("http://u:p@h:8/a/x.jsonl?token=secret", "data/x"), ("https://h?id=7", "data/h"),
])  # fmt: skip
def test_folder_is_named_for_the_input(where, folder):
    assert str(prepare.default_folder(config.load(prepare.Settings, [f"--input={where}"]).prepare)) == folder


# ---- the same folder again

def test_second_run_says_that_the_data_is_there_and_changes_nothing(text_file, tmp_path, capsys):
    argv = [tmp_path / "data", f"--input={text_file('some text ' * 99)}"]
    first = run(*argv)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    capsys.readouterr()
    assert run(*argv, workers=2) == first  # the number of processes is no matter
    assert "is already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()} == before


@pytest.mark.parametrize(("change", "words"), [
    ("nothing", None), ("touched", "newest "), ("longer", "bytes "), ("another", "files 7 -> 8"),
    ("fewer", "files 7 -> 6"), ("renamed", "names or sizes"), ("gone", "its files are gone"),
])  # fmt: skip
def test_second_run_names_how_its_input_has_changed(tmp_path, capsys, change, words):
    source = write_txt(tmp_path / "in", DOCUMENTS[:7])
    argv = [tmp_path / "data", f"--input={source}"]
    first, path = run(*argv), source / "003.txt"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    if change in ("touched", "longer"):
        path.write_text(DOCUMENTS[3] + "more" * (change == "longer"), newline="")
        os.utime(path, ns=tuple(time + 10**10 for time in times))
    if change == "another":
        (source / "new.txt").write_text("new")
    if change == "fewer":
        path.unlink()
    if change == "renamed":
        path.rename(source / "004b.txt")
    if change == "gone":
        shutil.rmtree(source)
    capsys.readouterr()
    assert run(*argv) == first
    printed = capsys.readouterr().out
    assert "is already prepared" in printed
    assert ("its input has changed since: " in printed) == (change != "nothing")
    assert words is None or (words in printed and f"to prepare it again, remove {tmp_path}/data" in printed)


def test_data_of_before_a_setting_was_added_is_still_recognised(tmp_path, capsys):
    argv = [tmp_path / "data", f"--input={write_txt(tmp_path / 'in')}"]
    meta = run(*argv)
    for name in ("encoding", "max_document_bytes"):
        del meta["settings"][name]
    del meta["input_files"]
    (tmp_path / "data/meta.json").write_text(json.dumps(meta))
    run(*argv)
    assert "is already prepared" in capsys.readouterr().out
    with pytest.raises(UserError, match="already holds data"):
        run(*argv, "--encoding=cp1252")


@pytest.mark.parametrize("other", ["--val_fraction=0.5", "--tokenizer=bpe", "--shard_tokens=50", "--input=."])
def test_folder_with_other_data_is_refused_and_left_alone(text_file, tmp_path, other):
    argv = [tmp_path / "data", f"--input={text_file('some text ' * 99)}"]
    first = run(*argv)
    with pytest.raises(UserError, match=rf"data already holds data, made by: python .* \(here {other[2:].split('=')[0]} .* -> .*\); use another"):
        run(*argv, other)
    assert json.loads((tmp_path / "data/meta.json").read_text()) == first


@pytest.mark.parametrize("left", ["shards under way", "shards without meta", "meta under way"])
def test_killed_run_is_refused_by_readers_and_recovered_by_running_again(text_file, tmp_path, left):
    argv = [tmp_path / "data", f"--input={text_file('some text ' * 99)}", "--shard_tokens=100"]
    whole = run(*argv)
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "data").glob("*.bin")}
    folder = tmp_path / "data"
    if left == "meta under way":
        (folder / "meta.json.part").write_text((folder / "meta.json").read_text()[:50])
    (folder / "meta.json").unlink()
    if left == "shards under way":
        for path in folder.glob("*.bin"):
            path.write_bytes(bytes(HEADER.size) + path.read_bytes()[HEADER.size : -7])  # the header comes last
            path.rename(f"{path}.part")
        (folder / "train_000077.bin.part").write_bytes(b"")
    for split in ("train", "val"):
        with pytest.raises(UserError, match="unfinished prepare; make the data"):
            Split(folder, split, 261)
    assert run(*argv) == whole
    assert {path.name: path.read_bytes() for path in folder.glob("*.bin")} == wanted
    assert not list(folder.glob("*.part"))


STRANGERS = {
    "movie.part": b"half a film", "train_000003.bin.part": b"not zeros and no shard", "meta.json.part": b"[1, 2",
    "tokenizer.json": b"{}", "notes.txt.part": b"",
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGERS)
def test_files_of_others_are_neither_removed_nor_overwritten_nor_taken_for_an_unfinished_prepare(tmp_path, name):
    source, folder = write_txt(tmp_path / "in"), tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(STRANGERS[name])
    if name in ("movie.part", "notes.txt.part"):
        run(folder, f"--input={source}")
        assert Split(folder, "train", 261).tokens
    else:
        message = refused(folder, f"--input={source}", "--bpe_vocab_size=300", tokenizer="bpe")
        assert f"holds files that prepare.py did not write: {name}; use another --data_dir" in message
        assert message == refused(folder, f"--input={source}", "--bpe_vocab_size=300", tokenizer="bpe")  # again
    assert (folder / name).read_bytes() == STRANGERS[name]


def test_tokenizer_that_lies_in_the_data_folder_may_be_used_there(tmp_path):
    source, folder = f"--input={write_txt(tmp_path / 'in')}", tmp_path / "data"
    run(tmp_path / "bpe", source, "--bpe_vocab_size=300", tokenizer="bpe")
    folder.mkdir()
    shutil.copy(tmp_path / "bpe/tokenizer.json", folder)
    assert run(folder, source, tokenizer=str(folder / "tokenizer.json"))["vocab_size"] == 300


def test_folder_in_which_another_prepare_works_is_refused_and_left_alone(tmp_path):
    source, folder = write_txt(tmp_path / "in"), tmp_path / "data"
    with prepare.locked(folder):
        (folder / "train_000000.bin.part").write_bytes(bytes(HEADER.size))
        message = refused(folder, f"--input={source}")
        assert f"data_dir {folder} is in use by another prepare.py, process {os.getpid()} on " in message
        assert (folder / "train_000000.bin.part").exists()
    run(folder, f"--input={source}")
    assert Split(folder, "train", 261).tokens


def test_prepared_folder_that_cannot_be_written_to_is_still_recognised(tmp_path, capsys):
    argv = [tmp_path / "data", f"--input={write_txt(tmp_path / 'in')}"]
    run(*argv)
    with prepare.locked(tmp_path / "data"):  # as good as read-only: nothing may be locked or written
        run(*argv)
    assert "is already prepared" in capsys.readouterr().out


def test_meta_has_a_checksum_of_each_block_of_each_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 100)
    meta = run(tmp_path / "data", f"--input={write_txt(tmp_path / 'in')}", "--shard_tokens=333", "--val_fraction=0.3")
    for split in meta["splits"].values():
        assert split["checksums"].keys() == split["shards"].keys()
        for name, sums in split["checksums"].items():
            data = (tmp_path / "data" / name).read_bytes()[HEADER.size :]
            assert sums == [zlib.crc32(data[i : i + 200]) for i in range(0, len(data), 200)]


def test_run_that_fails_leaves_nothing_that_is_taken_for_data(tmp_path):
    write_txt(tmp_path / "in", DOCUMENTS)
    (tmp_path / "in/x.parquet").write_bytes(b"no parquet")  # comes after 40 good files
    refused(tmp_path / "data", f"--input={tmp_path / 'in'}")
    with pytest.raises(UserError, match="holds no train tokens|unfinished prepare"):
        Split(tmp_path / "data", "train", 261)


@pytest.mark.parametrize("name", ["train.bin", "fineweb_train_000001.bin", "train_000000.bin"])
def test_token_files_of_others_are_neither_overwritten_nor_removed(text_file, tmp_path, name):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(b"precious")
    message = refused(tmp_path / "data", f"--input={text_file('x' * 99)}")
    assert f"holds files that prepare.py did not write: {name}; use another --data_dir" in message
    assert (tmp_path / "data" / name).read_bytes() == b"precious"


# ---- corpora by name

def write_fineweb(folder, number):
    folder.mkdir()
    for i, name in enumerate(["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, number + 1))]):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, 100 + i
        (folder / name).write_bytes(header.tobytes() + np.arange(100 + i, dtype=np.uint16).tobytes())
    return folder


def test_fineweb_is_taken_from_a_local_folder_of_its_shards(tmp_path, capsys):
    source = write_fineweb(tmp_path / "hub", 5)
    meta = run(tmp_path / "data", "--dataset=fineweb10b", f"--input={source}", "--max_shards=3", tokenizer="gpt2")
    assert (meta["vocab_size"], meta["specials"]) == (50257, {"<|endoftext|>": 50256})
    split = Split(tmp_path / "data", "train", 50257)
    assert [path.name for path in split.paths] == [f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3)]
    assert [len(shard) for shard in split.shards] == [101, 102, 103]
    assert Split(tmp_path / "data", "val", 50257).tokens == 100
    capsys.readouterr()
    run(tmp_path / "data", "--dataset=fineweb10b", f"--input={source}", "--max_shards=5", tokenizer="gpt2")
    assert capsys.readouterr().out.count("fetching") == 2  # what is there stays
    assert len(Split(tmp_path / "data", "train", 50257).shards) == 5


def test_fineweb_shard_that_is_not_there_is_named(tmp_path):
    source = write_fineweb(tmp_path / "hub", 2)
    message = refused(tmp_path / "data", "--dataset=fineweb10b", f"--input={source}", tokenizer="gpt2")
    assert f"{source} holds no fineweb_train_000003.bin" in message and "--max_shards" in message


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    cfg = config.load(prepare.Settings, ["config/quickstart.py"]).prepare
    return corpus.Corpus(cfg, tmp_path_factory.mktemp("data"))


def test_stdlib_corpus_is_pythons_library_without_tests_and_packages(stdlib):
    names = {str(path.relative_to(stdlib.root)) for path in stdlib.files}
    assert {"os.py", "json/decoder.py", "argparse.py"} <= names
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    for name in names:
        assert left_out.isdisjoint(Path(name).parts) and name.endswith(".py")
    assert 5e6 < stdlib.bytes < 40e6


def test_stdlib_files_are_held_out_by_the_hash_of_their_path(stdlib):
    names = {path: str(path.relative_to(stdlib.root)) for path in stdlib.files}
    held_out = {path for path, name in names.items() if corpus._unit_hash(name.encode()) <= 0.05}
    assert 0.02 < len(held_out) / len(stdlib.files) < 0.1
    size = {"train": 0, "val": 0}
    for split, piece, _ in stdlib.pieces():
        size[split] += len(piece)
    assert size["val"] == sum(path.stat().st_size for path in held_out)
    assert size["train"] + size["val"] == stdlib.bytes


def test_fineweb_does_not_go_into_a_folder_of_other_data(tmp_path, text_file):
    run(tmp_path / "data", f"--input={text_file('a text ' * 99)}")
    before = read_meta(tmp_path / "data")
    source = write_fineweb(tmp_path / "hub", 1)
    with pytest.raises(UserError, match="holds other data"):
        run(tmp_path / "data", "--dataset=fineweb10b", f"--input={source}", "--max_shards=1", tokenizer="gpt2")
    assert read_meta(tmp_path / "data") == before


def test_fineweb_cut_short_is_not_taken_for_whole(tmp_path):
    source = write_fineweb(tmp_path / "hub", 2)
    refused(tmp_path / "data", "--dataset=fineweb10b", f"--input={source}", "--max_shards=3", tokenizer="gpt2")
    with pytest.raises(UserError, match="unfinished prepare"):
        Split(tmp_path / "data", "train", 50257)


def test_fineweb_comes_in_tokens_of_gpt2_alone(tmp_path):
    assert "is in gpt2 tokens" in refused(tmp_path / "data", "--dataset=fineweb10b")


def test_folder_that_cannot_be_made_is_named(tmp_path, text_file):
    path = text_file("a text " * 99)
    assert f"data_dir {path}/data cannot be made" in refused(Path(path) / "data", f"--input={path}")


@contextlib.contextmanager
def no_file_above(size):
    """The system refuses to write more bytes than that into any file, as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize(("tokenizer", "size"), [
    ("byte", 0), ("byte", 35), ("byte", 100), ("byte", 200), ("bpe", 200), ("bpe", 4000),
])  # fmt: skip
def test_full_disk_is_one_line_and_nothing_is_left_that_looks_whole(tmp_path, capsys, tokenizer, size):
    """The lock, a shard, meta.json and tokenizer.json are each the first that does not fit."""
    options = f"--input={write_txt(tmp_path / 'in')}", "--shard_tokens=80", "--bpe_vocab_size=300"
    with no_file_above(size):
        message = refused(tmp_path / "data", *options, tokenizer=tokenizer)
    assert f"data_dir {tmp_path / 'data'} cannot be made or written to ([Errno 27] File too large); use" in message
    with pytest.raises(UserError, match="holds no train tokens|unfinished prepare"):
        Split(tmp_path / "data", "train", 300)
    again, whole = (run(tmp_path / name, *options, tokenizer=tokenizer) for name in ("data", "whole"))
    assert again["splits"] == whole["splits"]
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("data", "whole")]
    assert names[0] == names[1] and "meta.json" in names[0]


@pytest.mark.parametrize("name", ["train_000000.bin", "train_000000.bin.part"])
def test_pipe_in_place_of_a_shard_is_refused_without_waiting(tmp_path, name):
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / name)
    message = refused(tmp_path / "data", f"--input={write_txt(tmp_path / 'in')}")
    assert f"holds files that prepare.py did not write: {name}; use another" in message


def test_names_that_are_no_unicode_make_data_that_can_be_read(tmp_path):
    path = tmp_path / os.fsdecode(b"in\xff.txt")
    path.write_text("a text " * 99)
    for _ in range(2):  # the second time, it is recognised
        meta = run(tmp_path / os.fsdecode(b"data\xff"), f"--input={path}")
    assert meta["settings"]["input"].endswith("in\\xff.txt")
    assert Split(tmp_path / os.fsdecode(b"data\xff"), "train", 261).tokens


def test_shard_that_another_program_changes_while_it_is_written_is_one_line(tmp_path):
    for change in (lambda path: path.unlink(), lambda path: os.truncate(path, 30)):
        writer = ShardWriter(tmp_path, "train", np.uint16, 100)
        writer.write(np.arange(50))
        change(tmp_path / "train_000000.bin.part")
        with pytest.raises(UserError, match="train_000000.bin.part was changed by another program"):
            writer.write(np.arange(20))
            writer.finish()
        assert not (tmp_path / "train_000000.bin").exists()


def test_input_that_changes_while_it_is_read_is_told(tmp_path, text_file, capsys, monkeypatch):
    path, encoded = text_file("a text " * 99), prepare.encoded

    def growing(*args):
        yield from encoded(*args)
        with open(path, "a") as file:
            file.write("more")

    monkeypatch.setattr(prepare, "encoded", growing)
    run(tmp_path / "data", f"--input={path}")
    assert "  1 change of the input while it was read (bytes 693 -> 697" in capsys.readouterr().out


def test_ctrl_c_ends_prepare_and_its_workers(tmp_path):
    (tmp_path / "in.txt").write_text("a line of text\n" * 3_000_000)
    command = [sys.executable, str(ROOT / "prepare.py"), f"--input={tmp_path}/in.txt", "--tokenizer=byte", "--workers=2"]
    interrupted = 0
    for wait in (0, 0.05, 0.1) * 20:
        group = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=-3, stderr=-1)
        part, deadline = tmp_path / "data/in/train_000000.bin.part", time.monotonic() + 600
        while not part.exists() and group.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(wait)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.pid, signal.SIGINT)
        if group.wait(600) == 0:  # this process came too late, on a busy machine
            shutil.rmtree(tmp_path / "data")
            continue
        assert (group.returncode, group.stderr.read().decode().splitlines()[-1]) == (130, "interrupted")
        part.unlink()
        interrupted += 1
        if interrupted == 3:
            break
    assert interrupted


@pytest.mark.skipif(sys.platform != "linux", reason="semaphores are files on Linux alone")
def test_workers_that_cannot_be_started_are_one_line(tmp_path, capsys):
    source = write_txt(tmp_path / "in")
    with no_file_above(20):  # a semaphore takes 32 bytes of /dev/shm
        message = refused(tmp_path / "data", f"--input={source}")
    assert "1 worker processes cannot be started (" in message and "; set a smaller --workers, or raise" in message


def test_worker_that_is_killed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_encode", _end_by_kill_9)
    message = refused(tmp_path / "data", f"--input={write_txt(tmp_path / 'in')}")
    assert "one of 1 worker processes was killed, as the system does where memory runs out; set a smaller" in message


def _end_by_kill_9(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission_is_one_line(tmp_path, text_file):
    (tmp_path / "data").mkdir(mode=0o555)
    assert "cannot be made or written to ([Errno 13]" in refused(tmp_path / "data", f"--input={text_file('a text')}")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="children are found through /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "in.txt").write_text("a line of text\n" * 3_000_000)
    args = f"--input={tmp_path}/in.txt", "--tokenizer=byte", "--workers=2"
    command = [sys.executable, str(ROOT / "prepare.py"), *args]
    parent = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    deadline, found = time.monotonic() + 30, []
    while len(found) < 2 and parent.poll() is None and time.monotonic() < deadline:
        found = children.read_text().split()
    parent.kill()
    parent.wait()
    assert len(found) == 2
    while any(Path(f"/proc/{child}").exists() for child in found) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in found)
