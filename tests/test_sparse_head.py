"""What it saves to run BERT's head on masked positions alone; prints the README's figures: pytest -m slow -s -k sparse.
"""

import resource
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from config import load
from model import Transformer
from objective import IGNORE
from ops import Vocabulary, linear_cross_entropy
from ranks import start
from train import Settings

B, T, K = 16, 128, 19  # BERT's first phase: 15 % of 128 tokens


def head(kind, model, hidden, targets, positions):
    """The head's loss as BERT's code has it, all logits at once; as ours on all positions; as ours on masked ones."""
    if kind == "sparse":
        hidden = hidden.take_along_dim(positions[..., None], dim=1)
        targets = targets.take_along_dim(positions, dim=1)
    x = model.transform(hidden)
    if kind == "plain":
        return F.cross_entropy(model.head(x).flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return linear_cross_entropy(
        x.flatten(0, 1), model.head.weight, targets.flatten(), Vocabulary(model.cfg.vocab_size), model.head.bias
    )


def measure(pipe, kind, precision):
    """(loss, median seconds, MiB by which the process grew) of forward and backward, in a process of its own."""
    torch.set_num_threads(1)
    cfg = load(Settings, ["config/bert_base.py"]).model
    model = Transformer(replace(cfg, n_layer=1, vocab_size=30_528))  # no padding, which plain cross-entropy would count
    model.init_weights(seed=1)
    torch.manual_seed(2)
    hidden, positions = torch.randn(B, T, cfg.n_embd), torch.stack([torch.randperm(T)[:K] for _ in range(B)])
    targets = torch.full((B, T), IGNORE).scatter(1, positions, torch.randint(cfg.vocab_size, (B, K)))
    hidden.requires_grad_()
    parameters = [hidden, *model.transform.parameters(), *model.head.parameters()]
    for p in parameters:
        p.grad = torch.zeros_like(p)  # what is there anyway does not count
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(4):
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = head(kind, model, hidden, targets, positions)
        loss.backward()
        seconds.append(time.perf_counter() - begin)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    pipe.send((loss.item(), sorted(seconds)[1], grown))


def measured(kind, precision):
    process, pipe = start(measure, kind, precision)
    answer = pipe.recv()
    process.join()
    return answer


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_sparse_head_saves_most_of_the_heads_time_and_memory_and_changes_no_loss(precision):
    figures = {kind: measured(kind, precision) for kind in ("plain", "dense", "sparse")}
    print(f"\nBERT base's head, forward and backward, {B} x {T} tokens, {precision}, one thread:")
    for kind, (loss, seconds, mib) in figures.items():
        print(f"  {kind:<7} {1e3 * seconds:7.0f} ms {mib:7.0f} MiB  loss {loss:.4f}")
    (plain, *_), (dense, *of_dense), (sparse, *of_sparse) = figures.values()
    assert sparse == pytest.approx(dense, rel=1e-5)
    assert sparse == pytest.approx(plain, rel=1e-5 if precision == "fp32" else 1e-3)
    assert of_sparse[0] < of_dense[0] / 2
    assert of_sparse[1] < figures["plain"][2] / 2
