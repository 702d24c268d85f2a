"""Turns text into token shards.

    python prepare.py --input='books/*.txt' --tokenizer=gpt2 --data_dir=data/books
    python prepare.py config/quickstart.py
    python prepare.py --dataset=fineweb10b --max_shards=10

Input is a file, folder, glob (in quotes) or URL of .txt, .md, .jsonl or .parquet, also in .gz, .xz, .bz2 or .zst; other
files are read as text. A URL, also with a folder or glob as in s3://bucket/folder/*.jsonl, is read where it is.
"""

import collections
import contextlib
import functools
import glob
import itertools
import multiprocessing.connection
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import urllib.parse
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from config import Count, Fraction, Range, Share, UserError, as_dict, only, run_script, settings_of
from data import DataConfig, sha256
from foreign import telling
from interop.tokenizer import hub_json
from run.folder import lock_file
from shards import (
    END_OF_TEXT,
    ShardWriter,
    checksums,
    is_own_shard,
    open_shard,
    read_meta,
    unfinished,
    write_meta,
    writing_to,
)
from text.corpus import DATASETS, Corpus, CorpusConfig, training_texts
from text.files import shown
from text.remote import bare_url, is_url, public
from text.tokenizer import SMALLEST_BPE, FileTokenizer, load_tokenizer, train_bpe

TASK_BYTES = 1 << 20  # text per task of a worker
LOCK, UNFINISHED_TOKENIZER = ".prepare.lock", ".prepare.tokenizer.json"  # in the data folder
BpeSize = Annotated[int, Range(f"at least {SMALLEST_BPE} and at most 2**24", lambda n: SMALLEST_BPE <= n <= 2**24)]


@dataclass(frozen=True)
class PrepareConfig(CorpusConfig):
    dataset: Literal[*DATASETS, "fineweb10b"] | None = None  # corpus by name, in place of input
    tokenizer: str = "gpt2"  # byte, bpe (trained on the corpus), byte_fim, bpe_fim, tiktoken's, or a tokenizer's file
    bpe_vocab_size: BpeSize = 4096  # vocabulary size of tokenizer bpe, special tokens included
    val_fraction: Fraction = 0.01  # validation share of the documents, chosen by hash; a single document gives its tail
    bpe_dropout: Share = 0.0  # BPE-dropout: share of merges left out at random from training documents, without a seed
    copies: Count = 1  # with bpe_dropout: times that each training document is written, each with other merges left out
    shard_tokens: Count = 100_000_000  # tokens per shard file
    max_shards: Count | None = None  # training shards of fineweb10b to download; none: all 103

    def __post_init__(self):
        super().__post_init__()
        wrong = []
        if self.input is None and self.dataset is None:
            names = ", ".join([*DATASETS, "fineweb10b"])
            wrong.append(f"neither input nor dataset is set; give --input=FILE, or --dataset=, one of {names}")
        if self.input is not None and self.dataset not in (None, "fineweb10b"):
            wrong.append(f"input {public(self.input)} and dataset {self.dataset} are both set; give one")
        if self.dataset == "fineweb10b" and self.tokenizer != "gpt2":
            wrong.append(f"tokenizer is {self.tokenizer}, but dataset fineweb10b is in gpt2 tokens; leave it out")
        if self.dataset == "fineweb10b" and self.bpe_dropout:
            wrong.append(f"bpe_dropout is {self.bpe_dropout}, but dataset fineweb10b is in tokens; leave it out")
        if self.copies > 1 and not self.bpe_dropout:
            wrong.append(f"copies is {self.copies}, but without bpe_dropout all are equal; add --bpe_dropout=0.1")
        if wrong:
            raise UserError(*wrong)


@dataclass(frozen=True)
class Settings:
    prepare: PrepareConfig
    data: DataConfig = only("data_dir")
    presets: tuple = ()


def main(cfg):
    if len(cfg.data.folders) > 1:
        raise UserError(f"data_dir is a mixture of {', '.join(cfg.data.folders)}; prepare each by --data_dir=FOLDER")
    folder = Path(cfg.data.folder or default_folder(cfg.prepare))
    if is_prepared(cfg, folder):
        return
    if cfg.prepare.dataset == "fineweb10b":
        with locked(folder):
            return fetch_fineweb(cfg.prepare, folder)
    corpus = Corpus(cfg.prepare, folder)  # first: a wrong path leaves no folder
    with locked(folder):
        if is_prepared(cfg, folder):  # by another prepare.py in the meantime
            return
        with writing_to(folder):
            clear_unfinished(folder, cfg.prepare.tokenizer)
            tokenizer_name = make_tokenizer(cfg.prepare, corpus, folder)
        meta = {"settings": settings_of_tokens(cfg), "command": command(cfg.prepare)}
        if cfg.prepare.dataset != "shakespeare":  # it stays as it is, and needs no network once it is prepared
            meta["input_files"] = corpus.inventory
        meta |= tokenize(corpus, tokenizer_name, cfg.prepare, folder)
        write_meta(folder, meta)
        notes = [f"  {count:,} {reason}" for reason, count in (corpus.skipped + meta["notes"]).items()]
        print(summary(meta), *notes, f"written to {shown(folder)}", sep="\n")


def is_prepared(cfg, folder):
    """Whether a folder holds finished data of these settings, which is printed; UserError where of others."""
    meta = {} if cfg.prepare.dataset == "fineweb10b" else read_meta(folder)
    if not meta:
        return False
    defaults = {name: field.default for name, (_, field) in settings_of(Settings).items()}
    settings, old = settings_of_tokens(cfg), defaults | meta.get("settings", {})
    changes = [f"{name} {old[name]} -> {value}" for name, value in settings.items() if old[name] != value]
    if "settings" not in meta or changes:
        made = f"{folder} already holds data, made by: {meta.get('command')}"
        differs = f" (here {', '.join(changes)})" if changes else ""
        raise UserError(f"{made}{differs}; use another --data_dir, or remove it first")
    print(f"{shown(folder)} is already prepared:\n{summary(meta)}", flush=True)
    if changes := changes_of_input(cfg.prepare, folder, meta.get("input_files")):
        print(f"its input has changed since: {changes}; to prepare it again, remove {shown(folder)}")
    return True


def settings_of_tokens(cfg):
    """The settings that the tokens depend on, by which finished data is recognised, without a URL's secrets."""
    settings = {k: v for k, v in as_dict(cfg).items() if k not in ("data_dir", "workers", "max_shards")}
    settings |= {"input": cfg.prepare.input and public(cfg.prepare.input)}
    return {k: shown(v) if isinstance(v, str) else v for k, v in settings.items()}


def changes_of_input(cfg, folder, old):
    """How the input's files differ from those that meta.json describes, in words; "" where they do not."""
    if not old:  # made by an older prepare.py, or downloaded
        return ""
    try:
        new = Corpus(cfg, folder).inventory
    except UserError as error:
        if not is_url(cfg.input or ""):
            return "its files are gone"
        print(f"whether its input has changed is unknown: {error}")
        return ""
    changed = [name for name in new if old.get(name) != new[name]]
    figures = [f"{name} {old.get(name)} -> {new[name]}" for name in changed if name != "names"]
    return ", ".join(figures) or ("names or sizes of files, or etags" if changed else "")


def command(cfg):
    """The command line that makes this data, without a URL's secrets."""
    where = cfg.input or ""
    words = [shown(word.replace(where, public(where)) if where else word) for word in ["python", *sys.argv]]
    return shlex.join(words)


def default_folder(cfg):
    """data/ and the corpus's name: the dataset's, or the last part of input that is no glob."""
    where = cfg.input or ""
    parts = [part for part in Path(where).parts if not glob.has_magic(part)]
    if is_url(where):
        url = urllib.parse.urlsplit(bare_url(where))
        parts = [part for part in (url.hostname, *url.path.split("/")) if part and not glob.has_magic(part)]
    return Path("data", cfg.dataset or (Path(parts[-1]).stem.strip("./") if parts else "") or "text")


# ---- tokens


def make_tokenizer(cfg, corpus, folder):
    """Trains, copies or checks the tokenizer; returns its name or path for load_tokenizer."""
    saved = folder / UNFINISHED_TOKENIZER
    if cfg.tokenizer in ("bpe", "bpe_fim"):
        print(f"training a BPE with a vocabulary of {cfg.bpe_vocab_size}", flush=True)
        train_bpe(training_texts(corpus), cfg.bpe_vocab_size, saved, with_fim=cfg.tokenizer == "bpe_fim")
    elif (tokenizer := load_tokenizer(cfg.tokenizer)).saved is None:
        return cfg.tokenizer
    else:
        tokenizer.save(saved)
    return str(saved)


def tokenize(corpus, tokenizer_name, cfg, folder):
    """Encodes the corpus and writes its shards; returns their entries of meta.json."""
    tokenizer = _loaded_once(tokenizer_name, 0.0)  # before workers are forked, which then have it
    _loaded_once(tokenizer_name, cfg.bpe_dropout)  # raises where the tokenizer is no BPE
    if tokenizer.eot is None:
        lacks = f"no end-of-text token; its special tokens are {', '.join(tokenizer.specials) or 'none'}"
        raise UserError(f"the tokenizer {cfg.tokenizer} has {lacks}; use one with {', '.join(END_OF_TEXT)}")
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    writers = {split: ShardWriter(folder, split, dtype, cfg.shard_tokens) for split in ("train", "val")}
    counts = {split: collections.Counter(documents=0, tokens=0, bytes=0) for split in writers}
    notes = collections.Counter()
    for split, tokens, count, n_bad in encoded(corpus, tokenizer_name, dtype, cfg):
        writers[split].write(tokens)
        counts[split].update(count, tokens=len(tokens))
        notes.update({"pieces with bytes that are not UTF-8, replaced by U+FFFD": n_bad} if n_bad else {})
    if changes := changes_of_input(cfg, folder, corpus.inventory):
        notes[f"change of the input while it was read ({changes})"] = 1
    for split, count in counts.items():
        if not count["tokens"]:
            remedy = f"change --val_fraction={cfg.val_fraction}, or add documents: equal ones fall into the same split"
            if changes:
                remedy = f"the input has changed while it was read ({changes}): repeat the command"
            raise UserError(f"no document fell into the {split} split; {remedy}")
    meta = {"vocab_size": tokenizer.vocab_size, "specials": tokenizer.specials}
    meta |= {"tokenizer": tokenizer_name, "notes": notes, "token_bytes": tokenizer.byte_counts()}
    if is_saved := tokenizer_name.endswith(".json"):  # make_tokenizer has put it beside the shards
        meta |= {"tokenizer": "tokenizer.json", "tokenizer_sha256": sha256(tokenizer_name)}
    meta["splits"] = {
        split: {**counts[split], "shards": writer.finish(), "checksums": writer.checksums}
        for split, writer in writers.items()
    }
    if is_saved:  # after the shards, which show whose it is
        os.replace(tokenizer_name, folder / "tokenizer.json")
    if len(tokenizer.continuations):
        meta["continuations"] = tokenizer.continuations  # for whole-word masking
    return meta


def encoded(corpus, tokenizer_name, dtype, cfg):
    """Yields the results of _encode over the corpus, in order, by several processes and with a progress bar.

    Further copies of the training documents follow the whole corpus, one after the other.
    """
    from tqdm import tqdm

    workers = min(cfg.workers or os.cpu_count(), 4 * os.cpu_count())  # more would only cost memory
    # fork where it is safe; spawn imports everything anew in each process, which takes seconds
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with (
        _telling_of_workers(workers),
        ProcessPoolExecutor(workers, context, _end_with_parent) as pool,
        tqdm(total=corpus.bytes * cfg.copies or None, unit="B", unit_scale=True, disable=None) as progress,
    ):
        pending = collections.deque()  # its length is bounded, and so is memory
        again = (piece for _ in range(1, cfg.copies) for piece in corpus.pieces() if piece[0] == "train")
        for group in itertools.chain(_grouped(itertools.chain(corpus.pieces(), again)), [None] * (2 * workers + 1)):
            if group is not None:
                pending.append(pool.submit(_encode, group, tokenizer_name, dtype, cfg.bpe_dropout))
            if pending and (group is None or len(pending) > 2 * workers):
                for result in pending.popleft().result():
                    yield result
                    progress.update(result[2]["bytes"])


def _grouped(pieces):
    """Lists of (split, piece, whether it ends a document, whether it continues one), about TASK_BYTES each."""
    group, size, continues = [], 0, False
    for split, piece, last in pieces:
        group.append((split, piece, last, continues))
        size, continues = size + len(piece), not last
        if size >= TASK_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


@contextlib.contextmanager
def _telling_of_workers(workers):
    try:
        yield
    except BrokenProcessPool as error:
        rule = f"one of {workers} worker processes was killed, as the system does where memory runs out"
        raise UserError(f"{rule}; set a smaller --workers") from error
    except OSError as error:
        remedy = "set a smaller --workers, or raise ulimit -n and -u"
        raise UserError(f"{workers} worker processes cannot be started ({error}); {remedy}") from error


@functools.cache  # once, or where workers are spawned, once per worker
def _loaded_once(name, bpe_dropout):
    """The tokenizer of a name; with bpe_dropout one that leaves out merges. UserError where it is no BPE."""
    tokenizer = load_tokenizer(name)
    if bpe_dropout:
        rule = f"bpe_dropout is {bpe_dropout}, but the tokenizer has no merges to drop"
        with telling(lambda reason: f"{rule} ({reason})"):
            tokenizer = FileTokenizer(name, tokenizer.saved or hub_json(tokenizer))
            tokenizer.drop_merges(bpe_dropout)
    return tokenizer


def _end_with_parent():
    """Ends a worker when its parent ends or is killed, by Ctrl-C too; it would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted worker may leave the pool in a deadlock

    def watch():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _encode(group, tokenizer_name, dtype, bpe_dropout):
    """A group of pieces as [(split, tokens, {"documents": number, "bytes": number}, pieces with bad UTF-8)]."""
    results = []
    for split, pieces in itertools.groupby(group, key=lambda piece: piece[0]):
        tokenizer = _loaded_once(tokenizer_name, bpe_dropout if split == "train" else 0.0)
        parts, count, n_bad = [], collections.Counter(), 0
        for _, piece, last, continues in pieces:
            try:
                text = piece.decode("utf-8")
            except UnicodeDecodeError:
                text, n_bad = piece.decode("utf-8", errors="replace"), n_bad + 1
            parts.append(tokenizer.encode(text, continues).astype(dtype))
            if last:
                parts.append(np.array([tokenizer.eot], dtype))
            count.update(documents=last, bytes=len(piece))
        results.append((split, np.concatenate(parts), count, n_bad))
    return results


# ---- the data folder


@contextlib.contextmanager
def locked(folder):
    """Makes and locks a data folder; UserError where another prepare.py works in it, or where the system refuses."""
    with contextlib.ExitStack() as stack:
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            holder = lock_file(stack.enter_context(open(folder / LOCK, "a+", encoding="utf-8")))
        if holder:
            rule = f"data_dir {folder} is in use by another prepare.py, {holder}"
            raise UserError(f"{rule}; wait for its end, or use another --data_dir")
        yield


def clear_unfinished(folder, tokenizer):
    """Removes the files of an interrupted prepare; refuses a folder with others' token files or tokenizer.json.

    tokenizer: the one to use, which may be that file.
    """
    shards = [p for p in folder.glob("*.bin") if re.fullmatch(r"(train|val)_\d{6}\.bin", p.name) and is_own_shard(p)]
    partial = unfinished(folder)
    foreign = [p for p in folder.glob("*.bin") if p not in shards] + [p for p, is_own in partial.items() if not is_own]
    saved = folder / "tokenizer.json"
    if saved.exists() and not (shards or any(partial.values())):
        foreign += [] if os.path.exists(tokenizer) and os.path.samefile(saved, tokenizer) else [saved]
    if foreign:
        files = f"files that prepare.py did not write: {', '.join(sorted(p.name for p in foreign)[:3])}"
        raise UserError(f"{folder} holds {files}; use another --data_dir")
    for path in [*shards, *partial, folder / UNFINISHED_TOKENIZER]:
        path.unlink(missing_ok=True)


def summary(meta):
    """A table of the splits."""
    rows = [("split", "documents", "tokens", "bytes", "bytes/token", "shards")]
    for split, s in meta["splits"].items():
        tokens, text_bytes = s.get("tokens") or sum(s["shards"].values()), s.get("bytes")
        ratio = f"{text_bytes / tokens:.3f}" if text_bytes and tokens else "?"
        size = f"{text_bytes:,}" if text_bytes else "?"
        rows.append((split, s.get("documents") or "?", f"{tokens:,}", size, ratio, len(s["shards"])))
    lines = ["{:<8}{:>12}{:>16}{:>17}{:>15}{:>8}".format(*row) for row in rows]
    return "\n".join([f"tokenizer {meta.get('tokenizer')}, vocabulary of {meta['vocab_size']:,}", *lines])


def fetch_fineweb(cfg, folder):
    """Downloads FineWeb-10B in GPT-2 tokens, llm.c's shards, from the hub, or copies it from a local folder."""
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, 1 + (cfg.max_shards or 103))]
    if others := [path.name for path in folder.glob("*.bin") if not path.name.startswith("fineweb_")]:
        raise UserError(f"{folder} holds other data ({', '.join(others[:3])}); use another --data_dir")
    missing = [name for name in names if not (folder / name).exists()]
    with writing_to(folder):
        if missing:
            (folder / "meta.json.part").touch()  # marks the folder as unfinished until meta.json is written
        for name in missing:
            print(f"fetching {name}", flush=True)
            _fetch(name, cfg.input, folder)
    before = read_meta(folder).get("splits", {}).values()
    known = {k: v for split in before for k, v in split.get("checksums", {}).items() if k not in missing}
    splits = {}
    for path in sorted(folder.glob("fineweb_*_*.bin")):
        split = splits.setdefault(
            "val" if "val" in path.name else "train", {"tokens": 0, "shards": {}, "checksums": {}}
        )
        shard = open_shard(path)
        split["shards"][path.name] = len(shard)
        split["checksums"][path.name] = known.get(path.name) or checksums(shard)
        split["tokens"] += len(shard)
    meta = {"vocab_size": 50257, "tokenizer": "gpt2", "specials": {"<|endoftext|>": 50256}, "splits": splits}
    write_meta(folder, meta | {"command": command(cfg), "token_bytes": load_tokenizer("gpt2").byte_counts()})
    print(summary(meta), f"written to {folder}", sep="\n")


def _fetch(name, source, folder):
    if source is not None:
        if not (Path(source) / name).is_file():
            raise UserError(f"{source} holds no {name}; give the folder of the shards, or a smaller --max_shards")
        shutil.copyfile(Path(source) / name, folder / f"{name}.part")
        os.replace(folder / f"{name}.part", folder / name)
        return
    try:
        import huggingface_hub

        huggingface_hub.hf_hub_download("kjj0/fineweb10B-gpt2", name, repo_type="dataset", local_dir=folder)
    except ImportError as error:
        raise UserError("fineweb10b needs huggingface_hub; install it with: pip install huggingface_hub") from error
    except OSError as error:  # the hub's errors are OSErrors
        failed = f"{name} could not be downloaded from the Hugging Face hub ({type(error).__name__})"
        raise UserError(f"{failed}; try again, or set --input= to a folder that holds it") from error


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
