"""Files of text to documents, each in the training or the validation split.

Input is files, folders, globs and URLs of .txt, .jsonl, .jsonl.gz or .parquet; any other file is read as text. Memory
does not grow with the corpus, only with the longest line of a .jsonl file or document between separators.
"""

import collections
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

PIECE_BYTES = 1 << 20  # long documents are read in pieces of about this size
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"  # 1.1 MB


def stdlib_files(_):
    """Python's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = (path for path in root.rglob("*.py") if left_out.isdisjoint(path.relative_to(root).parts))
    return sorted(path for path in files if path.is_file())


# A dataset's name: a function that returns the paths of its files; what it downloads goes below the given folder.
DATASETS = {"stdlib": stdlib_files, "shakespeare": lambda folder: [download(SHAKESPEARE, folder / "download")]}


class Corpus:
    """The documents of the input. skipped: {reason: how many were left out} by the last pass."""

    def __init__(self, cfg, folder):
        self.cfg, self.skipped, self.fields = cfg, collections.Counter(), {}
        self.files = DATASETS[cfg.dataset](folder) if cfg.dataset else find_files(cfg.input, folder)
        self.root = Path(os.path.commonpath([path.parent for path in self.files]))
        self.bytes = sum(path.stat().st_size for path in self.files)

    def pieces(self):
        """Yields (split, bytes, whether they end a document), in order; long documents come in pieces.

        A hash decides a document's split: the hash of its path where a file is a document, else of its text. A small
        corpus gets at least one document into each split; a single document's tail becomes the validation split.
        """
        self.skipped.clear()
        documents = self._documents()
        first = list(itertools.islice(documents, 1000))
        if len(first) == 1:
            return self._tail_split(first[0][1])
        if not first:
            why = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items()) or "no documents"
            remedy = f"set --text_field= to one of: {', '.join(self.fields)}" if self.fields else "check --input="
            raise UserError(f"there is no text in {self.cfg.input or self.cfg.dataset}: {why}; {remedy}")
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
            try:
                for text in self._read(path):
                    if not text:
                        self.skipped["empty documents"] += 1
                    elif isinstance(text, bytes):
                        yield text, [text]
                    else:
                        yield str(path.relative_to(self.root)).encode(), text
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                self.skipped[f"files cut short or damaged: {path} ({error})"] += 1

    def _read(self, path):
        """Yields the documents of a file as bytes; a file that is one document as FilePieces."""
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
                yield from self._json_texts(filter(bytes.strip, lines))
        elif path.suffix == ".parquet":
            yield from self._parquet_texts(path)
        elif self.cfg.doc_separator is not None:
            yield from _split_file(path, self.cfg.doc_separator.replace("\\n", "\n").encode())
        else:
            yield FilePieces(path) if path.stat().st_size else b""

    def _json_texts(self, lines):
        for line in lines:
            try:
                value = json.loads(line)
            except ValueError:  # includes bad UTF-8
                self.skipped["lines that are not JSON"] += 1
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

            file = pyarrow.parquet.ParquetFile(path)
        except ImportError as error:
            raise UserError(f"{path} needs pyarrow; install it with: pip install pyarrow") from error
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path} is no readable parquet file ({error}); download or write it again") from error
        with file:
            if field not in (columns := file.schema_arrow.names):
                raise UserError(f"{path} has no column {field!r}; set --text_field to one of: {', '.join(columns)}")
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    if isinstance(text, str):
                        yield text.encode("utf-8", errors="replace")
                    else:
                        self.skipped[f"rows without text in the column {field!r}"] += 1


class FilePieces:
    """A file's bytes in pieces, cut between a letter or digit and a blank, where no tokenizer's word crosses the cut.

    Text without such a place for 16 pieces is cut between any two characters, so that memory stays bounded.
    """

    def __init__(self, path):
        self.path = path

    def __iter__(self):
        rest = b""
        with open(self.path, "rb") as file:
            while block := file.read(PIECE_BYTES):
                rest += block
                if word := re.match(rb"(?s).*[0-9A-Za-z](?=\s)", rest):
                    cut = word.end()
                elif len(rest) >= 16 * PIECE_BYTES:
                    cut = len(rest) - 1
                    while rest[cut] & 0xC0 == 0x80 and cut > len(rest) - 4:  # not inside a UTF-8 character
                        cut -= 1
                else:
                    continue
                yield rest[:cut]
                rest = rest[cut:]
        if rest:
            yield rest


def find_files(where, folder):
    """The files that a path, folder, glob or URL names, sorted; a URL is downloaded below folder."""
    endings = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
    if re.match(r"\w+://", where):
        return [download(where, folder / "download")]
    if os.path.isdir(where):
        found = [p for p in Path(where).rglob("*") if p.name.endswith(endings) and p.is_file()]
        remedy = f"it must hold {', '.join(endings)}; for other text, give a glob such as --input='{where}/**/*'"
    else:
        found = [Path(p) for p in [where, *glob.glob(where, recursive=True)] if os.path.isfile(p)]
        remedy = "check the path, and put a glob in quotes"
    if not found:
        what = "holds no file of text" if os.path.isdir(where) else "names no file"
        raise UserError(f"input {where} {what}; {remedy}")
    return sorted(set(found))


def download(url, folder):
    """The path of a URL's file, which is fetched into a folder unless it is there."""
    path = folder / (url.rstrip("/").rpartition("/")[2] or "download.txt")
    if not path.exists():
        print(f"fetching {url}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(partial, "wb") as file:
                shutil.copyfileobj(response, file)
                if getattr(response, "length", None):  # bytes that the server promised and did not send
                    raise ConnectionError(f"cut short {response.length:,} bytes before its end")
        except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
            raise UserError(f"{url} could not be fetched ({error}); get it by hand and set --input= to it") from error
        os.replace(partial, path)
    return path


def _split_file(path, separator):
    """The documents between the separators of a text file."""
    rest, searched = bytearray(), 0  # grows in place: a long document is not copied for each block
    with open(path, "rb") as file:
        while block := file.read(PIECE_BYTES):
            rest += block
            if rest.find(separator, max(0, searched - len(separator))) >= 0:
                *documents, rest = rest.split(separator)
                yield from map(bytes, documents)
            searched = len(rest)
    yield bytes(rest)


def _mark_last(items):
    """Yields (item, whether it is the last)."""
    return ((item, after is None) for item, after in itertools.pairwise(itertools.chain(items, [None])))


def _unit_hash(key):
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
