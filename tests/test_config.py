"""Settings of scripts: precedence, values, help, and the answer to each mistake."""

import ast
import dataclasses
import re
import subprocess
import sys

import pytest
import torch

import bench
import clean
import compress
import config
import convert
import data
import evaluate
import finetune
import plan
import prepare
import sample
import train
from conftest import ROOT
from model import Transformer

SCRIPTS = {
    "train": train, "prepare": prepare, "sample": sample, "bench": bench, "plan": plan, "convert": convert,
    "clean": clean, "compress": compress, "evaluate": evaluate, "finetune": finetune,
}  # fmt: skip
PRESETS = sorted(f"config/{path.name}" for path in (ROOT / "config").glob("[!_]*.py"))


def load(*argv, script=train):
    return config.load(script.Settings, [str(arg) for arg in argv])


def mistakes(*argv, script=train):
    """The lines of the error that a command gets."""
    with pytest.raises(config.UserError) as caught:
        load(*argv, script=script)
    return str(caught.value).splitlines()


def mistake(*argv, script=train):
    (line,) = mistakes(*argv, script=script)
    return line


@pytest.fixture
def preset(tmp_path):
    """Writes a preset file and returns its path."""
    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)
    return write


# ---- precedence

def test_command_line_beats_later_preset_beats_earlier_preset_beats_default(preset):
    first = preset("n_layer = 3\nn_head = 3\nn_embd = 9\n", "first.py")
    second = preset("n_head = 5\nn_embd = 35\n", "second.py")
    cfg = load("--n_embd=55", first, second)
    assert (cfg.model.block_size, cfg.model.n_layer, cfg.model.n_head, cfg.model.n_embd) == (1024, 3, 5, 55)
    assert load(second, first).model.n_head == 3
    assert cfg.presets == (first, second)


def test_last_of_a_setting_given_twice_holds():
    assert load("--n_layer=3", "--n_layer=5").model.n_layer == 5


def test_preset_may_start_from_another_and_compute(preset):
    cfg = load(preset("from config.gpt2_124m import *\nn_layer = n_layer + 5\nbatch_tokens = 3 * block_size\n"))
    assert (cfg.model.n_layer, cfg.model.n_embd, cfg.data.batch_tokens, cfg.optim.warmup_steps) == (17, 768, 3072, 700)


def test_underscored_names_modules_functions_and_classes_of_a_preset_are_scratch(preset):
    cfg = load(preset("import math\nfrom math import sqrt\n_width = 7\ndef twice(x): return 2 * x\nclass Shape: pass\n"
                      "n_embd = twice(_width) * int(sqrt(math.pow(6, 2)))\n"))
    assert cfg.model.n_embd == 84


def test_presets_do_not_see_each_others_names(preset):
    first, second = preset("n_layer = 3\n", "first.py"), preset("n_head = n_layer\n", "second.py")
    assert "NameError" in mistake(first, second)


def test_preset_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("config/gpt2_124m.py").model.n_embd == 768


# ---- values on the command line

@pytest.mark.parametrize(("argument", "section", "value"), [
    ("--learning_rate=1", "optim", 1.0),
    ("--learning_rate=3e-4", "optim", 3e-4),
    ("--min_lr=0", "optim", 0.0),
    ("--max_steps=6e5", "optim", 600_000),
    ("--max_steps=1_000", "optim", 1000),
    ("--max_steps=0", "optim", 0),
    ("--out_dir=a=b", "run", "a=b"),
    ("--out_dir=7", "run", "7"),
    ("--out_dir=none", "run", None),
    ("--compile=false", "parallel", False),
    ("--compile=True", "parallel", True),
    ("--compile=auto", "parallel", None),
    ("--compile", "parallel", True),
    ("--precision=auto", "world", "auto"),
    ("--grad_clip=none", "optim", None),
    ("--grad_clip=2", "optim", 2.0),
    ("--save_interval=none", "checkpoint", None),
    ("--vocab_size=None", "model", None),
    ("--reshard", "parallel", True),
    ("--log_to=tensorboard, wandb", "log", ("tensorboard", "wandb")),
    ("--log_to=none", "log", None),
])  # fmt: skip
def test_command_line_value_becomes(argument, section, value):
    name = argument[2:].partition("=")[0]
    got = getattr(getattr(load(argument), section), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(("argument", "expected"), [
    ("--n_layer=x", "--n_layer must be a whole number, not 'x'"),
    ("--n_layer=2.5", "--n_layer must be a whole number, not 2.5"),
    ("--n_layer=", "--n_layer must be a whole number, not ''"),
    ("--n_layer=none", "--n_layer must be a whole number, not 'none'"),
    ("--n_layer=true", "--n_layer must be a whole number, not 'true'"),
    ("--learning_rate=fast", "--learning_rate must be a number, not 'fast'"),
    ("--learning_rate=nan", "--learning_rate must be a number, not nan"),
    ("--max_steps=inf", "--max_steps must be a whole number, not inf"),
    ("--grad_clip=off", "--grad_clip must be a number or none, not 'off'"),
    ("--reshard=1", "--reshard must be true or false, not '1'"),
    ("--optimizer=adam", "--optimizer must be one of adamw, muon, adafactor, sgd"),
    ("--n_layer", "--n_layer has no value; settings are written --n_layer=value"),
])  # fmt: skip
def test_wrong_type_on_the_command_line_names_the_expected_one(argument, expected):
    assert mistake(argument).startswith(expected)


def test_misspelt_choice_names_the_nearest_one():
    assert mistake("--optimizer=adam").endswith("did you mean adamw?")


def test_number_too_large_for_any_float_is_a_plain_error(preset):
    assert "must be a number" in mistake("--learning_rate=" + "9" * 400)
    assert "must be a whole number" in mistake("--max_steps=" + "9" * 400)
    assert "must be a number" in mistake(preset("learning_rate = 10**400"))


def test_space_for_the_equals_sign_is_answered_with_how_settings_are_written():
    stray, no_value = mistakes("--micro_batch_size", "32")
    assert no_value == "--micro_batch_size has no value; settings are written --micro_batch_size=value"
    assert stray.startswith("32: neither a preset file (.py) nor --name=value")
    stray, old_name = mistakes("--batch_size", "32")
    assert old_name.startswith("--batch_size is not a setting; micro_batch_size is") and stray.startswith("32:")


# ---- values in presets

@pytest.mark.parametrize(("assignment", "expected"), [
    ("n_layer = '32'", "n_layer must be a whole number, not '32'"),
    ("n_layer = True", "n_layer must be a whole number, not True"),
    ("n_layer = None", "n_layer must be a whole number, not None"),
    ("n_layer = 2.5", "n_layer must be a whole number, not 2.5"),
    ("n_layer = [3]", "n_layer must be a whole number, not [3]"),
    ("bias = 1", "bias must be true or false, not 1"),
    ("learning_rate = '1e-3'", "learning_rate must be a number, not '1e-3'"),
    ("learning_rate = False", "learning_rate must be a number, not False"),
    ("schedule = None", "schedule must be one of cosine, wsd, linear, constant, not None"),
    ("out_dir = 3", "out_dir must be text or none, not 3"),
])  # fmt: skip
def test_wrong_type_in_a_preset_names_the_file_and_the_expected_type(preset, assignment, expected):
    path = preset(assignment)
    assert mistake(path) == f"{path}: {expected}"


@pytest.mark.parametrize(("assignment", "value"), [
    ("learning_rate = 1", 1.0), ("learning_rate = 6e-4", 6e-4), ("max_steps = 6e5", 600_000),
    ("grad_clip = None", None),
])  # fmt: skip
def test_whole_and_fractional_numbers_serve_where_they_are_equal(preset, assignment, value):
    got = getattr(load(preset(assignment)).optim, assignment.partition(" ")[0])
    assert got == value and type(got) is type(value)


# ---- names

def test_unknown_setting_names_the_nearest_one(preset):
    assert mistake("--learning_rat=1") == "--learning_rat is not a setting; did you mean learning_rate?"
    path = preset("n_layers = 3")
    assert mistake(path) == f"{path}: n_layers is not a setting; did you mean n_layer?"


def test_unknown_setting_like_no_other_has_no_hint():
    assert mistake("--zzzzzz=1") == "--zzzzzz is not a setting"


@pytest.mark.parametrize(("old", "ours"), [
    ("max_iters", "max_steps"), ("lr_decay_iters", "lr_decay_steps"), ("warmup_iters", "warmup_steps"),
    ("batch_size", "micro_batch_size"), ("gradient_accumulation_steps", "batch_tokens"), ("eval_iters", "eval_tokens"),
    ("dataset", "data_dir"), ("dtype", "precision"), ("wandb_log", "log_to"),
])  # fmt: skip
def test_nanogpt_names_are_answered_with_ours(preset, old, ours):
    for line in (mistake(f"--{old}=1"), *([] if old == "dataset" else [mistake(preset(f"{old} = 1"))])):
        hint = line.partition(f"{old} is not a setting; ")[2]  # prepare.py has a dataset, so a preset may
        assert hint == f"did you mean {ours}?" or hint.startswith((f"{ours} ", f"{ours}="))


def test_the_setting_that_wandb_had_is_answered_with_log(preset):
    for line in (mistake("--wandb"), mistake(preset("wandb = False"))):
        assert line.endswith("wandb is not a setting; log_to=wandb logs to Weights & Biases")


def test_a_dashboard_that_does_not_exist_is_refused():
    assert mistake("--log_to=tensorbord,wandb") == "log_to names tensorbord; it must be tensorboard, wandb, or none"


def test_hint_for_the_batch_size_says_what_sets_the_size_of_a_step():
    for old in ("batch_size", "gradient_accumulation_steps"):
        assert "batch_tokens sets the size of a step" in mistake(f"--{old}=8")


def test_hints_name_settings_that_exist():
    everywhere = config._settings_everywhere()
    assert [hint for hint in config.NANOGPT_NAMES.values() if re.split(r"\W", hint)[0] not in everywhere] == []


def test_start_of_several_choices_is_answered_with_all_of_them():
    assert mistake("--gpu=a100", script=plan).endswith("; did you mean a100-40 or a100-80?")
    assert mistake("--wandb_=x").endswith("; did you mean wandb_project or wandb_run_name?")


def test_setting_of_another_script_is_refused_on_the_command_line_and_left_alone_in_a_preset(preset):
    assert mistake("--bpe_vocab_size=999").startswith("--bpe_vocab_size is a setting of prepare.py, not of this script")
    assert mistake("--temperature=1").startswith("--temperature is a setting of generation.py, not of this script")
    path = preset("bpe_vocab_size = 999\ntemperature = 1.0\nn_layer = 3\n")
    assert load(path).model.n_layer == 3
    assert load(path, script=sample).generation.temperature == 1.0


def test_script_that_takes_part_of_a_class_refuses_the_rest():
    assert load("--seed=7", script=sample).run.seed == 7
    assert "--keep_every is a setting of checkpoint.py, not of this script" in mistake("--keep_every=7", script=sample)


# ---- combinations and several mistakes

def test_impossible_combination_names_both_numbers_and_what_fits():
    line = mistake("--n_embd=35", "--n_head=6")
    assert "n_embd 35" in line and "n_head 6" in line and "5, 7 would fit" in line
    line = mistake("--min_lr=0.5", "--learning_rate=0.25")
    assert "min_lr 0.5" in line and "learning_rate 0.25" in line


def test_all_mistakes_of_a_command_are_listed_together(preset):
    path = preset("n_layers = 3\nn_head = '5'\n")
    lines = mistakes(path, "config/gpt2_124.py", "--max_iters=7", "--reshard=7", "--seq_len=0", "--beta1=7")
    names = ["n_layers", "n_head", "config/gpt2_124.py", "max_iters", "reshard", "seq_len", "beta1"]
    assert len(lines) == len(names)
    for name in names:
        assert any(name in line for line in lines), name


@pytest.mark.parametrize("argument", [
    "--block_size=0", "--n_layer=-1", "--dropout=1", "--beta2=1", "--learning_rate=-1", "--batch_tokens=0",
    "--micro_batch_size=0", "--eval_interval=0", "--keep_checkpoints=0", "--grad_clip=0",
])  # fmt: skip
def test_value_out_of_range_is_answered_with_name_value_and_rule(argument):
    name, _, value = argument[2:].partition("=")
    line = mistakes(argument)[0]
    assert name in line and value in line and "must" in line


# ---- words that are no settings

@pytest.mark.parametrize(("argv", "words", "first", "pattern"), [
    (["notes.txt"], "notes.txt", "notes.txt", "*.txt"),
    (["a.txt", "b.txt"], "a.txt b.txt", "a.txt", "*.txt"),
    (["--input=in/a.md", "in/b.md"], "in/b.md", "in/b.md", "in/*.md"),
    (["a", "b", "c", "d", "e"], "a b c and 2 more", "a", "*"),
])  # fmt: skip
def test_file_of_text_on_prepares_command_line_is_answered_with_input(tmp_path, monkeypatch, argv, words, first, pattern):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("raise SystemExit('ran')")
    told = f"name your text by --input={first}, or several files by a quoted glob: --input='{pattern}'"
    assert mistake(*argv, script=prepare) == f"{words}: neither a preset file (.py) nor --name=value; {told}"


def test_file_that_is_no_preset_is_refused_and_not_run(tmp_path):
    (tmp_path / "notes.txt").write_text("n_layer = 3")
    assert mistake(tmp_path / "notes.txt") == f"{tmp_path}/notes.txt: neither a preset file (.py) nor --name=value"
    (tmp_path / "x.json").write_text("n_layer = 3")
    assert mistake(tmp_path / "x.json").endswith("neither a preset file (.py) nor --name=value")
    files = load("--compare", "A.json", "B.json", script=bench).files
    assert files == ("A.json", "B.json")


# ---- preset files that do not run

def test_missing_preset_names_the_nearest():
    assert mistake("config/gpt2_124.py") == "config/gpt2_124.py: no such preset file; did you mean config/gpt2_124m.py?"


@pytest.mark.parametrize(("text", "expected"), [
    ("n_layer = 3\nn_head = = 3\n", "line 2: SyntaxError: invalid syntax"),
    ("n_layer = 3\n  n_head = 3\n", "line 2: IndentationError: unexpected indent"),
    ("n_layer = 3\n\nn_head = 3 // 0\n", "line 3: ZeroDivisionError: integer division or modulo by zero"),
    ("n_layer = 3\nn_head = undefined\n", "line 2: NameError: name 'undefined' is not defined"),
    ("import json\nn_layer = 3\nn_head = json.loads('{')\n", "line 3: JSONDecodeError: "),
    ("n_layer = 3\nfrom config.nothing import *\n", "line 2: ModuleNotFoundError: No module named 'config.nothing'"),
    ("n_layer = 3\nimport sys\nsys.exit()\n", "line 3: SystemExit: "),
    ("n_layer = 3\ndef f(x):\n    return 1 // x\nn_head = f(0)\n", "line 4: ZeroDivisionError: "),
])  # fmt: skip
def test_preset_that_fails_is_answered_with_its_own_line(preset, text, expected):
    path = preset(text)
    assert mistake(path).startswith(f"{path}, {expected}")


def test_mistake_in_a_preset_that_another_starts_from_names_the_former(preset, monkeypatch):
    base = preset("n_layer = 3\nn_head = 1 // 0\n", "base_of_mine.py")
    monkeypatch.syspath_prepend(base.rpartition("/")[0])
    assert mistake(preset("\n\n\nfrom base_of_mine import *\n")).startswith(f"{base}, line 2: ZeroDivisionError")


# ---- settings as a preset, as help

@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_settings_written_as_a_preset_load_to_the_same_settings(preset, script):
    argv = {
        "train": ["--out_dir=it's \"mine\" # 1", "--grad_clip=none", "--learning_rate=0.1", "--min_lr=1e-30"],
        "prepare": ["--input=a*.txt", "--doc_separator=\\n\\n", "--val_fraction=0.3"],
        "sample": ["--prompt=two\nlines", "--top_p=0.7"],
        "bench": ["--json=x.json", "--n_layer=3"],
        "convert": ["--to_hf=x", "--hf_dtype=bfloat16"],
        "plan": ["--json", "--gpu=a100-80", "--gpu_price=0.5"],
        "clean": ["--steps=fix,near", "--near_bands=20"],
        "evaluate": ["--tasks=hellaswag,blimp_*", "--limit=0.5", "--text=two\nlines"],
        "compress": ["--prune=heads", "--sparsity=0.3", "--to_run=x"],
        "finetune": ["--tsv_columns=a,b", "--freeze=embeddings,blocks.0-1", "--layer_decay=0.5"],
    }[script.__name__]  # fmt: skip
    cfg = load(*argv, script=script)
    again = load(preset(config.as_preset(cfg)), script=script)
    assert dataclasses.replace(again, presets=()) == dataclasses.replace(cfg, presets=())


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_help_lists_every_setting_with_its_value_and_its_comment(script):
    text = config.help_text(script.Settings, [], script.__doc__)
    assert text.startswith(script.__doc__.strip())
    assert config.help_text(script.Settings, [], None) == text  # as under python -OO, which drops docstrings
    comments = config.comments(script.Settings)
    for name, (_, field) in config.settings_of(script.Settings).items():
        shown = {"None": "none", "True": "true", "False": "false"}.get(str(field.default), str(field.default))
        shown = ",".join(field.default) if isinstance(field.default, tuple) else shown
        start = text.index(f"\n    --{name}={shown} ")
        shown = " ".join(text[start:].split("\n    --")[1].split("\n\n")[0].split())
        assert comments[name] in shown, f"{name} lacks its comment"


def test_help_lists_the_choices_of_a_setting():
    text = " ".join(config.help_text(train.Settings, [], "").split())
    assert "[gelu_tanh, gelu, swiglu, relu2]" in text and "[cosine, wsd, linear, constant]" in text
    assert "fineweb10b, none]" in config.help_text(prepare.Settings, [], "")


@pytest.mark.parametrize("columns", [100, 120])
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_settings_of_the_help_fit_the_screen(script, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert max(map(len, config.help_text(script.Settings, [], "").splitlines())) <= columns


def test_each_setting_is_declared_once_and_taken_by_a_script():
    owners = {}
    for path in config.project_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                for line in node.body:
                    if isinstance(line, ast.AnnAssign):
                        owners.setdefault(line.target.id, []).append(f"{path.name}:{node.name}")
    assert {name: where for name, where in owners.items() if len(where) > 1} == {}
    taken = set().union(*(config.settings_of(script.Settings) for script in SCRIPTS.values()))
    assert taken == set(owners) == set(config._settings_everywhere())


def test_every_setting_is_read_somewhere():
    """A setting that nothing reads would be a promise that nothing keeps."""
    read = set()
    for path in config.project_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                of_class = isinstance(node.value, ast.Name) and node.value.id == "self"  # __post_init__ only checks it
                read.add((node.attr, of_class))
    unread = [name for name in config._settings_everywhere() if (name, False) not in read]
    # what a class turns into something else itself
    assert [name for name in unread if (name, True) not in read] == []
    resolved = {"max_steps", "max_tokens", "n_inner", "n_kv_head", "head_dim", "json", "residual_bytes", "second_column"}
    compared = {"distill_cosine", "distill_hidden", "distill_attention"}
    assert set(unread) <= resolved | compared | {"window", "global_every", "data_schedule"}


# ---- the presets of the project

@pytest.mark.parametrize("preset", PRESETS)
def test_preset_loads_for_every_script_and_its_model_builds(preset):
    labels_texts = "task = " in (ROOT / preset).read_text()  # it has tables, not data to prepare
    scripts = {name: script for name, script in SCRIPTS.items() if not (labels_texts and name == "prepare")}
    loaded = {name: load(preset, script=script) for name, script in scripts.items()}
    cfg = loaded["train"]
    assert loaded["bench"].model == cfg.model
    assert labels_texts or loaded["prepare"].data.data_dir == cfg.data.data_dir
    model_cfg = cfg.model if cfg.model.vocab_size else dataclasses.replace(cfg.model, vocab_size=37)
    with torch.device("meta"):
        model = Transformer(model_cfg)
    assert model.num_params() > 0
    assert cfg.data.batch_tokens % (cfg.data.micro_batch_size * (cfg.data.seq_len or cfg.model.block_size)) == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_assigns_only_settings_and_none_twice(preset):
    assignments = [node for node in ast.parse((ROOT / preset).read_text()).body if isinstance(node, ast.Assign)]
    names = [target.id for node in assignments for target in node.targets]
    assert len(names) == len(set(names))
    assert {name for name in names if not name.startswith("_")} <= set(config._settings_everywhere())


@pytest.mark.parametrize(("preset", "millions"), [
    ("config/gpt2_124m.py", 124.439808), ("config/gpt2_350m.py", 354.823168), ("config/gpt2_774m.py", 774.030080),
    ("config/gpt2_1558m.py", 1557.6112), ("config/llama_8b.py", 8030.261248), ("config/llama_70b.py", 70553.706496),
])  # fmt: skip
def test_presets_have_the_published_parameter_counts(preset, millions):
    with torch.device("meta"):
        assert Transformer(load(preset).model).num_params() == round(millions * 1e6)


# ---- whole commands

def test_help_of_a_command_is_printed_and_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare.py", "config/quickstart.py", "--help", "--val_fraction=0.07"])
    config.run_script(lambda cfg: pytest.fail("ran"), prepare.Settings, prepare.__doc__)
    printed = capsys.readouterr().out
    assert "--val_fraction=0.07" in printed and "--dataset=stdlib" in printed


@pytest.mark.parametrize("argv", [[], ["notes.txt"], ["config/nothing.py"], ["--nothing=3"], ["--val_fraction=7"],
                                  ["--workers=x"]])  # fmt: skip
def test_help_is_printed_whatever_else_is_on_the_command_line(monkeypatch, capsys, argv):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *argv, "--help"])
    config.run_script(lambda cfg: pytest.fail("ran"), prepare.Settings, prepare.__doc__)
    printed = capsys.readouterr()
    assert "--text_field=text" in printed.out and printed.err == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_prints_its_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "-h"])
    config.run_script(lambda cfg: pytest.fail("ran"), sys.modules[script].Settings, sys.modules[script].__doc__)
    printed = capsys.readouterr()
    assert "Settings, written --name=value" in printed.out and printed.err == ""


def test_preparing_data_imports_no_torch():
    code = "import prepare, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_help_alone_ends_with_code_0():
    done = subprocess.run([sys.executable, "prepare.py", "-h"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "Settings, written --name=value" in done.stdout


def test_wrong_command_ends_with_code_2_and_a_line_for_each_mistake():
    argv = [sys.executable, "train.py", "config/quickstart.py", "--max_iters=7", "--n_head=7"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 2), done.stderr
    assert lines[0] == "error: --max_iters is not a setting; did you mean max_steps?"
    assert lines[1].startswith("error: n_embd 256 is not a multiple of n_head 7; ")


def test_error_other_than_a_user_error_keeps_its_traceback():
    code = (
        "import config, prepare\nfrom text import corpus\n"
        "config.run_script(lambda cfg: list(corpus._split_file([b'x'], b'', 9)), prepare.Settings, '')"
    )
    done = subprocess.run([sys.executable, "-c", code, "--input=x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "in _split_file" in done.stderr
    assert done.stderr.endswith("ValueError: empty separator\n")


def test_settings_that_do_not_fit_each_other_are_listed_with_the_other_mistakes():
    with pytest.raises(config.UserError) as error:
        config.load(train.Settings, ["--seq_len=999", "--block_size=128", "--lerning_rate=1"])
    assert "seq_len 999 is above block_size 128" in str(error.value)
    assert "--lerning_rate is not a setting" in str(error.value)


def test_a_number_outside_the_range_of_its_type_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Sizes(config.Config):
        rows: config.Count = 1
        columns: config.Count | None = None
        share: config.Share = 0.0

    assert Sizes(rows=3, columns=None, share=0.5).rows == 3
    with pytest.raises(config.UserError) as error:
        Sizes(rows=0, columns=-1, share=1.0)
    assert str(error.value).splitlines() == [
        "rows is 0; it must be at least 1",
        "columns is -1; it must be at least 1, or none",
        "share is 1.0; it must be at least 0 and below 1",
    ]
    with pytest.raises(config.UserError, match=r"rows is 1\d+; it must be at most 2\*\*53"):
        Sizes(rows=10**16)


def test_preset_that_only_the_command_line_completes_still_names_its_data(tmp_path):
    preset = tmp_path / "heads.py"
    preset.write_text("n_head = 5\ndata_dir = 'data/mine'\n")
    cfg = config.load(train.Settings, [str(preset), "--n_embd=20"])
    assert data.prepare_command(cfg) == f"python prepare.py {preset}"
    cfg = config.load(train.Settings, [str(preset), "--n_embd=20", "--data_dir=data/books"])
    assert data.prepare_command(cfg) == "python prepare.py --input=FILES --data_dir=data/books"


def test_an_error_is_one_line_whatever_it_quotes():
    """Line breaks, terminal codes and the bytes of a file's name that is no UTF-8 are shown as escapes."""
    quoted = "a\nb\x1b[31m\u2028\udcff ü 語"
    error = config.UserError(f"out_dir is {quoted}", "and more")
    assert str(error) == "out_dir is a\\nb\\x1b[31m\\u2028\\udcff ü 語\nand more"
    assert mistake("--no\nsetting=1").startswith("--no\\nsetting is not a setting")


def test_torchrun_leaves_every_setting_to_the_script():
    """It reads what begins one of its own options as that option, wherever it stands."""
    from torch.distributed.run import get_args_parser

    for script in (train, finetune, evaluate, bench):
        names = [field.name for owner in dataclasses.fields(script.Settings) if dataclasses.is_dataclass(owner.type)
                 for field in dataclasses.fields(owner.type)]  # fmt: skip
        arguments = [f"--{name}=1" for name in names]
        assert len(names) > 10
        assert get_args_parser().parse_args(["train.py", *arguments]).training_script_args == arguments
