"""Cleaning: what each step finds and spares of planted faults, the same text by any workers, restarts, refusals."""

import contextlib
import fcntl
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

import clean
import config
import prepare
import train
from config import UserError
from conftest import ROOT
from interop.score import open_scorer
from pages import WORDS, document, page, words_of
from ranks import settings, without_matplotlib

pytest.importorskip("datatrove", reason="datatrove is absent: pip install '.[clean]'")

GERMAN = (
    "Der Bürgermeister erklärte gestern, dass die neue Brücke über den Fluss erst im nächsten Jahr fertig wird. Viele "
    "Einwohner sind darüber nicht glücklich, weil sie jeden Morgen einen langen Umweg fahren müssen. "
)
FRENCH = (
    "Le maire a déclaré hier que le nouveau pont sur la rivière ne serait pas terminé avant l'année prochaine. Beaucoup "
    "d'habitants ne sont pas contents, parce qu'ils doivent faire un long détour chaque matin. "
)




@pytest.fixture(autouse=True)
def no_picture_in_quick_tests(request):
    with contextlib.nullcontext() if request.node.get_closest_marker("slow") else without_matplotlib():
        yield


GOOD = {f"good{i}": document(f"good{i}") for i in range(60)}


def run(tmp_path, documents, steps, *argv, workers=1, out="out"):
    """Cleans documents; returns (the clean texts by their first words, {step: dropped samples})."""
    source = tmp_path / "in.jsonl"
    if not source.exists():
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return clean_up(tmp_path / out, f"--input={source}", f"--steps={steps}", f"--workers={workers}", *argv)


def clean_up(folder, *argv):
    clean.main(config.load(clean.Settings, [f"--clean_dir={folder}", *argv]))
    return texts_in(folder), dropped_in(folder)


def texts_in(folder):
    return [
        json.loads(line)["text"] for path in sorted((folder / "text").iterdir()) for line in gzip.open(path, "rt")
    ]


def dropped_in(folder):
    paths = (folder / "dropped").glob("*.jsonl")
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}


def names(texts):
    return {text.split()[0] for text in texts}


# ---- what each step finds and spares

BOILERPLATE = {
    "gopher": {f"short{i}": f"short{i} Home About Contact the and of" for i in range(9)},
    "gopher_repetition": {f"twice{i}": f"twice{i} Click here to read the story of the day.\n" * 30 for i in range(9)},
    "c4": {f"lorem{i}": document(f"lorem{i}") + "\nLorem ipsum dolor sit amet." for i in range(9)},
    "fineweb": {f"menu{i}": f"menu{i} " + "\n".join(random.Random(i).choices(WORDS, k=90)) for i in range(9)},
    "length": {f"tiny{i}": f"tiny{i} The end." for i in range(9)},
    "language": {f"fremd{i}": f"fremd{i} " + (GERMAN, FRENCH)[i % 2] * 3 for i in range(9)},
    "blocklist": {f"spam{i}": document(f"spam{i}") + "\nWin a Free,  PRIZE today." for i in range(9)},
}


@pytest.mark.parametrize("step", BOILERPLATE)
def test_each_filter_drops_all_of_its_planted_faults_and_none_of_the_good_documents(tmp_path, step):
    (tmp_path / "blocklist.txt").write_text("# phrases\nfree prize\ncasino\n")
    bad = BOILERPLATE[step]
    argv = [f"--blocklist={tmp_path / 'blocklist.txt'}"] if step == "blocklist" else []
    texts, dropped = run(tmp_path, [*GOOD.values(), *bad.values()], step, "--parts=2", *argv)
    assert names(texts) == set(GOOD)  # precision 1
    assert names(record["text"] for record in dropped[step]) == set(bad)  # recall 1


def test_repairs_restore_each_damaged_text_and_leave_the_good_ones_alone(tmp_path):
    good = {name: f"{text} Café naïve, “Ω” – 人 👩\u200d🚀 v1.2.3 at 10.0.0.1" for name, text in GOOD.items()}
    whole = [f"bad{i} The café’s naïve façade – déjà vu." for i in range(20)]
    damages = {
        "mojibake": lambda text: text.encode().decode("cp1252"),
        "decomposed": lambda text: text.replace("é", "e\u0301").replace("ç", "c\u0327"),
        "invisible": lambda text: "\ufeff" + text.replace("caf", "ca\u200bf").replace("na", "n\u00ada"),
        "control": lambda text: text.replace(" ", " \x07", 1) + "\r\n",
    }
    documents = [*good.values(), *(damage(text) for damage in damages.values() for text in whole)]
    texts, _ = run(tmp_path, documents, "fix,pii")
    assert texts[: len(good)] == list(good.values())
    assert [text.strip() for text in texts[len(good) :]] == whole * len(damages)


def test_addresses_of_people_and_machines_are_replaced_and_others_kept(tmp_path):
    texts, _ = run(tmp_path, ["mail jane.doe+x@uni-bonn.example.de or 8.8.8.8, not 192.168.0.1, me@home or 1.2.3"], "pii")
    assert texts == ["mail email@example.com or 22.214.171.124, not 192.168.0.1, me@home or 1.2.3"]


def test_one_of_each_group_of_exact_duplicates_is_kept_wherever_they_stand(tmp_path):
    copies = [text for i, text in enumerate(GOOD.values()) for _ in range(i % 4)]
    documents = [*GOOD.values(), *copies, *(text + " " for text in list(GOOD.values())[:5])]
    random.Random(0).shuffle(documents)
    texts, dropped = run(tmp_path, documents, "exact", "--parts=5")
    assert sorted(texts) == sorted(set(documents)) and len(dropped["exact"]) == len(copies)


def test_repeated_lines_are_dropped_but_their_first_and_short_ones(tmp_path):
    banner, short, numbered = "Subscribe to our newsletter for more such stories.", "Read more", "This is part 7 of 9 parts."
    documents = [f"{text}\n{banner}\n{short}\n{numbered.replace('7', str(i))}" for i, text in enumerate(GOOD.values())]
    texts, dropped = run(tmp_path, documents, "lines", "--parts=3")
    without = [document.replace(f"\n{banner}", "") for document in documents]
    assert dropped == {} and len(texts) == len(documents)
    assert len(set(texts) - set(without)) == 1 and sum(banner in text for text in texts) == 1


def shingles(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def similarity(a, b):
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b)


def altered(text, least):
    """A copy with words replaced one by one, as long as its Jaccard similarity is at least this."""
    words, copy = text.split(" "), text
    for i in random.Random(text).sample(range(1, len(words)), len(words) - 1):
        words[i] = "zebra"
        if similarity(text, " ".join(words)) < least:
            break
        copy = " ".join(words)
    return copy


@pytest.mark.parametrize(("least", "promised"), [
    (0.9, (0.95, 1)), pytest.param(0.5, (0, 0.2), marks=pytest.mark.slow),
])  # fmt: skip
def test_near_duplicates_are_found_as_often_as_minhash_promises_and_unrelated_ones_kept(tmp_path, least, promised):
    originals = {f"good{i}": document(f"good{i}", 20) for i in range(60)}
    copies = [altered(text, least) for text in originals.values()]
    assert all(least <= similarity(*pair) < least + 0.05 for pair in zip(originals.values(), copies))
    texts, _ = run(tmp_path, [*originals.values(), *copies], "near", "--parts=2")
    assert names(texts) == set(originals)  # one of each is kept, of either text
    assert promised[0] <= 2 - len(texts) / len(originals) <= promised[1]
    assert promised[0] <= 1 - (1 - least**8) ** 14 <= promised[1]


def test_documents_that_share_13_words_with_evaluation_texts_are_dropped_and_those_with_12_kept(tmp_path):
    question = words_of(random.Random(7), 40)
    (tmp_path / "eval.txt").write_text(" ".join(question))
    inside = {f"leak{i}": f"{document(f'leak{i}')} {' '.join(question[i : i + 13]).upper()}!" for i in range(20)}
    less = {f"less{i}": f"{document(f'less{i}')} {' '.join(question[i : i + 12])}." for i in range(20)}
    documents = [*GOOD.values(), *inside.values(), *less.values()]
    texts, dropped = run(tmp_path, documents, "decontaminate", f"--eval_texts={tmp_path / 'eval.txt'}", "--parts=2")
    assert names(texts) == set(GOOD) | set(less)
    assert names(record["text"] for record in dropped["decontaminate"]) == set(inside)


@pytest.mark.slow
def test_documents_that_a_model_finds_likeliest_are_kept(tmp_path):
    (tmp_path / "good.txt").write_text("\n".join(GOOD.values()))
    argv = [f"--input={tmp_path / 'good.txt'}", f"--data_dir={tmp_path / 'data'}", "--tokenizer=byte", "--workers=1"]
    prepare.main(config.load(prepare.Settings, argv))
    train.main(settings(tmp_path / "data", tmp_path / "run", vocab_size=None, max_steps=40, lr_decay_steps=40))
    letters = [f"bad{i} " + "".join(random.Random(i).choices("qwxz#%&{}0123456789JQ", k=300)) for i in range(20)]
    argv = [f"--perplexity_run={tmp_path / 'run'}", "--perplexity_keep=0.75", "--parts=3"]
    texts, dropped = run(tmp_path, [*GOOD.values(), *letters], "perplexity", *argv)
    assert names(texts) == set(GOOD) and names(record["text"] for record in dropped["perplexity"]) == names(letters)
    score = open_scorer(str(tmp_path / "run"))
    for record in dropped["perplexity"][:3]:
        assert record["metadata"]["nats_per_token"] == pytest.approx(score([record["text"]])[0], rel=1e-5)


# ---- pages

def write_warc(path, pages):
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    with open(path, "wb") as file:
        writer = WARCWriter(file, gzip=path.suffix == ".gz")
        for name, text in pages.items():
            headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.0")
            with open(path.with_suffix(".tmp"), "wb+") as payload:
                payload.write(text.encode())
                payload.seek(0)
                kind = "conversion" if ".wet" in path.name else "response"
                identified = {"WARC-Identified-Payload-Type": "text/plain" if kind == "conversion" else "text/html"}
                record = writer.create_warc_record(
                    f"http://example.com/{name}", kind, payload=payload, warc_headers_dict=identified,
                    http_headers=headers if kind == "response" else None,
                )  # fmt: skip
                writer.write_record(record)
    path.with_suffix(".tmp").unlink()


@pytest.fixture
def pages(tmp_path):
    """A folder of pages in every kind of file, some without text."""
    folder = tmp_path / "pages"
    (folder / "deep").mkdir(parents=True)
    for i in range(4):
        (folder / "deep" / f"{i}.html").write_text(page(f"html{i}"))
    (folder / "latin.htm").write_bytes(
        page("latin0").replace("<head>", '<head><meta charset="iso-8859-1">').replace("</article>", "<p>Die schöne Straße "
        "führt über die Brücke, und dort wohnt die größte Bäckerei für süße Brötchen.</p></article>").encode("latin-1")
    )
    (folder / "fragment.html").write_text(f"<p>{document('fragment0')}</p>")
    (folder / "empty.html").write_text("<html><body><nav></nav></body></html>")
    write_warc(folder / "a.warc.gz", {f"warc{i}": page(f"warc{i}") for i in range(4)})
    write_warc(folder / "b.warc.wet.gz", {f"wet{i}": document(f"wet{i}") for i in range(4)})
    (folder / "c.jsonl").write_text(json.dumps({"text": page("json0")}) + "\n" + json.dumps({"text": document("json1")}))
    (folder / "cut.warc.gz").write_bytes((folder / "a.warc.gz").read_bytes()[:1500])
    return folder


def test_text_of_pages_comes_out_of_every_kind_of_file_without_navigation(pages, tmp_path, capsys):
    texts, dropped = clean_up(tmp_path / "out", f"--input={pages}", "--steps=html", "--parts=2", "--workers=1")
    expected = {f"{kind}{i}" for kind in ("html", "warc", "wet") for i in range(4)}
    expected |= {"latin0", "fragment0", "json0", "json1"}
    assert names(texts) - {"warc0"} == expected - {"warc0"}
    assert not any(word in text for text in texts for word in ("About us", "Copyright", "var x", "<"))
    assert any("schöne Straße führt" in text for text in texts)
    assert [record["id"].endswith("empty.html/0") for record in dropped["html"]] == [True]
    assert "1 files cut short, damaged or unreadable" in capsys.readouterr().out


# ---- one run, however it is divided

ALL = "html,fix,pii,language,length,gopher_repetition,gopher,c4,fineweb,exact,near,lines"


@pytest.fixture
def planted(tmp_path):
    """A folder of four files with good documents and each kind of fault."""
    rng = random.Random(0)
    documents = [*GOOD.values(), *list(GOOD.values())[:7], *(altered(text, 0.9) for text in list(GOOD.values())[20:30])]
    documents += [text for step in BOILERPLATE for text in BOILERPLATE[step].values() if step != "blocklist"]
    documents += [page(f"page{i}") for i in range(5)]
    rng.shuffle(documents)
    (tmp_path / "planted").mkdir()
    for i in range(4):
        lines = [json.dumps({"text": text}) for text in documents[i::4]]
        (tmp_path / "planted" / f"{i}.jsonl").write_text("\n".join(lines))
    return tmp_path / "planted"


@pytest.mark.slow
def test_preset_on_one_and_two_workers_writes_the_same_documents_and_the_report_adds_up(planted, tmp_path, capsys):
    argv = [str(ROOT / "config/clean_web.py"), f"--input={planted}", f"--steps={ALL}"]
    ran = [clean_up(tmp_path / f"out{n}", *argv, f"--workers={n}") for n in (1, 2)]
    assert ran[0] == ran[1] and len(ran[0][0]) == 65
    assert names(ran[0][0]) == set(GOOD) | {f"page{i}" for i in range(5)}
    report = json.loads((tmp_path / "out1" / "report.json").read_text())
    rows = report["rows"]
    assert [row["step"] for row in rows] == ["input", *ALL.split(",")]
    for before, row in zip(rows, rows[1:]):
        assert before["documents"] == row["documents"] + row["dropped"]
        assert sum(row["reasons"].values()) == row["dropped"] == len(ran[0][1].get(row["step"], []))
        assert sum(row["lengths"].values()) == row["documents"]
    assert rows[-1]["bytes"] == sum(len(text.encode()) for text in ran[0][0])
    assert (tmp_path / "out1" / "steps.png").stat().st_size > 10_000 and not (tmp_path / "out1" / ".work").exists()
    assert re.search(r"\nc4 +82 +9 +9.9% .* lorem_ipsum 9\n", capsys.readouterr().out)
    clean_up(tmp_path / "out1", *argv)
    assert "is clean already" in capsys.readouterr().out


@pytest.mark.slow
def test_workers_do_not_change_the_text(planted, tmp_path):
    argv = [f"--input={planted}", "--steps=html,fix,exact", "--parts=3"]
    ran = [clean_up(tmp_path / f"out{n}", *argv, f"--workers={n}") for n in (1, 2)]
    assert ran[0] == ran[1] and len(ran[0][0]) == 129


@pytest.mark.slow
def test_tasks_that_outnumber_the_files_share_their_documents(planted, tmp_path):
    few, many = (clean_up(tmp_path / n, f"--input={planted}", "--steps=fix,exact", f"--parts={n}")[0] for n in "27")
    assert sorted(few) == sorted(many)


def test_at_most_100_dropped_documents_of_a_step_are_kept_and_they_do_not_depend_on_the_tasks(tmp_path):
    documents = [*GOOD.values(), *(f"tiny{i}" for i in range(250))]
    samples = [run(tmp_path, documents, "length", f"--parts={n}", out=f"out{n}")[1]["length"] for n in (1, 3)]
    assert samples[0] == samples[1] and len({record["text"] for record in samples[0]}) == 100
    assert max(int(record["text"][4:]) for record in samples[0]) > 200  # not the first ones
    assert {record["reason"] for record in samples[0]} == {"too short"}


def processes_of(folder):
    listed = subprocess.run(["ps", "-eo", "pid,args", "-ww"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(folder) in line and "clean.py" in line]


def is_locked(folder):
    with open(folder / ".clean.lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.slow
def test_killed_run_continues_with_the_tasks_that_are_left_and_ends_with_the_same_text(planted, tmp_path):
    argv = [f"--input={planted}", "--steps=fix,pii,exact", "--parts=40"]
    whole = clean_up(tmp_path / "whole", *argv, "--workers=1")
    out = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "clean.py"), *argv, f"--clean_dir={out}", "--workers=2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    done = out / ".work" / "logs" / "until_exact" / "completions"
    while process.poll() is None and not (done.is_dir() and len(list(done.iterdir())) >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "text").exists(), "nothing half-written has its name"
    completed = {path.name for path in done.iterdir()}
    times = {name: (out / ".work" / "counts" / "fix" / f"{name}.json").stat().st_mtime_ns for name in completed}
    assert 3 <= len(completed) < 40
    with pytest.raises(UserError, match="begun otherwise: steps .*; use another --clean_dir, or remove it"):
        clean_up(out, *argv, "--steps=fix,exact")
    while processes_of(out) or is_locked(out):  # workers end with their parent, or the restart below would not wait
        time.sleep(0.01)
    finish, seen = clean.finish, {}

    def look(*args):
        counts = out / ".work" / "counts" / "fix"
        seen.update({name: (counts / f"{name}.json").stat().st_mtime_ns for name in times})
        finish(*args)

    clean.finish = look
    try:
        assert clean_up(out, *argv, "--workers=1") == whole
    finally:
        clean.finish = finish
    assert seen == times, "completed tasks are not run again"


def test_clean_text_is_prepared_as_it_is(planted, tmp_path):
    texts, _ = clean_up(tmp_path / "out", f"--input={planted}", "--steps=html,fix,exact")
    argv = [f"--input={tmp_path / 'out' / 'text'}", f"--data_dir={tmp_path / 'data'}", "--tokenizer=byte", "--workers=1"]
    prepare.main(config.load(prepare.Settings, argv))
    splits = json.loads((tmp_path / "data" / "meta.json").read_text())["splits"]
    assert sum(split["documents"] for split in splits.values()) == len(texts)
    assert sum(split["bytes"] for split in splits.values()) == sum(len(text.encode()) for text in texts)


# ---- refusals

@pytest.mark.parametrize(("argv", "expected"), [
    (["--steps=fix,gofer"], "steps names 'gofer'; it may name html, fix, pii,"),
    (["--steps=fix,exact,fix"], "steps names fix twice; name it once"),
    (["--steps="], "steps is empty; name some of html, fix"),
    (["--steps=perplexity"], "steps names perplexity, but perplexity_run is none; set --perplexity_run=, or leave"),
    (["--steps=decontaminate"], "steps names decontaminate, but eval_texts is none; set --eval_texts=, or leave"),
    (["--language_threshold=1.5"], "language_threshold is 1.5; it must be at least 0 and below 1"),
    (["--min_chars=9", "--max_chars=8"], "min_chars is 9, above max_chars, 8; lower it"),
    (["--near_bands=0"], "near_bands is 0; it must be at least 1"),
    (["--executor=slurm"], "executor is slurm, but slurm_partition is none; set --slurm_partition="),
    (["--steps=language", "--language_model=lid.bin"], "language_model lid.bin is no fastText model"),
    (["--steps=language", "--language_model={text}"], "has wrong file format!); give a fastText model"),
    (["--steps=language", "--language=zz"], "language zz has no word splitter here"),
    (["--steps=language", "--language=bar"], "language bar is unknown to py3langid; its 1"),
    (["--steps=blocklist", "--blocklist=none.txt"], "blocklist none.txt cannot be read as UTF-8 text"),
    (["--steps=blocklist", "--blocklist={empty}"], "has no words; write a word or phrase a line"),
    (["--steps=perplexity", "--perplexity_run={tmp}"], "checkpoint|config.json"),
    (["--input=absent/*.txt"], "input absent/*.txt names no file; check the path"),
    (["--input={html}", "--steps=fix"], "has web pages, and steps lack html; begin --steps= with it"),
    (["--input=none"], "input is not set; give --input=FILE"),
    (["--clean_dir={text}/x"], "cannot be written to"),
])  # fmt: skip
def test_wrong_setting_is_one_line_and_nothing_is_written(tmp_path, argv, expected):
    files = {name: tmp_path / name for name in ("text", "empty", "html")}
    files["text"].write_text("words " * 99)
    files["empty"].write_text("# nothing\n")
    files["html"] = tmp_path / "a.html"
    files["html"].write_text(page("a"))
    argv = [arg.format(tmp=tmp_path, **files) for arg in argv]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        clean_up(tmp_path / "out", f"--input={files['text']}", *argv)
    [line] = error.value.args
    assert re.search(expected if "|" in expected or ".*" in expected else re.escape(expected), line)
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setattr(clean.importlib.util, "find_spec", lambda name: None if name in ("spacy", "ftfy") else name)
    with pytest.raises(UserError, match=r"clean.py needs ftfy, spacy; install all .*: pip install '\.\[clean\]'"):
        clean_up(tmp_path / "out", "--input=x.txt")


def test_page_without_text_leaves_no_document_and_says_which_step_dropped_it(tmp_path):
    (tmp_path / "empty.html").write_text("<html><body><nav></nav></body></html>")
    with pytest.raises(UserError, match="no document is left of .*empty.html: html dropped the last ones; change --steps"):
        clean_up(tmp_path / "out", f"--input={tmp_path / 'empty.html'}", "--steps=html,exact")
    assert not (tmp_path / "out" / "text").exists() and len(dropped_in(tmp_path / "out")["html"]) == 1


def test_text_in_another_encoding_is_one_line_and_the_remedy_is_another_setting(tmp_path):
    (tmp_path / "in.txt").write_bytes("Съешь ещё этих мягких французских булок. ".encode("cp1251") * 20)
    with pytest.raises(UserError, match="in.txt is not utf-8 text: .*; it looks like .*: set --encoding="):
        clean_up(tmp_path / "out", f"--input={tmp_path / 'in.txt'}", "--steps=fix", "--workers=1")
    assert not (tmp_path / "out" / "text").exists()


def test_second_clean_in_a_folder_is_refused_while_the_first_one_works(tmp_path):
    (tmp_path / "in.txt").write_text("words " * 99)
    with clean.locked(str(tmp_path / "out")):
        with pytest.raises(UserError, match="is in use by another clean.py, process [0-9]+ on .*; wait for its end"):
            clean_up(tmp_path / "out", f"--input={tmp_path / 'in.txt'}", "--steps=fix")


@pytest.mark.slow
def test_slurm_jobs_write_what_local_processes_do_and_the_same_command_then_reports(planted, tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    # Stand-ins for Slurm's commands: a job runs when it is submitted, each of its array's tasks after the other.
    sbatch = """#!/bin/bash
for last; do :; done
for i in $(seq 0 $(sed -n 's/.*--array=0-\\([0-9]*\\).*/\\1/p' $last)); do
  SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here bash $last >> {log} 2>&1
done
echo Submitted batch job 7
"""
    srun = '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n'
    for name, text in {"sbatch": sbatch, "srun": srun, "scontrol": "#!/bin/bash\necho here\n"}.items():
        (tmp_path / "bin" / name).write_text(text.replace("{log}", str(tmp_path / "slurm.log")))
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    argv = [f"--input={planted}", "--steps=fix,exact", "--parts=2"]
    slurm = [f"--clean_dir={tmp_path / 'slurm'}", *argv, "--executor=slurm", "--slurm_partition=cpu"]
    clean.main(config.load(clean.Settings, slurm))
    assert "6 tasks are submitted to Slurm" in capsys.readouterr().out
    clean.main(config.load(clean.Settings, slurm))
    assert texts_in(tmp_path / "slurm") == clean_up(tmp_path / "local", *argv)[0]
