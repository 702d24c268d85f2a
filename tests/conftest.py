"""What the tests share: the project's folder on the path, one thread a process, small models and small data."""

import gc
import os
import socket
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # tests are small; and equal bits need equally many threads in all processes
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(ROOT.parent / "shared/data/tiktoken_cache"))
# At each connection of ranks torch asks a name server who 127.0.0.1 is, and waits 5 s for an answer that is lost.
os.environ["RES_OPTIONS"] = "attempts:0"  # nobody is asked
gc.disable()  # until tests are collected: what that makes stays, and looking for garbage in it took a fifth of the time


def slow(*values):
    """The same values as parameters of slow tests."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture
def no_curves():
    from ranks import without_matplotlib

    with without_matplotlib():
        yield


@pytest.fixture
def calls(monkeypatch):
    """A test's calls to the network, which are refused; HF_HUB_OFFLINE=1 is set as late as a test can."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # or it counts even the loading of local files
    seen = []

    def refuse(*args, **kwargs):
        seen.append(args)
        raise OSError("tests have no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return seen


def pytest_collection_finish():
    gc.freeze()  # later searches for garbage leave out what is there now
    gc.enable()


def pytest_collection_modifyitems(items):
    """Files that take longest come first, so that of two workers none is left with one of them at the end."""
    longest = ("readme", "shard", "train", "finetune", "sample", "guard", "chaos", "bench", "convert", "foreign", "health",
               "hub_tokenizer", "prepare", "remote", "augmentation", "documents", "evaluate", "memory", "clean", "compress",
               "machine", "world", "log")  # fmt: skip
    order = {f"test_{name}.py": place for place, name in enumerate(longest)}
    items.sort(key=lambda item: order.get(item.path.name, len(longest)))
