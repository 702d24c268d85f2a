"""Files of text to documents, each in the training or the validation split.

Memory does not grow with the corpus, only with the longest document of a .jsonl or .parquet file or between separators.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

from config import Config, Count, UserError
from text import files
from text.files import Tally, TextFile, ending_of, find_files, open_file, shown, unescaped
from text.remote import public

BPE_BYTES = 200 << 20  # most text to train a BPE on
BPE_WORD = 256  # longest word to train it on: training time is quadratic in it
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"  # 1.1 MB


def stdlib_files(_):
    """Python's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = (path for path in root.rglob("*.py") if left_out.isdisjoint(path.relative_to(root).parts))
    return sorted(path for path in files if path.is_file())


# A dataset's name: a function of the data folder that returns its files.
DATASETS = {"stdlib": stdlib_files, "shakespeare": lambda folder: find_files(SHAKESPEARE, folder)[0]}


@dataclass(frozen=True)
class CorpusConfig(Config):
    input: str | None = None  # files, folder, glob (in quotes) or URL of text; fineweb10b: a local folder of its shards
    text_field: str = "text"  # text's field in .jsonl objects, its column in .parquet files
    doc_separator: str | None = None  # text between the documents of a .txt file; none: each file is one document
    encoding: str | None = None  # encoding of text files without a Unicode mark, such as gb18030; none: UTF-8
    max_document_bytes: Count = 256_000_000  # largest line or row, or document between separators; more is passed over
    workers: Count | None = None  # processes; none: one per core

    def __post_init__(self):
        super().__post_init__()
        if not _is_encoding(self.encoding or "utf-8"):
            remedy = "name one of Python's, such as utf-16-le, gb18030 or cp1252"
            raise UserError(f"encoding {self.encoding} is unknown; {remedy}")


def _is_encoding(name):
    try:
        b"a".decode(name, "replace")  # codecs that are no text's are refused, too
    except (LookupError, ValueError):
        return False
    return True


class Corpus:
    """The documents of the input. skipped: {reason: how many were left out} by the last pass.

    inventory: the number of files, their bytes, the newest one's time, and a hash of their names and sizes; remote
    files have no time, but etags in the hash.
    """

    def __init__(self, cfg, folder, found=None):
        """found: (paths, {what was left out: how many}) in place of the files that dataset or input name."""
        self.cfg, self.skipped, self.fields, self.total = cfg, collections.Counter(), {}, Tally()
        if found is None:
            found = (DATASETS[cfg.dataset](folder), {}) if cfg.dataset else find_files(cfg.input, folder)
        self.files, self.left_out = found
        self.root = Path(os.path.commonpath([getattr(path, "place", path).parent for path in self.files]))
        sizes, newest, names = [], 0, hashlib.sha256()
        for path in self.files:
            try:
                status = path.stat()
            except OSError as error:  # removed since it was found
                raise UserError(f"{shown(path)} cannot be read ({error.strerror}); repeat the command") from error
            sizes.append(status.st_size)
            newest = max(newest, status.st_mtime)
            names.update(b"%s %d%s\n" % (self._name(path), status.st_size, getattr(path, "version", "").encode()))
        self.bytes = sum(sizes)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(newest)) if newest else None
        self.inventory = {"files": len(sizes), "bytes": self.bytes, "newest": when, "names": names.hexdigest()[:16]}

    def _name(self, path):
        return str(getattr(path, "place", path).relative_to(self.root)).encode("utf-8", errors="surrogateescape")

    def pieces(self):
        """Yields (split, bytes, whether they end a document), in order; long documents come in pieces.

        A hash decides a document's split: the hash of its path where a file is a document, else of its text. A small
        corpus gets at least one document into each split; a single document's tail becomes the validation split.
        """
        self.skipped.clear()
        self.skipped.update(self.left_out)
        self.total = Tally()
        documents = self._documents()
        first = list(itertools.islice(documents, 1000))
        if len(first) == 1:
            yield from self._tail_split(first[0][1])
            return self.total.check("the text of all files", self.cfg.encoding or "utf-8")
        where = self.cfg.dataset or public(self.cfg.input)
        if not first:
            why = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items()) or "no documents"
            remedy = f"set --text_field= to one of: {', '.join(self.fields)}" if self.fields else "check --input="
            raise UserError(f"there is no text in {where}: {why}; {remedy}")
        limit = self.cfg.val_fraction
        if len(first) < 1000:
            hashes = sorted({_unit_hash(key) for key, _ in first})
            if len(hashes) == 1:
                rule = "equal documents fall into the same split, and each split needs one"
                raise UserError(f"the {len(first)} documents in {where} are all equal: {rule}; add other text")
            limit = min(max(limit, hashes[0]), hashes[-2])
        for key, text in itertools.chain(first, documents):
            split = "val" if _unit_hash(key) <= limit else "train"
            for piece, last in _mark_last(text):
                yield split, piece, last
        self.total.check("the text of all files", self.cfg.encoding or "utf-8")

    def _tail_split(self, text):
        cut = int(sum(map(len, text)) * (1 - self.cfg.val_fraction))  # from the current piece's start
        for piece, last in _mark_last(text):
            while 0 < cut < len(piece) and piece[cut] & 0xC0 == 0x80:  # not inside a UTF-8 character
                cut += 1
            if 0 < cut < len(piece):
                yield "train", piece[:cut], True
                yield "val", piece[cut:], last
            else:
                yield ("train" if cut > 0 else "val"), piece, last or cut == len(piece)
            cut -= len(piece)

    def _documents(self):
        """Yields (key, iterable of its bytes) for each document that is not empty."""
        for path in self.files:
            for text in self.documents_of(path):
                yield (text, [text]) if isinstance(text, bytes) else (self._name(path), text)

    def documents_of(self, path):
        """Yields a file's documents as bytes, or as FilePieces where it is one document; counts in skipped the rest."""
        with self.counting_damage(path):
            for text in self._read(path):
                if text is None:
                    self.skipped[f"documents of more than {self.cfg.max_document_bytes:,} bytes"] += 1
                elif not text:
                    self.skipped["empty documents"] += 1
                else:
                    yield text

    @contextlib.contextmanager
    def counting_damage(self, path):
        """Counts a file that turns out to be cut short, damaged or unreadable, in place of an error."""
        try:
            yield
        except (EOFError, OSError) as error:
            self.skipped[f"files cut short, damaged or unreadable: {shown(path)} ({error})"] = 1

    def _read(self, path):
        """Yields the documents of a file as bytes, None for one that is too large; a file of one as FilePieces."""
        file = TextFile(path, self.cfg.encoding, self.total)
        if file.is_parquet:
            return self._parquet_texts(path)
        if file.is_json:
            return self._json_texts(path, _split_file(self._blocks(file), b"\n", self.cfg.max_document_bytes))
        if file.is_binary:
            self.skipped[f"{''.join(ending_of(str(path)))} files that are no text".lstrip()] += 1
            return []
        if file.is_empty:
            return [b""]
        if self.cfg.doc_separator is None:
            return [FilePieces(functools.partial(self._blocks, file))]
        separator = unescaped(self.cfg.doc_separator).encode()
        return _split_file(self._blocks(file), separator, self.cfg.max_document_bytes)

    def _blocks(self, file):
        with self.counting_damage(file.path):
            yield from file.blocks()

    def _json_texts(self, path, lines):
        is_in_doubt = ending_of(str(path))[0] == ".json"
        for line in lines:
            if line is None:
                yield None
            if not (line and line.strip()):
                continue
            value, why = None, None
            try:
                value = json.loads(line)
            except RecursionError:
                why = "lines that are nested too deeply"
            except ValueError:  # includes bad UTF-8
                why = "lines that are not JSON"
            if is_in_doubt and not isinstance(value, dict):
                self.skipped[".json files of one value, where an object a line is read"] += 1
                return
            is_in_doubt = False
            if why:
                self.skipped[why] += 1
                continue
            fields = value if isinstance(value, dict) else {}
            if isinstance(text := fields.get(self.cfg.text_field), str):
                yield text.encode("utf-8", errors="replace")
                continue
            self.skipped[f"lines without text in the field {self.cfg.text_field!r}"] += 1
            if len(self.fields) < 20:
                self.fields |= {name: None for name, text in fields.items() if isinstance(text, str)}

    def _parquet_texts(self, path):
        field = self.cfg.text_field
        try:
            import pyarrow.parquet

            file = pyarrow.parquet.ParquetFile(path if isinstance(path, Path) else open_file(path))
        except ImportError as error:
            raise UserError(f"{path} needs pyarrow; install it with: pip install pyarrow") from error
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path} is no readable parquet file ({error}); download or write it again") from error
        with file:
            if field not in (columns := file.schema_arrow.names):
                raise UserError(f"{path} has no column {field!r}; set --text_field to one of: {', '.join(columns)}")
            rows = (text for batch in file.iter_batches(256, columns=[field]) for text in batch.column(0).to_pylist())
            try:
                for text in rows:
                    if isinstance(text, str):
                        data = text.encode("utf-8", errors="replace")
                        yield data if len(data) <= self.cfg.max_document_bytes else None
                    else:
                        self.skipped[f"rows without text in the column {field!r}"] += 1
            except pyarrow.ArrowException as error:
                raise EOFError(str(error)) from error


def training_texts(corpus):
    """Texts to train a BPE on. Cuts long words: training would take minutes for one unbroken line of 2 MB."""
    seen = 0
    for piece in (piece for split, piece, _ in corpus.pieces() if split == "train"):
        text, start = piece.decode("utf-8", errors="replace"), 0
        for word in re.finditer(rf"(?<!\S)\S{{{BPE_WORD + 1},}}|(?<!\s)\s{{{BPE_WORD + 1},}}", text):
            for cut in range(word.start() + BPE_WORD, word.end(), BPE_WORD):
                yield text[start:cut]
                start = cut
        yield text[start:]
        if (seen := seen + len(piece)) >= BPE_BYTES:
            break
    print(f"  its words in {seen / 1e6:,.1f} MB of text are counted; learning merges", flush=True)


class FilePieces:
    """A file's bytes in pieces, cut between a letter or digit and a blank, where no tokenizer's word crosses the cut.

    Text without such a place for 16 pieces is cut between any two characters, so that memory stays bounded.
    """

    def __init__(self, blocks):
        """blocks: a function that yields the file's text."""
        self.blocks = blocks

    def __iter__(self):
        rest = b""
        for block in self.blocks():
            searched = max(0, len(rest) - 1)
            rest += block
            if word := re.compile(rb"(?s).*[0-9A-Za-z](?=\s)").match(rest, searched):
                cut = word.end()
            elif len(rest) >= 16 * files.PIECE_BYTES:
                cut = len(rest) - 1
                while rest[cut] & 0xC0 == 0x80 and cut > len(rest) - 4:  # not inside a UTF-8 character
                    cut -= 1
            else:
                continue
            yield rest[:cut]
            rest = rest[cut:]
        if rest:
            yield rest


def _split_file(blocks, separator, limit):
    """The documents between the separators of a text in blocks; None for one of more than limit bytes."""
    rest, searched, is_too_long = bytearray(), 0, False  # grows in place: a long document is not copied for each block
    for block in blocks:
        rest += block
        if rest.find(separator, max(0, searched - len(separator))) >= 0:
            *documents, rest = rest.split(separator)
            for document in documents:
                yield None if is_too_long or len(document) > limit else bytes(document)
                is_too_long = False
        if len(rest) > limit + len(separator):
            is_too_long = True
            del rest[: -len(separator)]
        searched = len(rest)
    yield None if is_too_long or len(rest) > limit else bytes(rest)


def _mark_last(items):
    """Yields (item, whether it is the last)."""
    return ((item, after is None) for item, after in itertools.pairwise(itertools.chain(items, [None])))


def _unit_hash(key):
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
