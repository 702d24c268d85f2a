"""A rank that computes more slowly than the others is named, with how much, once."""

import json
import re
import time
import types

import pytest

from model import Block
from parallel import ParallelConfig
from ranks import codes, launch, on_ranks, records, settings, write_data
from run.pace import Pace
from world import WorldConfig, init_world

LAYOUTS = [
    ({}, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ({"strategy": "fsdp", "micro_batch_size": 2}, 3), ({"pp": 2, "strategy": "fsdp", "micro_batch_size": 2, "n_layer": 4}, 6),
        ({"compile": True}, 3),
    ])
]  # fmt: skip


def slow_down(rank, slow):
    """Makes a rank's blocks slow."""
    forward = Block.forward

    def slowed(self, *args):
        time.sleep(0.01)
        return forward(self, *args)

    if rank == slow:
        Block.forward = slowed


@pytest.mark.parametrize(("layout", "n"), LAYOUTS, ids=str)
def test_a_straggler_is_named_once_with_how_much_slower_it_is(layout, n, tmp_path):
    changes = {"batch_tokens": 42 * n, "max_steps": 60, "log_interval": 10, "n_layer": 2, **layout}
    cfg, told = settings(write_data(tmp_path / "data"), tmp_path / "run", **changes), tmp_path / "told"
    slow = n - 2
    assert codes(launch(n, cfg, told, (slow_down, slow))) == [0] * n
    slowest = records(tmp_path / "run", "slowest_rank")
    assert [*slowest.values()] == [slow] * 6
    worst, median = (records(tmp_path / "run", name) for name in ("forward_ms", "forward_ms_median"))
    assert all(worst[step] > 10 and worst[step] > 1.2 * median[step] for step in worst)
    lines = [line for line in told.read_text().splitlines() if line.startswith("straggler")]
    assert len(lines) == 1 and lines[0].startswith(f"straggler  rank {slow} on "), lines
    assert re.search("computes [0-9.]+ times as long as the median rank, over the last 59 steps$", lines[0])


def paced(pp):
    """The figures of two ranks, of which one takes 1.4 times as long."""
    with init_world(WorldConfig(device="cpu", precision="fp32"), ParallelConfig(pp=pp)) as world:
        pace = Pace(types.SimpleNamespace(run_blocks=None), world)
        pace.seconds, pace.n_steps = 50 + 20 * world.rank, 50
        return pace.figures(50)


def test_one_of_two_ranks_is_behind_the_other_and_stages_of_one_rank_are_not_compared():
    [(figures, [line]), _], [stages, _] = on_ranks(2, (paced, 1), (paced, 2), patience=60)
    assert figures == {"slowest_rank": 1, "forward_ms": 1400, "forward_ms_median": 1000}
    assert "computes 1.40 times as long" in line
    assert stages == ({}, [])


def test_one_process_has_no_slowest_rank_and_no_line_of_it(tmp_path):
    assert codes(launch(1, settings(write_data(tmp_path / "data"), tmp_path / "run"))) == [0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert not any("slowest_rank" in line for line in lines)
