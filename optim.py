"""Gradients to new weights: optimizers and schedules."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from config import Config, Count, NotNegative, Positive, Share, UserError, Whole
from world import local

STACK, MUON_DTYPE = 2**26, torch.bfloat16  # elements that Muon orthogonalizes at a time, 128 MiB, and their dtype


@dataclass(frozen=True)
class OptimConfig(Config):
    optimizer: Literal["adamw", "muon", "adafactor", "sgd"] = "adamw"  # muon: for the blocks' matrices, else adamw
    learning_rate: NotNegative = 6e-4  # peak learning rate, after warmup; adafactor: relative to the weights' size
    min_lr: NotNegative = 0.0  # learning rate at the end of the schedule
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"  # wsd: constant, then linear
    max_steps: Whole = 19_073  # optimizer steps of the run
    max_tokens: Count | None = None  # training tokens of the run; replaces max_steps
    warmup_steps: Whole = 700  # first steps, in which the learning rate rises linearly from 0
    cooldown_steps: Whole = 0  # wsd: last steps, in which the learning rate falls to min_lr
    lr_decay_steps: Count | None = None  # step at which the learning rate reaches min_lr; none: the last
    weight_decay: NotNegative = 0.1  # weight decay of matrices and embeddings; biases and norms have none
    beta1: Share = 0.9  # adamw: decay of the gradient's mean; sgd: momentum
    beta2: Share = 0.95  # adamw: decay of the squared gradient's mean
    muon_momentum: Share = 0.95  # muon: decay of the gradient's mean
    grad_clip: Positive | None = 1.0  # largest gradient norm; none: no clipping

    def __post_init__(self):
        super().__post_init__()
        if self.min_lr > self.learning_rate:
            raise UserError(f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}; lower it")
        decay, warmup = self.lr_decay_steps, self.warmup_steps
        if decay is not None and decay <= warmup and self.schedule != "constant":
            raise UserError(
                f"lr_decay_steps {decay} is not above warmup_steps {warmup}; raise it, or lower warmup_steps"
            )

    def last_step(self, batch_tokens, step=0, tokens=0):
        """Last step of a run that has taken `step` steps with `tokens` tokens: by max_tokens, rounded up, or max_steps.

        From where the run stands, since its earlier steps may have had another batch_tokens.
        """
        if self.max_tokens is None:
            return self.max_steps
        return step + max(0, -((tokens - self.max_tokens) // batch_tokens))  # minus twice: the quotient is rounded up


def lr_at(step, cfg, last_step):
    """Learning rate of the step after `step` finished ones."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    end = cfg.lr_decay_steps or last_step
    start = max(cfg.warmup_steps, end - cfg.cooldown_steps) if cfg.schedule == "wsd" else cfg.warmup_steps
    done = min(1.0, max(0.0, (step - start) / max(1, end - start)))  # share of the decay that is over
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "wsd": 1 - done, "linear": 1 - done, "constant": 1.0}
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * factor[cfg.schedule]


def build_optimizer(model, cfg, world=None, scale_of=lambda name: 1.0):
    """The optimizer; matrices and embeddings decay, vectors do not. A world's ranks share Muon's work.

    scale_of(name): the factor of a parameter's learning rate.
    """
    by_kind = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            by_kind.setdefault((p.dim() < 2, scale_of(name)), []).append(p)
    groups = [
        {"params": params, "weight_decay": 0.0 if is_vector else cfg.weight_decay} | ({"lr_scale": s} if s != 1 else {})
        for (is_vector, s), params in sorted(by_kind.items(), key=lambda item: item[0])
    ]
    if cfg.optimizer == "muon":
        return MuonAndAdamW(model, groups, cfg, world)
    if cfg.optimizer == "adafactor":
        return Adafactor(groups, {"lr": cfg.learning_rate})
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=cfg.learning_rate, momentum=cfg.beta1)
    lr, captured = cfg.learning_rate, model.graphs is not None
    if captured:  # a CUDA graph reads the learning rate from the GPU's memory
        lr = torch.tensor(lr, device=next(model.parameters()).device)
    return torch.optim.AdamW(groups, lr=lr, betas=(cfg.beta1, cfg.beta2), fused=True, capturable=captured)


def can_capture(optimizer):
    """Whether a CUDA graph can hold the next step: the optimizer is built for it, and its first step made its state."""
    return optimizer.defaults.get("capturable", False) and len(optimizer.state) > 0


class Adafactor(torch.optim.Optimizer):
    """Adafactor (arXiv 1804.04235): a matrix's squared gradients are kept as means of its rows and columns only.

    Equals torch.optim.Adafactor, which fails on sharded parameters: it takes norms, where this takes sums.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, self.state[p], group["lr"], group["weight_decay"])

    def _update(self, p, state, lr, weight_decay):
        square, eps = p.grad.square(), torch.finfo(p.dtype).eps
        means = {"variance": square}
        if p.dim() > 1:
            means = {"row_var": _mean(square, dim=1), "col_var": _mean(square, dim=0)}
        if not state:
            state |= {"step": torch.zeros(())} | {name: torch.zeros_like(mean) for name, mean in means.items()}
        state["step"] += 1
        step = state["step"].item()
        for name, mean in means.items():
            state[name].lerp_(mean, step**-0.8)
        if p.dim() > 1:
            estimate = state["row_var"] / _mean(state["row_var"], dim=0).clamp(min=eps) * state["col_var"]
        else:
            estimate = state["variance"]
        update = p.grad * estimate.clamp(min=eps * eps).rsqrt()
        size = min(lr, step**-0.5) * _rms(p).clamp(min=1e-3) / _rms(update).clamp(min=1.0)
        p.mul_(1 - lr * weight_decay).sub_(update * size)


def _mean(x, dim):
    """Mean over one or more dimensions, which are kept, and over all shards of a sharded tensor."""
    total = x.sum(dim, keepdim=True)
    mean = total * (total.numel() / x.numel())
    if hasattr(mean, "placements"):
        from torch.distributed.tensor import Replicate

        mean = mean.redistribute(placements=[Replicate() if p.is_partial() else p for p in mean.placements])
    return mean


def _rms(x):
    """Root of the mean of squares."""
    return _mean(x.square(), tuple(range(x.dim()))).sqrt()


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the blocks and torch's AdamW for all other parameters, as one optimizer.

    One, so that the gradient scaler skips a step in both. Muon's updates are scaled to the size of AdamW's (arXiv
    2502.16982, section 2.2), so that both use one learning rate. torch.optim.Muon gives the same up to bf16 rounding,
    but works on one matrix at a time: 1.3 to 3 times as long on a CPU.
    """

    def __init__(self, model, groups, cfg, world):
        self.world = world if world and world.size > 1 else None
        hidden = {id(p) for p in model.blocks.parameters() if p.dim() == 2}
        muon = {"params": [p for group in groups for p in group["params"] if id(p) in hidden], "lr": cfg.learning_rate}
        muon |= {"weight_decay": cfg.weight_decay, "momentum": cfg.muon_momentum}
        others = [group | {"params": [p for p in group["params"] if id(p) not in hidden]} for group in groups]
        self.adamw = torch.optim.AdamW(others, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)
        super().__init__([muon, *self.adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure=None):
        """One step of both, on this optimizer's groups and state."""
        self.adamw.param_groups, self.adamw.state = self.param_groups[1:], self.state
        self.adamw.step()
        group, stacks = self.param_groups[0], {}
        for p in group["params"]:
            if p.grad is not None:
                stacks.setdefault((p.shape, getattr(p, "placements", None)), []).append(p)
        for (shape, _), params in stacks.items():
            n = max(1, STACK // shape.numel()) * (self.world.ranks_of_stage if self.world else 1)
            for i in range(0, len(params), n):
                self._muon_step(params[i : i + n], group)

    def _muon_step(self, params, group):
        """Muon's step for matrices of one shape and one placement."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        weights, grads = [local(p) for p in params], [local(p.grad) for p in params]
        averages = [local(self.state[p]["momentum_buffer"]) for p in params]
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
        # Nesterov momentum
        updates = [u.to(MUON_DTYPE) for u in torch._foreach_lerp(grads, averages, group["momentum"])]
        if self.world:
            from parallel import on_whole_matrices  # here, because DTensor takes half a second to import

            updates = on_whole_matrices(orthogonalize, updates, params, self.world.mesh)
        else:
            updates = orthogonalize(torch.stack(updates))
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for w, u in zip(weights, updates):
            w.add_(u, alpha=-group["lr"] * 0.2 * math.sqrt(max(params[0].shape)))


def orthogonalize(x):
    """Matrices x (n, rows, columns) with their singular values replaced by about 1, in five Newton-Schulz steps."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):  # Keller Jordan's quintic, https://kellerjordan.github.io/posts/muon/
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def set_lr(optimizer, learning_rate):
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
