"""Text to ids and back: round trips, ids equal to other libraries', no special token out of text."""

import json
import random
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers

from config import UserError
from conftest import ROOT
from data import sha256
from objective import special_id
from text.tokenizer import (
    BERT_SPECIALS,
    SPECIALS,
    ByteTokenizer,
    FileTokenizer,
    load_tokenizer,
    train_bpe,
    write_character_tokenizer,
)  # fmt: skip

BERT_VOCAB = Path(ROOT).parent / "shared/data/bert_uncased_vocab.txt"
GPT2_FILES = Path(ROOT).parent / "shared/data/tiktoken_cache"
CORPUS = [Path(ROOT / name).read_text() for name in ("text/tokenizer.py", "data.py")]
CORPUS += ["ünïcödé 日本語 日本語 日本語 🙂🙂🙂 we'll they're I've I'd it's I'm don't 'llama " * 7]
PLAIN = CORPUS[1:]  # has no special token's name in it

HOSTILE = [
    "", "a", " ", "hello world", "\n", "\r\n", "line\r\nline\r\n\r\n", "    indented\n\t\ttabs \n", "a" * 999,
    " " * 999 + "x", "日本語と한국어", "🙂👩‍👩‍👧‍👦🏳️‍🌈", "e\u0301 combining", "\u202eright to left", "nul \0 byte",
    "\ufeffbom", "\ufffd", "\u00a0\u2003\u3000 \u0085",
    "don't WE'LL 'tis ''s", "'llama 'real 'vest 'mad 'dad 'sad 'tad",
    "1234567890 ½ ² ٣", "__init__(self, *args)", "\x1b[31m", "￿𐍈",
    "<|endoftext|>", "a<|endoftext|>b <|pad|><|mask|> <|cls|><|sep|>", "<|endoftext", "[MASK]",
]  # fmt: skip


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(CORPUS, 777, path)
    return path


@pytest.fixture(scope="module", params=["byte", "bpe", "gpt2"])
def tokenizer(request):
    if request.param == "bpe":
        return load_tokenizer(str(request.getfixturevalue("bpe_file")))
    if request.param == "gpt2" and not GPT2_FILES.is_dir():
        pytest.skip(f"{GPT2_FILES} is absent, and gpt2 would have to be fetched")
    return load_tokenizer(request.param)


def random_texts(number, seed=0):
    """Texts of mixed scripts, blanks and punctuation, in which words, runs and odd characters meet at random."""
    rng = random.Random(seed)
    parts = ["a", "b", "the", " the", "self.", "def ", " ", "  ", "\n", "\r\n", "\t", "'s", "'", "7", "42", "é", "日本",
             "🙂", "\u00a0", "!", "...", "_", "<|pad|>"]  # fmt: skip
    return ["".join(rng.choices(parts, k=rng.randrange(40))) for _ in range(number)]


# ---- all tokenizers

@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert isinstance(ids, np.ndarray) and ids.dtype.kind == "u" and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.decode_bytes(ids) == text.encode()


def test_decoding_gives_random_texts_back(tokenizer):
    for text in random_texts(300):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["\ud800", "a\udc80b", "\ud83d alone"])
def test_half_a_surrogate_pair_becomes_a_question_mark(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == "".join("?" if "\ud800" <= c <= "\udfff" else c for c in text)


@pytest.mark.parametrize("text", [" " * 1_300_000 + "x", "\n" * 1_300_000 + "x", "y" * 1_300_000, "!" * 1_300_000])
def test_endless_runs_are_encoded(tokenizer, text):
    """tiktoken's regex gives up on a million blanks in a row."""
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_text_never_becomes_a_special_token(tokenizer):
    specials = set(tokenizer.specials.values())
    assert tokenizer.eot in specials
    for text in HOSTILE + [name * 3 for name in SPECIALS]:
        assert specials.isdisjoint(tokenizer.encode(text).tolist())


def test_ids_fit_the_vocabulary_and_special_ids_end_it(tokenizer):
    n_text_ids = tokenizer.vocab_size - len(tokenizer.specials)
    assert sorted(tokenizer.specials.values()) == list(range(n_text_ids, tokenizer.vocab_size))
    assert max(tokenizer.encode("".join(HOSTILE))) < n_text_ids


def test_special_tokens_decode_to_their_names(tokenizer):
    ids = [*tokenizer.encode("a").tolist(), tokenizer.eot, *tokenizer.encode("b").tolist()]
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_ids_that_end_inside_a_character_decode_without_an_error(tokenizer):
    ids = tokenizer.encode("𐍈").tolist()  # 4 bytes of a rare script, which no vocabulary here has as one token
    assert len(ids) > 1
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")


def test_the_bytes_of_ids_are_those_of_their_text_and_special_tokens_have_none(tokenizer):
    counts = np.array(tokenizer.byte_counts())
    for text in HOSTILE + random_texts(30):
        assert counts[tokenizer.encode(text)].sum() == len(text.encode())
    assert len(counts) == tokenizer.vocab_size and not counts[[*tokenizer.specials.values()]].any()
    split = tokenizer.encode("𐍈")
    assert len(split) > 1 and counts[split].sum() == 4


@pytest.mark.parametrize("kind", ["wordpiece", "first blank", "normalized"])
def test_a_tokenizer_that_changes_text_has_no_bytes_of_ids(kind, tmp_path):
    path = vocab_file(tmp_path) if kind == "wordpiece" else str(tmp_path / "tokenizer.json")
    if kind != "wordpiece":
        (sentencepiece_like("llama2") if kind == "first blank" else byte_level_like("qwen3")).save(path)
    assert load_tokenizer(path).byte_counts() == []


def test_all_single_characters_come_back(tokenizer):
    text = "".join(chr(c) for c in range(0x3000) if not 0xD800 <= c < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- byte

def test_byte_ids_are_the_utf8_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é\n").tolist() == [0xC3, 0xA9, 10]
    assert (tokenizer.vocab_size, tokenizer.eot) == (256 + 5, 256)


# ---- gpt2

@pytest.mark.skipif(not GPT2_FILES.is_dir(), reason=f"{GPT2_FILES} is absent")
@pytest.mark.parametrize(("text", "ids"), [
    ("hello world", [31373, 995]),
    ("Hello, world!", [15496, 11, 995, 0]),
    ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
])  # fmt: skip
def test_gpt2_ids_are_gpt2s(text, ids):
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.encode(text).tolist() == ids
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)


def test_gpt2_without_a_network_names_the_offline_ways(tmp_path, monkeypatch):
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{nobody_listens.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # what tiktoken has read before
        with pytest.raises(UserError) as caught:
            load_tokenizer("gpt2")
    message = str(caught.value)
    assert "\n" not in message
    for needed in ("gpt2", "could not fetch", "TIKTOKEN_CACHE_DIR", "--tokenizer=byte", "--tokenizer=bpe"):
        assert needed in message


# ---- bpe

def test_bpe_ids_equal_those_of_the_tokenizers_library(bpe_file):
    ours, theirs = load_tokenizer(str(bpe_file)), tokenizers.Tokenizer.from_file(str(bpe_file))
    theirs.encode_special_tokens = True  # so that it, too, takes their names in text for text
    for text in HOSTILE + CORPUS + random_texts(500, seed=1):
        assert ours.encode(text).tolist() == theirs.encode(text).ids, text[:50]


@pytest.mark.parametrize("alphabet", ["a", "ab", "aab ", "abc'", "xyz \n", "é日 "])
def test_bpe_ids_equal_those_of_the_tokenizers_library_where_merges_overlap(tmp_path, alphabet):
    """tiktoken merges what makes a token, `tokenizers` only pairs in its list: few letters bring out a difference."""
    rng = random.Random(alphabet)
    train_bpe(["".join(rng.choices(alphabet, k=333)) for _ in range(5)], 333, tmp_path / "t.json")
    ours, theirs = load_tokenizer(str(tmp_path / "t.json")), tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    for _ in range(200):
        text = "".join(rng.choices(alphabet, k=rng.randrange(70)))
        assert ours.encode(text).tolist() == theirs.encode(text).ids, text


def test_bpe_cuts_words_at_every_kind_of_character_as_the_tokenizers_library_does(bpe_file):
    ours, theirs = load_tokenizer(str(bpe_file)), tokenizers.Tokenizer.from_file(str(bpe_file))
    for code in [*range(0x3000), *range(0x3000, 0x110000, 997)]:
        if not 0xD800 <= code < 0xE000:
            text = f"a{chr(code)}b {chr(code)}{chr(code)} x"
            assert ours.encode(text).tolist() == theirs.encode(text).ids, hex(code)


def test_bpe_learns_its_corpus(bpe_file):
    tokenizer = load_tokenizer(str(bpe_file))
    assert tokenizer.vocab_size == 777
    assert len(tokenizer.encode(CORPUS[0])) < 0.5 * len(CORPUS[0].encode())
    assert list(tokenizer.specials) == list(SPECIALS) and tokenizer.eot == 772


def test_small_corpus_gives_fewer_ids(tmp_path):
    train_bpe(["ab"], 999, tmp_path / "t.json")
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert tokenizer.vocab_size == 256 + 1 + len(SPECIALS)
    assert tokenizer.encode("abab").tolist() == [256, 256]


def test_bpe_is_the_same_each_time_and_wherever_its_file_lies(tmp_path, bpe_file):
    copy = tmp_path / "elsewhere.json"
    train_bpe(CORPUS, 777, copy)
    assert sha256(copy) == sha256(bpe_file)
    first, second = load_tokenizer(str(bpe_file)), load_tokenizer(str(copy))
    assert (first.vocab_size, first.specials) == (second.vocab_size, second.specials)
    for text in random_texts(50, seed=2):
        assert first.encode(text).tolist() == second.encode(text).tolist()


# ---- WordPiece

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CASED = [
    "[PAD]", "[unused1]", *LETTERS, "[UNK]", "[CLS]", *LETTERS.upper(), *(f"##{c}" for c in LETTERS), "the", "The",
    "self", "##ing", "##ed", "quick", "Quick", "encode", "##code", "en", "##er", "##or", "to", "token", "##ize",
    "##izer", "é", "日", "[MASK]", *".,:;()[]=+-*/'_<>|\"", *"0123456789", *(f"##{c}" for c in "0123456789"), "[SEP]",
    "return",
]  # fmt: skip


def vocab_file(folder, tokens=CASED, newline="\n", end=True):
    """A vocab.txt of these tokens."""
    path = folder / "vocab.txt"
    path.write_bytes((newline.join(tokens) + newline * end).encode())
    return str(path)


@pytest.fixture(scope="module", params=["uncased", "cased"])
def wordpiece_file(request, tmp_path_factory):
    """BERT's own uncased vocabulary, which has accents taken off, and a small cased one."""
    if request.param == "cased":
        return vocab_file(tmp_path_factory.mktemp("cased"))
    if not BERT_VOCAB.exists():
        pytest.skip(f"{BERT_VOCAB} is absent")
    return str(BERT_VOCAB)


@pytest.fixture(scope="module")
def wordpiece(wordpiece_file):
    return load_tokenizer(wordpiece_file)


def lines_of(path):
    return Path(path).read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def bert_tokenizer(wordpiece_file):
    """Hugging Face's, which takes special tokens in text for text if asked to."""
    from transformers import BertTokenizer

    vocab = {token: i for i, token in enumerate(lines_of(wordpiece_file))}
    theirs = BertTokenizer(vocab=vocab, do_lower_case="uncased" in wordpiece_file)
    return lambda text: theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_wordpiece_ids_equal_hugging_faces(wordpiece, bert_tokenizer):
    for text in HOSTILE + CORPUS + random_texts(300, seed=3):
        ids = wordpiece.encode(text)
        assert isinstance(ids, np.ndarray) and ids.dtype.kind == "u" and ids.ndim == 1
        assert ids.tolist() == bert_tokenizer(text), text[:50]


def test_wordpiece_treats_every_kind_of_character_as_hugging_face_does(wordpiece, bert_tokenizer):
    for start in range(0, 0x3000, 16):
        text = " ".join(f"a{chr(c)}b {chr(c)}{chr(c)} x" for c in range(start, start + 16))
        assert wordpiece.encode(text).tolist() == bert_tokenizer(text), hex(start)
    others = [chr(c) for c in range(0x3000, 0x110000, 997) if not 0xD800 <= c < 0xE000]
    assert wordpiece.encode(" ".join(others)).tolist() == bert_tokenizer(" ".join(others))


def longest_matches(word, ids):
    """WordPiece by its definition: the longest token each time; None where none fits."""
    out, rest = [], word
    while rest:
        prefix = "##" if out else ""
        size = next((n for n in range(len(rest), 0, -1) if prefix + rest[:n] in ids), None)
        if size is None:
            return None
        out.append(ids[prefix + rest[:size]])
        rest = rest[size:]
    return out


def test_wordpiece_takes_the_longest_token_each_time(wordpiece, wordpiece_file):
    ids = {token: i for i, token in enumerate(lines_of(wordpiece_file))}
    words = ["tokenizers", "thequicked", "enencoder", "q" * 99, *re.findall("[a-z]+|[0-9]+", "".join(CORPUS))]
    for word in words:
        expected = longest_matches(word, ids) or [ids["[UNK]"]]
        assert wordpiece.encode(word).tolist() == expected, word
    assert len(words) > 300
    text = " ".join(words)
    expected = sum((longest_matches(word, ids) or [ids["[UNK]"]] for word in words), [])
    assert wordpiece.encode(text).tolist() == expected


def test_wordpiece_knows_its_special_tokens_and_what_continues_words(wordpiece, wordpiece_file):
    tokens = lines_of(wordpiece_file)
    assert wordpiece.vocab_size == len(tokens)
    assert wordpiece.specials == {name: tokens.index(name) for name in BERT_SPECIALS}
    assert wordpiece.eot == tokens.index("[SEP]")
    roles = {role: special_id(wordpiece.specials, role) for role in ("mask", "cls", "sep", "pad")}
    assert roles == {role: tokens.index(f"[{role.upper()}]") for role in roles}
    assert list(wordpiece.continuations) == [i for i, token in enumerate(tokens) if token[:2] == "##"]
    json.dumps([wordpiece.continuations, wordpiece.specials])  # meta.json holds them


def test_wordpiece_text_never_becomes_a_special_token_but_unk(wordpiece):
    kept = {id_ for name, id_ in wordpiece.specials.items() if name != "[UNK]"}
    for text in HOSTILE + [f"{name}{name} {name}" for name in (*BERT_SPECIALS, *SPECIALS)]:
        assert kept.isdisjoint(wordpiece.encode(text).tolist()), text
    ids = wordpiece.encode("the [UNK] the").tolist()
    assert len(ids) > 3 and ids[0] == ids[-1]  # brackets and a word


def test_wordpiece_words_that_no_tokens_spell_are_unk(wordpiece):
    unk = wordpiece.specials["[UNK]"]
    assert wordpiece.encode("the \U00010348x the").tolist() == [*wordpiece.encode("the"), unk, *wordpiece.encode("the")]
    assert wordpiece.encode("a" * 101).tolist() == [unk]  # BERT's bound
    assert wordpiece.encode("").tolist() == []


@pytest.mark.parametrize("text", ["\ud800", "a\udc80b", "\ud83d the"])
def test_wordpiece_takes_half_a_surrogate_pair_for_a_question_mark(wordpiece, text):
    marked = "".join("?" if "\ud800" <= c <= "\udfff" else c for c in text)
    assert wordpiece.encode(text).tolist() == wordpiece.encode(marked).tolist()


def test_wordpiece_decodes_to_words_with_blanks_between(wordpiece):
    text = "the quick tokenizer encode s returned 123"
    ids = wordpiece.encode(text)
    assert len(ids) > 7 and wordpiece.decode(ids) == wordpiece.decode(ids.tolist()) == f" {text}"
    assert wordpiece.decode(wordpiece.encode("the (the)  the\n")) == " the ( the ) the"
    special = [special_id(wordpiece.specials, "cls"), *ids.tolist(), special_id(wordpiece.specials, "mask"), wordpiece.eot]
    assert wordpiece.decode(special) == f" [CLS] {text} [MASK] [SEP]"
    assert wordpiece.decode([]) == ""


def test_capitals_in_the_vocabulary_tell_that_it_is_cased(tmp_path):
    cased = load_tokenizer(vocab_file(tmp_path))
    assert cased.encode("The the Quick é").tolist() == [CASED.index(word) for word in ("The", "the", "Quick", "é")]
    assert cased.encode("THE").tolist() == [cased.specials["[UNK]"]]  # no ##H
    without = [token for token in CASED if token in BERT_SPECIALS or token == token.lower()]
    uncased = load_tokenizer(vocab_file(tmp_path, without))
    the, e = without.index("the"), without.index("e")
    assert uncased.encode("The THE the é É").tolist() == [the, the, the, e, e]
    only_inside = load_tokenizer(vocab_file(tmp_path, [*without, "##H"]))  # a capital that continues words
    assert only_inside.encode("The é").tolist() == [only_inside.specials["[UNK]"], without.index("é")]


def test_saved_wordpiece_gives_the_same_ids(wordpiece, tmp_path):
    path = tmp_path / "tokenizer.json"
    wordpiece.save(path)
    again = load_tokenizer(str(path))
    assert (again.vocab_size, again.specials) == (wordpiece.vocab_size, wordpiece.specials)
    assert list(again.continuations) == list(wordpiece.continuations)
    for text in HOSTILE + CORPUS + random_texts(50, seed=4):
        assert again.encode(text).tolist() == wordpiece.encode(text).tolist()
    again.save(tmp_path / "twice.json")
    assert json.loads((tmp_path / "twice.json").read_text()) == json.loads(path.read_text())


def test_hugging_face_reads_the_saved_wordpiece_and_frames_its_ids(wordpiece, tmp_path):
    from transformers import PreTrainedTokenizerFast

    wordpiece.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in ("the quick tokenizer", "(The) self.encode", ""):
        ids = wordpiece.encode(text).tolist()
        assert theirs(text)["input_ids"] == [special_id(wordpiece.specials, "cls"), *ids, special_id(wordpiece.specials, "sep")]
    assert theirs("[MASK]")["input_ids"][1:-1] == [special_id(wordpiece.specials, "mask")]


def test_what_else_a_tokenizer_json_asks_for_changes_no_plain_ids(wordpiece, tmp_path):
    """Truncation and padding would cut and fill, a template would frame."""
    wordpiece.save(tmp_path / "plain.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "plain.json"))
    theirs.enable_truncation(4)
    theirs.enable_padding(length=9, pad_id=special_id(wordpiece.specials, "pad"))
    framing = [(name, wordpiece.specials[name]) for name in ("[CLS]", "[SEP]")]
    theirs.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=framing)
    theirs.save(str(tmp_path / "more.json"))
    assert len(theirs.encode("the quick").ids) == 9
    more = load_tokenizer(str(tmp_path / "more.json"))
    for text in ("the quick", "[MASK] the [SEP]", "", CORPUS[0]):
        assert more.encode(text).tolist() == wordpiece.encode(text).tolist()
    assert more.vocab_size == wordpiece.vocab_size


def test_ends_of_lines_of_vocab_txt_do_not_matter(tmp_path):
    first = load_tokenizer(vocab_file(tmp_path))
    for newline, end in (("\r\n", True), ("\r\n", False), ("\n", False)):
        other = load_tokenizer(vocab_file(tmp_path, newline=newline, end=end))
        assert (other.vocab_size, other.specials) == (first.vocab_size, first.specials)
        assert other.encode(CORPUS[0]).tolist() == first.encode(CORPUS[0]).tolist()


def test_only_newlines_end_a_line_of_vocab_txt(tmp_path):
    odd = ["\u2028", "a\u00a0b", "\x0b", "\x85"]  # which end lines or part words elsewhere
    tokenizer = load_tokenizer(vocab_file(tmp_path, [*odd, *CASED]))
    assert tokenizer.vocab_size == 4 + len(CASED)
    assert tokenizer.encode("the").tolist() == [4 + CASED.index("the")]


@pytest.mark.parametrize("tokens", [
    [*CASED, "the"], [token for token in CASED if token != "[MASK]"], [token for token in CASED if token != "[UNK]"],
    [token.lower() for token in CASED], [], [""], ["the", "quick"],
], ids=["twice", "no mask", "no unk", "lower", "empty", "blank", "no special"])  # fmt: skip
def test_damaged_vocab_txt_is_refused_by_name(tmp_path, tokens):
    path = vocab_file(tmp_path, tokens, end=bool(tokens))
    with pytest.raises(UserError, match="vocab.txt is no readable tokenizer file") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value) and re.search("times|lacks|not found in the vocabulary", str(caught.value))


@pytest.mark.parametrize("content", [b"[PAD]\n\xff\xfe\n[MASK]\n", "\n".join(CASED).encode("utf-16")])
def test_vocab_txt_that_is_no_utf8_is_refused_by_name(tmp_path, content):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(UserError, match="vocab.txt is no readable tokenizer file"):
        load_tokenizer(str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize("damage", [
    lambda vocab: vocab.pop("[CLS]"), lambda vocab: vocab.clear(), lambda vocab: vocab.update(the=-1),
    lambda vocab: vocab.update(the="x"), lambda vocab: vocab.update(the=999), lambda vocab: vocab.update(the=2),
], ids=["no cls", "empty", "negative", "word", "gap", "id twice"])  # fmt: skip
def test_damaged_tokenizer_json_of_wordpiece_is_refused_by_name(tmp_path, damage):
    load_tokenizer(vocab_file(tmp_path)).save(tmp_path / "broken.json")
    saved = json.loads((tmp_path / "broken.json").read_text())
    damage(saved["model"]["vocab"])
    (tmp_path / "broken.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="broken.json is no readable tokenizer file") as caught:
        load_tokenizer(str(tmp_path / "broken.json"))
    assert "\n" not in str(caught.value)


def test_our_other_tokenizers_have_special_tokens_by_role_too(tokenizer):
    expected = {name[2:-2]: id_ for name, id_ in tokenizer.specials.items()}
    for role in ("mask", "cls", "sep", "pad"):
        if role in expected:
            assert special_id(tokenizer.specials, role) == expected[role]
        else:
            with pytest.raises(UserError, match=f"need a {role} token"):
                special_id(tokenizer.specials, role)
    assert len(tokenizer.continuations) == 0


@pytest.mark.parametrize("change", [
    {"pre_tokenizer": {"type": "WhitespaceSplit"}}, {"model": {"unk_token": "[MASK]"}},
    {"model": {"continuing_subword_prefix": "@@"}},
], ids=["words", "unknown", "prefix"])  # fmt: skip
def test_wordpiece_that_is_not_built_as_berts_gives_hugging_faces_ids_and_no_special_tokens(tmp_path, change):
    load_tokenizer(vocab_file(tmp_path)).save(tmp_path / "other.json")
    saved = json.loads((tmp_path / "other.json").read_text())
    for name, value in change.items():
        saved[name] |= value
    (tmp_path / "other.json").write_text(json.dumps(saved))
    ours, theirs = load_tokenizer(str(tmp_path / "other.json")), tokenizers.Tokenizer.from_str(json.dumps(saved))
    assert isinstance(ours, FileTokenizer)
    for text in PLAIN + random_texts(50, seed=5):
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids
    kept = {id_ for name, id_ in ours.specials.items() if name != saved["model"]["unk_token"]}
    for text in [f"the {name} quick" for name in BERT_SPECIALS]:
        assert kept.isdisjoint(ours.encode(text).tolist())


# ---- any tokenizer.json

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_level_like(kind):
    """A small byte-level BPE as GPT-2's own, Llama 3's or Qwen3's file has it, learnt from CORPUS."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

    made = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    specials = {"gpt2": ["<|endoftext|>"], "llama3": ["<|begin_of_text|>", "<|end_of_text|>"]}.get(kind, [])
    if kind != "gpt2":
        cut = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if kind == "qwen3":
        made.normalizer, specials = normalizers.NFC(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=555, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    if kind == "qwen3":  # words that are not special, and come after those that are
        made.add_tokens(["<think>", AddedToken("</think>", normalized=False), "é\u0301 \ud55c"])
    if kind == "llama3":
        frame = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 555)])
        made.post_processor = processors.Sequence([made.post_processor, frame])
    return made


def sentencepiece_like(kind):
    """A small BPE with bytes to fall back on, as in Llama 2's file (prepend) or in Mistral's later ones (metaspace)."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

    learnt = tokenizers.Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    learnt.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=444, show_progress=False))
    model = json.loads(learnt.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *model["vocab"]]
    made = tokenizers.Tokenizer(models.BPE(
        {token: i for i, token in enumerate(tokens)}, [tuple(pair) for pair in model["merges"]],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(strip)
    if kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    frame = [("<s>", 1)]
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", special_tokens=frame)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return made


def test_bytes_that_are_listed_as_special_still_stand_for_what_the_vocabulary_lacks(tmp_path):
    """transformers' own trainers and converters list them so at times."""
    theirs = sentencepiece_like("llama2")
    plain = json.loads(theirs.to_str())
    theirs.add_special_tokens([f"<0x{byte:02X}>" for byte in range(256)])
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    theirs.save(str(tmp_path / "special.json"))
    ours = [load_tokenizer(str(tmp_path / name)) for name in ("plain.json", "special.json")]
    for text in ("Héllo, naïve 1234", "日本語 🙂", "x\r\ny\tz", "the quick"):
        assert ours[0].encode(text).tolist() == ours[1].encode(text).tolist()
        assert ours[0].decode(ours[1].encode(text)) == ours[0].decode(ours[0].encode(text))


def unigram_like(_):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>", "<mask>"]
    made.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=333, special_tokens=specials, unk_token="<unk>", show_progress=False))
    return made


def word_level_like(_):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=222, special_tokens=["[PAD]", "[UNK]", "<eos>"], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


FILES = {"gpt2": byte_level_like, "llama3": byte_level_like, "qwen3": byte_level_like, "prepend": sentencepiece_like,
         "metaspace": sentencepiece_like, "unigram": unigram_like, "words": word_level_like}  # fmt: skip
LOSSLESS = ("gpt2", "llama3", "prepend", "metaspace")


@pytest.fixture(scope="module", params=FILES)
def any_file(request, tmp_path_factory):
    """(kind, path of its tokenizer.json)."""
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    FILES[request.param](request.param).save(str(path))
    return request.param, path


@pytest.fixture(scope="module")
def file_tokenizer(any_file):
    return load_tokenizer(str(any_file[1]))


def test_file_ids_equal_those_of_autotokenizer(any_file, file_tokenizer, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(any_file[1])).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [text for text in HOSTILE + CORPUS + random_texts(300, seed=6) + ["a <think> b</think>é\u0301 \ud55c"]
             if not any(name in text for name in file_tokenizer.specials)]  # fmt: skip
    assert len(texts) > 250 and isinstance(file_tokenizer, FileTokenizer)
    for text in texts:
        ids = file_tokenizer.encode(text)
        assert isinstance(ids, np.ndarray) and ids.dtype.kind == "u" and ids.ndim == 1
        assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"], text[:50]
    assert file_tokenizer.vocab_size == 1 + max(theirs.get_vocab().values())
    assert file_tokenizer.specials == {token: theirs.convert_tokens_to_ids(token) for token in theirs.all_special_tokens
                                       } | {t.content: i for i, t in theirs.added_tokens_decoder.items() if t.special}


def test_text_never_becomes_a_special_token_of_a_file(file_tokenizer):
    kept = {id_ for name, id_ in file_tokenizer.specials.items() if "unk" not in name.lower()}
    for text in HOSTILE + [text for name in file_tokenizer.specials for text in (name, f"a {name} b{name}{name}")]:
        assert kept.isdisjoint(file_tokenizer.encode(text).tolist()), text
    assert file_tokenizer.eot in kept


def test_tokens_of_a_file_give_text_one_by_one(any_file, file_tokenizer):
    """What sample.py prints as it comes; the space before the first word is the tokenizer's own."""
    kind, _ = any_file
    for text in HOSTILE + PLAIN + random_texts(50, seed=7) if kind in LOSSLESS else ():
        ids = file_tokenizer.encode(text)
        parts = b"".join(file_tokenizer.decode_bytes([i]) for i in ids)
        assert parts == file_tokenizer.decode_bytes(ids)
        prepended = bool(text) and (kind == "prepend" or kind == "metaspace" and not text.startswith(" "))
        assert parts.decode() == " " * prepended + text
    ids = [*file_tokenizer.encode("the quick").tolist(), file_tokenizer.eot]
    if kind != "words":
        eot = next(name for name, id_ in file_tokenizer.specials.items() if id_ == file_tokenizer.eot)
        assert file_tokenizer.decode(ids).lstrip(" ") == f"the quick{eot}"


def test_tokens_of_a_file_decode_as_the_tokenizers_library_does_it(any_file, file_tokenizer):
    theirs = tokenizers.Tokenizer.from_file(str(any_file[1]))
    for text in ["the self.encode [7]", "日本語 🙂 don't", *PLAIN, *random_texts(50, seed=8)]:
        ids = [i for i in file_tokenizer.encode(text).tolist() if i not in file_tokenizer.specials.values()]
        ours = file_tokenizer.decode(ids)  # in which the space before the first word stays
        assert theirs.decode(ids) == (ours if any_file[0] in ("gpt2", "llama3", "qwen3") else ours.removeprefix(" "))


def test_space_begins_words_where_tokens_hold_it(any_file, file_tokenizer):
    assert file_tokenizer.space_begins_word


@pytest.mark.parametrize("text", ["\ud800", "a\udc80b"])
def test_half_a_surrogate_pair_is_a_question_mark_to_a_file(file_tokenizer, text):
    marked = "".join("?" if "\ud800" <= c <= "\udfff" else c for c in text)
    assert file_tokenizer.encode(text).tolist() == file_tokenizer.encode(marked).tolist()


def test_saved_file_gives_the_same_ids(file_tokenizer, tmp_path):
    file_tokenizer.save(tmp_path / "again.json")
    again = load_tokenizer(str(tmp_path / "again.json"))
    assert (again.vocab_size, again.specials, again.eot) == (
        file_tokenizer.vocab_size, file_tokenizer.specials, file_tokenizer.eot)
    for text in CORPUS:
        assert again.encode(text).tolist() == file_tokenizer.encode(text).tolist()


def test_truncation_and_padding_of_a_file_change_no_ids(tmp_path):
    made = byte_level_like("gpt2")
    expected = made.encode(PLAIN[0]).ids
    made.enable_truncation(4)
    made.enable_padding(length=9)
    made.save(str(tmp_path / "t.json"))
    assert load_tokenizer(str(tmp_path / "t.json")).encode(PLAIN[0]).tolist() == expected


def test_merges_to_a_special_token_are_left_out(tmp_path):
    """A token that text would merge to, made special later, as people do with fine-tuned models."""
    merges = [("e", "o"), ("eo", "s"), ("a", "eos")]
    vocab = {token: i for i, token in enumerate([*"aeos<>", "eo", "eos", "aeos"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    made.add_special_tokens(["eos"])
    made.save(str(tmp_path / "t.json"))
    ours = load_tokenizer(str(tmp_path / "t.json"))
    assert ours.encode("eoa eos aeos").tolist() == [6, 0, 6, 3, 0, 6, 3]
    assert ours.specials == {"eos": 7} and ours.vocab_size == 9


@pytest.mark.parametrize("name", ["</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>", "[SEP]", "<other>"])
def test_end_of_text_is_found_by_its_usual_names(tmp_path, name):
    made = byte_level_like("gpt2")
    saved = json.loads(made.to_str())
    saved["added_tokens"][0]["content"] = name
    (tmp_path / "t.json").write_text(json.dumps(saved))
    assert load_tokenizer(str(tmp_path / "t.json")).eot == (None if name == "<other>" else 555)


def test_file_of_old_without_the_models_type_is_read(tmp_path):
    made = byte_level_like("gpt2")
    saved = json.loads(made.to_str())
    del saved["model"]["type"]
    saved["model"]["merges"] = [" ".join(pair) for pair in saved["model"]["merges"]]
    (tmp_path / "t.json").write_text(json.dumps(saved))
    ours = load_tokenizer(str(tmp_path / "t.json"))
    for text in PLAIN:
        assert ours.encode(text).tolist() == made.encode(text).ids
    assert ours.specials == {"<|endoftext|>": 555}


def test_gpt2s_pair_of_files_gives_hugging_faces_ids(tmp_path):
    from transformers import GPT2Tokenizer

    saved = json.loads(byte_level_like("gpt2").to_str())
    saved["model"]["vocab"]["<|endoftext|>"] = 555
    (tmp_path / "vocab.json").write_text(json.dumps(saved["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, saved["model"]["merges"])) + "\n")
    ours, theirs = load_tokenizer(str(tmp_path / "vocab.json")), GPT2Tokenizer.from_pretrained(tmp_path)
    assert (ours.vocab_size, ours.specials, ours.eot) == (556, {"<|endoftext|>": 555}, 555)
    for text in HOSTILE + CORPUS:
        if "<|endoftext|>" not in text:
            assert ours.encode(text).tolist() == theirs(text)["input_ids"]
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match="vocab.json is no readable tokenizer file") as caught:
        load_tokenizer(str(tmp_path / "vocab.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage, message", [
    (lambda saved: saved.update(decoder={"type": "CTC", "pad_token": "x", "word_delimiter_token": "|", "cleanup": True}
                                ), "its decoder is CTC"),
    (lambda saved: saved["model"].update(vocab={}, merges=[]), "its vocabulary is empty"),
    (lambda saved: saved["model"].update(type="Nothing"), ""),
    (lambda saved: saved["model"]["merges"].append(["no", "such"]), ""),
    (lambda saved: saved.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}}), ""),
    (lambda saved: saved["added_tokens"][0].pop("special"), ""),
    (lambda saved: saved.pop("model"), ""),
])  # fmt: skip
def test_damaged_file_of_any_kind_is_refused_by_name(tmp_path, damage, message):
    saved = json.loads(byte_level_like("gpt2").to_str())
    damage(saved)
    (tmp_path / "broken.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=f"broken.json is no readable tokenizer file .*{message}") as caught:
        load_tokenizer(str(tmp_path / "broken.json"))
    assert "\n" not in str(caught.value)


def test_text_that_a_file_has_no_tokens_for_is_an_error_of_one_line(tmp_path):
    made = word_level_like(None)
    saved = json.loads(made.to_str())
    saved["model"]["unk_token"] = "<none>"
    (tmp_path / "t.json").write_text(json.dumps(saved))
    ours = load_tokenizer(str(tmp_path / "t.json"))
    assert len(ours.encode("import numpy")) == 2
    with pytest.raises(UserError, match="t.json cannot encode the text .*use another") as caught:
        ours.encode("import nothingofthekind")
    assert "\n" not in str(caught.value)


# ---- characters

CHARACTERS = ["b", "\n", " ", "a", "é", "日", "🙂", "\u2028", "\t", "\0", '"', "\\", "▁", "\u0301", "'", "<"]


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    path = tmp_path_factory.mktemp("characters") / "tokenizer.json"
    write_character_tokenizer(CHARACTERS, path)
    return load_tokenizer(str(path))


def test_characters_ids_are_their_places_in_the_list(characters):
    assert characters.encode("".join(CHARACTERS)).tolist() == list(range(len(CHARACTERS)))
    assert (characters.vocab_size, characters.specials, characters.eot) == (len(CHARACTERS), {}, None)
    assert not characters.space_begins_word
    for text in ["", "ab\n\n  ba", "\n" * 99, "🙂'日\u2028\0", "e\u0301".replace("e", "a"), "a\tb▁b"]:
        ids = characters.encode(text)
        assert ids.tolist() == [CHARACTERS.index(c) for c in text]
        assert characters.decode(ids) == b"".join(characters.decode_bytes([i]) for i in ids).decode() == text
        assert np.array(characters.byte_counts())[ids].sum() == len(text.encode())


@pytest.mark.parametrize("text", ["c", "ab c", "B", "a\r\nb", "\ud800"])
def test_character_that_is_not_in_the_list_is_an_error_that_names_it(characters, text):
    lacking = sorted(set(text.replace("\ud800", "?")) - set(CHARACTERS))
    with pytest.raises(UserError, match="knows only 16 characters") as caught:
        characters.encode(text)
    assert repr(lacking[0]) in str(caught.value) and "\n" not in str(caught.value)


def test_autotokenizer_reads_a_file_of_characters(characters, tmp_path):
    from transformers import AutoTokenizer

    characters.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(random.Random(0).choices(CHARACTERS, k=999))
    ids = theirs(text)["input_ids"]
    assert ids == characters.encode(text).tolist() and theirs.decode(ids) == text
    with pytest.raises(Exception, match="Missing .UNK. token"):
        theirs("c")


@pytest.mark.parametrize("wrong, message", [
    (["a", "bc"], "'bc' is no character"), (["a", ""], "'' is no character"), (["a", 7], "7 is no character"),
    (["a", "\udc80"], "is no character"), (["a", "b", "a"], "'a' is in the list twice"), ([], "is empty"),
])  # fmt: skip
def test_list_that_is_not_of_characters_is_refused(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        write_character_tokenizer(wrong, tmp_path / "t.json")


# ---- names and files that are wrong

@pytest.mark.parametrize("name", ["gpt-2", "bytes", "", "bpe", "tokenizer.model"])
def test_unknown_name_lists_the_known_ones(name):
    message = "is unknown; use byte, bpe, byte_fim, bpe_fim, the path of a tokenizer.json, BERT.s vocab.txt, .*gpt2"
    with pytest.raises(UserError, match=message):
        load_tokenizer(name)


@pytest.mark.parametrize("name", ["nothing.json", "nothing.txt"])
def test_missing_file_is_named(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} is no readable tokenizer file"):
        load_tokenizer(str(tmp_path / name))


def damaged(change):
    def damage(saved):
        change(saved)
        return json.dumps(saved)
    return damage


@pytest.mark.parametrize("damage", [
    lambda saved: "",
    lambda saved: json.dumps(saved)[:-999],
    lambda saved: "[]",
    lambda saved: "{}",
    damaged(lambda saved: saved.update(model={"type": "WordPiece", "vocab": {}})),
    damaged(lambda saved: saved.update(pre_tokenizer=None)),
    damaged(lambda saved: saved.update(added_tokens=[{}])),
    damaged(lambda saved: saved["model"].update(vocab=["a"])),
    damaged(lambda saved: saved["model"]["vocab"].update({"a b": 999})),  # a blank is written as another character
    damaged(lambda saved: saved["model"]["vocab"].popitem()),
    damaged(lambda saved: saved["model"]["vocab"].update({"a": 300})),
    damaged(lambda saved: saved["added_tokens"][0].update(id=5)),
], ids=range(12))  # fmt: skip
def test_damaged_file_is_refused_by_name(tmp_path, bpe_file, damage):
    path = tmp_path / "broken.json"
    path.write_text(damage(json.loads(bpe_file.read_text())))
    with pytest.raises(UserError, match="broken.json is no readable tokenizer file") as caught:
        load_tokenizer(str(path))
    assert "\n" not in str(caught.value)
