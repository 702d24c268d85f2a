"""Cleans text for training: takes it out of web pages, repairs, filters and deduplicates it.

    python clean.py config/clean_web.py --input='crawl/*.warc.gz' --clean_dir=data/web
    python clean.py --input=notes --steps=fix,exact,near --clean_dir=data/notes
    python prepare.py --input=data/web/text

Input is what prepare.py reads, and .html, .warc and .wet files. clean_dir gets text/*.jsonl.gz, samples of what each
step dropped in dropped/, report.json and steps.png. The same command continues after an interruption. datatrove does
the work; docs/data.md describes the steps.
"""

import collections
import contextlib
import functools
import importlib.util
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from config import ROOT, Count, Positive, Share, UpToOne, UserError, Whole, as_dict, run_script
from run.folder import lock_file
from shards import refusing_system_errors
from text import cleaning
from text.cleaning import SAMPLES, Input, Stored, Watched, folder_of, make
from text.corpus import Corpus, CorpusConfig
from text.files import ending_of, find_files
from text.remote import RemoteFile, bare_url, is_url, public

FINDERS = 16  # most tasks that look for exact duplicates, each among a part of the hashes
TASK_BYTES = 64 << 20  # input of a task, about
SPLIT = {"gopher", "gopher_repetition", "c4", "fineweb", "near", "decontaminate"}  # steps that split words
OF_THE_MACHINES = ("workers", "executor", "slurm_partition", "slurm_time", "memory_gib", "clean_dir")  # not of the text


@dataclass(frozen=True)
class CleanConfig(CorpusConfig):
    steps: tuple = ("html", "fix", "exact", "near")  # in order, as in --steps=fix,exact; docs/data.md describes all
    clean_dir: str = "data/clean"  # folder of the clean text, local or as in s3://bucket/folder
    language: str = "en"  # ISO 639-1 code of the language to keep, which also decides how words and sentences are split
    language_threshold: Share = 0.65  # language: its least probability
    language_model: str | None = None  # language: file of a fastText model such as lid.176.bin; none: py3langid's own
    min_chars: Whole = 200  # length: fewest characters
    max_chars: Count = 1_000_000  # length: most characters
    min_words: Whole = 50  # gopher: fewest words
    min_sentences: Whole = 5  # c4: fewest sentences
    c4_line_ends: bool = False  # c4: drop lines that end without punctuation, as C4 does and FineWeb does not
    min_line_ends: Share = 0.12  # fineweb: least share of lines that end with punctuation
    blocklist: str | None = None  # blocklist: file of words or phrases, one a line; text with any of them is dropped
    eval_texts: str | None = None  # decontaminate: files of texts, such as benchmarks, that training must not contain
    eval_words: Count = 13  # decontaminate: successive words that a document may not share with them
    min_line_words: Count = 5  # lines: fewest words of a line that is dropped where it is repeated
    near_bands: Count = 14  # near: bands of MinHash; more of them find less similar documents
    near_rows: Count = 8  # near: hashes in a band; more of them find fewer documents
    near_words: Count = 5  # near: successive words that are compared
    perplexity_run: str | None = None  # perplexity: folder of a run, or of a Hugging Face model, that reads the text
    perplexity_keep: UpToOne = 0.7  # perplexity: share of documents to keep, the likeliest ones
    parts: Count | None = None  # parts of the work; none: one per 64 MiB, or remote file, and up to 4 for as many files
    executor: Literal["local", "slurm", "ray"] = "local"  # where tasks run
    slurm_partition: str | None = None  # Slurm's partition
    slurm_time: str = "24:00:00"  # Slurm's time limit of a task
    memory_gib: Positive = 4.0  # memory of a task, for Slurm and Ray

    def __post_init__(self):
        super().__post_init__()
        wrong = [f"steps names {name!r}; it may name {', '.join(STEPS)}" for name in self.steps if name not in STEPS]
        wrong += [f"steps names {name} twice; name it once" for name in STEPS if self.steps.count(name) > 1]
        wrong += [] if self.steps else [f"steps is empty; name some of {', '.join(STEPS)}"]
        needs = {"blocklist": self.blocklist, "eval_texts": self.eval_texts, "perplexity_run": self.perplexity_run}
        for step, setting in zip(("blocklist", "decontaminate", "perplexity"), needs):
            if step in self.steps and needs[setting] is None:
                wrong.append(f"steps names {step}, but {setting} is none; set --{setting}=, or leave the step out")
        if self.min_chars > self.max_chars:
            wrong.append(f"min_chars is {self.min_chars}, above max_chars, {self.max_chars}; lower it")
        if self.executor == "slurm" and not self.slurm_partition:
            wrong.append("executor is slurm, but slurm_partition is none; set --slurm_partition=")
        if self.executor == "slurm" and is_url(self.input or "") and bare_url(self.input) != self.input:
            rule = f"input {public(self.input)} has a password or query, which Slurm's jobs would find in a file"
            wrong.append(f"{rule}; set credentials as docs/data.md says, or copy the input")
        if wrong:
            raise UserError(*wrong)


@dataclass(frozen=True)
class Settings:
    clean: CleanConfig
    presets: tuple = ()


# ---- the steps: datatrove's objects from the settings; `at` is a folder for a step's own files, n the number of tasks


class Across(NamedTuple):
    """The parts of a step that needs all documents: those before and after a task writes its own, (parts, tasks) that
    then find what to drop, and those that drop it.
    """

    before: list
    after: list
    find: list
    drop: list


def keep_if(decide):
    return [make("filters.LambdaFilter", decide)]


def rules(name, cfg, **settings):
    return [make(f"filters.{name}", language=cfg.language, **settings)]


def language(cfg, *_):
    step = make("filters.LanguageFilter", [cfg.language], cfg.language_threshold)
    step.model = cleaning.LanguageModel(cfg.language, cfg.language_model)  # datatrove would fetch one
    return [step]


def gopher(cfg, *_):
    fewest = 2 if cfg.language == "en" else None  # the stop words are English
    return rules("GopherQualityFilter", cfg, min_doc_words=cfg.min_words, min_stop_words=fewest)


def c4(cfg, *_):
    settings = {"filter_no_terminal_punct": cfg.c4_line_ends, "min_num_sentences": cfg.min_sentences}
    return rules("C4QualityFilter", cfg, **settings)


def exact(cfg, at, n):
    n, config = min(n, FINDERS), make("dedup.ExactDedupConfig", cleaning.content_of)
    hashes = make("dedup.ExactDedupSignature", f"{at}/hashes", config, finder_workers=n)
    find = [make("dedup.ExactFindDedups", f"{at}/hashes", f"{at}/found", config)]
    return Across([], [hashes], [(find, n)], [make("dedup.ExactDedupFilter", f"{at}/found", config)])


def lines(cfg, at, n):
    n, limits = min(n, FINDERS), {"min_doc_words": 0, "min_num_sentences": 0}
    config = make("dedup.SentDedupConfig", n_sentences=1, split_sentences=False, **limits)
    hashes = make("dedup.SentenceDedupSignature", f"{at}/hashes", n, config, cfg.language)
    hashes.get_hashes = functools.partial(cleaning.hashes_of_lines, hashes.hash_fc, cfg.min_line_words)
    find = [make("dedup.SentenceFindDedups", f"{at}/hashes", f"{at}/found", config=config)]
    drop = make("dedup.SentenceDedupFilter", f"{at}/found", config, language=cfg.language)
    hashes.tokenizer = drop.tokenizer = cleaning.Splitter(cfg.language)
    return Across([], [hashes], [(find, n)], [drop])


def near(cfg, at, n):
    config = make("dedup.MinhashConfig", cfg.near_words, cfg.near_bands, cfg.near_rows)
    hashes = make("dedup.MinhashDedupSignature", f"{at}/hashes", config, cfg.language)
    hashes.word_tokenizer = cleaning.Splitter(cfg.language)
    pairs = [make("dedup.MinhashDedupBuckets", f"{at}/hashes", f"{at}/pairs", config=config)]
    clusters = [make("dedup.MinhashDedupCluster", f"{at}/pairs", f"{at}/found", config)]
    find = [(pairs, cfg.near_bands), (clusters, 1)]
    return Across([], [hashes], find, [make("dedup.MinhashDedupFilter", f"{at}/found")])


def perplexity(cfg, at, n):
    from interop.pretrained import open_model
    from interop.score import open_scorer

    if not open_model(cfg.perplexity_run).cfg.is_causal:
        raise UserError(f"perplexity_run {cfg.perplexity_run} is a masked model, without perplexity; name a causal one")
    scores = cleaning.Perplexity(open_scorer, cfg.perplexity_run, f"{at}/scores")
    return Across([scores], [], [], keep_if(cleaning.LowestShare(f"{at}/scores", cfg.perplexity_keep)))


def decontaminate(cfg, at, n):
    config = make("decont.NGramsDecontConfig", cfg.eval_words)
    step = make("decont.NGramsDecontFilter", f"{at}/index", config, language=cfg.language)
    step.tokenizer = cleaning.Splitter(cfg.language)
    return [step]


STEPS = {
    "html": lambda *_: [cleaning.html_to_text()],
    "fix": lambda *_: [cleaning.remove_invisible, make("formatters.FTFYFormatter", **REPAIRS)],
    "pii": lambda *_: [make("formatters.PIIFormatter", **REPLACEMENTS)],
    "language": language,
    "length": lambda cfg, *_: keep_if(functools.partial(cleaning.is_within, cfg.min_chars, cfg.max_chars)),
    "blocklist": lambda cfg, *_: keep_if(cleaning.Blocklist(cfg.blocklist)),
    "gopher_repetition": lambda cfg, *_: rules("GopherRepetitionFilter", cfg),
    "gopher": gopher,
    "c4": c4,
    "fineweb": lambda cfg, *_: rules("FineWebQualityFilter", cfg, line_punct_thr=cfg.min_line_ends),
    "perplexity": perplexity,
    "exact": exact,
    "lines": lines,
    "near": near,
    "decontaminate": decontaminate,
}
REPAIRS = {"normalization": "NFC", "fix_line_breaks": True}
# One replacement each: by datatrove's several in turn, duplicates would come to differ.
REPLACEMENTS = {"email_replacement": "email@example.com", "ip_replacement": "22.214.171.124"}


def stages_of(cfg, work, n):
    """[(name, parts, tasks)] for datatrove to run one after the other. work: a folder for what is between them."""
    stages, parts = [], [Watched("input", [Input(cfg, work)], f"{work}/counts")]
    for name in cfg.steps:
        step = STEPS[name](cfg, f"{work}/{name}", n)
        if isinstance(step, Across):
            stored = f"{work}/{name}/documents"
            stages.append(
                (f"until_{name}", [*parts, *step.before, make("writers.JsonlWriter", stored), *step.after], n)
            )
            stages += [(f"{name}_{i}", found, tasks) for i, (found, tasks) in enumerate(step.find, 1)]
            parts, step = [Stored(stored)], step.drop
        parts.append(Watched(name, step, f"{work}/counts"))
    return [*stages, ("to_the_end", [*parts, make("writers.JsonlWriter", f"{work}/text")], n)]


# ---- running


def main(cfg):
    cfg = cfg.clean
    check_installed(cfg)
    where = cfg.clean_dir if is_url(cfg.clean_dir) else os.path.abspath(cfg.clean_dir)
    folder, work = folder_of(where), f"{where}/.work"
    corpus = Corpus(cfg, None, find_files(cfg.input, Path(where), cleaning.ENDINGS))
    if "html" not in cfg.steps and any(ending_of(str(p))[0] in (*cleaning.HTML, ".warc") for p in corpus.files):
        raise UserError(f"input {public(cfg.input)} has web pages, and steps lack html; begin --steps= with it")
    most = len(corpus.files) if isinstance(corpus.files[0], RemoteFile) else 1000  # each task of a file reads it whole
    n = cfg.parts or min(most, 1000, corpus.bytes // TASK_BYTES + min(len(corpus.files), 4))
    started = {"settings": settings_of_text(cfg) | {"parts": n}, "input": corpus.inventory}
    check_same(started, folder, where)
    if folder.isfile("report.json"):
        return print_report(json.loads(folder.cat_file("report.json")), f"{where} is clean already")
    stages = stages_of(cfg, work, n)  # checks what the steps need, before a file is written
    with locked(where):
        check_same(started, folder, where)  # by another clean.py in the meantime
        files = [[p.path, p.size, p.version] if isinstance(p, RemoteFile) else os.path.abspath(p) for p in corpus.files]
        started |= {"files": files, "left_out": corpus.left_out}
        if not folder.isfile(".work/started.json"):
            if "decontaminate" in cfg.steps:
                index_eval_texts(cfg, stages, work)
            write_json(folder, ".work/started.json", started)
        if run(cfg, stages, work):
            finish(started, folder, where, stages)


def check_installed(cfg):
    """UserError where the input is not named, a package is missing, or the language has no word splitter."""
    if cfg.input is None:
        raise UserError("input is not set; give --input=FILE, a folder, a glob in quotes or a URL")
    packages = ("datatrove", "ftfy", "lxml_html_clean", "py3langid", "spacy", "trafilatura", "warcio")
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"clean.py needs {', '.join(missing)}; install all that it uses with: pip install '.[clean]'")
    os.environ.setdefault("TQDM_DISABLE", "1")  # datatrove's own bars
    from datatrove.utils.logging import logger
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    logger.disable("datatrove")
    try:
        splitter = load_word_tokenizer(cfg.language)
        if not SPLIT.isdisjoint(cfg.steps):
            splitter.word_tokenize("a")  # loads it, for all processes that are forked
    except (ValueError, ImportError) as error:
        raise UserError(f"language {cfg.language} has no word splitter here ({error}); name another") from error


def settings_of_text(cfg):
    """The settings that the text depends on; a file's with its size and time, a URL's without its secrets."""
    settings = {k: v for k, v in as_dict(Settings(cfg)).items() if k not in OF_THE_MACHINES}
    for name in ("blocklist", "language_model", "eval_texts"):
        if settings[name] and os.path.exists(settings[name]):
            status = os.stat(settings[name])
            settings[name] = f"{settings[name]} ({status.st_size} bytes, {status.st_mtime})"
        elif settings[name]:
            settings[name] = public(settings[name])
    return settings | {"input": public(cfg.input), "steps": list(cfg.steps)}


def write_json(folder, name, value):
    """Writes a file that has its name once it is whole."""
    with folder.open(f"{name}.part", "wt") as file:
        json.dump(value, file)
    folder.mv(f"{name}.part", name)


def check_same(started, folder, where):
    """UserError where the folder was begun with other settings or another input."""
    for path in filter(folder.isfile, (".work/started.json", "report.json")):
        old = json.loads(folder.cat_file(path))
        pairs = [(k, v, started[part].get(k)) for part in ("settings", "input") for k, v in old[part].items()]
        if changes := ", ".join(f"{name} {before} -> {now}" for name, before, now in pairs if before != now):
            raise UserError(f"{where} was begun otherwise: {changes}; use another --clean_dir, or remove it")


@contextlib.contextmanager
def locked(where):
    """Makes and locks a local folder; UserError where another clean.py works in it, or where the system refuses."""
    errors = refusing_system_errors(f"clean_dir {where} cannot be written to", "make room, or use another")
    with contextlib.ExitStack() as stack, errors:
        if not is_url(where):
            Path(where).mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(Path(where, ".clean.lock"), "a+", encoding="utf-8"))
            if holder := lock_file(file):
                raise UserError(f"clean_dir {where} is in use by another clean.py, {holder}; wait for its end")
        yield


def index_eval_texts(cfg, stages, work):
    """Writes the n-grams of eval_texts, which the tasks of decontaminate read."""
    [step] = [part.parts[0] for _, parts, _ in stages for part in parts if getattr(part, "name", "") == "decontaminate"]
    corpus = Corpus(cfg, None, find_files(cfg.eval_texts, Path(work)))
    read = [
        text if isinstance(text, bytes) else b"".join(text) for p in corpus.files for text in corpus.documents_of(p)
    ]
    used = cleaning.write_ngrams(
        (text.decode("utf-8", "replace") for text in read), step, f"{work}/decontaminate/index"
    )
    print(f"decontaminate: {used:,} of {len(read):,} texts have {cfg.eval_words} words and are looked for", flush=True)
    if not used:
        rule = f"eval_texts {public(cfg.eval_texts)} has no text of {cfg.eval_words} words"
        raise UserError(f"{rule}; set a lower --eval_words")


def run(cfg, stages, work):
    """Runs those tasks of the stages that an earlier run has not completed; returns whether all are complete."""
    from tqdm import tqdm

    executors = []
    for name, parts, n in stages:
        executors.append(executor_of(cfg, parts, n, f"{work}/logs/{name}", executors[-1] if executors else None))
    if cfg.executor == "slurm":
        left = sum(len(executor.get_incomplete_ranks()) for executor in executors)
        submitted = folder_of(work)
        if left and submitted.isfile("submitted"):
            print(f"{left} tasks have not ended; where jobs have failed, remove {work}/submitted to submit them again")
        elif left:
            executors[-1].run()  # submits what it depends on, too
            submitted.touch("submitted")
            print(f"{left} tasks are submitted to Slurm; when its jobs have ended, the same command writes the report")
        return not left
    cleaning.end_with_parent()
    with tqdm(total=sum(n for *_, n in stages), unit="task", disable=not sys.stderr.isatty()) as bar:
        for (name, _, n), executor in zip(stages, executors):
            bar.set_description(name)
            executor.run()
            if left := len(executor.get_incomplete_ranks()):
                raise UserError(f"{left} of {n} tasks of {name} failed; see {work}/logs/{name}, and run it again")
            bar.update(n)
    return True


def executor_of(cfg, parts, n, logs, depends):
    """datatrove's executor of a stage."""
    import datatrove.executor as executors

    settings, path = {"logging_dir": logs, "workers": cfg.workers or -1}, os.path.dirname(sys.executable)
    if cfg.executor == "local":
        method = "fork" if sys.platform == "linux" else "spawn"  # as in prepare.py
        settings["workers"] = min(cfg.workers or os.cpu_count(), n)
        return executors.LocalPipelineExecutor(parts, n, start_method=method, **settings)
    settings["mem_per_cpu_gb"] = math.ceil(cfg.memory_gib)
    if cfg.executor == "ray":
        env = {"runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}}}
        return executors.RayPipelineExecutor(parts, n, ray_remote_kwargs=env, **settings)
    env = f"export PYTHONPATH={ROOT}\nexport PATH={path}:$PATH"
    settings |= {"job_name": os.path.basename(logs), "env_command": env, "depends": depends, "qos": None}
    return executors.SlurmPipelineExecutor(parts, n, cfg.slurm_time, cfg.slurm_partition, **settings)


# ---- the report


def finish(started, folder, where, stages):
    """Writes the samples, the picture and the report, and moves the text to its place."""
    from perf.pictures import draw_cleaning, write_picture

    rows, skipped = [], collections.Counter(started["left_out"])
    for name in [part.name for _, parts, _ in stages for part in parts if isinstance(part, Watched)]:
        total, sample = collections.defaultdict(collections.Counter), []
        for path in folder.list_files(f".work/counts/{name}"):
            found = json.loads(folder.cat_file(path))
            sample += found.pop("sample")
            for kind, counts in found.items():
                total[kind].update(counts)
        skipped += total["skipped"]
        figures = {kind: total["counts"][kind] for kind in ("documents", "bytes", "dropped", "changed")}
        rows.append({"step": name, **figures, "reasons": total["reasons"], "lengths": total["lengths"]})
        if sample:
            with folder.open(f"dropped/{name}.jsonl", "wt") as file:
                file.writelines(json.dumps(record) + "\n" for *_, record in sorted(sample, reverse=True)[:SAMPLES])
    report = started | {"rows": rows, "skipped": skipped}
    if not is_url(where):
        write_picture(f"{where}/steps.png", (11, 5), draw_cleaning, rows)
    if not rows[-1]["documents"]:
        print_report(report, f"samples of what each step dropped are in {where}/dropped")
        last = [row["step"] for row in rows if row["dropped"]]
        why = f"{last[-1]} dropped the last ones; change --steps= or its settings" if last else "check --input="
        raise UserError(f"no document is left of {started['settings']['input']}: {why}")
    folder.makedirs("text", exist_ok=True)
    for path in folder.list_files(".work/text"):
        folder.mv(path, f"text/{os.path.basename(path)}")
    write_json(folder, "report.json", report)
    folder.rm(".work", recursive=True)
    print_report(report, f"{where}/text is for: python prepare.py --input={where}/text\n{where}/dropped has samples")


def print_report(report, end):
    """Prints a table of the steps."""
    print(f"{'step':<18}{'documents':>12}{'dropped':>12}{'':>8}{'bytes':>18}{'less':>8}{'changed':>12}  reasons")
    before = report["rows"][0]
    for row in report["rows"]:
        shares = [1 - row[kind] / max(1, before[kind]) for kind in ("documents", "bytes")]
        reasons = collections.Counter(row["reasons"]).most_common(4)
        figures = f"{row['documents']:>12,}{row['dropped']:>12,}{shares[0]:>8.1%}{row['bytes']:>18,}{shares[1]:>8.1%}"
        why = ", ".join(f"{reason} {n:,}" for reason, n in reasons if reason != row["step"])
        print(f"{row['step']:<18}{figures}{row['changed']:>12,}  {why}".rstrip())
        before = row
    print(*(f"  {n:,} {why}" for why, n in report["skipped"].items()), end, sep="\n")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
