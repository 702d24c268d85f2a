"""Cleans text for training: extracts it from pages, repairs, filters and deduplicates it.

    python clean.py config/clean_web.py --input='crawl/*.warc.gz' --clean_dir=data/web
    python clean.py --input=notes --steps=fix,exact,near --clean_dir=data/notes
    python prepare.py --input=data/web/text --data_dir=data/web_tokens

Input is what prepare.py reads, and .html, .warc and .wet files. The steps are datatrove's. clean_dir gets text/*.jsonl.gz,
a sample of what each step dropped in dropped/, report.json and steps.png. The same command continues after an interruption.
"""

import collections
import contextlib
import functools
import glob
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from config import ROOT, Count, Positive, Share, UpToOne, UserError, Whole, as_dict, run_script
from interop.pretrained import open_model
from interop.score import open_scorer
from perf.pictures import draw_cleaning, write_picture
from run.folder import lock_file
from text import cleaning
from text.cleaning import SAMPLES, Input, Stored, Watched, make
from text.corpus import Corpus, CorpusConfig
from text.files import ending_of, find_files, is_url, public, shown

FINDERS = 16  # tasks, at most, that look for exact duplicates, each among some of the hashes
TASK_BYTES = 64 << 20  # input of a task, about
OF_THE_MACHINES = ("workers", "executor", "slurm_partition", "slurm_time", "memory_gib", "clean_dir")  # not of the text


@dataclass(frozen=True)
class CleanConfig(CorpusConfig):
    steps: tuple = ("html", "fix", "exact", "near")  # steps in order, as in --steps=fix,exact; docs/data.md has them all
    clean_dir: str = "data/clean"  # folder of the clean text, local or as in s3://bucket/folder
    language: str = "en"  # language of the text, as an ISO 639-1 code: to keep, and to split words and sentences by
    language_threshold: Share = 0.65  # language: least probability of it
    language_model: str | None = None  # language: a fastText model's file such as lid.176.bin; none: py3langid's own
    min_chars: Whole = 200  # length: fewest characters
    max_chars: Count = 1_000_000  # length: most characters
    min_words: Whole = 50  # gopher: fewest words
    max_words: Count = 100_000  # gopher: most words
    min_sentences: Whole = 5  # c4: fewest sentences
    c4_line_ends: bool = False  # c4: drop lines that end without punctuation, as C4 does and FineWeb does not
    min_line_ends: Share = 0.12  # fineweb: least share of lines that end with punctuation
    blocklist: str | None = None  # blocklist: a file of words or phrases, one a line; text with any of them is dropped
    eval_texts: str | None = None  # decontaminate: files of texts, such as benchmarks, that training must not contain
    eval_words: Count = 13  # decontaminate: successive words that a document may not share with them
    min_line_words: Count = 5  # lines: fewest words of a line that is dropped where it is repeated
    near_bands: Count = 14  # near: bands of MinHash; more of them find less similar documents
    near_rows: Count = 8  # near: hashes in a band; more of them find fewer documents
    near_words: Count = 5  # near: successive words that are compared
    perplexity_run: str | None = None  # perplexity: a run's folder, or a Hugging Face model's, whose model reads the text
    perplexity_keep: UpToOne = 0.7  # perplexity: share of documents to keep, those that the model finds likeliest
    tasks: Count | None = None  # parts of the work; none: one per 64 MiB of input, and for up to 16 files one each
    executor: Literal["local", "slurm", "ray"] = "local"  # where tasks run
    slurm_partition: str | None = None  # Slurm's partition
    slurm_time: str = "24:00:00"  # Slurm's time limit of a task
    memory_gib: Positive = 4.0  # memory of a task, for slurm and ray

    def __post_init__(self):
        super().__post_init__()
        wrong = [f"steps names {name}; steps are {', '.join(STEPS)}" for name in self.steps if name not in STEPS]
        counts = collections.Counter(self.steps)
        wrong += [f"steps names {name} {n} times; name it once" for name, n in counts.items() if n > 1]
        wrong += [] if self.steps else [f"steps is empty; name some of {', '.join(STEPS)}"]
        for step, needed in {"blocklist": "blocklist", "decontaminate": "eval_texts", "perplexity": "perplexity_run"}.items():
            if step in self.steps and getattr(self, needed) is None:
                wrong.append(f"steps names {step}, which needs --{needed}=; set it, or leave the step out")
        for low, high in (("min_chars", "max_chars"), ("min_words", "max_words")):
            if getattr(self, low) > getattr(self, high):
                wrong.append(f"{low} is {getattr(self, low)}, above {high}, {getattr(self, high)}; lower it")
        if self.executor == "slurm" and not self.slurm_partition:
            wrong.append("executor is slurm, but no partition is named; set --slurm_partition=")
        if wrong:
            raise UserError(*wrong)


@dataclass(frozen=True)
class Settings:
    clean: CleanConfig
    presets: tuple = ()


class Across(NamedTuple):
    """The parts of a step that needs all documents: before and after each task has written its own, then to find what to
    drop, as [(parts, tasks)], and to drop it."""

    before: list
    after: list
    find: list
    drop: list


# ---- the steps: datatrove's objects from the settings; `at` is a folder for a step's own files, n the number of tasks


def keep_if(decide):
    return [make("filters.LambdaFilter", decide)]


def language(cfg, at, n):
    step = make("filters.LanguageFilter", [cfg.language], cfg.language_threshold)
    step.model = cleaning.LanguageModel(cfg.language, cfg.language_model)  # datatrove would fetch one
    return [step]


def gopher(cfg, at, n):
    fewest = 2 if cfg.language == "en" else None  # the stop words are English
    return [make("filters.GopherQualityFilter", cfg.min_words, cfg.max_words, min_stop_words=fewest, language=cfg.language)]


def c4(cfg, at, n):
    ends = {"filter_no_terminal_punct": cfg.c4_line_ends, "min_num_sentences": cfg.min_sentences}
    return [make("filters.C4QualityFilter", language=cfg.language, **ends)]


def exact(cfg, at, n):
    n, config = min(n, FINDERS), make("dedup.ExactDedupConfig", cleaning.content_of)
    return Across(
        before=[],
        after=[make("dedup.ExactDedupSignature", f"{at}/hashes", config, finder_workers=n)],
        find=[([make("dedup.ExactFindDedups", f"{at}/hashes", f"{at}/found", config)], n)],
        drop=[make("dedup.ExactDedupFilter", f"{at}/found", config)],
    )


def lines(cfg, at, n):
    n = min(n, FINDERS)
    config = make("dedup.SentDedupConfig", n_sentences=1, split_sentences=False, min_doc_words=0, min_num_sentences=0)
    hashes = make("dedup.SentenceDedupSignature", f"{at}/hashes", n, config, cfg.language)
    hashes.get_hashes = functools.partial(cleaning.hashes_of_lines, hashes.hash_fc, cfg.min_line_words)
    return Across(
        before=[],
        after=[hashes],
        find=[([make("dedup.SentenceFindDedups", f"{at}/hashes", f"{at}/found", config=config)], n)],
        drop=[make("dedup.SentenceDedupFilter", f"{at}/found", config, language=cfg.language)],
    )


def near(cfg, at, n):
    config = make("dedup.MinhashConfig", cfg.near_words, cfg.near_bands, cfg.near_rows)
    return Across(
        before=[],
        after=[make("dedup.MinhashDedupSignature", f"{at}/hashes", config, cfg.language)],
        find=[
            ([make("dedup.MinhashDedupBuckets", f"{at}/hashes", f"{at}/pairs", config=config)], cfg.near_bands),
            ([make("dedup.MinhashDedupCluster", f"{at}/pairs", f"{at}/found", config)], 1),
        ],
        drop=[make("dedup.MinhashDedupFilter", f"{at}/found")],
    )


def perplexity(cfg, at, n):
    if not open_model(cfg.perplexity_run).cfg.is_causal:
        raise UserError(f"perplexity_run {cfg.perplexity_run} is a masked model, without perplexity; name a causal one")
    scores = cleaning.Perplexity(open_scorer, cfg.perplexity_run, f"{at}/scores")
    return Across([scores], [], [], keep_if(cleaning.LowestShare(f"{at}/scores", cfg.perplexity_keep)))


def decontaminate(cfg, at, n):
    config = make("decont.NGramsDecontConfig", cfg.eval_words)
    return [make("decont.NGramsDecontFilter", f"{at}/index", config, language=cfg.language)]


STEPS = {
    "html": lambda cfg, at, n: [cleaning.html_to_text()],
    "fix": lambda cfg, at, n: [
        cleaning.remove_invisible,
        make("formatters.FTFYFormatter", normalization="NFC", fix_line_breaks=True),
    ],
    # One replacement each: with datatrove's several in turn, duplicates would differ.
    "pii": lambda cfg, at, n: [
        make("formatters.PIIFormatter", email_replacement="email@example.com", ip_replacement="22.214.171.124")
    ],
    "language": language,
    "length": lambda cfg, at, n: keep_if(functools.partial(cleaning.is_within, cfg.min_chars, cfg.max_chars)),
    "blocklist": lambda cfg, at, n: keep_if(cleaning.Blocklist(cfg.blocklist)),
    "gopher_repetition": lambda cfg, at, n: [make("filters.GopherRepetitionFilter", language=cfg.language)],
    "gopher": gopher,
    "c4": c4,
    "fineweb": lambda cfg, at, n: [
        make("filters.FineWebQualityFilter", line_punct_thr=cfg.min_line_ends, language=cfg.language)
    ],
    "perplexity": perplexity,
    "exact": exact,
    "lines": lines,
    "near": near,
    "decontaminate": decontaminate,
}


def stages_of(cfg, work, n):
    """[(name, parts, tasks)]: what datatrove runs one after the other. work: a folder for all that is between."""
    counts, stages = f"{work}/counts", []
    parts = [Watched("input", [Input(cfg, f"{work}/started.json")], counts)]
    for name in cfg.steps:
        step = STEPS[name](cfg, f"{work}/{name}", n)
        if isinstance(step, Across):
            stored = f"{work}/{name}/documents"
            parts += [*step.before, make("writers.JsonlWriter", stored), *step.after]
            stages += [(f"until_{name}", parts, n)]
            stages += [(f"{name}_{i}", found, tasks) for i, (found, tasks) in enumerate(step.find, 1)]
            parts, step = [Stored(stored)], step.drop
        parts.append(Watched(name, step, counts))
    return [*stages, ("to_the_end", [*parts, make("writers.JsonlWriter", f"{work}/text")], n)]


# ---- running


def main(cfg):
    cfg = cfg.clean
    if cfg.input is None:
        raise UserError("input is not set; give --input=FILE, a folder, a quoted glob or a URL")
    os.environ.setdefault("TQDM_DISABLE", "1")  # datatrove's own bars
    try:
        import datatrove.utils.word_tokenizers as tokenizers
        import ftfy, lxml_html_clean, py3langid, spacy, trafilatura  # noqa: E401, F401
    except ImportError as error:
        raise UserError(f"clean.py needs {error.name}; install what it uses with: pip install '.[clean]'") from error
    try:
        tokenizers.load_word_tokenizer(cfg.language).word_tokenize("a")
    except (ValueError, ImportError) as error:
        raise UserError(f"language {cfg.language} has no word splitter here ({error}); choose another") from error
    where = cfg.clean_dir if is_url(cfg.clean_dir) else os.path.abspath(cfg.clean_dir)
    folder, work = cleaning.folder_of(where), f"{where}/.work"
    with locked(where):
        found = find_files(cfg.input, Path(where), cleaning.ENDINGS)
        corpus = Corpus(cfg, None, found)
        if "html" not in cfg.steps and any(ending_of(p.name)[0] in (*cleaning.HTML, ".warc") for p in corpus.files):
            raise UserError(f"input {public(cfg.input)} has web pages, and steps lack html; begin --steps= with it")
        n = cfg.tasks or min(1000, corpus.bytes // TASK_BYTES + min(len(corpus.files), 16))
        settings = {name: value for name, value in as_dict(Settings(cfg)).items() if name not in OF_THE_MACHINES}
        settings |= {"input": public(cfg.input), "tasks": n}
        started = {"settings": json.loads(json.dumps(settings)), "input": corpus.inventory}
        check_same(started, folder, where)
        if folder.isfile("report.json"):
            return print_report(json.loads(folder.cat_file("report.json")), where, "is clean already")
        stages = stages_of(cfg, work, n)  # checks the settings of all steps, before a file is written
        started |= {"files": [os.path.abspath(path) for path in corpus.files], "left_out": corpus.left_out}
        if not folder.isfile(".work/started.json"):
            if "decontaminate" in cfg.steps:
                index_eval_texts(cfg, stages, work)
            with folder.open(".work/started.json", "wt") as file:
                json.dump(started, file)
        if run(cfg, stages, work):
            finish(started, folder, where, stages)


@contextlib.contextmanager
def locked(where):
    """Locks a local folder, without leaving one behind where nothing was begun."""
    if is_url(where):
        yield
        return
    path = Path(where, ".clean.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as file:
            if holder := lock_file(file):
                raise UserError(f"clean_dir {where} is in use by another clean.py, {holder}; wait for its end")
            yield
    except OSError as error:
        raise UserError(f"clean_dir {where} cannot be written to ({error.strerror}); use another") from error
    finally:
        if set(os.listdir(path.parent)) <= {path.name}:
            shutil.rmtree(path.parent)


def check_same(started, folder, where):
    """UserError where the folder was begun with other settings or another input."""
    for name in (".work/started.json", "report.json"):
        if folder.isfile(name):
            old = json.loads(folder.cat_file(name))
            changes = [
                f"{name}: {value} -> {started[part].get(name)}"
                for part in ("settings", "input")
                for name, value in old[part].items()
                if started[part].get(name) != value
            ]
            if changes:
                raise UserError(f"{where} was begun with others: {', '.join(changes)}; use another --clean_dir, or remove it")


def index_eval_texts(cfg, stages, work):
    """Writes the n-grams of eval_texts, which each task of decontaminate reads."""
    [step] = [part.parts[0] for _, parts, _ in stages for part in parts if getattr(part, "name", "") == "decontaminate"]
    texts = Corpus(cfg, None, find_files(cfg.eval_texts, Path(work)))
    read = [b''.join(p if not isinstance(p, bytes) else [p]).decode('utf-8', 'replace') for path in texts.files for p in texts.documents_of(path)]
    used = cleaning.write_ngrams(read, step, f"{work}/decontaminate/index")
    if not used:
        raise UserError(f"eval_texts {cfg.eval_texts} have no text of {cfg.eval_words} words; lower --eval_words")
    print(f"decontaminate: {used:,} of {len(read):,} texts have {cfg.eval_words} words or more", flush=True)


def run(cfg, stages, work):
    """Runs the stages, those tasks that an earlier run has not completed; whether all are complete."""
    executor, executors = None, []
    for name, parts, n in stages:
        executor = executor_of(cfg, parts, n, f"{work}/logs/{name}", executor)
        executors.append(executor)
    if cfg.executor == "slurm":
        left = {stage[0]: len(e.get_incomplete_ranks()) for stage, e in zip(stages, executors)}
        if sum(left.values()) == 0:
            return True
        executors[-1].run()
        print("submitted to Slurm; once its jobs have ended, the same command writes the report")
        return False
    from datatrove.utils.logging import logger
    from tqdm import tqdm

    logger.disable("datatrove")
    with tqdm(total=sum(n for *_, n in stages), unit="task", disable=None if sys.stderr.isatty() else True) as bar:
        for (name, _, n), executor in zip(stages, executors):
            bar.set_description(name)
            executor.depends = None
            executor.run()
            if left := len(executor.get_incomplete_ranks()):
                raise UserError(f"{left} of {n} tasks of {name} failed; see {work}/logs/{name}, and run it again")
            bar.update(n)
    return True


def executor_of(cfg, parts, n, logs, depends):
    """datatrove's executor of a stage."""
    if cfg.executor == "local":
        from datatrove.executor import LocalPipelineExecutor

        workers, method = min(cfg.workers or os.cpu_count(), n), "fork" if sys.platform == "linux" else "spawn"
        return LocalPipelineExecutor(parts, n, workers, logging_dir=logs, start_method=method)
    paths = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if cfg.executor == "ray":
        from datatrove.executor import RayPipelineExecutor

        env = {"runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}}}
        return RayPipelineExecutor(parts, n, cfg.workers or -1, logging_dir=logs, mem_per_cpu_gb=cfg.memory_gib, ray_remote_kwargs=env)
    from datatrove.executor import SlurmPipelineExecutor

    return SlurmPipelineExecutor(
        parts, n, cfg.slurm_time, cfg.slurm_partition, workers=cfg.workers or -1, mem_per_cpu_gb=math.ceil(cfg.memory_gib),
        job_name=os.path.basename(logs), qos=None, depends=depends, logging_dir=logs,
        env_command="\n".join(f"export {name}={value}" for name, value in paths.items()),
    )  # fmt: skip


# ---- the report


def finish(started, folder, where, stages):
    """Writes what the steps dropped and the report, and moves the text to its place."""
    rows, skipped = [], collections.Counter(started["left_out"])
    for step in [part for _, parts, _ in stages for part in parts if isinstance(part, Watched)]:
        counts, reasons, lengths, sample = (collections.Counter(), collections.Counter(), collections.Counter(), [])
        for path in folder.list_files(f".work/counts/{step.name}"):
            found = json.loads(folder.cat_file(path))
            counts.update(found["counts"])
            reasons.update(found["reasons"])
            lengths.update(found["lengths"])
            skipped.update(found["skipped"])
            sample += found["sample"]
        rows.append({"step": step.name, **{k: counts[k] for k in ("documents", "bytes", "dropped", "changed")}, "reasons": reasons, "lengths": lengths})
        if sample:
            with folder.open(f"dropped/{step.name}.jsonl", "wt") as file:
                for *_, record in sorted(sample, key=lambda s: -s[0])[:SAMPLES]:
                    file.write(json.dumps(record) + "\n")
    report = started | {"rows": rows, "skipped": skipped}
    if not is_url(where):
        write_picture(f"{where}/steps.png", (11, 5), draw_cleaning, rows)
    if not rows[-1]["documents"]:
        print_report(report, where, "has no document left")
        raise UserError(f"no document is left of {started['input']['files']} files; look at {where}/dropped and the reasons above")
    folder.makedirs("text", exist_ok=True)
    for name in folder.list_files(".work/text"):
        folder.mv(name, f"text/{os.path.basename(name)}")
    with folder.open("report.json", "wt") as file:
        json.dump(report, file)
    folder.rm(".work", recursive=True)
    print_report(report, where, "is clean")


def print_report(report, where, end):
    """Prints a table of the steps."""
    print(f"{'step':<18}{'documents':>12}{'dropped':>12}{'':>8}{'bytes':>18}{'less':>8}{'changed':>12}  reasons")
    before = None
    for row in report["rows"]:
        share = row["dropped"] / max(1, row["documents"] + row["dropped"])
        less = 1 - row["bytes"] / before if before else 0.0
        reasons = ", ".join(f"{why} {n:,}" for why, n in collections.Counter(row["reasons"]).most_common(4) if why != row["step"])
        print(f"{row['step']:<18}{row['documents']:>12,}{row['dropped']:>12,}{share:>8.1%}{row['bytes']:>18,}{less:>8.1%}{row['changed']:>12,}  {reasons}".rstrip())
        before = row["bytes"]
    for why, n in report["skipped"].items():
        print(f"  {n:,} {why}")
    print(f"{where} {end}; samples of what each step dropped are in {where}/dropped")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
