"""Gradients to new weights: optimizers and schedules."""

import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["adamw", "muon", "adafactor", "sgd"] = "adamw"  # muon: of blocks' matrices, adamw of all else
    learning_rate: float = 6e-4  # after warm-up; of adafactor, relative to the size of the weights
    min_lr: float = 0.0  # where the schedule ends
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"  # wsd: constant, at the end linear
    max_steps: int = 19_073  # optimizer steps of the run
    max_tokens: int | None = None  # tokens of the run; sets max_steps
    warmup_steps: int = 700  # steps in which the learning rate rises linearly from 0
    cooldown_steps: int = 0  # last steps of wsd, in which the learning rate falls to min_lr
    lr_decay_steps: int | None = None  # step at which cosine, linear and wsd reach min_lr; none: the last
    weight_decay: float = 0.1  # of matrices and embeddings; biases and norms have none
    beta1: float = 0.9  # decay of the gradient's mean in adamw, momentum of sgd
    beta2: float = 0.95  # decay of the squared gradient's mean in adamw
    muon_momentum: float = 0.95  # decay of the gradient's mean in muon
    grad_clip: float | None = 1.0  # largest gradient norm; none: no clipping

    def __post_init__(self):
        wrong = [
            f"{name} is {getattr(self, name)}; it must not be negative"
            for name in ("learning_rate", "min_lr", "max_steps", "warmup_steps", "cooldown_steps", "weight_decay")
            if getattr(self, name) < 0
        ]
        wrong += [
            f"{name} is {getattr(self, name)}; it must be at least 0 and below 1"
            for name in ("beta1", "beta2", "muon_momentum")
            if not 0 <= getattr(self, name) < 1
        ]
        wrong += [
            f"{name} is {getattr(self, name)}; it must be above 0, or none"
            for name in ("max_tokens", "lr_decay_steps", "grad_clip")
            if getattr(self, name) is not None and getattr(self, name) <= 0
        ]
        if self.min_lr > self.learning_rate:
            wrong.append(f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}; lower it")
        if wrong:
            raise ValueError("\n".join(wrong))

    def last_step(self, batch_tokens):
        """Steps of the run: max_tokens over the tokens of a step, rounded up, or max_steps."""
        return self.max_steps if self.max_tokens is None else math.ceil(self.max_tokens / batch_tokens)


def lr_at(step, cfg, last_step):
    """Learning rate of the step that follows `step` finished ones."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    end = cfg.lr_decay_steps or last_step
    start = max(cfg.warmup_steps, end - cfg.cooldown_steps) if cfg.schedule == "wsd" else cfg.warmup_steps
    done = min(1.0, max(0.0, (step - start) / max(1, end - start)))  # share of the decay that is behind us
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "wsd": 1 - done, "linear": 1 - done, "constant": 1.0}
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * left[cfg.schedule]


def build_optimizer(model, cfg):
    """The optimizer, with every parameter in exactly one group: matrices and embeddings decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if cfg.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)
    elif cfg.optimizer == "muon":
        optimizer = MuonAndAdamW(model, groups, cfg)
    elif cfg.optimizer == "adafactor":
        optimizer = torch.optim.Adafactor(groups, lr=cfg.learning_rate)
    else:
        optimizer = torch.optim.SGD(groups, lr=cfg.learning_rate, momentum=cfg.beta1, fused=True)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters()), (
        "a parameter is in no optimizer group, or in two"
    )
    return optimizer


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for the matrices of the blocks, each by itself, and torch's AdamW for all else, as one optimizer.

    One, because a step that the gradient scaler skips must be skipped by both. Muon's updates are scaled to the size of
    AdamW's (arXiv 2502.16982, section 2.2), so that one learning rate serves.
    """

    def __init__(self, model, groups, cfg):
        hidden = {id(p) for p in model.blocks.parameters() if p.dim() == 2}
        muon = {
            "params": [p for group in groups for p in group["params"] if id(p) in hidden],
            "weight_decay": cfg.weight_decay,
            "momentum": cfg.muon_momentum,
        }
        others = [group | {"params": [p for p in group["params"] if id(p) not in hidden]} for group in groups]
        self.parts = [
            torch.optim.Muon([muon], lr=cfg.learning_rate, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        """One step of both, on the groups and the state of this optimizer."""
        assert closure is None, "the gradients are there already"  # torch itself passes a closure of None
        muon, adamw = self.parts
        muon.param_groups, adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        for part in self.parts:
            part.state = self.state
            part.step()


def set_lr(optimizer, learning_rate):
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
