"""Files of text to documents, each in the training or the validation split.

Files, folders, globs and URLs of .txt, .jsonl, .jsonl.gz or .parquet; any other file is read as text. Memory is bounded
whatever the size of the corpus, a single document aside that has no line or blank for long.
"""

import collections
import contextlib
import glob
import gzip
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import sysconfig
import urllib.request
import zlib
from pathlib import Path

from config import UserError

PIECE_BYTES = 1 << 20  # long documents come in pieces of about so much
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


class Corpus:
    """The documents of the input. skipped counts, by reason, what the last pass left out."""

    def __init__(self, cfg, folder):
        self.cfg, self.skipped = cfg, collections.Counter()
        self.other_fields = ""  # fields of the first line that lacks text_field
        if cfg.dataset == "stdlib":
            self.root = Path(sysconfig.get_paths()["stdlib"])
            left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
            self.files = sorted(
                p
                for p in self.root.rglob("*.py")
                if p.is_file() and left_out.isdisjoint(p.relative_to(self.root).parts)
            )
        else:
            where = SHAKESPEARE if cfg.dataset == "shakespeare" else cfg.input
            if re.match(r"\w+://", where):
                where = str(download(where, folder / "download"))
            self.files = find_files(where)
            self.root = Path(os.path.commonpath([p.parent for p in self.files]))
        self.bytes = sum(p.stat().st_size for p in self.files)

    def pieces(self):
        """(split, bytes, whether they end a document) of all the text, in order; documents that are long, in pieces.

        A document is in the validation split by its hash: of the file's path where a file is a document, else of its
        text. A small corpus gets at least one document into each split; a single document is cut at its tail.
        """
        self.skipped.clear()
        documents = self._documents()
        first = list(itertools.islice(documents, 1000))
        if len(first) == 1:
            return self._tail_split(first[0][1])
        if not first:
            why = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items()) or "no documents"
            raise UserError(
                f"there is no text in {self.cfg.input or self.cfg.dataset}: {why}; "
                + (f"set --text_field to one of: {self.other_fields}" if self.other_fields else "check --input")
            )
        limit = self.cfg.val_fraction
        if len(first) < 1000:
            hashes = sorted(_unit_hash(key) for key, _ in first)
            limit = min(max(limit, hashes[0]), hashes[-2])
        return (
            ("val" if _unit_hash(key) <= limit else "train", piece, last)
            for key, text in itertools.chain(first, documents)
            for piece, last in _mark_last(text)
        )

    def _tail_split(self, text):
        size = sum(len(piece) for piece in text)
        cut = int(size * (1 - self.cfg.val_fraction))
        position = 0
        for piece, last in _mark_last(text):
            here = cut - position
            while 0 < here < len(piece) and piece[here] & 0xC0 == 0x80:  # not inside a UTF-8 character
                here += 1
            if 0 < here < len(piece):
                yield "train", piece[:here], True
                yield "val", piece[here:], last
            else:
                yield ("train" if here > 0 else "val"), piece, last or here == len(piece)
            position += len(piece)

    def _documents(self):
        """(key, iterable of its bytes) of each document that is not empty."""
        for path in self.files:
            try:
                for key, text in self._read(path):
                    if not text:
                        self.skipped["empty documents"] += 1
                    else:
                        yield key, [text] if isinstance(text, bytes) else text
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                self.skipped[f"files cut short or damaged: {path} ({error})"] += 1

    def _read(self, path):
        name, field = path.name, self.cfg.text_field
        if name.endswith((".jsonl", ".jsonl.gz")):
            with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as lines:
                for line in lines:
                    if (text := self._json_text(line)) is not None:
                        yield text, text
        elif name.endswith(".parquet"):
            yield from ((text, text) for text in _parquet_texts(path, field, self.skipped))
        elif self.cfg.doc_separator is not None:
            for text in _split_file(path, self.cfg.doc_separator.replace("\\n", "\n").encode()):
                yield text, text
        else:
            key = str(path.relative_to(self.root)).encode()
            yield key, FilePieces(path) if path.stat().st_size else b""

    def _json_text(self, line):
        if not line.strip():
            return None
        try:
            value = json.loads(line)
        except ValueError:  # bad UTF-8 as well
            self.skipped["lines that are not JSON"] += 1
            return None
        text = value.get(self.cfg.text_field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            self.skipped[f"lines without text in the field {self.cfg.text_field!r}"] += 1
            self.other_fields = self.other_fields or (", ".join(value) if isinstance(value, dict) else "")
            return None
        return text.encode("utf-8", errors="replace")


class FilePieces:
    """A file's bytes in pieces, cut where no tokenizer's word goes across: between a letter or digit and a blank.

    Text that has no such place for 16 pieces is cut between any two characters, so that memory stays bounded.
    """

    def __init__(self, path):
        self.path = path

    def __iter__(self):
        rest = b""
        with open(self.path, "rb") as file:
            while block := file.read(PIECE_BYTES):
                rest += block
                if cut := self._cut(rest):
                    yield rest[:cut]
                    rest = rest[cut:]
        if rest:
            yield rest

    def _cut(self, text):
        """Where to cut the text, or 0 where it should grow first."""
        if word := re.match(rb"(?s).*[0-9A-Za-z](?=\s)", text):
            return word.end()
        if len(text) < 16 * PIECE_BYTES:
            return 0
        end = len(text) - 1
        while text[end] & 0xC0 == 0x80 and end > len(text) - 4:  # not inside a UTF-8 character
            end -= 1
        return end


def find_files(where):
    """The files that a path, folder or glob names, sorted."""
    endings = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
    if os.path.isdir(where):
        found = [p for p in Path(where).rglob("*") if p.name.endswith(endings) and p.is_file()]
        remedy = f"it must hold {', '.join(endings)}; for other text, give a glob such as --input='{where}/**/*'"
    else:
        found = [Path(p) for p in [where, *glob.glob(where, recursive=True)] if os.path.isfile(p)]
        remedy = "check the path, and put a glob in quotes"
    if not found:
        raise UserError(f"input {where} names no file; {remedy}")
    return sorted(set(found))


def download(url, folder):
    """The file of a URL, fetched once into a folder."""
    path = folder / (url.rstrip("/").rpartition("/")[2] or "download.txt")
    if not path.exists():
        print(f"fetching {url}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(partial, "wb") as file:
                shutil.copyfileobj(response, file)
                if getattr(response, "length", None):  # bytes that the server promised and has not sent
                    raise ConnectionError(f"cut short {response.length:,} bytes before its end")
        except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
            raise UserError(
                f"{url} could not be fetched ({error}); fetch it by hand and give the file as --input="
            ) from error
        os.replace(partial, path)
    return path


def _split_file(path, separator):
    """The documents of a text file that stand between separators."""
    rest, searched = bytearray(), 0  # grows in place, so that a document without end costs no copies
    with open(path, "rb") as file:
        while block := file.read(PIECE_BYTES):
            rest += block
            if rest.find(separator, max(0, searched - len(separator))) >= 0:
                *documents, rest = rest.split(separator)
                yield from map(bytes, documents)
            searched = len(rest)
    yield bytes(rest)


def _parquet_texts(path, field, skipped):
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow; install it with: pip install pyarrow") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is no readable parquet file ({error}); fetch or make it again") from error
    with contextlib.closing(file):
        if field not in file.schema_arrow.names:
            raise UserError(
                f"{path} has no column {field!r}; set --text_field to one of: {', '.join(file.schema_arrow.names)}"
            )
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for text in batch.column(0).to_pylist():
                if isinstance(text, str):
                    yield text.encode("utf-8", errors="replace")
                else:
                    skipped[f"rows without text in the column {field!r}"] += 1


def _mark_last(items):
    """(item, whether it is the last) of each."""
    items = iter(items)
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        yield item, following is None
        item = following


def _unit_hash(key):
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
