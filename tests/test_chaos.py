"""Runs that are killed again and again, at random moments, end as if nothing had been.

CHAOS_KILLS=200 in the environment kills 200 times in place of 12, spread over the kinds of runs; -s prints the counts.
"""

import json
import os
import random
import signal
import statistics
import time

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from checkpoint import CheckpointWriter, checkpoints, newest_checkpoint
from conftest import ROOT
from ranks import codes, launch, logged, records, settings, torchrun, wait_until, write_data
from test_checkpoint import same

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("CHAOS_KILLS", 12))
RUNS = [(1, "ddp", "adamw"), (1, "ddp", "muon"), (1, "ddp", "adafactor"),
        (2, "ddp", "adamw"), (2, "fsdp", "adamw"), (2, "fsdp", "muon")]  # fmt: skip
CHANGES = {"max_steps": 40, "eval_interval": 10, "keep_checkpoints": 1, "lr_decay_steps": "none", "dropout": 0.1,
           "micro_batch_size": 3}  # fmt: skip


def wait_for_a_moment(out_dir, is_alive, generator):
    """Waits until a save is being written, or for a while after the next step, or just for a while, at random."""
    kind, first = generator.choice(["save", "save", "step", "start"]), logged(out_dir)
    if kind != "start":
        wait_until(lambda: logged(out_dir) > first or not is_alive())
    if kind == "save":
        wait_until(lambda: any((out_dir / "ckpt").glob(".*.partial")) or not is_alive())
    time.sleep(generator.uniform(0, {"start": 1, "step": 0.1, "save": 0.03}[kind]))


def check_newest(out_dir):
    """The newest checkpoint is whole; says whether a save was cut short."""
    if found := checkpoints(out_dir):
        assert newest_checkpoint(out_dir) == found[-1]
    return any((out_dir / "ckpt").glob(".*"))


def check_equal(killed, whole):
    """Every loss, and every bit of the last checkpoint's weights and optimizer state."""
    for name in ("loss", "val_loss"):
        assert records(killed, name) == records(whole, name)
    (last, state), (wanted, whole_state) = (
        (newest.name, {path.name: load_file(path) for path in newest.glob("*.safetensors")})
        for newest in (checkpoints(run)[-1] for run in (killed, whole))
    )
    assert last == wanted and same(state, whole_state) and len(state)
    assert not check_newest(killed)


@pytest.mark.parametrize(("n", "strategy", "optimizer"), RUNS)
def test_kill_9_at_random_moments_changes_no_bit_of_losses_and_weights(n, strategy, optimizer, tmp_path):
    """All ranks are killed, up to 0.05 s apart. A run that ends before its time is compared, and the next one begins."""
    place = RUNS.index((n, strategy, optimizer))
    generator = random.Random(os.environ.get("CHAOS_SEED", place))
    data_dir, changes = write_data(tmp_path / "data"), CHANGES | {"strategy": strategy, "optimizer": optimizer}
    kills, cut_saves, n_runs, killed = 0, 0, 0, tmp_path / "killed_0"

    def started(out_dir, save_interval):
        return launch(n, settings(data_dir, out_dir, save_interval=save_interval, **changes))

    assert codes(started(tmp_path / "whole", 7)) == [0] * n
    while kills < (KILLS + place) // len(RUNS):
        processes = started(killed, generator.choice([3, 7]))
        wait_for_a_moment(killed, lambda: all(process.is_alive() for process in processes), generator)
        if not any(process.is_alive() for process in processes):
            assert codes(processes) == [0] * n
            check_equal(killed, tmp_path / "whole")
            n_runs, killed = n_runs + 1, tmp_path / f"killed_{n_runs + 1}"
            continue
        for process in generator.sample(processes, n):
            process.kill()
            time.sleep(generator.uniform(0, 0.05) if n > 1 else 0)
        for process in processes:
            process.join()
        kills += 1
        cut_saves += check_newest(killed)
    assert codes(started(killed, 3)) == [0] * n
    check_equal(killed, tmp_path / "whole")
    print(f"\n{n} ranks, {strategy}, {optimizer}: {kills} kills, {cut_saves} of them in a save; {n_runs + 1} runs equal")
    assert cut_saves >= kills // 10


def workers_of(pid):
    """Processes that a process has started, by the kernel's list."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def test_kill_9_of_a_rank_at_random_moments_is_healed_by_torchruns_restarts(tmp_path):
    data_dir, out_dir, n = write_data(tmp_path / "data"), tmp_path / "killed", 2
    changes = CHANGES | {"max_steps": 80, "save_interval": 7}
    run = torchrun(
        n, ROOT / "train.py", settings(data_dir, out_dir, **changes), tmp_path / "told", f"--max-restarts={KILLS}"
    )
    generator, kills = random.Random(os.environ.get("CHAOS_SEED", n)), 0
    try:
        while kills < max(1, KILLS // 12) and run.poll() is None:
            wait_for_a_moment(out_dir, lambda: run.poll() is None, generator)
            workers = workers_of(run.pid) if run.poll() is None else []
            if len(workers) == n:  # else they are being started
                os.kill(generator.choice(workers), signal.SIGKILL)
                kills += 1
                wait_until(lambda: not set(workers) & set(workers_of(run.pid)))
                check_newest(out_dir)
        assert run.wait(timeout=1200) == 0, (tmp_path / "told").read_text()[-3000:]
    finally:
        run.terminate()  # and with it the workers, where something went wrong
    assert kills and "terminate called" not in (tmp_path / "told").read_text()
    assert codes(launch(n, settings(data_dir, tmp_path / "whole", **changes))) == [0] * n
    check_equal(out_dir, tmp_path / "whole")


def node(store, cfg, told):
    """Starts torchrun as a node of an elastic run of up to four, with one rank; they meet at a store."""
    rendezvous = ["--rdzv_backend=c10d", "--rdzv_id=run", f"--rdzv_endpoint=127.0.0.1:{store.port}"]
    quick = "is_host=0,last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
    options = ["--nnodes=1:4", *rendezvous, f"--rdzv_conf={quick}", "--local_addr=127.0.0.1", "--max-restarts=99"]
    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    return torchrun(1, ROOT / "train.py", cfg, told, *options, meet=(), env=env)


@pytest.mark.parametrize("seed", range(max(1, KILLS // 12)))
def test_a_run_goes_on_with_the_nodes_that_are_there(seed, tmp_path):
    """One of four nodes is killed, at a random moment, and comes back; then a rank is killed, and the run goes on."""
    data_dir, out_dir, generator = write_data(tmp_path / "data"), tmp_path / "elastic", random.Random(seed)
    changes = {"batch_tokens": 84, "save_interval": 10, "max_steps": 100_000, "schedule": "constant", "elastic": True,
               "keep_checkpoints": 1, "eval_interval": 100_000}  # fmt: skip
    cfg, store = settings(data_dir, out_dir, **changes), dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    nodes = [node(store, cfg, tmp_path / f"told_{i}") for i in range(4)]
    sizes, times = [], []

    def wait_for(size):
        """Waits until the run goes on with so many ranks, and has made five steps."""
        began = time.monotonic()
        wait_until(lambda: len(starts(out_dir)) > len(sizes) and starts(out_dir)[-1] == size, patience=180)
        first = logged(out_dir)
        wait_until(lambda: logged(out_dir) > first + 5, patience=180)
        sizes[:] = starts(out_dir)
        times.append(time.monotonic() - began)

    def alive():
        return all(node.poll() is None for node in nodes)

    try:
        wait_for(4)
        wait_until(lambda: checkpoints(out_dir))  # before the first, a run begins again
        wait_for_a_moment(out_dir, alive, generator)
        lost = generator.randrange(4)
        for pid in (nodes[lost].pid, *workers_of(nodes[lost].pid)):
            os.kill(pid, signal.SIGKILL)
        wait_for(3)
        nodes[lost] = node(store, cfg, tmp_path / f"told_{lost}_again")
        wait_for(4)
        wait_for_a_moment(out_dir, alive, generator)
        os.kill(generator.choice([pid for one in nodes for pid in workers_of(one.pid)]), signal.SIGKILL)
        wait_for(4)
        (out_dir / "stop").touch()
        assert [one.wait(timeout=600) for one in nodes] == [0] * 4, (tmp_path / "told_0").read_text()[-3000:]
    finally:
        for one in nodes:
            one.terminate()
    print(f"\nseed {seed}: node {lost} killed; seconds until the run went on: {times}, with ranks {sizes}")
    last = logged(out_dir)
    whole = settings(data_dir, tmp_path / "whole", **changes | {"max_steps": last})
    assert codes(launch(4, whole)) == [0] * 4
    found, wanted = records(out_dir), records(tmp_path / "whole")
    assert [*found] == [*wanted] == [*range(1, last + 1)]
    assert [*found.values()] == pytest.approx([*wanted.values()], rel=1e-4)


def starts(out_dir):
    """The number of ranks at each start of a run, by its log."""
    lines = (out_dir / "log.jsonl").read_bytes().splitlines() if (out_dir / "log.jsonl").exists() else []
    return [int(json.loads(line)["devices"].split()[0]) for line in lines if b'"start"' in line and line.endswith(b"}")]


@pytest.mark.alone
def test_saving_costs_training_little(tmp_path):
    """Steps of a model whose checkpoint has 500 MB, saved every 5; prints what README says (-s)."""
    data_dir = write_data(tmp_path / "data", train_tokens=200_000)
    shape = {"n_embd": 640, "n_layer": 9, "n_head": 10, "block_size": 256, "seq_len": 256, "micro_batch_size": 4,
             "batch_tokens": 1024, "eval_tokens": 512, "eval_interval": 1000, "precision": "auto",
             "keep_checkpoints": 1}  # fmt: skip
    seconds = {}
    for interval, steps in (("none", 6), (5, 15)):
        cfg = settings(data_dir, tmp_path / str(interval), **shape, save_interval=interval, max_steps=steps)
        assert codes(launch(1, cfg, tmp_path / "told", (note_pauses, tmp_path / "pauses"))) == [0]
        steps = [json.loads(line) for line in (tmp_path / str(interval) / "log.jsonl").read_text().splitlines()]
        seconds[interval] = [shape["batch_tokens"] / step["tokens_per_s"] for step in steps if "loss" in step]
    pauses = [float(line) for line in (tmp_path / "pauses").read_text().splitlines()]
    size = sum(file.stat().st_size for file in checkpoints(tmp_path / "5")[-1].iterdir())
    step, while_writing = statistics.median(seconds["none"]), statistics.median(seconds[5])
    slower = sum(seconds[5][5:]) + sum(pauses[:2]) - 10 * step  # two intervals, each after a save
    print(f"\ncheckpoint {size / 1e6:.0f} MB; a step without saves {step:.3f} s, with {while_writing:.3f} s (medians); "
          f"pause of a save {statistics.median(pauses):.3f} s; cost of a save, pause and slower steps, "
          f"{slower / 2:.2f} s = {slower / 2 / (5 * step):.1%} of the time between saves")  # fmt: skip
    assert size > 500e6 and len(pauses) == 3
    assert statistics.median(pauses) < step and slower / 2 < 10 * step


def note_pauses(rank, file):
    """Writes down for how long each save keeps the loop."""
    save = CheckpointWriter.save

    def timed(self, *args):
        start = time.perf_counter()
        save(self, *args)
        with open(file, "a") as noted:
            noted.write(f"{time.perf_counter() - start}\n")

    CheckpointWriter.save = timed
