"""Schedules against torch's own, optimizers against their formulas."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch

import checkpoint
import optim
from model import ModelConfig, Transformer
from optim import OptimConfig, build_optimizer, lr_at, set_lr

SMALL = ModelConfig(vocab_size=37, block_size=11, n_layer=3, n_head=5, n_embd=20)
BERT = replace(SMALL, objective="mlm", mlp="gelu", norm_position="post", n_token_types=2)
MODERN = replace(
    SMALL, n_head=6, n_kv_head=2, head_dim=8, n_inner=33, mlp="swiglu", norm="rmsnorm", qk_norm=True, position="rope",
    bias=False,
)  # fmt: skip
SHAPES = pytest.mark.parametrize("shape", [SMALL, BERT, MODERN], ids=["gpt2", "bert", "modern"])
OPTIMIZERS = ["adamw", "muon", "adafactor", "sgd"]


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
    assert OptimConfig(max_tokens=85).last_step(batch_tokens=10, step=2, tokens=64) == 2 + 3
    assert OptimConfig(max_tokens=60).last_step(batch_tokens=10, step=2, tokens=64) == 2


@pytest.mark.parametrize("tied", [True, False])
@SHAPES
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_parameter_is_in_one_group_and_only_matrices_decay(optimizer, shape, tied):
    model = Transformer(replace(shape, tie_embeddings=tied))
    groups = build_optimizer(model, OptimConfig(optimizer=optimizer, weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if name.endswith("bias") or "norm" in name else 0.3), name


def with_gradients(seed=1, shape=SMALL):
    torch.manual_seed(seed)
    model = Transformer(shape)
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


# ---- muon, and adamw beside it

HIDDEN = re.compile(r"blocks\.\d+\.(attn\.(q|k|v|proj)|mlp\.(gate|up|down))\.weight")  # what Muon takes
RATES = ((1, 0.01), (2, 0.004), (3, 0.007))  # steps with their learning rates


def random_gradients(model, step):
    """Gives every parameter a random gradient, the same for all models of a shape."""
    g = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("tied", [True, False])
@SHAPES
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else(shape, tied):
    model = Transformer(replace(shape, tie_embeddings=tied))
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", muon_momentum=0.7, beta1=0.8, beta2=0.9))
    muon, *others = optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in muon["params"]} == {name for name in names.values() if HIDDEN.fullmatch(name)}
    assert len(muon["params"]) == 3 * (7 if shape is MODERN else 6)
    assert muon["momentum"] == 0.7 and "betas" not in muon
    assert all(group["betas"] == (0.8, 0.9) for group in others)
    left = {names[id(p)] for group in others for p in group["params"]}
    assert {"wte.weight"} < left and left.isdisjoint(names[id(p)] for p in muon["params"])


def newton_schulz(matrix):
    """Keller Jordan's quintic iteration, https://kellerjordan.github.io/posts/muon/; torch's rounds to bf16 in it."""
    x = matrix / matrix.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muons_update_is_its_formula_and_size_for_each_matrix_alone():
    """arXiv 2502.16982, equation 4: 0.2 sqrt(max(rows, columns)) times the orthogonalised Nesterov momentum."""
    model, _ = with_gradients(shape=MODERN)
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", muon_momentum=0.7, weight_decay=0.3))
    momentum = {}
    for step, lr in RATES:
        random_gradients(model, step)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if HIDDEN.fullmatch(name)}
        set_lr(optimizer, lr)
        optimizer.step()
        for name, old in before.items():
            p = model.get_parameter(name)
            momentum[name] = 0.7 * momentum.get(name, 0) + 0.3 * p.grad
            wanted = newton_schulz(0.3 * p.grad + 0.7 * momentum[name]) * 0.2 * math.sqrt(max(p.shape))
            update = (old * (1 - lr * 0.3) - p.detach()) / lr
            assert ((update - wanted).norm() / wanted.norm()).item() < 0.025, (step, name)


def check_steps_equal(model, optimizer, alone, atol=0.0):
    """Steps the optimizer, and beside it each parameter's twin by an optimizer of its own: {name: (twin, its own)}."""
    for step, lr in RATES:
        random_gradients(model, step)
        set_lr(optimizer, lr)
        optimizer.step()
        for name, (twin, its_own) in alone.items():
            twin.grad = model.get_parameter(name).grad
            set_lr(its_own, lr)
            its_own.step()
            assert (model.get_parameter(name) - twin).abs().max() <= atol, (step, name)


@SHAPES
@pytest.mark.parametrize("stack", [1, 2**26])
def test_muon_and_adamw_are_to_the_bit_torchs_run_on_each_parameter_alone(shape, stack, monkeypatch):
    """At this size; that of larger matrices is rounded in another order."""
    monkeypatch.setattr(optim, "STACK", stack)
    cfg = OptimConfig(optimizer="muon", beta1=0.8, beta2=0.9, muon_momentum=0.7, weight_decay=0.3)
    model, _ = with_gradients(shape=shape)
    optimizer, alone = build_optimizer(model, cfg), {}
    for name, p in model.named_parameters():
        p.data.add_(0.1)  # else decay of vectors that are 0 would not show
        twin = torch.nn.Parameter(p.detach().clone())
        if HIDDEN.fullmatch(name):
            its_own = torch.optim.Muon([twin], momentum=0.7, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
        else:
            decay = 0.3 if p.dim() == 2 else 0.0
            its_own = torch.optim.AdamW([twin], betas=(0.8, 0.9), weight_decay=decay, fused=True)
        alone[name] = twin, its_own
    check_steps_equal(model, optimizer, alone)


def test_muons_updates_have_the_size_of_adamws():
    """Root mean square 0.2 of the learning rate, as far as Newton-Schulz's singular values are 1: 0.7 to 1.2."""
    wide = ModelConfig(vocab_size=37, block_size=11, n_layer=1, n_head=5, n_kv_head=1, n_embd=120, mlp="swiglu")
    model, grads = with_gradients(shape=wide)
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", learning_rate=0.01, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p, g in zip(model.parameters(), grads):
        p.grad = g
    optimizer.step()
    sizes = {
        name: (p.detach() - before[name]).square().mean().sqrt().item() / 0.01
        for name, p in model.named_parameters()
        if HIDDEN.fullmatch(name)
    }
    assert len(sizes) == 7 and all(0.14 < size < 0.24 for size in sizes.values()), sizes


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_set_lr_reaches_every_parameter_also_after_the_state_was_loaded(optimizer):
    model, _ = with_gradients(shape=BERT)
    optimizer = build_optimizer(model, OptimConfig(optimizer=optimizer, learning_rate=0.1))
    for step in (1, 2, 3, 4):
        random_gradients(model, step)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        set_lr(optimizer, 0.0 if step % 2 else 0.1)
        optimizer.step()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == bool(step % 2), (step, name)
        if step == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # makes new groups and new state
    assert all(group["lr"] == 0.1 for group in optimizer.param_groups)


def test_gradients_of_both_parts_are_forgotten():
    model, _ = with_gradients()
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon"))
    random_gradients(model, 1)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


STATE = {"adamw": {"exp_avg", "exp_avg_sq", "step"}, "adafactor": {"row_var", "col_var", "step"},
         "sgd": {"momentum_buffer"}}  # fmt: skip


def state_names(optimizer, name, p):
    """The names of the state that an optimizer keeps for a parameter."""
    if optimizer == "muon":
        return {"momentum_buffer"} if HIDDEN.fullmatch(name) else STATE["adamw"]
    return {"variance", "step"} if optimizer == "adafactor" and p.dim() < 2 else STATE[optimizer]


@SHAPES
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_is_complete_after_a_step(optimizer, shape):
    model, _ = with_gradients(shape=shape)
    built = build_optimizer(model, OptimConfig(optimizer=optimizer))
    random_gradients(model, 1)
    built.step()
    assert set(built.state) == set(model.parameters())
    for name, p in model.named_parameters():
        assert set(built.state[p]) == state_names(optimizer, name, p), name


@SHAPES
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoints_tensors_are_all_that_a_new_optimizer_needs(optimizer, shape):
    """What checkpoint.py does: it copies into the tensors of an optimizer that has not stepped yet."""

    def built(seed):
        model, _ = with_gradients(seed, shape)
        return model, build_optimizer(model, OptimConfig(optimizer=optimizer, learning_rate=0.01))

    (model, its_optimizer), (other, other_optimizer) = built(1), built(2)
    for step in (1, 2):
        random_gradients(model, step)
        its_optimizer.step()
    its_optimizer.zero_grad()
    saved = {name: tensor.clone() for name, tensor in checkpoint._tensors(model, its_optimizer).items()}
    fresh = {name: p.detach().clone() for name, p in other.named_parameters()}
    loaded = checkpoint._tensors(other, other_optimizer)
    assert all(torch.equal(p, fresh[name]) for name, p in other.named_parameters())  # making state changes no weight
    state = {f"optimizer.state.{name}.{kind}" for name, p in fresh.items() for kind in state_names(optimizer, name, p)}
    assert loaded.keys() == saved.keys() == {f"model.{name}" for name in fresh} | state
    for name, tensor in loaded.items():
        tensor.copy_(saved[name])
    for one, its in ((model, its_optimizer), (other, other_optimizer)):
        random_gradients(one, 3)
        its.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(name)), name
        assert not torch.equal(p, saved[f"model.{name}"]), name


@pytest.mark.parametrize("planted", ["wte.weight", "blocks.1.mlp.up.weight", "blocks.0.norm1.bias"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_the_gradient_scaler_skips_is_skipped_whole(optimizer, planted):
    model, _ = with_gradients()
    optimizer = build_optimizer(model, OptimConfig(optimizer=optimizer, learning_rate=0.1))
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    ids = torch.randint(37, (3, 7), generator=torch.Generator().manual_seed(2))
    for step in range(3):
        scaler.scale(model(ids, targets=ids)).backward()
        if step == 1:
            model.get_parameter(planted).grad.view(-1)[7] = math.inf
        before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            if "attn.k.bias" not in name:  # which has no gradient
                assert torch.equal(p, before[0][name]) == (step == 1), (step, name)
        if step == 1:
            after = optimizer.state_dict()["state"]
            assert all(torch.equal(after[i][kind], value) for i in after for kind, value in before[1][i].items())
        assert all(p.isfinite().all() for p in model.parameters())
    assert scaler.get_scale() == 2.0**15  # halved once


# ---- adafactor

def test_adafactor_is_torchs_run_on_each_parameter_alone_and_decays_matrices_alone():
    model, _ = with_gradients(shape=BERT)
    optimizer, alone = build_optimizer(model, OptimConfig(optimizer="adafactor", weight_decay=0.3)), {}
    for name, p in model.named_parameters():
        p.data.add_(0.1)
        twin = torch.nn.Parameter(p.detach().clone())
        alone[name] = twin, torch.optim.Adafactor([twin], weight_decay=0.3 if p.dim() == 2 else 0.0)
    check_steps_equal(model, optimizer, alone, atol=1e-6)


def test_adafactors_first_step_follows_its_paper():
    """arXiv 1804.04235, algorithms 4 to 6, in double precision: the first step's decay is 0, its size at most 1."""
    model, grads = with_gradients()
    optimizer = build_optimizer(model, OptimConfig(optimizer="adafactor", learning_rate=0.01, weight_decay=0.0))
    before = [p.detach().double() for p in model.parameters()]
    for p, g in zip(model.parameters(), grads):
        p.grad = g
    optimizer.step()
    for p, old in zip(model.parameters(), before):
        square = p.grad.double() ** 2
        if p.dim() == 2:
            square = square.sum(1, keepdim=True) * square.sum(0, keepdim=True) / square.sum()
        update = p.grad.double() / square.sqrt()
        update /= max(1.0, update.square().mean().sqrt().item())
        size = max(1e-3, old.square().mean().sqrt().item())
        torch.testing.assert_close(p.detach(), (old - 0.01 * size * update).float(), rtol=1e-5, atol=1e-6)


def test_adafactor_keeps_a_row_and_a_column_for_each_matrix():
    def elements(optimizer):
        model, _ = with_gradients(shape=replace(SMALL, n_embd=60))
        built = build_optimizer(model, OptimConfig(optimizer=optimizer))
        random_gradients(model, 1)
        built.step()
        for p, state in built.state.items():
            if optimizer == "adafactor":
                assert sum(t.numel() for t in state.values()) == 1 + (sum(p.shape) if p.dim() == 2 else len(p))
        return sum(t.numel() for state in built.state.values() for t in state.values()), model.num_params()

    count, params = elements("adafactor")
    assert count < params / 15 and elements("adamw")[0] > 2 * params


# ---- training

@pytest.mark.parametrize("optimizer, rate", [("adamw", 0.01), ("muon", 0.02), ("adafactor", 0.1), ("sgd", 0.1)])
@pytest.mark.parametrize("shape", [
    SMALL, BERT, MODERN, replace(MODERN, dropout=0.1, label_smoothing=0.1),
], ids=["gpt2", "bert", "modern", "dropout and label smoothing"])  # fmt: skip
def test_thirty_steps_learn_a_batch(shape, optimizer, rate):
    torch.manual_seed(1)
    model = Transformer(shape)
    model.init_weights(seed=1)
    optimizer = build_optimizer(model, OptimConfig(optimizer=optimizer, learning_rate=rate, weight_decay=0.0))
    g = torch.Generator().manual_seed(2)
    ids, targets = torch.randint(37, (3, 7), generator=g), torch.randint(37, (3, 7), generator=g)

    def loss():
        with torch.no_grad():
            return model.eval()(ids, targets=targets).item() / 21

    first = loss()
    assert first == pytest.approx(math.log(37), rel=0.05)
    for _ in range(30):
        (model.train()(ids, targets=targets) / 21).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert loss() < first - 0.5, loss()


@pytest.mark.parametrize("wrong", [
    {"learning_rate": -1.0}, {"min_lr": 1.0}, {"beta1": 1.0}, {"beta2": -0.1}, {"grad_clip": 0.0}, {"max_tokens": 0},
    {"lr_decay_steps": 0}, {"warmup_steps": -1}, {"muon_momentum": 1.0}, {"muon_momentum": -0.1}, {"max_steps": -1},
    {"lr_decay_steps": 700},  # which is all warmup
])  # fmt: skip
def test_impossible_settings_are_named_with_their_value(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        OptimConfig(**wrong)


def test_cosine_passes_through_its_closed_form():
    """llm.c's schedulers.h: min + (1 + cos(pi * share)) / 2 * (max - min), share counted from the end of warm-up."""
    rates = schedule(100, schedule="cosine", warmup_steps=20, max_steps=100, min_lr=0.07)
    assert rates[45] == pytest.approx(0.07 + 0.63 * 0.5 * (1 + math.cos(math.pi * 25 / 80)))
