"""Text to ids and back.

A tokenizer is named by `byte`, by a tiktoken name such as `gpt2`, or by the path of a tokenizer.json that train_bpe
made. Text never becomes a special token: "<|endoftext|>" inside a document is encoded as the text it is.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|mask|>", "<|cls|>", "<|sep|>")  # follow the text ids of byte and bpe
SMALLEST_BPE = 256 + len(SPECIALS)  # ids of a bpe that has learnt nothing

# GPT-2's way of cutting text into words, within which bytes merge; `tokenizers` calls it ByteLevel.
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"""


class Tokenizer:
    """What all tokenizers share. specials maps the names of special tokens to their ids."""

    def __init__(self, name, vocab_size, specials):
        self.name, self.vocab_size, self.specials = name, vocab_size, specials

    @property
    def eot(self):
        """Id of end-of-text, which follows each document."""
        return self.specials["<|endoftext|>"]

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

    def __init__(self, name, encoding):
        super().__init__(name, encoding.n_vocab, dict(encoding._special_tokens))
        self._encoding = encoding

    def encode(self, text):
        """Ids of a text, as a numpy array."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # tiktoken refuses half a surrogate pair
        try:
            return self._encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except ValueError:  # its regex gives up on a million blanks in a row (openai/tiktoken issue 245); cut them
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])

    def decode_bytes(self, ids):
        """UTF-8 bytes of ids, special tokens by name; the bytes may end inside a character."""
        return self._encoding.decode_bytes(ids)


def load_tokenizer(name):
    """The tokenizer of that name: `byte`, a tiktoken name, or the path of a tokenizer.json from train_bpe."""
    if name == "byte":
        return ByteTokenizer()
    if name.endswith(".json"):
        return TiktokenTokenizer(name, _encoding_from_json(Path(name)))
    try:
        import tiktoken
    except ImportError as error:
        raise ValueError(f"tokenizer {name} needs tiktoken; install it with: pip install tiktoken") from error
    if name not in tiktoken.list_encoding_names():
        raise ValueError(
            f"tokenizer {name!r} is unknown; use byte, bpe, the path of a tokenizer.json, "
            f"or one of tiktoken's: {', '.join(tiktoken.list_encoding_names())}"
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


def _encoding_from_json(path):
    import tiktoken

    byte_of = _byte_of_character()
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        is_ours = saved["model"]["type"] == "BPE" and saved["pre_tokenizer"]["type"] == "ByteLevel"
        ranks = {bytes(byte_of[c] for c in token): id_ for token, id_ in saved["model"]["vocab"].items()}
        specials = {token["content"]: token["id"] for token in saved["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no readable tokenizer.json ({type(error).__name__}: {error})") from error
    ids = [*sorted(ranks.values()), *specials.values()]
    if not is_ours or tuple(specials) != SPECIALS or ids != list(range(len(ids))):
        raise ValueError(
            f"{path} is not a byte-level BPE made by prepare.py --tokenizer=bpe, "
            f"the only kind of tokenizer.json read here"
        )
    return tiktoken.Encoding(name=path.name, pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=specials)


def _byte_of_character():
    """How a tokenizer.json writes bytes: printable ones as themselves, the other 68 as characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
