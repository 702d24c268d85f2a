"""Text to ids and back.

A tokenizer is named by `byte`, by a tiktoken name such as `gpt2`, or by the path of a file: any tokenizer.json of
Hugging Face's, BERT's vocab.txt, or GPT-2's vocab.json with merges.txt beside it. Text never becomes a special token:
"<|endoftext|>" inside a document is encoded as the text it is.
"""

import collections
import json
import re
import secrets
from functools import cached_property
from pathlib import Path

import numpy as np

from config import UserError

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|mask|>", "<|cls|>", "<|sep|>")  # follow the text ids of byte and bpe
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Names of the token that follows each document; where a tokenizer has several, the first of these.
END_OF_TEXT = ("<|endoftext|>", "[SEP]", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>")
SMALLEST_BPE = 256 + len(SPECIALS)  # ids of a bpe that has learnt nothing

# GPT-2's way of cutting text into words, within which bytes merge; `tokenizers` calls it ByteLevel.
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"""


class Tokenizer:
    """Base of all tokenizers. specials: {name of a special token: id}."""

    space_begins_word = False  # whether a word's first token holds the space before it
    continuations = ()  # tokens that continue a word, where the tokenizer marks them
    begin = ()  # ids that a Hugging Face model was given before each text
    before_text = None  # id that stands before a text to be scored; none: end-of-text
    saved = None  # the content of its tokenizer.json, where it has one

    def __init__(self, name, vocab_size, specials):
        self.name, self.vocab_size, self.specials = name, vocab_size, specials

    @property
    def eot(self):
        """Id of end-of-text, which follows each document, [SEP] of BERT's; None where there is none."""
        return next((self.specials[name] for name in END_OF_TEXT if name in self.specials), None)

    def decode(self, ids):
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path):
        """Writes the tokenizer.json, which Hugging Face's libraries read as well."""
        Path(path).write_text(json.dumps(self.saved, ensure_ascii=False), encoding="utf-8")


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

    def __init__(self, name, encoding, saved=None):
        super().__init__(name, encoding.n_vocab, dict(encoding._special_tokens))
        self.encoding, self.saved = encoding, saved
        self._unused = set(range(encoding.n_vocab)).difference(
            encoding._mergeable_ranks.values(), self.specials.values()
        )

    def encode(self, text):
        """Ids of a text, as a numpy array."""
        try:
            return self.encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair
            return self.encode(text.encode("utf-8", errors="replace").decode("utf-8"))
        except ValueError:  # its regex gives up on a million blanks in a row (openai/tiktoken issue 245); cut them
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])

    def decode_bytes(self, ids):
        """UTF-8 bytes of ids, special tokens by name; the bytes may end inside a character.

        Ids that stand for no token, as 100256 of cl100k_base does, are nothing.
        """
        return self.encoding.decode_bytes([i for i in ids if i not in self._unused] if self._unused else ids)


class WordPieceTokenizer(Tokenizer):
    """BERT's WordPiece by tokenizers; text in capitals or with accents stays so only where the vocabulary has them."""

    def __init__(self, name, saved):
        """saved: a tokenizer.json as a dict; its special tokens are kept from matching in text."""
        import tokenizers

        vocab = saved["model"]["vocab"]
        if missing := [special for special in BERT_SPECIALS if special not in vocab]:
            raise UserError(f"its vocabulary lacks {', '.join(missing)}")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise UserError("its ids are not 0, 1, 2 and so on, each once")
        super().__init__(name, len(vocab), {special: vocab[special] for special in BERT_SPECIALS})
        self.continuations = sorted(id_ for token, id_ in vocab.items() if token.startswith("##"))
        self.saved, self._tokens = saved, {id_: token for token, id_ in vocab.items()}
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


class FileTokenizer(Tokenizer):
    """Whatever a tokenizer.json holds, by tokenizers; its ids are those of Hugging Face's libraries."""

    def __init__(self, name, saved):
        """saved: a tokenizer.json as a dict."""
        import tokenizers

        harmless, names = _with_secret_specials(saved)
        self.saved, self._tokenizer = saved, tokenizers.Tokenizer.from_str(json.dumps(harmless))
        self._vocab, model = self._tokenizer.get_vocab(with_added_tokens=True), saved["model"]
        specials = {name: self._vocab.pop(secret) for name, secret in names.items()}
        if not self._vocab:
            raise UserError("its vocabulary is empty")
        super().__init__(name, 1 + max([*self._vocab.values(), *specials.values()]), specials)
        self._decode_token = _decoder_of_tokens(saved.get("decoder"))
        # The known characters, where a tokenizer of characters has no token for others.
        knows_no_others = model["type"] == "WordLevel" and model["unk_token"] not in model["vocab"]
        self.alphabet = set(self._vocab) if knows_no_others and max(map(len, self._vocab)) == 1 else None

    @cached_property
    def space_begins_word(self):
        """Whether a word's first token holds the space before it."""
        return any(len(token) > 1 and token.startswith(b" ") for token in self._bytes.values())

    @cached_property
    def _bytes(self):
        texts = {id_: self._decode_token(token) for token, id_ in self._vocab.items()}
        return texts | {id_: name.encode() for name, id_ in self.specials.items()}

    def encode(self, text):
        """Ids of a text, as a numpy array; UserError where the vocabulary lacks what the text is made of."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # tokenizers refuses half a surrogate pair
        if self.alphabet is not None and (lacking := sorted(set(text) - self.alphabet)):
            raise UserError(
                f"the tokenizer {self.name} knows {len(self.alphabet)} characters alone, and the text has others: "
                f"{', '.join(map(repr, lacking[:5]))}; leave them out, or use another tokenizer"
            )
        try:
            encoded = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        except Exception as error:  # tokenizers raises plain Exceptions
            raise UserError(f"the tokenizer {self.name} cannot encode the text ({error}); use another") from error
        return np.array(encoded.ids, dtype=np.uint32)

    def decode_bytes(self, ids):
        """UTF-8 bytes of ids, special tokens by name; the bytes may end inside a character.

        As what goes on from other text: the space that a word's token holds is kept, also the first word's, which
        tokenizers such as Llama 2's put there themselves. Ids that stand for no token are nothing.
        """
        return b"".join(self._bytes.get(int(i), b"") for i in ids)


def load_tokenizer(name):
    """The tokenizer of that name: `byte`, a tiktoken name, or the path of a tokenizer.json, vocab.txt or vocab.json."""
    if name == "byte":
        return ByteTokenizer()
    if name.endswith((".json", ".txt")):
        return _tokenizer_of_file(Path(name))
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(f"tokenizer {name} needs tiktoken; install it with: pip install tiktoken") from error
    if name not in tiktoken.list_encoding_names():
        raise UserError(
            f"tokenizer {name!r} is unknown; use byte, bpe, the path of a tokenizer.json, "
            f"BERT's vocab.txt, or one of tiktoken's: {', '.join(tiktoken.list_encoding_names())}"
        )
    try:
        return TiktokenTokenizer(name, tiktoken.get_encoding(name))
    except OSError as error:  # requests' errors are OSErrors
        raise UserError(
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
        raise UserError("tokenizer bpe needs tokenizers; install it with: pip install tokenizers") from error
    if vocab_size < SMALLEST_BPE:
        raise UserError(
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
    Path(path).write_text(json.dumps(json.loads(bpe.to_str()), ensure_ascii=False), encoding="utf-8")  # as save does


def write_character_tokenizer(characters, path):
    """Writes a tokenizer.json of one id a character, its place in the list; it has no special tokens."""
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
        # The unknown token is not in the vocabulary: so unknown characters are an error in all libraries.
        "model": {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(characters)}, "unk_token": "<unk>"},
    }
    Path(path).write_text(json.dumps(saved), encoding="utf-8")


def _tokenizer_of_file(path):
    try:
        saved = _saved_tokenizer(path)
        model, words = saved["model"], (saved.get("pre_tokenizer") or {}).get("type")
        how = words, model.get("unk_token"), model.get("continuing_subword_prefix")
        if model["type"] == "WordPiece" and how == ("BertPreTokenizer", "[UNK]", "##"):
            return WordPieceTokenizer(str(path), saved)
        if model["type"] == "BPE" and tuple(token["content"] for token in saved.get("added_tokens") or ()) == SPECIALS:
            return TiktokenTokenizer(str(path), _encoding_of_bpe(path.name, saved), saved)
        return FileTokenizer(str(path), saved)
    except ImportError as error:
        raise UserError(f"tokenizer {path} needs {error.name}; install it with: pip install {error.name}") from error
    except Exception as error:  # whatever a damaged file makes json and tokenizers raise, which is plain Exceptions
        raise UserError(f"{path} is no readable tokenizer file ({type(error).__name__}: {error})") from error


def _saved_tokenizer(path):
    """The tokenizer.json, as a dict, of a tokenizer.json, vocab.txt or vocab.json."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".txt":
        return _wordpiece_of_vocab(text.rstrip("\n").split("\n"))
    if path.name == "vocab.json":
        return _bpe_of_pair(path)
    saved = json.loads(text)
    if "type" not in saved["model"]:  # files of before 2021, such as GPT-2's own, leave it out
        import tokenizers

        saved = json.loads(tokenizers.Tokenizer.from_str(text).to_str())
    return saved


def _bpe_of_pair(path):
    """The tokenizer.json, as a dict, of GPT-2's vocab.json and merges.txt; special is what no bytes merge to."""
    import tokenizers

    vocab, merges = tokenizers.models.BPE.read_file(str(path), str(path.with_name("merges.txt")))
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    made = {left + right for left, right in merges}
    specials = sorted((token for token in vocab if len(token) > 1 and token not in made), key=vocab.get)
    bpe.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in specials])
    return json.loads(bpe.to_str())


def _with_secret_specials(saved):
    """A tokenizer.json, as a dict, whose special tokens no text can name, and {name: secret name} of these.

    They must stay: where they are taken out, `tokenizers` gives their ids to other added tokens.
    """
    vocab = saved["model"]["vocab"]
    # Bytes, which stand for what the vocabulary lacks, need not be added as well, and must keep their names.
    held = {f"<0x{byte:02X}>" for byte in range(256)}.intersection(vocab if isinstance(vocab, dict) else ())
    added = [token for token in saved.get("added_tokens") or [] if token["content"] not in held]
    secret = {token["content"]: secrets.token_hex(16) for token in added if token["special"]}
    added = [token | {"content": secret.get(token["content"], token["content"])} for token in added]
    model = saved["model"]
    if isinstance(model["vocab"], dict):
        vocab = {secret.get(token, token): id_ for token, id_ in model["vocab"].items()}
    else:  # Unigram's, which finds in text all that is listed
        vocab = [[secret.get(token, token), score] for token, score in model["vocab"]]
    model = model | {"vocab": vocab}
    if model.get("unk_token") in secret:
        model["unk_token"] = secret[model["unk_token"]]
    if model.get("merges") and not secret.keys().isdisjoint(saved["model"]["vocab"]):
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if secret.keys().isdisjoint((*pair, "".join(pair)))]
    plain = {"added_tokens": added, "model": model, "post_processor": None, "truncation": None, "padding": None}
    return saved | plain, secret


def _decoder_of_tokens(decoder):
    """The function by which a tokenizer.json's decoder, a dict or None, turns one token into UTF-8 bytes.

    What it does at the ends of a whole text, such as taking off the first space, is left out.
    """
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    known = {"ByteLevel", "ByteFallback", "Replace", "Metaspace", "BPEDecoder", "WordPiece", "Fuse", "Strip"}
    if not kinds <= known:
        raise UserError(f"its decoder is {', '.join(kinds - known)}, which is none of {', '.join(sorted(known))}")
    byte_of = byte_of_character()
    replaced = {"Metaspace": "replacement", "BPEDecoder": "suffix"}  # the key whose text stands for a space in tokens
    spaces = [step[replaced[step["type"]]] for step in steps if step["type"] in replaced]
    pairs = [(step["pattern"]["String"], step["content"]) for step in steps if step["type"] == "Replace"]
    pairs += [(space, " ") for space in spaces]
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
    """The tokenizer.json, as a dict, of the lines of BERT's vocab.txt; capitals among them tell that it is cased."""
    from tokenizers.implementations import BertWordPieceTokenizer

    vocab = {token: id_ for id_, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        token, times = collections.Counter(tokens).most_common(1)[0]
        raise UserError(f"it has {token!r} {times} times")
    is_cased = any(re.fullmatch("(##)?[A-Z]", token) for token in tokens)
    return json.loads(BertWordPieceTokenizer(vocab, lowercase=not is_cased).to_str())


def _encoding_of_bpe(name, saved):
    import tiktoken

    byte_of = byte_of_character()
    ranks = {bytes(byte_of[c] for c in token): id_ for token, id_ in saved["model"]["vocab"].items()}
    specials = {token["content"]: token["id"] for token in saved["added_tokens"]}
    ids = [*sorted(ranks.values()), *specials.values()]
    if saved["pre_tokenizer"]["type"] != "ByteLevel" or ids != list(range(len(ids))):
        raise UserError("it is not as prepare.py --tokenizer=bpe makes it, whose special tokens it has")
    return tiktoken.Encoding(name=name, pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=specials)


def byte_of_character():
    """How a tokenizer.json writes bytes: printable ones as themselves, the other 68 as characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
