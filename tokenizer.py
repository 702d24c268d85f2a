"""Text to ids and back.

A tokenizer is named by `byte`, by a tiktoken name such as `gpt2`, or by the path of a file: a tokenizer.json that
train_bpe made, or BERT's WordPiece as vocab.txt or tokenizer.json. Text never becomes a special token: "<|endoftext|>"
inside a document is encoded as the text it is.
"""

import collections
import hashlib
import json
import re
from pathlib import Path

import numpy as np

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|mask|>", "<|cls|>", "<|sep|>")  # follow the text ids of byte and bpe
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SMALLEST_BPE = 256 + len(SPECIALS)  # ids of a bpe that has learnt nothing

# GPT-2's way of cutting text into words, within which bytes merge; `tokenizers` calls it ByteLevel.
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"""


class Tokenizer:
    """What all tokenizers share. specials maps the names of special tokens to their ids."""

    space_begins_word = False  # whether a word's first token holds the space before it
    continuations = ()  # ids of tokens that go on with a word, where the tokenizer knows

    def __init__(self, name, vocab_size, specials):
        self.name, self.vocab_size, self.specials = name, vocab_size, specials

    @property
    def eot(self):
        """Id of end-of-text, which follows each document: [SEP] where the special tokens are BERT's."""
        return self.specials.get("<|endoftext|>", self.specials.get("[SEP]"))

    def decode(self, ids):
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class ByteTokenizer(Tokenizer):
    """One id a UTF-8 byte."""

    def __init__(self):
        super().__init__("byte", 256 + len(SPECIALS), {name: 256 + i for i, name in enumerate(SPECIALS)})
        self._names = {id_: name.encode() for name, id_ in self.specials.items()}

    def encode(self, text):
        """Ids of a text, as a numpy array."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)

    def decode_bytes(self, ids):
        """UTF-8 bytes of ids, special tokens by name; the bytes may end inside a character."""
        return b"".join(bytes((i,)) if i < 256 else self._names[i] for i in ids)


class TiktokenTokenizer(Tokenizer):
    """Byte-pair encoding by tiktoken."""

    space_begins_word = True

    def __init__(self, name, encoding):
        super().__init__(name, encoding.n_vocab, dict(encoding._special_tokens))
        self._encoding = encoding

    def encode(self, text):
        """Ids of a text, as a numpy array."""
        try:
            return self._encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair
            return self.encode(text.encode("utf-8", errors="replace").decode("utf-8"))
        except ValueError:  # its regex gives up on a million blanks in a row (openai/tiktoken issue 245); cut them
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])

    def decode_bytes(self, ids):
        """UTF-8 bytes of ids, special tokens by name; the bytes may end inside a character."""
        return self._encoding.decode_bytes(ids)


class WordPieceTokenizer(Tokenizer):
    """BERT's WordPiece by tokenizers; text in capitals or with accents stays so only where the vocabulary has them."""

    def __init__(self, name, saved):
        """saved: a tokenizer.json as a dict; its special tokens are kept from matching in text."""
        import tokenizers

        model, vocab = saved["model"], saved["model"]["vocab"]
        if missing := [special for special in BERT_SPECIALS if special not in vocab]:
            raise ValueError(f"its vocabulary lacks {', '.join(missing)}")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError("its ids are not 0, 1, 2 and so on, each once")
        how = saved["pre_tokenizer"]["type"], model["unk_token"], model["continuing_subword_prefix"]
        if how != ("BertPreTokenizer", "[UNK]", "##"):  # which cuts "[MASK]" in text into what is no special token
            raise ValueError(f"it is built of {', '.join(how)}, where BERT's has BertPreTokenizer, [UNK], ##")
        super().__init__(name, len(vocab), {special: vocab[special] for special in BERT_SPECIALS})
        self.continuations = sorted(id_ for token, id_ in vocab.items() if token.startswith("##"))
        self._saved, self._tokens = saved, {id_: token for token, id_ in vocab.items()}
        plain = saved | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._wordpiece = tokenizers.Tokenizer.from_str(json.dumps(plain))

    def encode(self, text):
        """Ids of a text, as a numpy array; a word that no tokens spell is [UNK]."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # tokenizers refuses half a surrogate pair
        return np.array(self._wordpiece.encode_batch_fast([text])[0].ids, dtype=np.uint32)

    def decode_bytes(self, ids):
        """UTF-8 bytes of ids: words with a space before each, since WordPiece does not keep which had one."""
        tokens = [self._tokens[int(i)] for i in ids]
        return "".join(token[2:] if token.startswith("##") else " " + token for token in tokens).encode()

    def save(self, path):
        """Writes the tokenizer.json, which Hugging Face's libraries read as well."""
        Path(path).write_text(json.dumps(self._saved, ensure_ascii=False), encoding="utf-8")


def load_tokenizer(name):
    """The tokenizer of that name: `byte`, a tiktoken name, or the path of a tokenizer.json or BERT's vocab.txt."""
    if name == "byte":
        return ByteTokenizer()
    if name.endswith((".json", ".txt")):
        return _tokenizer_of_file(Path(name))
    try:
        import tiktoken
    except ImportError as error:
        raise ValueError(f"tokenizer {name} needs tiktoken; install it with: pip install tiktoken") from error
    if name not in tiktoken.list_encoding_names():
        raise ValueError(
            f"tokenizer {name!r} is unknown; use byte, bpe, the path of a tokenizer.json, "
            f"BERT's vocab.txt, or one of tiktoken's: {', '.join(tiktoken.list_encoding_names())}"
        )
    try:
        return TiktokenTokenizer(name, tiktoken.get_encoding(name))
    except OSError as error:  # requests' errors are OSErrors
        raise ValueError(
            f"tiktoken could not fetch the tokenizer {name!r} ({type(error).__name__}); with a network, try "
            f"again; without one, set TIKTOKEN_CACHE_DIR to the cache folder of a machine that has it, "
            f"or use --tokenizer=byte or --tokenizer=bpe"
        ) from error


def train_bpe(texts, vocab_size, path):
    """Learns a byte-level BPE of vocab_size ids, special tokens included, from texts; writes it to path.

    The file is a tokenizer.json that Hugging Face's libraries read as well. A small corpus may give fewer ids.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError("tokenizer bpe needs tokenizers; install it with: pip install tokenizers") from error
    if vocab_size < SMALLEST_BPE:
        raise ValueError(
            f"bpe_vocab_size is {vocab_size}; it must be at least {SMALLEST_BPE}: "
            f"256 bytes and {len(SPECIALS)} special tokens"
        )
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = words, tokenizers.decoders.ByteLevel()
    # Trained without special tokens, which come last: so ids are merge ranks, which is what tiktoken takes them for.
    bpe.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIALS),
            initial_alphabet=words.alphabet(),
            special_tokens=[],
            show_progress=False,
        ),
    )
    bpe.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    bpe.save(str(path))


def file_sha256(path):
    """Hash by which a saved tokenizer is known."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _tokenizer_of_file(path):
    try:
        text = path.read_text(encoding="utf-8-sig")
        saved = _wordpiece_of_vocab(text.rstrip("\n").split("\n")) if path.suffix == ".txt" else json.loads(text)
        if saved["model"]["type"] == "WordPiece":
            return WordPieceTokenizer(str(path), saved)
        return TiktokenTokenizer(str(path), _encoding_of_bpe(path.name, saved))
    except ImportError as error:
        raise ValueError(f"tokenizer {path} needs {error.name}; install it with: pip install {error.name}") from error
    except Exception as error:  # whatever a damaged file makes json and tokenizers raise, which is plain Exceptions
        raise ValueError(f"{path} is no readable tokenizer file ({type(error).__name__}: {error})") from error


def _wordpiece_of_vocab(tokens):
    """The tokenizer.json, as a dict, of the lines of BERT's vocab.txt; capitals among them tell that it is cased."""
    from tokenizers.implementations import BertWordPieceTokenizer

    vocab = {token: id_ for id_, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        token, times = collections.Counter(tokens).most_common(1)[0]
        raise ValueError(f"it has {token!r} {times} times")
    is_cased = any(re.fullmatch("(##)?[A-Z]", token) for token in tokens)
    return json.loads(BertWordPieceTokenizer(vocab, lowercase=not is_cased).to_str())


def _encoding_of_bpe(name, saved):
    import tiktoken

    byte_of = _byte_of_character()
    is_ours = saved["model"]["type"] == "BPE" and saved["pre_tokenizer"]["type"] == "ByteLevel"
    ranks = {bytes(byte_of[c] for c in token): id_ for token, id_ in saved["model"]["vocab"].items()}
    specials = {token["content"]: token["id"] for token in saved["added_tokens"]}
    ids = [*sorted(ranks.values()), *specials.values()]
    if not is_ours or tuple(specials) != SPECIALS or ids != list(range(len(ids))):
        raise ValueError("neither a byte-level BPE made by prepare.py --tokenizer=bpe nor BERT's WordPiece")
    return tiktoken.Encoding(name=name, pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=specials)


def _byte_of_character():
    """How a tokenizer.json writes bytes: printable ones as themselves, the other 68 as characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
