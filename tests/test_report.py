"""Reference curves, and the page of a run."""

import json
import math
import re
import shutil
import subprocess
import time
from html import escape, unescape
from html.parser import HTMLParser

import pytest

import config
import convert
import train
from config import UserError
from conftest import ROOT
from ranks import records, run, settings, write_data
from run.curves import draw_curves
from run.page import ticks, write_page
from run.reference import Curve, Reference

CURVES = sorted((ROOT / "docs" / "curves").glob("*.json"))
SHORT = {"eval_interval": 3, "max_steps": 9}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("report") / "data")


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The folder of a finished run."""
    return run(data_dir, tmp_path_factory.mktemp("finished"), **SHORT)


# ---- reference curves


@pytest.mark.parametrize("path", CURVES, ids=lambda path: path.stem)
def test_a_presets_reference_has_its_settings_and_a_source(path):
    curve = json.loads(path.read_text())
    cfg = config.load(train.Settings, [f"config/{path.stem}.py"])
    values = config.as_dict(cfg) | {"seq_len": cfg.data.seq_len or cfg.model.block_size}
    meant = {name: curve["comparable"][name] for name in ("objective", "batch_tokens", "seq_len", "eval_tokens")}
    assert meant == {name: values[name] for name in meant} and curve["source"] and curve["hardware"]
    assert cfg.model.vocab_size in (None, curve["comparable"]["vocab_size"]) and curve["comparable"]["dataset"]
    steps, losses = zip(*curve["val_loss"])
    assert [*steps] == sorted({*steps}) and steps[-1] >= cfg.optim.max_steps
    assert losses[0] == pytest.approx(math.log(curve["comparable"]["vocab_size"]), rel=0.03), "it starts untrained"
    assert losses[-1] == pytest.approx(min(losses), rel=0.02)


def test_gpt2s_reference_ends_at_the_published_loss():
    losses = json.loads((ROOT / "docs/curves/gpt2_124m.json").read_text())["val_loss"]
    assert losses[-1] == [19560, 3.2722] and "3.2722" in (ROOT / "config/gpt2_124m.py").read_text()


def test_losses_between_points_lie_on_a_line_over_the_logarithm_of_steps():
    curve = Curve("x", [(0, 10.0), (9, 5.0), (99, 3.0)])
    assert [curve.at(step) for step in (0, 9, 99)] == [10.0, 5.0, 3.0]
    assert curve.at(31) == pytest.approx(4.0, abs=0.02)  # 32 is about the root of 10 x 100
    assert curve.at(5) is None and curve.at(100) is None
    assert curve.until(50)[:2] == [(0, 10.0), (9, 5.0)] and curve.until(50)[2] == (50, curve.at(50))
    assert curve.until(200) == curve.points


def test_the_same_run_again_is_at_its_reference_at_each_evaluation(data_dir, finished, tmp_path, capsys):
    out_dir = run(data_dir, tmp_path, reference=finished, **SHORT)
    printed = capsys.readouterr().out
    assert f"reference  {finished}: val loss" in printed and "usual causes" not in printed
    assert printed.count("  +0.00 of the reference") == 4  # steps 0, 3, 6, 9
    assert records(out_dir, "reference_loss") == pytest.approx(records(out_dir, "val_loss"), abs=1e-4)


def test_a_curve_from_a_run_serves_as_a_presets_reference(data_dir, finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "docs" / "curves").mkdir(parents=True)
    path = tmp_path / "docs" / "curves" / "mine.json"
    convert.main(config.load(convert.Settings, [f"--out_dir={finished}", f"--to_curve={path}"]))
    assert [step for step, _ in json.loads(path.read_text())["val_loss"]] == [0, 3, 6, 9]
    monkeypatch.setattr("run.reference.ROOT", tmp_path)
    preset = str(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text("n_layer = 3\n")
    cfg = settings(data_dir, tmp_path / "run", preset)
    assert Reference(cfg).curve.at(9) == pytest.approx(records(finished, "val_loss")[9], abs=1e-4)
    other = Reference(settings(data_dir, tmp_path / "run", preset, batch_tokens=21))
    assert other.curve is None and "not compared: batch_tokens is 21, there 42\n" in other.line
    assert Reference(settings(data_dir, tmp_path / "run")).line == ""


def test_a_run_far_from_its_reference_hears_of_usual_causes_once(data_dir, finished, tmp_path, capsys):
    path = tmp_path / "curve.json"
    convert.main(config.load(convert.Settings, [f"--out_dir={finished}", f"--to_curve={path}"]))
    curve = json.loads(path.read_text())
    path.write_text(json.dumps(curve | {"val_loss": [[step, loss / 1.2] for step, loss in curve["val_loss"]]}))
    run(data_dir, tmp_path / "run", reference=path, **SHORT)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "usual causes" in line]
    assert line.startswith(f"warning    that is 20% above {path}; usual causes: a changed learning rate")


def test_what_is_no_curve_is_named(data_dir, finished, tmp_path):
    (tmp_path / "few.json").write_text('{"source": "", "hardware": "", "comparable": {}, "val_loss": [[1, 2.0]]}')
    (tmp_path / "log.jsonl").write_text('{"step": 0, "val_loss": 3.0}\n')
    for name, rule in (
        ("few.json", "two or more pairs"), ("none.json", "cannot be read as JSON"), ("", "train with this version"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rule):
            Reference(settings(data_dir, tmp_path / "run", reference=tmp_path / name))


def test_curves_show_the_reference_in_grey(tmp_path):
    from matplotlib.image import imread

    found, grey = [{"step": i, "mean_loss": 5 - i / 9, "val_loss": 5 - i / 9} for i in range(9)], []
    for reference in (None, Curve("x", [(0, 5.5), (3, 5.2), (20, 4.5)])):
        draw_curves(tmp_path, found, reference)
        pixels = (imread(tmp_path / "curves.png")[:, :, :3] * 255).round()
        grey.append(int((pixels == 128).all(axis=2).sum()))
    assert grey[1] > grey[0] + 100


# ---- the page


class Page(HTMLParser):
    """A page's texts, by the parser of the standard library; asserts that it is well-formed and stands alone."""

    EMPTY = {"meta", "line", "polyline"}

    def __init__(self, path):
        super().__init__()
        self.open, self.texts, self.tags = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"{self.open} are not closed"
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open += [] if tag in self.EMPTY else [tag]
        assert tag not in ("script", "link", "img", "iframe", "a", "base", "object")
        assert not [name for name, _ in attrs if name in ("src", "href") or name.startswith("on")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        assert tag in self.EMPTY

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        assert self.open[-1:] != ["style"] or not re.search(r"url\(|@import|http", data)


def test_a_runs_page_holds_its_figures_pictures_settings_and_command(data_dir, finished, tmp_path):
    page = Page(run(data_dir, tmp_path, reference=finished, **SHORT) / "report.html")  # without matplotlib
    assert page.tags.count("svg") == 4 and "finished: step 9 of 9" in page.text
    assert f"{records(tmp_path, 'val_loss')[9]:.4f}" in page.text and "reference ,  training ,  validation" in page.text
    assert "max_steps = 9" in page.text and "To continue python " in page.text and "1 x cpu" in page.text


HOSTILE = "</pre></title></style><script>alert(1)</script><img src=x onerror=alert(1)>&lt;"


def in_a_browser(html, folder):
    """(what a script of html's writes as its title, the lines of its console), without a screen."""
    (folder / "shown.html").write_text(html, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--dump-dom"]
    options += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", "--window-size=1000,900"]
    command = [shutil.which("chromium"), *options, (folder / "shown.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    title = re.search("<title>(.*?)</title>", done.stdout, re.S)
    return title and unescape(title[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_shows_the_page_without_an_error_on_a_telephone_and_in_the_dark(data_dir, finished, tmp_path):
    """At 400 pixels nothing is cut off; text and paper change places in dark mode."""
    page = (finished / "report.html").read_text(encoding="utf-8")
    title, errors = in_a_browser(page, tmp_path)
    assert title == re.search("<title>(.*?)</title>", page)[1] and not errors
    assert in_a_browser("<script>console.error('x')</script>", tmp_path)[1], "errors would be seen"

    style = "getComputedStyle(page.body)"
    found = f"[page.documentElement.scrollWidth, {style}.color, {style}.backgroundColor, page.querySelectorAll('svg').length]"
    script = f"page = document.querySelector('iframe').contentDocument; document.title = {found}.join('|')"
    frame = f'srcdoc="{escape(page)}" onload="{escape(script)}"'
    colours = []
    for scheme in ("light", "dark"):
        style = f"border: 0; width: 400px; height: 900px; color-scheme: {scheme}"
        title, errors = in_a_browser(f'<title></title><iframe style="{style}" {frame}></iframe>', tmp_path)
        width, ink, paper, n_pictures = title.split("|")
        assert int(width) <= 400 and int(n_pictures) >= 2 and not errors
        colours.append([sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)])
    (light_ink, light_paper), (dark_ink, dark_paper) = colours
    assert light_ink < 200 < 600 < light_paper and dark_paper < 200 < 600 < dark_ink


def test_texts_in_a_page_are_shown_and_never_become_html(tmp_path):
    out_dir = tmp_path / HOSTILE.replace("/", "")
    out_dir.mkdir()
    (out_dir / "config.py").write_text(f"a = {HOSTILE!r}\n")
    start = {"start": HOSTILE, "step": 0, "command": HOSTILE, "devices": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    found = [start | {"changes": [HOSTILE]}, {"step": 1, "skipped": HOSTILE}, {"step": 2, "sample/0": HOSTILE}]
    write_page(out_dir, found, HOSTILE)
    page = Page(out_dir / "report.html")
    assert page.texts.count(HOSTILE) >= 2  # how it stands, and the sample


def test_the_page_names_skipped_steps_rollbacks_crashes_and_the_newest_samples(tmp_path):
    (tmp_path / "crash_20260101_000000_rank_0.txt").touch()
    found = [
        {"start": "then", "step": 0, "command": "train.py", "devices": "8 x H100"},
        {"step": 1, "sample/0": "old"}, {"step": 3, "skipped": "loss nan, gradient norm 1"},
        {"step": 2, "went_back_to": 2}, {"step": 4, "val_loss": "odd", "lr": None, "loss": float("nan")},
        {"step": 5, "sample/0": "To be", "sample/1": "or not"},
    ]  # fmt: skip
    write_page(tmp_path, found, "running")
    text = Page(tmp_path / "report.html").text
    for line in (
        "skipped step 3: loss nan", "rolled back to step 2", "crash report crash_20260101_000000_rank_0.txt", "To be",
        "or not", "torchrun (as before, 8 ranks) train.py",
    ):  # fmt: skip
        assert line in text
    assert "old" not in text


def test_pictures_hold_every_point_but_the_firsts_height(tmp_path):
    warmup = [{"step": i, "lr": min(i, 5) / 5, "mean_loss": 99 if i < 2 else 4.0} for i in range(1, 101)]
    write_page(tmp_path, warmup, "running")
    text = (tmp_path / "report.html").read_text()
    loss, lr = (
        [[float(n) for n in at.split(",")] for at in re.search(rf'"{name}" points="([^"]+)"', text)[1].split()]
        for name in ("mean_loss", "lr")
    )
    assert all(58 <= x <= 412 and 0 <= y <= 204 for x, y in loss + lr) and len(loss) == len(lr) == 101
    assert loss[0][1] == 0.0 and loss[1][1] > 100 and lr[0][1] > lr[4][1] == lr[-1][1]


def test_an_empty_log_has_a_page_too(tmp_path):
    write_page(tmp_path, [], "running")
    assert "Evaluations" in Page(tmp_path / "report.html").text


def test_the_page_of_a_run_that_failed_says_so(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("train.train_step", lambda *args: 1 // 0)  # an error in the code
    with pytest.raises(ZeroDivisionError):
        run(data_dir, tmp_path)
    assert "ended by ZeroDivisionError" in Page(tmp_path / "report.html").text


def test_the_page_shows_the_samples_of_its_own_evaluation(tmp_path, monkeypatch):
    written = []

    def write(out_dir, *rest):
        write_page(out_dir, *rest)
        written.append(Page(out_dir / "report.html").text)

    monkeypatch.setattr("run.log.write_page", write)  # to see each page
    data_dir = write_data(tmp_path / "data", vocab_size=261)
    run(data_dir, tmp_path / "run", vocab_size=261, sample_prompts="a</b", sample_tokens=2, max_steps=1)
    assert ["a</b" in text and "Samples" in text for text in written] == [True, True, True], "one page for each evaluation, one for the end"


def test_a_page_that_cannot_be_written_ends_no_run(data_dir, tmp_path, capsys):
    (tmp_path / ".report.html").mkdir()
    run(data_dir, tmp_path, **SHORT)
    assert capsys.readouterr().err.count("warning: report.html failed (IsADirectoryError") == 1
    assert (tmp_path / "finished").exists() and not (tmp_path / "report.html").exists()


def test_a_long_log_makes_a_small_page_in_a_moment(tmp_path):
    found = [{"step": i, "mean_loss": 3 + 1 / i, "val_loss": 3.0, "grad_norm": 0.5} for i in range(1, 20_000)]
    start = time.process_time()
    write_page(tmp_path, found, "running")
    assert time.process_time() - start < 2 and (tmp_path / "report.html").stat().st_size < 100_000


@pytest.mark.parametrize("low, high", [(0, 7), (2.95, 3.01), (-1e-4, 1e-3), (0, 600_000), (5, 5.0001)])
def test_ticks_are_a_few_round_numbers_within_the_range(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high
    digits = f"{found[1] - found[0]:.1e}"[:3]
    assert digits in ("1.0", "2.0", "5.0")
