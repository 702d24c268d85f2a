"""The processes of a run: their environment is checked as a whole, and they meet or end."""

import os
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from config import UserError
from data import Loader, Split
from objective import NextToken
from order import TrainOrder
from parallel import fit_to_ranks
from ranks import codes, free_port, run, settings, start, train_rank, wait_until, write_data
from world import World, processes_here

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TWO = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """A function that sets torchrun's variables, those that it is not given as well: these are absent."""

    def set_to(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(("variables", "wanted"), [
    ({}, (0, 1, 0)),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (0, 1, 0)),
    (TWO, (1, 2, 0)),
    (TWO | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node-3.cluster"}, (1, 2, 1)),
    (TWO | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "fe80::1%eth0"}, (1, 2, 0)),
])  # fmt: skip
def test_an_environment_that_fits_together_gives_rank_size_and_local_rank(variables, wanted, environment):
    environment(**variables)
    assert processes_here() == wanted


@pytest.mark.parametrize(("variables", "told"), [
    ({"RANK": "1"}, "RANK is 1 in the environment; it must be below WORLD_SIZE, here 1"),
    (TWO | {"RANK": "2"}, "RANK is 2 .* below WORLD_SIZE, here 2"),
    (TWO | {"RANK": "-1"}, "RANK is -1 .* a whole number"),
    (TWO | {"RANK": ""}, "RANK is empty .* a whole number"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0 .* at least 1"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE is two .* a whole number"),
    ({"LOCAL_RANK": "1"}, "LOCAL_RANK is 1 .* below LOCAL_WORLD_SIZE, here 1"),
    (TWO | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is 1 .* below LOCAL_WORLD_SIZE, here 1"),
    (TWO | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is 3 .* at most WORLD_SIZE, here 2"),
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK is not set .* beside WORLD_SIZE, here 2"),
    ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set .* rank 0's machine"),
    (TWO | {"MASTER_ADDR": "host:29500"}, "MASTER_ADDR is host:29500 .* without a port"),
    (TWO | {"MASTER_PORT": "0"}, "MASTER_PORT is 0 .* a port"),
    (TWO | {"MASTER_PORT": "65536"}, "MASTER_PORT is 65536 .* a port"),
    (TWO | {"MASTER_PORT": "http"}, "MASTER_PORT is http .* a whole number"),
], ids=str)  # fmt: skip
def test_an_environment_that_contradicts_itself_is_refused_in_a_line(variables, told, environment):
    environment(**variables)
    with pytest.raises(UserError, match=f"^{told}.*; start several processes with torchrun") as error:
        processes_here()
    assert "\n" not in str(error.value)


def test_a_rank_without_a_world_trains_nothing_and_writes_nothing(environment, tmp_path):
    data_dir = write_data(tmp_path / "data")
    environment(RANK="1")
    with pytest.raises(UserError, match="RANK is 1 .* below WORLD_SIZE"):
        run(data_dir, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_batch_holds_a_row_that_nothing_filled(tmp_path):
    """A rank beyond the world reads past the sequences of a step, whose last ones are looked up together."""
    split = Split(write_data(tmp_path), "train", 37)
    loader = Loader(TrainOrder(split, 7, 1337), NextToken(7), 0, 1, 3, World(1, 1, torch.device("cpu"), "fp32"))
    with pytest.raises(AssertionError, match="beyond the step's sequences"):
        for _ in range(4096):
            loader.next()
    loader.close()


# ---- the wait for the other processes

def test_a_process_that_waits_alone_ends_after_timeout_minutes(tmp_path):
    """Rank 0, which keeps the store, and rank 1, which looks for it; each on a port of its own."""
    data_dir, processes = write_data(tmp_path / "data"), []
    for rank in (0, 1):
        cfg = settings(data_dir, tmp_path / f"run_{rank}", timeout_minutes=0.02)
        processes.append(start(train_rank, rank, 2, free_port(), cfg, tmp_path / f"told_{rank}", None)[0])
    assert codes(processes, patience=60) == [2, 2]
    for rank in (0, 1):
        told = (tmp_path / f"told_{rank}").read_text()
        assert "2 processes did not meet in timeout_minutes 0.02, or torchrun has ended" in told


def keep_store(pipe, port):
    """What torchrun does for its workers."""
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    time.sleep(1000)


def start_under_torchrun(rank):
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


def test_processes_end_when_torchrun_has_ended_while_they_wait(tmp_path):
    cfg, port = settings(write_data(tmp_path / "data"), tmp_path / "run", timeout_minutes=30), free_port()
    agent, pipe = start(keep_store, port)
    pipe.recv()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    told = tmp_path / "told"
    process, _ = start(train_rank, 0, 2, port, cfg, told, (start_under_torchrun,))
    wait_until(lambda: store.check(["store_of_rank_0"]), patience=60)
    agent.kill()
    assert codes([process], patience=60) == [2]
    assert "did not meet in timeout_minutes 30, or torchrun has ended" in told.read_text()


def test_an_elastic_run_fits_its_batch_to_the_ranks_and_says_so(tmp_path, monkeypatch, capsys):
    cfg = settings(write_data(tmp_path / "data"), tmp_path / "run", elastic=True, batch_tokens=56, micro_batch_size=2)
    for name, value in {"RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    fitted = fit_to_ranks(cfg)
    assert (fitted.data.batch_tokens, fitted.data.micro_batch_size) == (63, 1)
    assert capsys.readouterr().out == ("elastic    batch_tokens 63 in place of 56, micro_batch_size 1 in place of 2, "
                                       "which 3 ranks do not divide\n")  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert fit_to_ranks(cfg) == cfg
    (tmp_path / "texts.py").write_text("objective = {'clm': 1.0, 'contrastive': 1.0}\ndropout = 0.1")
    texts = settings(tmp_path / "data", tmp_path / "run", str(tmp_path / "texts.py"), elastic=True)
    with pytest.raises(UserError, match="elastic is on, but contrastive compares"):
        fit_to_ranks(texts)


@pytest.mark.parametrize(("change", "said"), [
    ({"checkpoint": {"save_interval": None}}, "save_interval is none, and what is not saved begins anew; leave elastic off"),
    ({"run": {"resume": "never"}}, "resume is never, and runs that change size resume"),
    ({"data": {"data_dir": {"a": 1}, "data_schedule": {3: {"a": 1}}}}, "data_schedule counts steps of batch_tokens 56, which 3 ranks do not divide"),
])  # fmt: skip
def test_an_elastic_run_that_could_not_go_on_is_refused_before_it_begins(change, said, tmp_path, monkeypatch):
    cfg = settings("a", tmp_path / "run", elastic=True, batch_tokens=56, micro_batch_size=2)
    cfg = replace(cfg, **{part: replace(getattr(cfg, part), **values) for part, values in change.items()})
    for name, value in {"RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=said):
        fit_to_ranks(cfg)
