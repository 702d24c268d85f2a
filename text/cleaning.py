"""Steps of clean.py around datatrove's own: what reads and counts documents, and filters that datatrove lacks.

A step is a callable (documents, rank, world size) that yields documents; datatrove's executors run it like their own.
"""

import collections
import contextlib
import functools
import hashlib
import heapq
import importlib
import json
import os
import re
import threading
import types
from pathlib import Path

import numpy as np

from config import UserError
from text.corpus import Corpus
from text.files import JSON_LINES, TEXTS, TextFile, ending_of, open_file, shown
from text.remote import RemoteFile

HTML, WEB = (".html", ".htm", ".xhtml"), (".warc", ".wet")
ENDINGS = (*TEXTS, *JSON_LINES, ".parquet", *HTML, *WEB)  # of files that a folder is searched for
SAMPLES, SAMPLE_CHARS = 100, 20_000  # dropped documents that are kept for each step, and the characters of each
# Zero-width space, word joiner, byte order mark, soft hyphen; not the joiners, which other scripts and emoji need.
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad\u180e"))
MARKUP = re.compile(r"(?is)\s*(?:<\?xml[^>]*>\s*)?(?:<!--.{0,2000}?-->\s*){0,5}<(?:!doctype\s+html|html)\b")
MOST_LINES = 2**16 - 1  # of a document that datatrove's SentenceDedup can number


def make(name, *args, **settings):
    """An object of datatrove's, by its package below datatrove.pipeline and its class."""
    package, _, class_ = name.rpartition(".")
    return getattr(importlib.import_module(f"datatrove.pipeline.{package}"), class_)(*args, **settings)


def folder_of(where):
    """A local or remote folder, as datatrove reads and writes it."""
    return importlib.import_module("datatrove.io").get_datafolder(where)


# ---- reading


class Input:
    """Reads a task's share of the input. skipped: {reason: how many were left out}, once all is read."""

    def __init__(self, cfg, work):
        """work: a folder with started.json, whose "files" are local paths, or the fields of a RemoteFile but source."""
        self.cfg, self.work, self.skipped = cfg, work, {}

    def __call__(self, _, rank, world_size):
        from datatrove.data import Document

        files = json.loads(folder_of(self.work).cat_file("started.json"))["files"]
        paths = [Path(file) if isinstance(file, str) else RemoteFile(self.cfg.input, *file) for file in files]
        # Tasks that outnumber the files share each file's documents in turn.
        mine = paths[rank::world_size] or [paths[rank % len(paths)]]
        share, n_shares = rank // len(paths), len(range(rank % len(paths), world_size, len(paths)))
        n_shares = 1 if len(paths) >= world_size else n_shares
        corpus = Corpus(self.cfg, None, (mine, {}))
        for path in mine:
            kind = ending_of(str(path))[0]
            for i, (text, fields) in enumerate((_web_texts if kind in WEB else _texts)(corpus, path, kind)):
                if i % n_shares != share % n_shares:
                    continue
                if kind in (*HTML, ".warc") and not MARKUP.match(text):
                    text = f"<!doctype html>\n{text}"  # by which the step html knows it
                yield Document(text, f"{shown(path)}/{i}", metadata=fields)
        self.skipped = dict(corpus.skipped) if share % n_shares == 0 else {}


def _texts(corpus, path, kind):
    """Yields (text, {}) for each document of a file."""
    if kind in HTML:
        from trafilatura.utils import decode_file  # by the encoding that a page names, or looks like

        with corpus.counting_damage(path), open_file(path) as file:
            yield decode_file(file.read()), {}
        return
    limit = corpus.cfg.max_document_bytes
    for pieces in corpus.documents_of(path):
        data = pieces if isinstance(pieces, bytes) else b"".join(pieces)
        if data.strip() and len(data) <= limit:
            yield data.decode("utf-8", errors="replace"), {}
        else:
            corpus.skipped[f"documents of more than {limit:,} bytes" if data.strip() else "empty documents"] += 1


def _web_texts(corpus, path, _):
    """Yields (text, {url, date}) for each page of a WARC or WET file."""
    from warcio.exceptions import ArchiveLoadFailed

    reader = make("readers.WarcReader", ".", compression=None)
    # The reader's own files would not be read on over a broken connection.
    reader.data_folder = types.SimpleNamespace(open=lambda *_, **__: open_file(path), resolve_paths=str)
    with corpus.counting_damage(path):
        try:
            for document in reader.read_file(str(path)):
                yield document.text, {name: document.metadata[name] for name in ("url", "date")}
        except ImportError as error:
            raise UserError(f"{shown(path)} cannot be read: {error}; install libmagic, no Python package") from error
        except ArchiveLoadFailed as error:
            raise EOFError(str(error)) from error
        collections.deque(TextFile(path).chunks(1 << 20), maxlen=0)  # warcio would not tell of a cut


class Stored:
    """Reads the documents that the same task of an earlier stage has written."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, _, rank, world_size):
        reader, name = make("readers.JsonlReader", self.folder, add_file_path=False), f"{rank:05d}.jsonl.gz"
        if reader.data_folder.isfile(name):  # a task without documents writes no file
            yield from reader.read_files_shard([name])


@functools.cache
def end_with_parent():
    """From now on, processes that this one forks, and theirs, end when it is killed: no orphan writes on."""
    read, write = os.pipe()

    def watch():
        with contextlib.suppress(OSError):  # a child of a child has it closed already
            os.close(write)
        threading.Thread(target=lambda: os._exit(len(os.read(read, 1)) + 1), daemon=True).start()

    if hasattr(os, "register_at_fork"):  # Windows forks nothing
        os.register_at_fork(after_in_child=watch)


# ---- counting


class Watched:
    """Runs a step's parts and writes, for each task, what it kept and dropped, with a sample. Drops blank documents.

    A part that drops documents must have dropped or yielded one before it takes the next.
    """

    def __init__(self, name, parts, folder):
        self.name, self.parts, self.folder = name, parts, folder
        for part in parts:
            if hasattr(part, "filter_batch"):  # a filter keeps its reasons for a writer alone
                part.exclusion_writer = contextlib.nullcontext(types.SimpleNamespace(write=_write_nothing))

    def __call__(self, data, rank, world_size):
        counts, reasons, lengths = collections.Counter(), collections.Counter(), collections.Counter()
        entered, sample = [], []

        def drop(document, text):
            reason = document.metadata.pop("filter_reason", None) or self.name
            counts["dropped"] += 1
            reasons[reason] += 1
            # The smallest hashes are a sample that is the same whatever the order of tasks.
            key = int.from_bytes(hashlib.blake2b(document.id.encode(errors="replace"), digest_size=8).digest())
            record = {"id": document.id, "reason": reason, "text": text[:SAMPLE_CHARS], "metadata": document.metadata}
            heapq.heappush(sample, (-key, counts["dropped"], record))
            if len(sample) > SAMPLES:
                heapq.heappop(sample)

        def entering():
            for document in data:
                while entered:
                    drop(*entered.pop())
                entered.append((document, document.text))
                yield document

        stream = None if data is None else entering()
        for part in self.parts:
            stream = part(stream, rank, world_size)
        for document in stream:
            before = entered.pop()[1] if entered else document.text
            if not document.text.strip():
                drop(document, before)
                continue
            size = len(document.text.encode(errors="replace"))
            counts.update(documents=1, bytes=size, changed=document.text != before)
            lengths[size.bit_length()] += 1
            yield document
        while entered:
            drop(*entered.pop())
        found = {"counts": counts, "reasons": reasons, "lengths": lengths, "sample": sample}
        found["skipped"] = getattr(self.parts[0], "skipped", {})
        with folder_of(self.folder).open(f"{self.name}/{rank:05d}.json", "wt") as file:
            json.dump(found, file, default=str)


def _write_nothing(document, rank):
    pass


# ---- formatting


def html_to_text():
    """datatrove's Trafilatura for documents that are HTML; others pass.

    A page's text depends on the page alone: passages that pages share stay, and the time limit is far.
    """
    step = make("extractors.Trafilatura", timeout=60, deduplicate=False)
    step.extract = functools.partial(_extract, step.extract)
    return step


def _extract(extract, text):
    return extract(text) if MARKUP.match(text) else text


def remove_invisible(data, rank, world_size):
    """Removes characters that have neither width nor meaning."""
    for document in data:
        document.text = document.text.translate(INVISIBLE)
        yield document


# ---- filters: callables for datatrove's LambdaFilter, which answer True or (False, reason)


def is_within(fewest, most, document):
    """Whether a document's number of characters is within bounds."""
    n = len(document.text)
    return (fewest <= n <= most) or (False, "too short" if n < fewest else "too long")


class Blocklist:
    """Refuses documents whose text, or URL, has a phrase of a file: a phrase a line, of whole words, case ignored."""

    def __init__(self, path):
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"blocklist {path} cannot be read as UTF-8 text ({error}); check --blocklist") from error
        self.phrases = {tuple(_words(line)) for line in lines if not line.startswith("#")} - {()}
        if not self.phrases:
            raise UserError(f"blocklist {path} has no words; write a word or phrase a line")

    def __call__(self, document):
        words = [*_words(document.text), "", *_words(document.metadata.get("url") or "")]
        for n in sorted({len(phrase) for phrase in self.phrases}):
            for phrase in zip(*(words[i:] for i in range(n))):
                if phrase in self.phrases:
                    return False, f"blocklist: {' '.join(phrase)}"
        return True


def _words(text):
    return re.findall(r"\w+", text.casefold())


@functools.cache  # once per process, not per task
def load_language_model(path):
    """(a function of texts that gives {language: probability}, the languages), of a fastText file or of py3langid."""
    if path is None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        return (lambda text: dict(model.rank(text))), model.labels
    from fasttext.FastText import _FastText

    try:
        model = _FastText(path)
    except ValueError as error:
        remedy = "give a fastText model such as lid.176.bin, or none for py3langid's"
        raise UserError(f"language_model {path} is no fastText model ({error}); {remedy}") from error

    def score(text):
        labels, scores = model.predict(" ".join(text.split()), k=-1)
        return {label.removeprefix("__label__"): float(score) for label, score in zip(labels, scores)}

    return score, [label.removeprefix("__label__") for label in model.get_labels()]


class LanguageModel:
    """Scores a language for datatrove's LanguageFilter."""

    def __init__(self, language, path):
        self.language, self.path = language, path
        labels = load_language_model(path)[1]
        if language not in labels:
            rule = f"language {language} is unknown to {path or 'py3langid'}"
            raise UserError(f"{rule}; its {len(labels)} are {', '.join(sorted(labels)[:8])} ...")

    def predict(self, document):
        """((the likeliest language, its probability), {the wanted language: its probability})."""
        scores = load_language_model(self.path)[0](document.text)
        return max(scores.items(), key=lambda pair: pair[1]), {self.language: scores.get(self.language, 0.0)}


class Splitter:
    """Splits words as datatrove's splitter for a language, which a process loads once and not for each task."""

    def __init__(self, language):
        self.language = language

    def word_tokenize(self, text):
        from datatrove.utils.word_tokenizers import load_word_tokenizer

        return load_word_tokenizer(self.language).word_tokenize(text)


class Perplexity:
    """Scores documents by a model: nats per token, in their metadata and in a file for each task.

    open_scorer: a function of run_dir that returns a function of texts, which gives the nats per token of each.
    """

    def __init__(self, open_scorer, run_dir, folder):
        self.open_scorer, self.run_dir, self.folder = open_scorer, run_dir, folder

    def __call__(self, data, rank, world_size):
        from datatrove.utils.batching import batched

        score, values = self.open_scorer(self.run_dir), []
        for batch in batched(data, 16):
            for document, nats in zip(batch, score([document.text for document in batch])):
                document.metadata["nats_per_token"] = nats
                values.append(nats)
                yield document
        with folder_of(self.folder).open(f"{rank:05d}.npy", "wb") as file:
            np.save(file, np.array(values))


class LowestShare:
    """Keeps the share of all documents that the model finds likeliest, as CCNet does (Wenzek et al. 2020)."""

    def __init__(self, folder, share):
        self.folder, self.share, self.limit = folder, share, None

    def __call__(self, document):
        if self.limit is None:
            folder = folder_of(self.folder)
            scores = [np.load(folder.open(name, "rb")) for name in folder.list_files(glob_pattern="*.npy")]
            self.limit = float(np.quantile(np.concatenate(scores), self.share))
        return document.metadata["nats_per_token"] <= self.limit or (False, "high perplexity")


# ---- duplicates and n-grams


def content_of(document) -> str:
    """A document's text, by which exact deduplication compares."""
    return document.text


def hashes_of_lines(hash_text, fewest_words, document, number):
    """(hash, document's number, line's number) of each line with enough words, for datatrove's SentenceDedup.

    datatrove's own would compare lines without their digits, and overflow at 65,536 lines.
    """
    lines = enumerate(document.text.splitlines()[:MOST_LINES])
    return [(hash_text(line.strip()), number, i) for i, line in lines if len(line.split()) >= fewest_words]


def write_ngrams(texts, decontamination, folder):
    """Writes the n-grams of texts as the index of datatrove's NGramsDecontFilter; returns how many texts have one."""
    from datatrove.utils.text import ngrams, simplify_text

    config, hashes, n_used = decontamination.config, set(), 0
    for text in texts:
        words = decontamination.tokenizer.word_tokenize(simplify_text(text, config.norm_config))
        found = {decontamination.hash_func(" ".join(gram)) for gram in ngrams(words, config.n_grams)}
        hashes.update(found)
        n_used += bool(found)
    with folder_of(folder).open("texts.index.hashes", "wb") as file:
        file.write(np.array(sorted(hashes), dtype=config.hash_config.np_descr).tobytes())
    return n_used
