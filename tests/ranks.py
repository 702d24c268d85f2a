"""Small data and small runs for tests: in this process, in a process to be killed, on several ranks."""

import contextlib
import gc
import json
import multiprocessing
import os
import pickle
import runpy
import secrets
import shutil
import socket
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

import config
import train
from optim import OptimConfig
from prepare import write_meta
from run.health import HealthConfig
from shards import ShardWriter
from world import end_process

# Odd sizes: a mistake that 2, 4 and 8 would hide shows.
SMALL = {
    "vocab_size": 37, "block_size": 11, "n_layer": 3, "n_head": 5, "n_embd": 20, "seq_len": 7, "micro_batch_size": 3,
    "batch_tokens": 42, "eval_tokens": 140, "max_steps": 9, "warmup_steps": 2, "lr_decay_steps": 20,
    "learning_rate": 1e-2, "log_interval": 1, "eval_interval": 100, "save_interval": 100, "device": "cpu",
    "precision": "fp32",
}  # fmt: skip

# Modules that the tests' processes import: conftest first, which switches garbage collection off; torch._dynamo comes
# with an optimizer's first step.
PRELOADED = [
    "conftest", "torch", "torch.distributed.checkpoint", "torch.distributed._composable.replicate",
    "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch._dynamo", "safetensors.torch",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "tiktoken", "scipy.stats", "sklearn.metrics", "train", "bench",
    "sample", "plan", "finetune",
]  # fmt: skip


def write_data(
    folder, train_tokens=2000, val_tokens=300, vocab_size=37, tokenizer="byte", shard_tokens=900, seed=0, specials=None
):
    """A data folder as prepare.py leaves it, of random tokens that follow a pattern which can be learned.

    specials, the vocabulary's last ids by name, are for masked training: tokens then repeat, eight times on average,
    and every 29th ends a document.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    random, splits = np.random.default_rng(seed), {}
    for split, n in (("train", train_tokens), ("val", val_tokens)):
        writer = ShardWriter(folder, split, np.uint16, shard_tokens)
        tokens = np.cumsum(random.integers(0, 3, n)) % vocab_size
        if specials:
            tokens = np.cumsum(random.integers(0, 8, n) == 0) % (vocab_size - len(specials))
            tokens[28::29] = specials["<|endoftext|>"]
        writer.write(tokens.astype(np.uint16))
        splits[split] = {"shards": writer.finish(), "checksums": writer.checksums, "tokens": n, "bytes": 2 * n}
    meta = {"vocab_size": vocab_size, "tokenizer": tokenizer, "splits": splits, "token_bytes": [1] * vocab_size}
    write_meta(folder, meta | ({"specials": specials} if specials else {}))
    return folder


def settings(data_dir, out_dir, *presets, **changes):
    """The settings of a small run, as the command line would give them; changes are settings by name."""
    names = SMALL | {"data_dir": data_dir, "out_dir": out_dir} | changes
    return config.load(train.Settings, [*presets, *(f"--{name}={value}" for name, value in names.items())])


def step_settings(grad_clip=0.5, **health):
    """What train_step reads of a script's settings."""
    return types.SimpleNamespace(optim=OptimConfig(grad_clip=grad_clip), health=HealthConfig(**health))


def run(data_dir, out_dir, with_curves=False, **changes):
    """Trains a small run to its end, in this process; returns its folder."""
    with contextlib.nullcontext() if with_curves else without_matplotlib():
        train.main(settings(data_dir, out_dir, **changes))
    return Path(out_dir)


def records(out_dir, name="loss"):
    """{step: value} of a name in a run's log."""
    lines = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    found = [(line["step"], line[name]) for line in lines if name in line]
    assert len(found) == len(dict(found)), f"{name} stands twice in the log for one step: {found}"
    return dict(found)


@contextlib.contextmanager
def without_matplotlib():
    """Nothing can import matplotlib: drawing is most of the time of a run of nine steps."""
    held = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "matplotlib"}
    sys.modules["matplotlib"] = None
    try:
        yield
    finally:
        del sys.modules["matplotlib"]
        sys.modules.update(held)


# ---- other processes


def on_ranks(n, *cases, patience=1200):
    """Runs cases (function, *args), one after the other, each on n new-born ranks; returns [a list by rank] by case.

    Functions are a module's own, and what they take and return can be pickled. Each case has a process group to itself.
    patience: seconds for all of them.
    """
    # The stores are here, as torchrun's is in torchrun: where rank 0 keeps it, a rank that comes earlier waits for 1 s.
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in cases]
    children = [start(_rank_main, rank, n, cases, [store.port for store in stores]) for rank in range(n)]
    answers = []
    try:
        for rank, (_, pipe) in enumerate(children):
            if not pipe.poll(patience):
                raise TimeoutError(f"rank {rank} has not answered for {patience} s")
            good, answer = pickle.loads(pipe.recv_bytes())
            assert good, f"rank {rank}: {answer}"  # others may wait for it for ever
            answers.append(answer)
    except EOFError:
        raise RuntimeError(f"rank {rank} ended without an answer") from None
    finally:
        for process, _ in children:
            process.join(2)
            process.kill()
    return [list(by_rank) for by_rank in zip(*answers)]


def start(function, *args):
    """Starts function(pipe, *args) in a new process; returns the process and this end of the pipe.

    The fork server has imported torch and this project already, so that a process starts in 0.1 s instead of 4 s.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here, there = context.Pipe()
    process = context.Process(target=_begin, args=(function, there, *args), daemon=True)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # a new fork server reads it
        process.start()
    there.close()
    return process, here


def _begin(function, *args):
    gc.freeze()  # what the fork server has imported is no garbage, and long to look through
    gc.enable()
    function(*args)


def launch(n, cfg, told=None, before=None):
    """Starts training with cfg as train.py would, in n processes that may be killed, stopped, disturbed; returns them.

    told: file that takes what they print. before: (function, *args); a process first does function(rank, *args), such
    as to plant a fault.
    """
    port = free_port()
    return [start(train_rank, rank, n, port, cfg, told, before)[0] for rank in range(n)]


def run_script(script, arguments, folder, n_ranks=1, patience=1200, with_curves=True):
    """What `python script arguments`, typed in a folder, would give, as subprocess.run has it; but that it starts at once.

    Or torchrun, with several ranks. Not of scripts that start processes by multiprocessing.
    """
    told = [Path(folder) / name for name in (".stdout", ".stderr")]
    for path in told:
        path.unlink(missing_ok=True)
    port, ranks = free_port(), range(n_ranks)
    common = (with_curves, str(script), arguments, str(folder), *map(str, told))
    ended = codes([start(_script_main, rank, n_ranks, port, *common)[0] for rank in ranks], patience)
    stdout, stderr = (path.read_text() for path in told)
    return subprocess.CompletedProcess([str(script), *arguments], max(ended, key=abs), stdout, stderr)


def _script_main(pipe, rank, n_ranks, port, with_curves, script, arguments, folder, *told):
    os.chdir(folder)
    for number, path in enumerate(told, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if n_ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n_ranks), "LOCAL_RANK": str(rank),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    sys.argv = [script, *arguments]
    with contextlib.nullcontext() if with_curves else without_matplotlib():
        runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()


def torchrun(n, script, cfg, told, *options, meet=("--standalone",), env=None):
    """Starts torchrun itself, with n ranks of a script; it prints into the file told. meet: options of its rendezvous."""
    values = {name: ",".join(v) if isinstance(v, tuple) else v for name, v in config.as_dict(cfg).items()}
    arguments = [f"--{name}={'none' if value is None else value}" for name, value in values.items()]
    command = [*meet, f"--nproc_per_node={n}", *options, str(script), *arguments]
    with open(told, "w") as file:
        command = [sys.executable, "-m", "torch.distributed.run", *command]
        return subprocess.Popen(command, stdout=file, stderr=file, env=env)


def codes(processes, patience=1200):
    """Exit codes of processes, which end by themselves within so many seconds."""
    for process in processes:
        process.join(patience)
    ended = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return ended


def train_rank(pipe, rank, n, port, cfg, told, before):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    if told:
        handle = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
    if before:
        before[0](rank, *before[1:])
    sys.argv = ["train.py"]
    config.load = lambda *_: cfg
    with without_matplotlib():
        config.run_script(train.main, train.Settings, "", needs_console=False)
    end_process()


def logged(out_dir):
    """The last step in a run's log, by its last 4 kB, since tests ask often; 0 without one."""
    try:
        with open(Path(out_dir) / "log.jsonl", "rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - 4096)
            file.seek(start)
            lines = file.read().splitlines()[bool(start) :]  # the first one is cut
    except OSError:
        return 0
    return max((json.loads(line).get("step", 0) for line in lines if line.endswith(b"}")), default=0)


def wait_until(condition, patience=600):
    """Waits for a condition, for so many seconds."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def _rank_main(pipe, rank, n, cases, ports):
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # where torch finds a GPU, its PowerSGD waits for it, of a CPU's model too
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
    answers = []
    try:
        for (function, *args), port in zip(cases, ports):
            os.environ["MASTER_PORT"] = str(port)
            with without_matplotlib():
                answers.append(function(*args))
        answer = True, answers
    except BaseException:
        answer = False, f"case {len(answers)}, {function.__name__}: {traceback.format_exc()}"
    pipe.send_bytes(pickle.dumps(answer))
    os._exit(0)  # see end_process


def free_port():
    """A free port below those that the system hands out by itself: it must still be free when its turn comes.

    By the system's random numbers: Python's are seeded by the evaluation harness, alike in all of pytest's workers.
    """
    while True:
        port = 10_000 + secrets.randbelow(22_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def copy_run(run_dir, to):
    """A copy of a run's folder, to be spoilt."""
    shutil.copytree(run_dir, to)
    return Path(to)
