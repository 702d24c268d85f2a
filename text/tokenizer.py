"""Text to token ids and back.

A tokenizer's name is `byte`, `byte_fim`, a tiktoken name such as `gpt2`, or the path of a file: any Hugging Face
tokenizer.json, BERT's vocab.txt, or GPT-2's vocab.json next to merges.txt. Text never becomes a special token:
"<|endoftext|>" inside a document is encoded as ordinary text.
"""

import collections
import json
import re
import secrets
from pathlib import Path

import numpy as np

import foreign
from config import UserError
from foreign import telling
from shards import end_of_text

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|mask|>", "<|cls|>", "<|sep|>")  # the last ids of byte and bpe
FIM_SPECIALS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")  # behind them in byte_fim and bpe_fim
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SMALLEST_BPE = 256 + len(SPECIALS)  # vocabulary size of a bpe without merges

# Texts on which tokenizers differ
HARD_TEXTS = (
    "The quick brown fox, don't WE'LL 'tis; I'm you're 'llama.\n\n\tx = 1234567890 + 3.14e-10 # §½²٣\r\n",
    "   blanks  \t \n\n\n  before and after   \n ",
    "def f(self, *args):\n        return {'a': [1, 2], \"b\": __name__}  # TODO\n",
    "naïve café Ünïcödé Straße e\u0301 日本語と한국어 Ελλάδα Москва العربية हिन्दी ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 \u202e\u00a0\u3000\u2003\x00\x85\ufeff\ufffd𐍈 ſs K",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa " + " " * 99 + "!" * 99 + "0" * 99 + "\n" * 9 + "//////\n--\n/",
)

# A tokenizer.json without the parts that frame, cut or pad a text's ids
PLAIN = {"post_processor": None, "truncation": None, "padding": None}
# Kinds of values of a tokenizer.json (see foreign.check); `tokenizers` checks the rest
TOKEN_ID = range(2**24)
TOKENIZER = {
    "added_tokens": ([{"id!": TOKEN_ID, "content!": str, "special!": bool}], None),
    "model!": {"type": str, "vocab!": ({"*": TOKEN_ID}, list), "merges": (list, None),
              "unk_token": (str, None), "continuing_subword_prefix": (str, None)},
    **dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"), (dict, None)),
}  # fmt: skip
# GPT-2's pattern for words, within which bytes merge; `tokenizers` calls it ByteLevel.
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"""


class Tokenizer:
    """Base class. A subclass adds encode(text, continues=False), which gives the ids as a numpy array.

    continues: the text is what follows a cut between a letter and a blank, and gets nothing that begins a text.
    """

    space_begins_word = False  # whether a word's first token contains the space before it
    continuations = ()  # ids of tokens that continue a word; only WordPiece has them
    begin = ()  # ids that a Hugging Face model expects before each text
    before_text = None  # id that precedes a text to be scored; none: end-of-text
    alphabet = None  # the characters of a tokenizer that knows no others
    saved = None  # the tokenizer.json as a dict, where there is one

    def __init__(self, name, texts, specials):
        """texts: {id: its UTF-8 bytes}; specials: {special token's name: its id}."""
        self.name, self.specials = name, specials
        self._bytes = {id_: special.encode() for special, id_ in specials.items()} | texts
        self.vocab_size = 1 + max(self._bytes)
        self.eot = end_of_text(specials)
        self.stops = {self.eot} - {None}  # ids that end a generated text

    def decode(self, ids):
        """The text of ids; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """The UTF-8 bytes of ids, which may end inside a character; unused ids give none, special ones their names."""
        return b"".join(self._bytes.get(int(i), b"") for i in ids)

    def byte_counts(self):
        """The bytes of text that each id stands for, a list: 0 for special and unused ids.

        [] where ids do not give back the exact text, as with uncased or normalizing tokenizers.
        """
        for text in HARD_TEXTS:
            text = "".join(c for c in text if c in self.alphabet) if self.alphabet else text
            if self.decode(self.encode(text)) != text:  # type: ignore[attr-defined]
                return []
        special_ids = {*self.specials.values()}
        return [0 if i in special_ids else len(self._bytes.get(i, b"")) for i in range(self.vocab_size)]

    def spans(self, text):
        """(ids, tokens' first characters, the ones behind their last) of a text that the tokens' bytes make up."""
        ids, data = self.encode(text), np.frombuffer(text.encode(errors="replace"), np.uint8)  # type: ignore[attr-defined]
        character = np.cumsum((data & 0xC0) != 0x80)  # a byte's, counted from 1
        ends = np.cumsum([0, *(len(self._bytes[i]) for i in ids.tolist())])
        return ids, character[ends[:-1]] - 1, character[ends[1:] - 1]

    def save(self, path):
        """Writes the tokenizer.json, which Hugging Face's libraries read too."""
        Path(path).write_text(json.dumps(self.saved, ensure_ascii=False), encoding="utf-8")


class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte."""

    def __init__(self, name="byte"):
        names = SPECIALS + FIM_SPECIALS if name == "byte_fim" else SPECIALS
        specials = {special: 256 + i for i, special in enumerate(names)}
        super().__init__(name, {i: bytes((i,)) for i in range(256)}, specials)

    def encode(self, text, continues=False):
        """The ids of a text, as a numpy array."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)


class TiktokenTokenizer(Tokenizer):
    """Byte-pair encoding by tiktoken."""

    space_begins_word = True

    def __init__(self, name, encoding, saved=None):
        texts = {rank: token for token, rank in encoding._mergeable_ranks.items()}
        super().__init__(name, texts, dict(encoding._special_tokens))
        self.encoding, self.saved = encoding, saved

    def encode(self, text, continues=False):
        """The ids of a text, as a numpy array."""
        try:
            return self.encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair
            return self.encode(text.encode("utf-8", errors="replace").decode("utf-8"))
        except ValueError:  # tiktoken's regex fails on a million blanks in a row (openai/tiktoken issue 245)
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])


class FileTokenizer(Tokenizer):
    """Any tokenizer.json, by tokenizers; it gives the same ids as Hugging Face's libraries."""

    def __init__(self, name, saved):
        import tokenizers

        if saved["model"].get("dropout"):
            raise UserError("its model leaves out merges at random (dropout), which changes ids from call to call")
        harmless, names = with_secret_specials(saved)
        self.saved, self._tokenizer = saved, tokenizers.Tokenizer.from_str(json.dumps(harmless))
        vocab, model = self._tokenizer.get_vocab(with_added_tokens=True), saved["model"]
        specials = {name: vocab.pop(secret) for name, secret in names.items()}
        if not vocab:
            raise UserError("its vocabulary is empty")
        # The first word keeps the space that a decoder such as Llama 2's removes.
        decode_token = _decoder_of_tokens(saved.get("decoder"))
        texts = {id_: decode_token(token) for token, id_ in vocab.items()}
        super().__init__(name, texts, specials)
        self.space_begins_word = any(len(text) > 1 and text.startswith(b" ") for text in texts.values())
        # the characters of a character tokenizer without an unknown token
        lacks_unknown = model["type"] == "WordLevel" and model["unk_token"] not in model["vocab"]
        self.alphabet = set(vocab) if lacks_unknown and max(map(len, vocab)) == 1 else None
        steps = json.dumps([saved.get("normalizer"), saved.get("pre_tokenizer")])
        self._begins_texts = any(word in steps for word in ("Prepend", "prepend_scheme", '"add_prefix_space": true'))

    def encode(self, text, continues=False):
        """The ids of a text, as a numpy array; UserError where the vocabulary lacks a character and has no [UNK]."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # tokenizers refuses half a surrogate pair
        if self.alphabet is not None and (lacking := sorted(set(text) - self.alphabet)):
            others = f"{len(self.alphabet)} characters, and the text has others: {', '.join(map(repr, lacking[:5]))}"
            raise UserError(f"the tokenizer {self.name} knows only {others}; leave them out, or use another tokenizer")
        if continues and self._begins_texts:
            # What precedes a text, such as a blank, goes before the letter, whose ids are left out.
            letter, ids = self._ids("a"), self._ids("a" + text)
            if ids[: len(letter)] == letter:
                return np.array(ids[len(letter) :], dtype=np.uint32)
        return np.array(self._ids(text), dtype=np.uint32)

    def spans(self, text):
        """Tokenizer.spans, by tokenizers."""
        ids, text = self.encode(text), text.encode("utf-8", errors="replace").decode("utf-8")
        return ids, *np.array(self._tokenizer.encode(text, add_special_tokens=False).offsets).reshape(-1, 2).T

    def drop_merges(self, share):
        """Leaves out this share of a BPE's merges at random from now on (Provilkov et al. 2020), without a seed."""
        if self.saved["model"]["type"] != "BPE" or not self.saved["model"]["merges"]:
            raise UserError("it is no BPE; leave it out")
        self._tokenizer.model.dropout = share

    def _ids(self, text):
        with telling(lambda reason: f"the tokenizer {self.name} cannot encode the text ({reason}); use another"):
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


class WordPieceTokenizer(FileTokenizer):
    """BERT's WordPiece, by tokenizers; an uncased vocabulary loses capitals and accents."""

    def __init__(self, name, saved):
        vocab = saved["model"]["vocab"]
        if missing := [special for special in BERT_SPECIALS if special not in vocab]:
            raise UserError(f"its vocabulary lacks {', '.join(missing)}")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise UserError("its ids are not 0, 1, 2 and so on, each once")
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        specials = [{"id": vocab[token], "content": token, "special": True} | flags for token in BERT_SPECIALS]
        added = [token for token in saved.get("added_tokens") or [] if token["content"] not in BERT_SPECIALS]
        # A space before each word: WordPiece does not keep the original spacing.
        words = {"decoder": saved.get("decoder") or {"type": "WordPiece", "prefix": "##", "cleanup": False}}
        super().__init__(name, saved | words | {"added_tokens": specials + added})
        self.saved, self.space_begins_word = saved, False
        self._bytes |= {vocab[special]: f" {special}".encode() for special in BERT_SPECIALS}
        self.continuations = sorted(id_ for token, id_ in vocab.items() if token.startswith("##"))


def load_tokenizer(name):
    """The tokenizer of a name: byte, byte_fim, tiktoken's, or the path of a tokenizer.json, vocab.txt or vocab.json."""
    if name in ("byte", "byte_fim"):
        return ByteTokenizer(name)
    if name.endswith((".json", ".txt")):
        return tokenizer_of_saved(name, saved_tokenizer(name))
    import tiktoken

    if name not in (names := tiktoken.list_encoding_names()):
        known = "byte, bpe, byte_fim, bpe_fim, the path of a tokenizer.json, BERT's vocab.txt, or one of tiktoken's"
        raise UserError(f"tokenizer {name!r} is unknown; use {known}: {', '.join(names)}")
    try:
        return TiktokenTokenizer(name, tiktoken.get_encoding(name))
    except OSError as error:  # requests' errors are OSErrors
        raise UserError(
            f"tiktoken could not fetch the tokenizer {name!r} ({type(error).__name__}); without a network, set "
            f"TIKTOKEN_CACHE_DIR to a copy of another machine's, or use --tokenizer=byte or --tokenizer=bpe"
        ) from error


def train_bpe(texts, vocab_size, path, with_fim=False):
    """Trains a byte-level BPE of vocab_size ids, special tokens included, on texts; writes it to path.

    The file is a tokenizer.json that Hugging Face's libraries read too. A small corpus may give fewer ids.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("tokenizer bpe needs tokenizers; install it with: pip install tokenizers") from error
    specials = SPECIALS + FIM_SPECIALS if with_fim else SPECIALS
    if vocab_size < 256 + len(specials):
        raise UserError(f"bpe_vocab_size is {vocab_size}; with bpe_fim it must be at least {256 + len(specials)}")
    bpe, alphabet = _byte_level(), tokenizers.pre_tokenizers.ByteLevel.alphabet()
    # Trained without special tokens, which come last: ids must be merge ranks for tiktoken.
    size = vocab_size - len(specials)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(list(specials))
    Path(path).write_text(json.dumps(json.loads(bpe.to_str()), ensure_ascii=False), encoding="utf-8")  # as save does


def _byte_level(*vocab_and_merges):
    """A BPE of GPT-2's kind in tokenizers."""
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(*vocab_and_merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return bpe


def write_character_tokenizer(characters, path):
    """Writes a tokenizer.json that gives each character its index in the list; it has no special tokens."""
    if wrong := [c for c in characters if not (isinstance(c, str) and len(c) == 1) or "\ud800" <= c <= "\udfff"]:
        raise UserError(f"{wrong[0]!r} is no character; give a list of strings of one character each")
    if repeated := [c for c, times in collections.Counter(characters).items() if times > 1]:
        raise UserError(f"the character {repeated[0]!r} is in the list twice; list each once")
    if not characters:
        raise UserError("the list of characters is empty; it needs at least one")
    saved = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        # The vocabulary lacks the unknown token, so that unknown characters are an error in all libraries.
        "model": {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(characters)}, "unk_token": "<unk>"},
    }
    Path(path).write_text(json.dumps(saved), encoding="utf-8")


def tokenizer_of_saved(path, saved):
    """The tokenizer of a tokenizer.json as a dict; path: where it comes from."""
    with telling(lambda reason: f"{path} is no readable tokenizer file ({reason})"):
        model, words = saved["model"], (saved.get("pre_tokenizer") or {}).get("type")
        how = words, model.get("unk_token"), model.get("continuing_subword_prefix")
        if model["type"] == "WordPiece" and how == ("BertPreTokenizer", "[UNK]", "##"):
            return WordPieceTokenizer(str(path), saved)
        names = tuple(token["content"] for token in saved.get("added_tokens") or ())
        if model["type"] == "BPE" and names in (SPECIALS, SPECIALS + FIM_SPECIALS):
            encoding = _encoding_of_bpe(Path(path).name, saved)
            if _is_plain_bpe(saved):  # faster by tiktoken
                return TiktokenTokenizer(str(path), encoding, saved)
        return FileTokenizer(str(path), saved)


def saved_tokenizer(path):
    """A tokenizer.json as a dict, read or converted from a tokenizer.json, vocab.txt or vocab.json."""
    path = Path(path)
    with telling(lambda reason: f"{path} is no readable tokenizer file ({reason})"):
        if path.suffix == ".txt":
            return _wordpiece_of_vocab(_lines(path))
        if path.name == "vocab.json":
            return _bpe_of_pair(path)
        saved = foreign.read_json(path, TOKENIZER)
        if "type" not in saved["model"]:  # files from before 2021, such as GPT-2's own, leave it out
            import tokenizers

            saved = json.loads(tokenizers.Tokenizer.from_str(json.dumps(saved)).to_str())
        return saved


def _lines(path):
    return foreign.read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n").rstrip("\n").split("\n")


def _bpe_of_pair(path):
    """GPT-2's vocab.json and merges.txt as a tokenizer.json dict; tokens that no merge makes are special."""
    vocab = foreign.read_json(path, {"*": TOKEN_ID})
    merges = [line.split(" ") for line in _lines(path.with_name("merges.txt")) if not line.startswith("#version")]
    merges = [(left, right) for left, right in filter(any, merges)]
    bpe, made = _byte_level(vocab, merges), {left + right for left, right in merges}
    bpe.add_special_tokens(sorted((token for token in vocab if len(token) > 1 and token not in made), key=vocab.get))
    return json.loads(bpe.to_str())


def with_secret_specials(saved):
    """Renames special tokens so that no text contains them; returns the tokenizer.json dict and {name: secret name}.

    They can't be removed: `tokenizers` would give their ids to other added tokens.
    """
    model, vocab = dict(saved["model"]), saved["model"]["vocab"]
    # Tokens for byte fallback must keep their names; where the vocabulary has them, they need not be added.
    fallback = {f"<0x{byte:02X}>" for byte in range(256)}.intersection(vocab if isinstance(vocab, dict) else ())
    added = [token for token in saved.get("added_tokens") or [] if token["content"] not in fallback]
    secret = {token["content"]: secrets.token_hex(16) for token in added if token["special"]}
    if isinstance(vocab, dict) and all(token["content"] in secret.keys() & vocab.keys() for token in added):
        added = []  # all have their ids from the vocabulary, and text is not searched for them
    added = [token | {"content": secret.get(token["content"], token["content"])} for token in added]
    if isinstance(vocab, dict):
        model["vocab"] = {secret.get(token, token): id_ for token, id_ in vocab.items()}
    else:  # Unigram's vocabulary is a list; every token in it matches in text
        model["vocab"] = [[secret.get(token, token), score] for token, score in vocab]
    if model.get("unk_token") in secret:
        model["unk_token"] = secret[model["unk_token"]]
    if model.get("merges") and not secret.keys().isdisjoint(vocab):
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if secret.keys().isdisjoint((*pair, "".join(pair)))]
    return saved | PLAIN | {"added_tokens": added, "model": model}, secret


def _decoder_of_tokens(decoder):
    """The function from a token to its UTF-8 bytes, by a tokenizer.json's decoder, a dict or None.

    It leaves out the decoder's work at the ends of a whole text, such as removing the first space.
    """
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    known = {"ByteLevel", "ByteFallback", "Replace", "Metaspace", "BPEDecoder", "WordPiece", "Fuse", "Strip"}
    if not kinds <= known:
        raise UserError(f"its decoder is {', '.join(kinds - known)}; supported are {', '.join(sorted(known))}")
    byte_of = byte_of_character()
    replaced = {"Metaspace": "replacement", "BPEDecoder": "suffix"}  # the option that names the text for a space
    pairs = [(step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"]
    pairs += [(step[replaced[step["type"]]], " ") for step in steps if step["type"] in replaced]
    prefix = next((step["prefix"] for step in steps if step["type"] == "WordPiece"), None)

    def decode(token):
        if "ByteLevel" in kinds and all(c in byte_of for c in token):  # added tokens may hold other characters
            return bytes(byte_of[c] for c in token)
        if "ByteFallback" in kinds and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
            return bytes.fromhex(byte[1])
        for old, new in pairs:
            token = token.replace(old, new)
        if prefix is not None:
            token = token[len(prefix) :] if token.startswith(prefix) else f" {token}"
        return (token if steps else f" {token}").encode()

    return decode


def _wordpiece_of_vocab(tokens):
    """The lines of BERT's vocab.txt as a tokenizer.json dict; a vocabulary with capitals is cased."""
    from tokenizers.implementations import BertWordPieceTokenizer

    [(token, times)] = collections.Counter(tokens).most_common(1)
    if times > 1:
        raise UserError(f"it has {token!r} {times} times")
    vocab = {token: id_ for id_, token in enumerate(tokens)}
    is_cased = any(re.fullmatch("(##)?[A-Z]", token) for token in tokens)
    return json.loads(BertWordPieceTokenizer(vocab, lowercase=not is_cased).to_str())


def _encoding_of_bpe(name, saved):
    import tiktoken

    byte_of = byte_of_character()
    ranks = {bytes(byte_of[c] for c in token): id_ for token, id_ in saved["model"]["vocab"].items()}
    specials = {token["content"]: token["id"] for token in saved["added_tokens"]}
    ids = [*sorted(ranks.values()), *specials.values()]
    if saved["pre_tokenizer"]["type"] != "ByteLevel" or ids != list(range(len(ids))):
        raise UserError("it has the special tokens of prepare.py --tokenizer=bpe, but not its structure")
    return tiktoken.Encoding(name=name, pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=specials)


def _is_plain_bpe(saved):
    """Whether a byte-level BPE is as train_bpe makes it, so that tiktoken, which knows ranks alone, gives its ids."""
    model, words = saved["model"], saved["pre_tokenizer"]
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    is_plain = not saved.get("normalizer") and not any(model.get(name) for name in options)
    is_plain = is_plain and not words.get("add_prefix_space") and words.get("use_regex", True)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    made = sorted(model["vocab"], key=model["vocab"].get)[256:]
    return is_plain and all(t["special"] for t in saved["added_tokens"]) and ["".join(pair) for pair in merges] == made


def byte_of_character():
    """{character: byte} of byte-level BPE: printable bytes as themselves, the other 68 as U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
