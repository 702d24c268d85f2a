"""Schedules against torch's own, optimizers against their formulas."""

import math

import pytest
import torch

from model import ModelConfig, Transformer
from optim import OptimConfig, build_optimizer, lr_at, set_lr

SMALL = ModelConfig(vocab_size=37, block_size=11, n_layer=3, n_head=5, n_embd=20)


def torch_schedule(scheduler, steps):
    """Learning rates of steps 0 .. steps - 1 of one of torch's schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    scheduler = scheduler(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def schedule(steps, **changes):
    cfg = OptimConfig(learning_rate=0.7, **{"max_steps": 23, "warmup_steps": 0} | changes)
    return [lr_at(step, cfg, cfg.max_steps) for step in range(steps)]


def test_cosine_is_torchs():
    theirs = torch_schedule(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=23, eta_min=0.1), 24)
    assert schedule(24, schedule="cosine", min_lr=0.1) == pytest.approx(theirs, rel=1e-6)


def test_linear_is_torchs():
    theirs = torch_schedule(lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 1 / 7, total_iters=23), 24)
    assert schedule(24, schedule="linear", min_lr=0.1) == pytest.approx(theirs, rel=1e-6)


def test_constant_ignores_min_lr():
    assert schedule(40, schedule="constant", min_lr=0.1) == [0.7] * 40


def test_wsd_is_constant_then_linear():
    rates = schedule(24, schedule="wsd", cooldown_steps=10, warmup_steps=3, min_lr=0.2)
    assert rates[3:14] == [0.7] * 11
    assert rates[13:] == pytest.approx([0.7 - 0.05 * i for i in range(11)])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warmup_rises_linearly_from_above_zero(name):
    rates = schedule(8, schedule=name, warmup_steps=7)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.7])  # llm.c's: (step + 1) / warmup_steps


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_decay_begins_after_warmup_and_stays_at_min_lr_from_lr_decay_steps(name):
    rates = schedule(40, schedule=name, warmup_steps=5, lr_decay_steps=17, cooldown_steps=6, min_lr=0.1, max_steps=40)
    halfway = 14 if name == "wsd" else 11  # between 11 and 17, or 5 and 17
    assert rates[5] == pytest.approx(0.7)
    assert rates[halfway] == pytest.approx(0.4)
    assert rates[16] > 0.1
    assert rates[17:] == pytest.approx([0.1] * 23)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:]))


def test_a_warmup_longer_than_the_run_never_decays():
    assert schedule(9, warmup_steps=10, max_steps=9) == pytest.approx([0.07 * (i + 1) for i in range(9)])


def test_max_tokens_sets_the_number_of_steps():
    assert OptimConfig(max_tokens=100).last_step(batch_tokens=42) == 3
    assert OptimConfig(max_tokens=84).last_step(batch_tokens=42) == 2
    assert OptimConfig(max_steps=5).last_step(batch_tokens=42) == 5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_each_parameter_is_in_one_group_and_only_matrices_decay(optimizer, tied):
    model = Transformer(ModelConfig(vocab_size=37, block_size=11, n_layer=3, n_head=5, n_embd=20, tie_embeddings=tied))
    groups = build_optimizer(model, OptimConfig(optimizer=optimizer, weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if name.endswith("bias") or "norm" in name else 0.3), name


def with_gradients(seed=1):
    torch.manual_seed(seed)
    model = Transformer(SMALL)
    return model, [torch.randn_like(p) for p in model.parameters()]


def test_adamw_follows_its_paper():
    """arXiv 1711.05101, algorithm 2, in double precision over two steps."""
    model, grads = with_gradients()
    cfg = OptimConfig(learning_rate=0.01, beta1=0.8, beta2=0.9, weight_decay=0.3)
    optimizer = build_optimizer(model, cfg)
    expected = [p.detach().double() for p in model.parameters()]
    mean, square = [torch.zeros_like(e) for e in expected], [torch.zeros_like(e) for e in expected]
    for step, lr in ((1, 0.01), (2, 0.004)):
        set_lr(optimizer, lr)
        for i, (p, g) in enumerate(zip(model.parameters(), grads)):
            p.grad = g / step
            mean[i] = 0.8 * mean[i] + 0.2 * p.grad.double()
            square[i] = 0.9 * square[i] + 0.1 * p.grad.double() ** 2
            update = mean[i] / (1 - 0.8**step) / ((square[i] / (1 - 0.9**step)).sqrt() + 1e-8)
            expected[i] = expected[i] - lr * ((0.3 if p.dim() >= 2 else 0.0) * expected[i] + update)
        optimizer.step()
    for p, e in zip(model.parameters(), expected):
        torch.testing.assert_close(p.detach(), e.float(), rtol=1e-5, atol=1e-6)


def test_sgd_has_momentum_beta1():
    model, grads = with_gradients()
    optimizer = build_optimizer(model, OptimConfig(optimizer="sgd", learning_rate=0.1, beta1=0.5, weight_decay=0.0))
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        for p, g in zip(model.parameters(), grads):
            p.grad = g
        optimizer.step()
    for p, b, g in zip(model.parameters(), before, grads):
        torch.testing.assert_close(p.detach(), b - 0.1 * (1 + 1.5) * g)


@pytest.mark.parametrize("wrong", [
    {"learning_rate": -1.0}, {"min_lr": 1.0}, {"beta1": 1.0}, {"beta2": -0.1}, {"grad_clip": 0.0}, {"max_tokens": 0},
    {"lr_decay_steps": 0}, {"warmup_steps": -1},
])  # fmt: skip
def test_impossible_settings_are_named_with_their_value(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        OptimConfig(**wrong)


def test_cosine_passes_through_its_closed_form():
    """llm.c's schedulers.h: min + (1 + cos(pi * share)) / 2 * (max - min), share counted from the end of warm-up."""
    rates = schedule(100, schedule="cosine", warmup_steps=20, max_steps=100, min_lr=0.07)
    assert rates[45] == pytest.approx(0.07 + 0.63 * 0.5 * (1 + math.cos(math.pi * 25 / 80)))
