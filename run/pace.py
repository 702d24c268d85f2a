"""How fast each rank computes, so that a straggler has a number and a name."""

import socket
import statistics
import time

import torch

BEHIND, STEPS = 1.2, 50  # a straggler takes so many times the median's time, for so many steps


class Pace:
    """Times the blocks' forward in a step's first micro-step, where ranks of ddp, fsdp and pipelines wait for nobody.

    Ranks of tp and cp wait for each other in every layer, and so are equally slow.
    """

    def __init__(self, model, world):
        self.world, self.spans, self.seconds, self.slow_since = world, [], 0.0, {}
        self.n_steps = -1  # the first step may compile, and is not counted
        if world.ranks_of_stage == 1:
            return
        if hasattr(model, "set_requires_all_reduce"):  # FSDP gathers weights between blocks
            self.n_spans = len(model.blocks)
            for block in model.blocks:
                block.forward = self._timed(block.forward)
        else:
            self.n_spans = 1
            model.run_blocks = self._timed(model.run_blocks)

    def _timed(self, forward):
        def timed(*args, **options):
            if len(self.spans) == self.n_spans or not torch.is_grad_enabled():
                return forward(*args, **options)
            start = self._now()
            result = forward(*args, **options)
            self.spans.append((start, self._now()))
            return result

        return timed

    def _now(self):
        """The time; on CUDA an event, which the stream passes when it gets there."""
        if self.world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(self):
        """Counts a step, after which the device is idle."""
        is_cuda = self.world.device.type == "cuda"
        if self.n_steps >= 0:
            self.seconds += sum(a.elapsed_time(b) / 1e3 if is_cuda else b - a for a, b in self.spans)
        self.spans, self.n_steps = [], self.n_steps + 1

    def figures(self, step):
        """(figures of the steps since the last call, lines about stragglers): the same on all ranks."""
        if self.world.ranks_of_stage == 1 or not self.n_steps:  # stages are of unequal sizes, and not compared
            return {}, []
        by_rank = self.world.gather(1e3 * self.seconds / self.n_steps)
        self.seconds, n_steps, self.n_steps = 0.0, self.n_steps, 0
        n, lines = self.world.ranks_of_stage, []
        medians = [statistics.median_low(by_rank[i : i + n]) for i in range(0, len(by_rank), n)]
        if not all(medians):  # a forward of someone's own, without run_blocks
            return {}, []
        behind = [ms / medians[rank // n] for rank, ms in enumerate(by_rank)]
        slowest = max(range(len(behind)), key=behind.__getitem__)
        for rank, times in enumerate(behind):
            if times < BEHIND:
                self.slow_since.pop(rank, None)
            elif step - self.slow_since.setdefault(rank, step - n_steps) >= STEPS and self.slow_since[rank] >= 0:
                host = self.world.gather(socket.gethostname())[rank]
                over = f"over the last {step - self.slow_since[rank]} steps"
                lines.append(
                    f"straggler  rank {rank} on {host} computes {times:.2f} times as long as the median rank, {over}"
                )
                self.slow_since[rank] = float("-inf")
        figures = {"slowest_rank": slowest, "forward_ms": by_rank[slowest], "forward_ms_median": medians[slowest // n]}
        return figures, lines
