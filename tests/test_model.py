"""The network against transformers, torch's own functions and its definition."""

import math
import resource
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import IGNORE, MLP, Cache, ModelConfig, Transformer, linear_cross_entropy
from optim import OptimConfig, build_optimizer

B, T, V = 3, 7, 37
SMALL = ModelConfig(vocab_size=V, block_size=11, n_layer=3, n_head=5, n_embd=20)


def random_model(cfg=SMALL, seed=1):
    """A model whose every weight, bias and gain is drawn, wide enough for mistakes to show in its logits."""
    torch.manual_seed(seed)
    model = Transformer(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for table in {model.wte.weight, model.head.weight}:
            table[cfg.vocab_size :] = 0
    return model


def random_ids(seed=2, vocab_size=V, shape=(B, T)):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ---- GPT-2, exactly

GPT2 = {"124m": (12, 12, 768, 124_439_808), "350m": (24, 16, 1024, 354_823_168),
        "774m": (36, 20, 1280, 774_030_080), "1558m": (48, 25, 1600, 1_557_611_200)}  # fmt: skip


@pytest.mark.parametrize("layers, heads, width, count", GPT2.values(), ids=GPT2)
def test_gpt2_sizes_count_as_published_and_cost_nothing_on_meta(layers, heads, width, count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        model = Transformer(ModelConfig(n_layer=layers, n_head=heads, n_embd=width))
    assert model.num_params() == count
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 * 1024  # KiB; the smallest has 500 MB of weights


def hugging_face_twin(model):
    """transformers' GPT-2 with our model's weights; theirs keep q, k, v as one, and matrices transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    cfg = model.cfg
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd, n_layer=cfg.n_layer,
        n_head=cfg.n_head, n_inner=cfg.n_inner, activation_function="gelu_new", resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    ))  # fmt: skip
    ours = dict(model.named_parameters())
    state = {
        "transformer.wte.weight": ours["wte.weight"][: cfg.vocab_size],
        "transformer.wpe.weight": ours["wpe.weight"],
        "transformer.ln_f.weight": ours["norm_f.weight"],
        "transformer.ln_f.bias": ours["norm_f.bias"],
    }
    state["lm_head.weight"] = state["transformer.wte.weight"]
    names = {"ln_1": "norm1", "attn.c_proj": "attn.proj",
             "ln_2": "norm2", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}  # fmt: skip
    for i in range(cfg.n_layer):
        for kind in ("weight", "bias"):
            parts = [ours[f"blocks.{i}.attn.{name}.{kind}"] for name in "qkv"]
            state[f"transformer.h.{i}.attn.c_attn.{kind}"] = torch.cat(parts).t()
            for name, our_name in names.items():
                state[f"transformer.h.{i}.{name}.{kind}"] = ours[f"blocks.{i}.{our_name}.{kind}"].t()
    theirs.load_state_dict(state)
    return theirs.eval()


@pytest.mark.parametrize("n_inner", [None, 33])
def test_logits_and_loss_are_transformers_gpt2s(n_inner):
    model, ids = random_model(replace(SMALL, n_inner=n_inner)), random_ids()
    theirs = hugging_face_twin(model)
    with torch.no_grad():
        out = theirs(ids, labels=ids)  # theirs shifts the labels itself, and takes the mean
        torch.testing.assert_close(model(ids), out.logits, rtol=0, atol=1e-4)
        assert out.logits.std() > 1
        loss = model(ids[:, :-1], targets=ids[:, 1:]) / (B * (T - 1))
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)


@pytest.mark.parametrize("name, approximate", [("gelu_tanh", "tanh"), ("gelu", "none")])
def test_both_gelus_are_torchs(name, approximate):
    mlp, x = MLP(replace(SMALL, mlp=name)), 3 * torch.randn(B, T, 20)
    torch.testing.assert_close(mlp(x), mlp.down(torch.nn.GELU(approximate)(mlp.up(x))))
    other = torch.nn.GELU("none" if approximate == "tanh" else "tanh")
    assert not torch.equal(mlp(x), mlp.down(other(mlp.up(x))))


def test_exact_gelu_is_the_erf_form():
    x = torch.linspace(-5, 5, 101)
    mlp = MLP(replace(SMALL, mlp="gelu", n_embd=1, n_head=1, n_inner=1, bias=False))
    with torch.no_grad():
        mlp.up.weight.fill_(1.0), mlp.down.weight.fill_(1.0)
        torch.testing.assert_close(mlp(x[:, None])[:, 0], x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))


def test_model_without_biases_has_none():
    assert not [name for name, _ in Transformer(replace(SMALL, bias=False)).named_parameters() if "bias" in name]


# ---- the loss

LARGE_V = 16_400  # padded to 16,448: a chunk on the CPU is then 512 rows, and 1,200 rows are three chunks


def loss_inputs(rows=1200, vocab_size=LARGE_V, width=20):
    g = torch.Generator().manual_seed(3)
    padded = -(-vocab_size // 64) * 64
    hidden = torch.randn(rows, width, generator=g).requires_grad_()
    weight = torch.randn(padded, width, generator=g)
    weight[vocab_size:] = 9.0  # must not count, whatever stands there
    targets = torch.randint(vocab_size, (rows,), generator=g)
    targets[::5] = IGNORE
    targets[600:900] = IGNORE  # some of it a whole stretch, across two chunks
    return hidden, weight.requires_grad_(), targets


def plain_loss(hidden, weight, targets, vocab_size):
    return F.cross_entropy(hidden @ weight[:vocab_size].T, targets, ignore_index=IGNORE, reduction="sum")


def worst_error(ours, theirs):
    """Largest difference, relative to the largest entry."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("rows, vocab_size", [(1200, LARGE_V), (B * T, V), (1, V)])
def test_chunked_loss_and_gradients_are_plain_cross_entropys(rows, vocab_size):
    hidden, weight, targets = loss_inputs(rows, vocab_size)
    if rows == 1:
        targets[:] = 5
    theirs = plain_loss(hidden, weight, targets, vocab_size)
    their_gradients = torch.autograd.grad(theirs / 7, (hidden, weight))
    ours = linear_cross_entropy(hidden, weight, targets, vocab_size)
    our_gradients = torch.autograd.grad(ours / 7, (hidden, weight))
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert worst_error(our_gradients[0], their_gradients[0]) < 1e-5
    assert worst_error(our_gradients[1], their_gradients[1]) < 1e-5
    assert our_gradients[0][targets == IGNORE].eq(0).all()
    assert our_gradients[1][vocab_size:].eq(0).all()
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, vocab_size).item() == ours.item()


def test_loss_of_ignored_targets_alone_is_zero():
    hidden, weight, targets = loss_inputs(B * T, V)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE), V)
    loss.backward()
    assert loss.item() == 0 and hidden.grad.eq(0).all() and weight.grad.eq(0).all()


def test_loss_survives_logits_that_overflow_exp():
    hidden, weight, targets = loss_inputs(B * T, V)
    theirs, ours = plain_loss(hidden * 100, weight, targets, V), linear_cross_entropy(hidden * 100, weight, targets, V)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5) and math.isfinite(ours.item())


def test_loss_in_bf16_is_close_and_sums_in_float32():
    """torch's own, in bf16, sums in bf16 and is 15 % off; rounding each logit costs 0.4 % at most."""
    hidden, weight, targets = loss_inputs()
    theirs = plain_loss(hidden, weight, targets, LARGE_V)
    their_gradients = torch.autograd.grad(theirs, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets, LARGE_V)
    our_gradients = torch.autograd.grad(ours, (hidden, weight))
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=2e-3)
    assert ours.item() != pytest.approx(theirs.item(), rel=1e-9)  # or autocast would have been ignored
    for ours, theirs in zip(our_gradients, their_gradients):
        assert ours.dtype == torch.float32
        assert ((ours - theirs).norm() / theirs.norm()).item() < 0.02


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_operation_of_the_loss_makes_all_logits():
    hidden, weight, targets = loss_inputs()
    with LargestTensor() as of_plain:
        plain_loss(hidden, weight, targets, LARGE_V).backward()
    with LargestTensor() as of_ours:
        linear_cross_entropy(hidden, weight, targets, LARGE_V).backward()
    assert of_plain.elements == len(hidden) * LARGE_V
    assert of_ours.elements == 512 * len(weight)


def test_a_large_vocabulary_takes_part_as_a_whole():
    """The model's loss, over three chunks, is cross-entropy of its own logits."""
    cfg = replace(SMALL, vocab_size=LARGE_V, block_size=400, n_layer=1)
    model = random_model(cfg)
    ids, targets = random_ids(shape=(B, 400), vocab_size=LARGE_V), random_ids(3, LARGE_V, (B, 400))
    targets[1, 5:] = IGNORE
    with torch.no_grad():
        theirs = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        assert model(ids, targets=targets).item() == pytest.approx(theirs.item(), rel=1e-5)


# ---- padding of the vocabulary

@pytest.mark.parametrize("tied", [True, False])
def test_padding_rows_take_no_part_and_stay_zero(tied):
    model, ids = Transformer(replace(SMALL, tie_embeddings=tied)), random_ids()
    model.init_weights(seed=1)
    tables = [model.wte.weight] if tied else [model.wte.weight, model.head.weight]
    assert model(ids).shape == (B, T, V) and len(tables[0]) == 64
    optimizer = build_optimizer(model, OptimConfig(learning_rate=0.1))
    for _ in range(3):
        model(ids, targets=ids).backward()
        assert all(table.grad[V:].eq(0).all() for table in tables)
        optimizer.step()
        optimizer.zero_grad()
    assert all(table[V:].eq(0).all() and table[:V].ne(0).all() for table in tables)
    with torch.no_grad():
        before = model(ids, targets=ids).item()
        for table in tables:
            table[V:] = 50.0
        assert model(ids, targets=ids).item() == before


def test_gpt2s_vocabulary_is_padded_to_50304():
    assert ModelConfig().padded_vocab_size == 50304
    assert ModelConfig(vocab_size=64).padded_vocab_size == 64


# ---- attention

@pytest.mark.parametrize("t", [0, 3, 6])
def test_logits_never_depend_on_later_tokens(t):
    model, ids = random_model(), random_ids()
    other = ids.clone()
    other[:, t] = (ids[:, t] + 1) % V
    with torch.no_grad():
        before, after = model(ids), model(other)
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t:] - after[:, t:]).abs().amax(-1).gt(1e-3).all()  # they do depend on this one and earlier ones


@pytest.mark.parametrize("prompt", [1, 4, 11])
def test_cached_logits_are_the_uncached_ones(prompt):
    model, ids = random_model(), random_ids(shape=(B, 11))
    with torch.no_grad():
        whole = model(ids)
        cache = Cache(model.cfg, B, "cpu", torch.float32)
        for _ in range(2):  # a cleared cache is as good as new
            cache.clear()
            steps = [model(ids[:, :prompt], cache=cache)]
            steps += [model(ids[:, i : i + 1], cache=cache) for i in range(prompt, 11)]
            torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, prompt - 1 :], rtol=0, atol=1e-4)
        assert cache.length == 11


def test_several_tokens_behind_cached_ones_are_refused_not_wrong():
    model, ids = random_model(), random_ids()
    cache = Cache(model.cfg, B, "cpu", torch.float32)
    with torch.no_grad(), pytest.raises(AssertionError, match="one at a time"):
        model(ids[:, :3], cache=cache)
        model(ids[:, 3:], cache=cache)


def test_a_sequence_longer_than_block_size_is_refused():
    model = random_model()
    with pytest.raises(ValueError, match="12 tokens do not fit into block_size 11"):
        model(random_ids(shape=(B, 12)))
    cache = Cache(model.cfg, B, "cpu", torch.float32)
    with torch.no_grad(), pytest.raises(ValueError, match="12 tokens do not fit into block_size 11"):
        model(random_ids(shape=(B, 11)), cache=cache)
        model(random_ids(shape=(B, 1)), cache=cache)


def test_dropout_is_off_in_evaluation():
    model, ids = random_model(replace(SMALL, dropout=0.5)), random_ids()
    with torch.no_grad():
        assert not torch.equal(model(ids), model(ids))
        model.eval()
        assert torch.equal(model(ids), model(ids))
        assert torch.equal(model(ids), random_model().eval()(ids))


# ---- initial weights

def initial(cfg=SMALL, seed=1):
    with torch.device("meta"):
        model = Transformer(cfg)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.init_weights(seed)
    return dict(model.named_parameters())


RESIDUAL = ("attn.proj.weight", "mlp.down.weight")


def test_initial_weights_are_gpt2s():
    weights = initial(ModelConfig(vocab_size=1000, block_size=300, n_layer=3, n_head=5, n_embd=200))
    for name, w in weights.items():
        if name.endswith("bias"):
            assert w.eq(0).all(), name
        elif "norm" in name:
            assert w.eq(1).all(), name
        else:
            std = 0.02 / math.sqrt(6) if name.endswith(RESIDUAL) else 0.02  # 3 layers, 2 branches each
            drawn = w[:1000] if name == "wte.weight" else w
            assert drawn.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(drawn.mean().item()) < 0.02 * std, name


def test_a_layer_more_changes_no_other_weight():
    three, four = initial(), initial(replace(SMALL, n_layer=4))
    assert set(three) < set(four)
    for name, w in three.items():
        if name.endswith(RESIDUAL):  # the same draw, at the scale of a deeper model
            torch.testing.assert_close(w * math.sqrt(3 / 4), four[name])
        else:
            assert torch.equal(w, four[name]), name


def test_padding_changes_no_weight():
    @dataclass(frozen=True)
    class WidePadding(ModelConfig):
        padded_vocab_size = 128

    narrow, wide = initial(), initial(WidePadding(vocab_size=V, block_size=11, n_layer=3, n_head=5, n_embd=20))
    assert wide["wte.weight"].shape == (128, 20)
    assert torch.equal(narrow["wte.weight"][:V], wide["wte.weight"][:V])
    assert all(torch.equal(narrow[name], wide[name]) for name in narrow if name != "wte.weight")


def test_initial_weights_follow_seed_and_name_alone():
    once = initial()
    torch.manual_seed(99)
    again, other = initial(), initial(seed=2)
    for name in once:
        assert torch.equal(once[name], again[name]), name
    drawn = [name for name in once if not name.endswith("bias") and "norm" not in name]
    assert not [name for name in drawn if torch.equal(once[name], other[name])]
    assert not torch.equal(once["blocks.0.attn.q.weight"], once["blocks.0.attn.k.weight"])
    assert not torch.equal(once["blocks.0.attn.q.weight"], once["blocks.1.attn.q.weight"])


def test_tied_head_is_one_parameter_with_the_embedding_and_an_untied_one_is_not():
    tied = Transformer(SMALL)
    assert tied.head.weight is tied.wte.weight
    assert len([p for p in tied.parameters() if p.shape == (64, 20)]) == 1
    untied = Transformer(replace(SMALL, tie_embeddings=False))
    untied.init_weights(seed=1)
    assert untied.num_params() == tied.num_params() + V * 20
    assert not torch.equal(untied.head.weight, untied.wte.weight)


@pytest.mark.parametrize("wrong, told", [
    ({"n_embd": 20, "n_head": 3}, "n_embd 20 is not a multiple of n_head 3; n_head 1, 2, 4 would fit"),
    ({"n_layer": 0}, "n_layer is 0"), ({"vocab_size": -1}, "vocab_size is -1"), ({"dropout": 1.0}, "dropout is 1.0"),
])
def test_impossible_shapes_are_named(wrong, told):
    with pytest.raises(ValueError, match=told):
        replace(SMALL, **wrong)


def test_remedy_for_a_huge_width_comes_at_once():
    with pytest.raises(ValueError, match="n_embd 100000000000 is not a multiple of n_head 3"):
        ModelConfig(n_embd=10**11, n_head=3)
