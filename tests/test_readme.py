"""Every command of README.md and docs/ runs as it stands there, cut down to seconds by settings put behind it."""

import importlib.util
import itertools
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import config
import train
from hugging_face import saved
from interop.tokenizer import write_tokenizer
from pages import page
from ranks import free_port, run_script
from test_harness import write_tasks
from test_nanogpt import ARGS, checkpoint_of, optimizer_of, parameters
from text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [block for text in TEXT.values() for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)]
COMMAND = re.compile(r"(make|python3?|pip|source|torchrun|echo|lm_eval)\b")
LINES = [line.partition(" #")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = list(dict.fromkeys(filter(COMMAND.match, LINES)))
SET_UP = ("python3 -m venv", "source ", "pip install")  # they made the environment that this test runs in
TIME_LIMIT = 900  # seconds for a command: no claim about speed, only an end to one that hangs

# Settings that make a command small. The data of config/quickstart.py is Python, so its vocabulary is left alone.
TINY_MODEL = "--n_layer=2 --n_embd=32 --n_head=2 --n_inner=48 --block_size=32 --seq_len=32 --device=cpu"
TINY_STEP = f"{TINY_MODEL} --batch_tokens=128 --micro_batch_size=2 --precision=fp32"
TINY = {
    "train.py": f"{TINY_STEP} --max_steps=3 --eval_tokens=256 --save_interval=2",
    "bench.py": f"{TINY_STEP} --bench_steps=3 --bench_warmup=1 --picture=false",
    "sample.py": "--max_new_tokens=5 --device=cpu",
    "evaluate.py": "--device=cpu",
    "prepare.py": "--workers=2",
    "clean.py": "--workers=2",
    "compress.py": "--eval_tokens=2048 --device=cpu",
    "finetune.py": "--init_from=bert --train_file=reviews/train.tsv --eval_file=reviews/dev.tsv --tsv_columns=text,label"
    " --batch_examples=4 --max_steps=2 --device=cpu --precision=fp32",
    "own files": "--batch_examples=4 --max_steps=2 --device=cpu --precision=fp32",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder with the files that commands assume: one's own text, BERT's vocabulary, FineWeb's shards."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "books").mkdir()
    for i in range(7):
        (folder / "books" / f"{i}.txt").write_text(f"Chapter {i}. " + "It was a dark and stormy night. " * 50)
    (folder / "wikipedia").mkdir()
    articles = [json.dumps({"text": f"Paris {i} is the capital of France. " * 20}) for i in range(300)]
    (folder / "wikipedia" / "0.jsonl").write_text("\n".join(articles))
    (folder / "texts.txt").write_text("import os\nimport sys\n")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] paris is the capital of france . ##1 ##2 0 1 2 3 4 5 6 7 8 9".split()
    (folder / "vocab.txt").write_text("\n".join(words))
    make_theirs(folder)
    (folder / "crawl").mkdir()
    for i in range(20):
        (folder / "crawl" / f"{i}.html").write_text(page(f"page{i}"))
    saved("bert", folder / "bert")
    tokens = (folder / "vocab.txt").read_text().split()
    (folder / "bert" / "vocab.txt").write_text(
        "\n".join([*tokens, *(f"[unused{i}]" for i in range(131 - len(tokens)))])
    )
    (folder / "reviews").mkdir()
    for name in ("train", "dev"):
        (folder / "reviews" / f"{name}.tsv").write_text("paris is the capital\t1\nof france\t0\n" * 4)
    words = {"tokens": ["paris", "is", "of", "france"], "tags": ["B-LOC", "O", "O", "B-LOC"]}
    answers = {"text": ["paris"], "answer_start": [0]}
    question = {"question": "is the capital of france", "context": "paris is the capital of france", "answers": answers}
    for name, record in (("ner", words), ("squad", question)):
        (folder / name).mkdir()
        for split in ("train", "dev"):
            (folder / name / f"{split}.jsonl").write_text((json.dumps(record) + "\n") * 8)
    (folder / "chats").mkdir()
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    for name in ("train", "dev"):
        (folder / "chats" / f"{name}.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 8)
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    (folder / "fineweb").mkdir()
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, 5000
        tokens = np.random.default_rng(0).integers(0, 50257, 5000).astype(np.uint16)
        (folder / "fineweb" / name).write_bytes(header.tobytes() + tokens.tobytes())
    return folder


def make_theirs(folder):
    """Others' models that the pages start from: Hugging Face's gpt2 in TINY_MODEL's size, and nanoGPT's checkpoint."""
    saved("gpt2", folder / "gpt2", vocab_size=50257, n_layer=2, n_embd=32, n_head=2, n_inner=48, n_positions=32)
    if Path(os.environ["TIKTOKEN_CACHE_DIR"]).is_dir():
        write_tokenizer(load_tokenizer("gpt2"), folder / "gpt2", "clm", block_size=32)
    data = folder / "nanoGPT" / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    (folder / "nanoGPT" / "out").mkdir()
    characters = "".join(map(chr, range(1, 132)))
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 131, "itos": dict(enumerate(characters))}))
    for split in ("train", "val"):
        np.arange(2000, dtype=np.uint16).__mod__(131).tofile(data / f"{split}.bin")
    weights = parameters(bias=False)
    optimizer = optimizer_of(weights)
    sum(p.sum() for p in weights.values()).backward()
    optimizer.step()
    checkpoint = checkpoint_of(weights, optimizer, ARGS | {"bias": False})
    torch.save(checkpoint, folder / "nanoGPT" / "out" / "ckpt.pt")


def run(command, folder, extra=""):
    """Runs a command of the pages in a folder, made small, on two ranks where it has several."""
    words = shlex.split(command)
    script = next((word for word in words if word.endswith(".py") and "/" not in word), None)
    words = shlex.split(shlex.join(words).replace("--tasks=lambada_openai", "--tasks=texts --include_path=tasks"))
    words = [sys.executable if word == "python" else str(ROOT / script) if word == script else word for word in words]
    if "prepare.py config/bert_base.py" in command:
        words += ["--val_fraction=0.1"]  # or nsp would find too few documents there
    elif "--task=qa" in command:
        words = [word.replace("--stride=128", "--stride=4") for word in words]
    if words[0] == "lm_eval":
        words[0] = str(Path(sys.executable).with_name("lm_eval"))
        words = shlex.split(" ".join(words).replace("lambada_openai", "texts --include_path tasks"))
    elif "train.py out/" in command:  # the run has a model and data of its own
        words += ["--max_steps=6", "--device=cpu"]
    elif command != "python bench.py":  # that one measures the machine, not a model
        words += shlex.split(TINY.get("own files" if re.search("--task=(tag|qa|instruct)", command) else script, "")) + shlex.split(extra)
    if script not in (None, "prepare.py", "clean.py"):  # torchrun itself is tried in test_guard.py
        at = words.index(str(ROOT / script))
        n_ranks = 2 if command.startswith("torchrun") else 1
        with_curves = script == "bench.py"  # test_train.py has a run that draws them
        return run_script(words[at], words[at + 1 :], folder, n_ranks, with_curves=with_curves)
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=TIME_LIMIT)


def shown_below(command):
    """Lines that a page shows as a command's output, below it in the same block."""
    block = next(block for block in BLOCKS if command in block)
    lines = block.partition(command)[2].splitlines()[1:]
    return [line for line in itertools.takewhile(lambda line: not COMMAND.match(line), lines) if line.strip(" .")]


def run_on_two_machines(script, folder, name, more=""):
    """Runs a job script with two agents of torchrun, one process each, as if they were two machines."""
    bin = folder / "bin"
    bin.mkdir(exist_ok=True)
    # Stand-ins for Slurm's commands, as far as the script needs them.
    (bin / "srun").write_text('#!/bin/sh\n"$@" & first=$!\n"$@" & second=$!\nwait $first && wait $second\n')
    (bin / "scontrol").write_text("#!/bin/sh\ncase $1 in requeue) touch requeued_$2 ;; *) echo 127.0.0.1 ;; esac\n")
    (bin / "torchrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    for file in bin.iterdir():
        file.chmod(0o755)
    tiny = TINY["train.py"].replace("--batch_tokens=128", f"--batch_tokens=128 --out_dir=out/{name} {more}")
    script = script.replace("out/gpt2_1558m", f"out/{name}")
    smaller = {
        "nproc_per_node=8": "nproc_per_node=1",
        "shard_size=8": f"shard_size=2 {tiny}",
        "29500": str(free_port()),
    }
    for old, new in (smaller | {" train.py": f" {ROOT / 'train.py'}"}).items():
        assert old in script
        script = script.replace(old, new)
    env = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}", "HEAD": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    env |= {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "first,second"}
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=TIME_LIMIT
    )


def needs_gpt2_tokenizer(command):
    """Whether a command needs the gpt2 tokenizer, or data that another command made with it."""
    words = ("tokenizer=gpt2", "data/books", "finetune_gpt2", "--task=instruct", "out/chat")
    return any(word in command for word in words) or ("sample.py" in command and "gpt2" in command)


def is_long(command):
    """Whether a command measures the machine, plans by that, sweeps, or what is in it takes seconds."""
    parts = ("--gpu=this", "--sweep", "lm_eval", "data/web", "--tp=2")
    return command == "python bench.py" or any(part in command for part in parts)


SHOWN = [
    pytest.param(c, marks=pytest.mark.slow) if is_long(c) else c
    for c in COMMANDS
    if not c.startswith(("make", *SET_UP)) and "$HEAD" not in c and "$STORE" not in c  # tests/test_chaos.py runs the last
]


@pytest.mark.parametrize("command", SHOWN)
def test_readme_command_runs(command, folder):
    if needs_gpt2_tokenizer(command) and not Path(os.environ["TIKTOKEN_CACHE_DIR"]).is_dir():
        pytest.skip("the gpt2 tokenizer is not on this machine, and tests fetch nothing")
    if ("clean.py" in command or "data/web" in command) and importlib.util.find_spec("datatrove") is None:
        pytest.skip("datatrove is absent: pip install '.[clean]'")
    local = ""  # settings that replace what the command would fetch
    if "prepare.py" in command and "--input" not in command:
        local = "--input=fineweb --max_shards=1" if "gpt2" in command else local
        local = "--dataset=none --input=books/0.txt" if re.search("speedrun_cpu|finetune", command) else local
        local = f"--dataset=none --input={ROOT}/tests/*.py" if "quickstart" in command else local  # 1 MB
    if command.startswith("lm_eval") and not (folder / "out" / "quickstart_hf").exists():  # with -m slow alone
        for earlier in ("prepare.py config/quickstart.py", "train.py config/quickstart.py", "convert.py --out_dir"):
            assert run(next(c for c in COMMANDS if c.startswith(f"python {earlier}")), folder).returncode == 0
    if re.search("--[tpc]p=2", command):  # with -m slow alone
        assert run("python prepare.py config/gpt2_124m.py", folder, "--input=fineweb --max_shards=1").returncode == 0
    done = run(command, folder, local)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "error:" not in done.stderr.lower(), done.stderr
    if "plan.py" in command and "--gpu=this" not in command:  # all other figures depend on the machine
        assert not [line for line in shown_below(command) if line not in done.stdout], "the page shows another output"


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--tp=" in c])
def test_the_models_shown_with_tensor_parallelism_can_be_split_so(command):
    """The presets' own sizes, which the test of the command replaces by small ones."""
    arguments = [word for word in shlex.split(command) if word.startswith(("config/", "--")) and "nproc" not in word]
    cfg = config.load(train.Settings, arguments)
    cfg.parallel.check_model(cfg.model, cfg.data.seq_len or cfg.model.block_size)


def test_kubernetes_takes_the_manifest_shown():
    validate = pytest.importorskip("kubernetes_validate").validate
    [manifest] = (pytest.importorskip("yaml").safe_load(block) for block in BLOCKS if block.startswith("apiVersion"))
    validate(manifest, "1.37", strict=True)
    words = manifest["spec"]["template"]["spec"]["containers"][0]["command"]
    cfg = config.load(train.Settings, words[words.index("train.py") + 1 :])
    assert cfg.train.elastic and cfg.run.out_dir == "/runs/gpt2"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchrun on each", "a Slurm script"])
def test_commands_for_several_machines_train_one_model(kind, folder):
    assert run("python prepare.py config/gpt2_124m.py", folder, "--input=fineweb --max_shards=1").returncode == 0
    if kind == "a Slurm script":
        script = next(block for block in BLOCKS if "#SBATCH" in block)
    else:
        [command] = [c for c in COMMANDS if "$HEAD" in c]
        script = f"srun {command}"  # as if typed on two machines
    name = kind.split()[-1]
    done = run_on_two_machines(script, folder, name)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("finished: step 3 of 3") == 1, "only rank 0 speaks"
    assert "1 replicas x 2 shards x 1 tensor parallel" in done.stdout
    assert (folder / "out" / name / "finished").exists() and not (folder / "requeued_7").exists()


@pytest.mark.slow
def test_the_slurm_script_requeues_itself_until_the_run_has_finished(folder):
    assert run("python prepare.py config/gpt2_124m.py", folder, "--input=fineweb --max_shards=1").returncode == 0
    script = next(block for block in BLOCKS if "#SBATCH" in block)
    done = run_on_two_machines(script, folder, "stopped", "--max_minutes=0.0001 --log_interval=1")
    assert "stopped after max_minutes 0.0001: step 1 of 3" in done.stdout and (folder / "requeued_7").exists()
    assert "the model is unfinished; the same command continues" in done.stdout
    (folder / "requeued_7").unlink()
    (folder / "out" / "stopped" / "stop").touch()
    done = run_on_two_machines(script, folder, "stopped")
    assert "stopped by out/stopped/stop: step 1 of 3" in done.stdout and not (folder / "requeued_7").exists()
    done = run_on_two_machines(script, folder, "stopped")
    assert "resumed from step 1" in done.stdout and "finished: step 3 of 3" in done.stdout
    assert not (folder / "requeued_7").exists()


def test_the_readme_leads_with_make_and_make_test():
    assert COMMANDS[:3] == ["make", "make test", "make bert"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not on this machine")
@pytest.mark.parametrize("target, run", [("quickstart", "quickstart"), ("bert", "quickstart_bert")])
def test_make_runs_the_commands_that_the_readme_shows_for_it(target, run):
    planned = subprocess.run(["make", "-n", "-B", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shown = [c.removeprefix("python ") for c in COMMANDS if re.match(rf"python .*(config|out)/{run}(\.py| |$)", c)][:3]
    assert [c.split()[0] for c in shown] == ["prepare.py", "train.py", "sample.py"], "the README shows no plain way"
    positions = [planned.find(c.split(" --prompt")[0]) for c in shown]
    assert -1 not in positions and positions == sorted(positions), f"{shown} in this order is not in:\n{planned}"


def test_files_that_the_readmes_map_names_exist():
    [block] = [block for block in BLOCKS if "model.py " in block and "plan.py " in block and "config/ " in block]
    named = re.findall(r"(?:^|  )((?:[\w/]|\{[\w,]+\})+(?:\.py|/))(?=\s|$)", block, re.M)
    paths = []
    for name in named:
        before, brace, rest = name.partition("{")
        inside, _, after = rest.partition("}")
        paths += [f"{before}{part}{after}" for part in inside.split(",")] if brace else [name]
    assert len(paths) > 20
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_a_page_names_exist(page):
    wrong, prose = [], re.sub(r"^```.*?^```$|`[^`\n]*`", "", TEXT[page], flags=re.M | re.S)
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", prose):
        target = (page.parent / path).resolve() if path else page
        headings = re.findall(r"^#+ (.*)$", TEXT.get(target, ""), re.M)
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        if not target.exists() or (anchor and anchor not in slugs):
            wrong.append(f"{path}#{anchor}")
    folders = "config|text|run|perf|interop|tests|docs"
    for path in re.findall(rf"(?<![\w/.])((?:{folders})/\w+\.\w+)", TEXT[page]):
        wrong += [] if (ROOT / path).exists() else [path]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_that_a_page_places_in_a_file_are_there(page):
    """Such as `lr_at` in `optim.py`."""
    wrong = []
    for name, path in re.findall(r"`([A-Za-z_.]+)`(?:, [^`.]*,)? in `([\w/]+\.py)`", TEXT[page]):
        last = name.rpartition(".")[2]
        if not re.search(rf"^\s*(def |class )?{last}\b", (ROOT / path).read_text(encoding="utf-8"), re.M):
            wrong.append(f"{name} in {path}")
    assert not wrong
