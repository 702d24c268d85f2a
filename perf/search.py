"""The fastest layouts of a run on many GPUs: every way to divide it is planned."""

from dataclasses import dataclass, field, replace

from config import UserError
from data import accumulation_steps, divisors
from perf import timing
from perf.memory import memory
from perf.report_plan import PARTS

MOST_CP = 64  # ranks that share a sequence
KINDS = ("none", "selective", "full")
SEARCHED = ("tp", "cp", "pp", "shard_size", "activation_checkpointing", "micro_batch_size")


@dataclass
class Way:
    """A layout: settings by name, and what the plan says of it."""

    change: dict
    why: str | None = None  # why it is impossible, or None
    setup: object = None
    n_bytes: float = 0.0  # reserved memory
    fits: bool = False
    parts: dict = field(default_factory=dict)  # seconds of a step by part, where it fits

    @property
    def step_s(self):
        """Seconds of a step."""
        return sum(self.parts.values())


def layouts(cfg, n_gpus, gpus_per_node):
    """Yields settings for every way to divide a run over GPUs, tensor parallel ranks within a node."""
    for tp in divisors(n_gpus, gpus_per_node):
        if n_gpus > gpus_per_node and gpus_per_node % tp:
            continue  # ranks of two nodes would meet in one group
        for cp in divisors(n_gpus // tp, MOST_CP):
            for pp in divisors(n_gpus // (tp * cp), cfg.model.n_layer):
                data_ranks = n_gpus // (tp * pp)
                for shards in divisors(data_ranks, data_ranks):
                    yield {"tp": tp, "cp": cp, "pp": pp, "shard_size": shards}


def settings_of(cfg, change):
    """A layout's settings, to be added to those of cfg; shard_size 1 is ddp."""
    found, off = change | {"strategy": "fsdp"}, {}  # off: what would be an error in this layout
    if change["shard_size"] == 1:
        found |= {"strategy": "ddp", "shard_size": None}
        off = {"reshard": True, "accumulate": "sharded"}
    if change["tp"] == 1:
        off["async_tp"] = False
    return found | {name: value for name, value in off.items() if getattr(cfg.parallel, name) != value}


def with_layout(cfg, change):
    """Settings with a layout."""
    found = settings_of(cfg, change)
    data = replace(cfg.data, micro_batch_size=found.pop("micro_batch_size", cfg.data.micro_batch_size))
    return replace(cfg, data=data, parallel=replace(cfg.parallel, **found))


def search(cfg, n_gpus, setup_of, gpu, available):
    """Yields a Way for every layout, activation checkpointing and micro-batch, impossible ones once.

    setup_of(settings) gives a Setup. available: bytes of memory for what is reserved.
    """
    p = cfg.plan
    for layout in layouts(cfg, n_gpus, p.gpus_per_node):
        try:
            here = with_layout(cfg, layout)
            here.parallel.check_model(cfg.model, cfg.data.seq_len)
            ranks = n_gpus // here.parallel.ranks_of_sequence
            one = replace(cfg.data, micro_batch_size=1)
            sequences = accumulation_steps(one, cfg.data.seq_len, ranks)
            base = setup_of(replace(here, data=one))
            here.parallel.check_precision(base.precision)
            timing.step_seconds(cfg.model, base, gpu, p.gpus_per_node)  # raises where --gpu=this has no figures for it
        except UserError as error:
            yield Way(layout, why=str(error))
            continue
        for kind in KINDS:
            for n in divisors(sequences, sequences):
                setup = replace(base, checkpointing=kind, micro_batch_size=n, micro_steps=sequences // n)
                change = layout | {"activation_checkpointing": kind, "micro_batch_size": n}
                n_bytes = sum(memory(cfg.model, setup).values()) * p.fragmentation
                way = Way(change, None, setup, n_bytes, n_bytes <= available)
                if way.fits:
                    way.parts = timing.step_seconds(cfg.model, setup, gpu, p.gpus_per_node, p.efficiency)
                yield way


def best_of(ways, n=10):
    """The n fastest ways that fit, of each tp, cp and pp one."""
    found = {}
    for way in sorted((way for way in ways if way.fits), key=lambda way: way.step_s):
        found.setdefault(tuple(way.change[name] for name in ("tp", "cp", "pp")), way)
    return [*found.values()][:n]


def why_others_fell(ways, best):
    """[(setting, value, text)] for each value of a setting that the best layout does not have: what speaks against it."""
    lines = []
    for name in best.change:
        for value in sorted({way.change[name] for way in ways if name in way.change}, key=_rank):
            if value != best.change[name]:
                lines.append((name, value, _against([w for w in ways if w.change.get(name) == value], best)))
    return lines


def _rank(value):
    return KINDS.index(value) if value in KINDS else value


def _against(ways, best):
    """The reason why layouts fall: a slower step with the part that grew most, too little memory, or a rule."""
    if fitting := [way for way in ways if way.fits]:
        way = min(fitting, key=lambda way: way.step_s)
        grew = max(way.parts, key=lambda name: way.parts[name] - best.parts[name])
        return f"{way.step_s / best.step_s:.2f} times as long at best: {PARTS[grew][0]}"
    if possible := [way for way in ways if way.why is None]:
        return f"does not fit: {min(way.n_bytes for way in possible) / 2**30:,.0f} GiB at least"
    return ways[0].why.partition(";")[0]
