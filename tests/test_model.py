"""The network against transformers, torch's own functions and its definition."""

import hashlib
import itertools
import math
import resource
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cache import Cache
from model import MLP, Block, ModelConfig, Transformer
from ops import (
    IGNORE,
    LayerNorm,
    Linear,
    LossOptions,
    RMSNorm,
    Vocabulary,
    attend,
    linear_cross_entropy,
    linear_together,
    loss_pass,
    rope_table,
    rotate,
)
from optim import OptimConfig, build_optimizer

B, T, V = 3, 7, 37
SMALL = ModelConfig(vocab_size=V, block_size=11, n_layer=3, n_head=5, n_embd=20)
BERT = replace(
    SMALL, objective="mlm", n_inner=33, mlp="gelu", norm_position="post", norm_eps=1e-3, n_token_types=2
)  # fmt: skip
MODERN = replace(
    SMALL, n_head=6, n_kv_head=2, head_dim=8, n_inner=33, mlp="swiglu", norm="rmsnorm", norm_eps=1e-3, qk_norm=True,
    position="rope", rope_theta=500.0, bias=False,
)  # fmt: skip
KINDS = pytest.mark.parametrize("cfg", [SMALL, BERT, MODERN], ids=["gpt2", "bert", "modern"])
DECODERS = pytest.mark.parametrize("cfg", [SMALL, MODERN], ids=["gpt2", "modern"])


def random_model(cfg=SMALL, seed=1, std=0.3):
    """A model whose every weight, bias and gain is drawn, wide enough for mistakes to show in its logits."""
    torch.manual_seed(seed)
    model = Transformer(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=std).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for table in {model.wte.weight, model.head.weight}:
            table[cfg.vocab_size :] = 0
    return model


def random_ids(seed=2, vocab_size=V, shape=(B, T)):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def masked_targets(seed=4):
    """Positions (B, K) with their targets, and the same targets as (B, T); 4, 2 and 3 of K = 4, the rest padding."""
    ids, g = random_ids(seed), torch.Generator().manual_seed(seed)
    positions, targets = torch.zeros(B, 4, dtype=torch.long), torch.full((B, 4), IGNORE)
    dense = torch.full((B, T), IGNORE)
    for row, count in enumerate((4, 2, 3)):
        where = torch.randperm(T, generator=g)[:count]
        positions[row, :count], targets[row, :count] = where, ids[row, where]
        dense[row, where] = ids[row, where]
    return positions, targets, dense


REAL = torch.arange(T) < torch.tensor([7, 4, 6])[:, None]  # (B, T): sequences of 7, 4 and 6 tokens, padded on the right


# ---- GPT-2, exactly

GPT2 = {"124m": (12, 12, 768, 124_439_808), "350m": (24, 16, 1024, 354_823_168),
        "774m": (36, 20, 1280, 774_030_080), "1558m": (48, 25, 1600, 1_557_611_200)}  # fmt: skip


@pytest.mark.parametrize("layers, heads, width, count", GPT2.values(), ids=GPT2)
def test_gpt2_sizes_count_as_published_and_cost_nothing_on_meta(layers, heads, width, count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.device("meta"):
        model = Transformer(ModelConfig(vocab_size=50257, n_layer=layers, n_head=heads, n_embd=width))
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


def test_a_padded_batch_has_transformers_gpt2s_logits_where_tokens_are_real():
    model, ids = random_model(), random_ids()
    theirs = hugging_face_twin(model)
    with torch.no_grad():
        logits, out = model(ids, attention_mask=REAL), theirs(ids, attention_mask=REAL.long()).logits
    torch.testing.assert_close(logits[REAL], out[REAL], rtol=0, atol=1e-4)


# ---- BERT, Qwen3 and Llama, exactly

BERT_NAMES = {
    "bert.embeddings.word_embeddings": "wte",
    "bert.embeddings.position_embeddings": "wpe",
    "bert.embeddings.token_type_embeddings": "wtt",
    "bert.embeddings.LayerNorm": "norm_e",
    "bert.encoder.layer.{i}.attention.self.query": "blocks.{i}.attn.q",
    "bert.encoder.layer.{i}.attention.self.key": "blocks.{i}.attn.k",
    "bert.encoder.layer.{i}.attention.self.value": "blocks.{i}.attn.v",
    "bert.encoder.layer.{i}.attention.output.dense": "blocks.{i}.attn.proj",
    "bert.encoder.layer.{i}.attention.output.LayerNorm": "blocks.{i}.norm1",
    "bert.encoder.layer.{i}.intermediate.dense": "blocks.{i}.mlp.up",
    "bert.encoder.layer.{i}.output.dense": "blocks.{i}.mlp.down",
    "bert.encoder.layer.{i}.output.LayerNorm": "blocks.{i}.norm2",
    "cls.predictions.transform.dense": "transform.dense",
    "cls.predictions.transform.LayerNorm": "transform.norm",
    "cls.predictions.decoder": "head",
}
LLAMA_NAMES = {
    "model.embed_tokens": "wte",
    "model.layers.{i}.input_layernorm": "blocks.{i}.norm1",
    "model.layers.{i}.self_attn.q_proj": "blocks.{i}.attn.q",
    "model.layers.{i}.self_attn.k_proj": "blocks.{i}.attn.k",
    "model.layers.{i}.self_attn.v_proj": "blocks.{i}.attn.v",
    "model.layers.{i}.self_attn.o_proj": "blocks.{i}.attn.proj",
    "model.layers.{i}.post_attention_layernorm": "blocks.{i}.norm2",
    "model.layers.{i}.mlp.gate_proj": "blocks.{i}.mlp.gate",
    "model.layers.{i}.mlp.up_proj": "blocks.{i}.mlp.up",
    "model.layers.{i}.mlp.down_proj": "blocks.{i}.mlp.down",
    "model.norm": "norm_f",
    "lm_head": "head",
}
QWEN3_NAMES = LLAMA_NAMES | {
    "model.layers.{i}.self_attn.q_norm": "blocks.{i}.attn.q_norm",
    "model.layers.{i}.self_attn.k_norm": "blocks.{i}.attn.k_norm",
}


def twin(model, theirs, names):
    """transformers' model `theirs` with our model's weights, by a table of their modules' names and ours."""
    ours, state, used = model.state_dict(), {}, set()
    for their_name, our_name in names.items():
        for i in range(model.cfg.n_layer if "{i}" in their_name else 1):
            for kind in ("weight", "bias"):
                source, target = f"{our_name}.{kind}".format(i=i), f"{their_name}.{kind}".format(i=i)
                if source in ours:
                    used.add(source)
                    state[target] = ours[source][: V if our_name in ("wte", "head") else None]
    if "cls.predictions.bias" in theirs.state_dict():  # the decoder's, by another name
        state["cls.predictions.bias"] = state["cls.predictions.decoder.bias"]
    assert used == ours.keys()
    theirs.load_state_dict(state)
    return theirs.eval()


def bert_twin(model):
    from transformers import BertConfig, BertForMaskedLM

    cfg = model.cfg
    theirs = BertForMaskedLM(BertConfig(
        vocab_size=V, hidden_size=cfg.n_embd, num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head,
        intermediate_size=cfg.inner_width, hidden_act="gelu", hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, max_position_embeddings=cfg.block_size, type_vocab_size=2,
        layer_norm_eps=cfg.norm_eps, tie_word_embeddings=cfg.tie_embeddings, attn_implementation="eager",
    ))  # fmt: skip
    return twin(model, theirs, BERT_NAMES)


def llama_twin(model):
    """Llama with our model's weights, or Qwen3, which is Llama with norms of queries and keys."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    cfg = model.cfg
    shape = {
        "vocab_size": V, "hidden_size": cfg.n_embd, "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head, "num_key_value_heads": cfg.kv_heads, "head_dim": cfg.head_width,
        "intermediate_size": cfg.inner_width, "max_position_embeddings": cfg.block_size, "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings, "attention_bias": cfg.bias,
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta}, "attn_implementation": "eager",
    }  # fmt: skip
    if cfg.qk_norm:
        return twin(model, Qwen3ForCausalLM(Qwen3Config(**shape)), QWEN3_NAMES)
    return twin(model, LlamaForCausalLM(LlamaConfig(**shape, mlp_bias=cfg.bias)), LLAMA_NAMES)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("typed", [True, False], ids=["types", "no types"])
def test_a_padded_batch_has_transformers_berts_logits_where_tokens_are_real(typed, tied):
    model, ids = random_model(replace(BERT, tie_embeddings=tied)), random_ids()
    theirs = bert_twin(model)
    types = random_ids(3, 2) if typed else None
    with torch.no_grad():
        logits = model(ids, attention_mask=REAL, token_types=types)
        out = theirs(ids, attention_mask=REAL.long(), token_type_ids=types).logits
    assert logits.shape == out.shape == (B, T, V)
    torch.testing.assert_close(logits[REAL], out[REAL], rtol=0, atol=1e-4)
    assert out[REAL].std() > 1


def test_masked_loss_is_transformers_berts_whether_targets_are_dense_or_sparse():
    model, ids, types = random_model(BERT), random_ids(), random_ids(3, 2)
    positions, targets, dense = masked_targets()
    batch = {"ids": ids, "token_types": types, "attention_mask": torch.ones(B, T, dtype=torch.bool)}
    with torch.no_grad():
        theirs = bert_twin(model)(ids, token_type_ids=types, labels=dense).loss.item()
        assert model(targets=dense, **batch).item() / 9 == pytest.approx(theirs, rel=1e-5)
        assert model(targets=targets, positions=positions, **batch).item() / 9 == pytest.approx(theirs, rel=1e-5)
    assert theirs > 1


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("changes", [
    {}, {"bias": True}, {"qk_norm": False, "n_embd": 24}, {"qk_norm": False, "n_embd": 24, "bias": True},
    {"qk_norm": False, "n_head": 5, "n_kv_head": None, "head_dim": None},
], ids=["qwen3", "qwen3, biases", "llama", "llama, biases", "llama, heads all alike"])  # fmt: skip
def test_logits_and_loss_are_transformers_qwen3s_and_llamas(changes, tied):
    model, ids = random_model(replace(MODERN, tie_embeddings=tied, **changes)), random_ids()
    if model.cfg.qk_norm:
        for block in model.blocks:  # Qwen3 has biases in attention alone
            block.mlp.gate.bias = block.mlp.up.bias = block.mlp.down.bias = None
    theirs = llama_twin(model)
    with torch.no_grad():
        out = theirs(ids, labels=ids)
        torch.testing.assert_close(model(ids), out.logits, rtol=0, atol=1e-4)
        loss = model(ids[:, :-1], targets=ids[:, 1:]) / (B * (T - 1))
        for mask in (REAL, REAL.flip(1)):  # padding on the right and on the left
            logits, padded = model(ids, attention_mask=mask), theirs(ids, attention_mask=mask.long()).logits
            torch.testing.assert_close(logits[mask], padded[mask], rtol=0, atol=1e-4)
    assert out.logits.std() > 1
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)


@pytest.mark.parametrize("layers, heads, width, count", [(12, 12, 768, 109_514_298), (24, 16, 1024, 335_174_458)],
                         ids=["base", "large"])  # fmt: skip
def test_bert_sizes_count_as_transformers_do(layers, heads, width, count):
    from transformers import BertConfig, BertForMaskedLM

    with torch.device("meta"):
        ours = Transformer(replace(
            BERT, vocab_size=30_522, block_size=512, n_layer=layers, n_head=heads, n_embd=width, n_inner=None
        ))  # fmt: skip
        theirs = BertForMaskedLM(BertConfig(
            num_hidden_layers=layers, num_attention_heads=heads, hidden_size=width, intermediate_size=4 * width
        ))  # fmt: skip
    assert theirs.cls.predictions.decoder.weight is theirs.bert.embeddings.word_embeddings.weight  # and counts once
    assert ours.num_params() == sum(p.numel() for p in theirs.parameters()) == count


# ---- the MLP

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


def test_swiglu_is_a_sigmoid_gated_product():
    """arXiv 2002.05202: (x sigmoid(x)) of one projection times another; here with biases."""
    mlp, x = MLP(replace(SMALL, mlp="swiglu", n_inner=33)), 3 * torch.randn(B, T, 20)
    a, b = x @ mlp.gate.weight.T + mlp.gate.bias, x @ mlp.up.weight.T + mlp.up.bias
    torch.testing.assert_close(mlp(x), (a / (1 + (-a).exp()) * b) @ mlp.down.weight.T + mlp.down.bias)


def test_relu2_squares_what_is_above_zero():
    mlp, x = MLP(replace(SMALL, mlp="relu2")), 3 * torch.randn(B, T, 20)
    a = x @ mlp.up.weight.T + mlp.up.bias
    torch.testing.assert_close(mlp(x), (a * a * (a > 0)) @ mlp.down.weight.T + mlp.down.bias)
    assert mlp.gate is None and 0.2 < (a > 0).float().mean() < 0.8


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


def random_bias(vocab_size=LARGE_V):
    """A bias of the head, of the size of the logits; its padding must not count."""
    bias = 4 * torch.randn(-(-vocab_size // 64) * 64, generator=torch.Generator().manual_seed(4))
    bias[vocab_size:] = 9.0
    return bias.requires_grad_()


def plain_loss(hidden, weight, targets, vocab_size, bias=None, label_smoothing=0.0):
    logits = F.linear(hidden, weight[:vocab_size], None if bias is None else bias[:vocab_size])
    return F.cross_entropy(
        logits, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing
    )  # fmt: skip


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
    ours = linear_cross_entropy(hidden, weight, targets, Vocabulary(vocab_size))
    our_gradients = torch.autograd.grad(ours / 7, (hidden, weight))
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert worst_error(our_gradients[0], their_gradients[0]) < 1e-5
    assert worst_error(our_gradients[1], their_gradients[1]) < 1e-5
    assert our_gradients[0][targets == IGNORE].eq(0).all()
    assert our_gradients[1][vocab_size:].eq(0).all()
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, Vocabulary(vocab_size)).item() == ours.item()


@pytest.mark.parametrize("rows, vocab_size, smoothing, biased", [
    (1200, LARGE_V, 0.1, True), (B * T, V, 0.0, True), (B * T, V, 0.1, True), (B * T, V, 0.9, True),
    (B * T, V, 0.1, False),
])  # fmt: skip
def test_bias_and_label_smoothing_are_torchs_in_loss_and_gradients(rows, vocab_size, smoothing, biased):
    hidden, weight, targets = loss_inputs(rows, vocab_size)
    bias = random_bias(vocab_size) if biased else None
    wanted = [hidden, weight, bias] if biased else [hidden, weight]
    exact = [tensor.double() for tensor in wanted]  # torch's own gradients of smoothed targets are 4e-5 off in float32
    theirs = plain_loss(*exact[:2], targets, vocab_size, *exact[2:], label_smoothing=smoothing)
    ours = linear_cross_entropy(hidden, weight, targets, Vocabulary(vocab_size), bias, LossOptions(smoothing))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    our_gradients = torch.autograd.grad(ours / 7, wanted)
    for our_gradient, their_gradient in zip(our_gradients, torch.autograd.grad(theirs / 7, wanted)):
        assert worst_error(our_gradient, their_gradient) < 1e-5
    assert all(gradient[vocab_size:].eq(0).all() for gradient in our_gradients[1:])
    assert our_gradients[0][targets == IGNORE].eq(0).all()
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, Vocabulary(vocab_size), bias, LossOptions(smoothing)).item() == ours.item()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows, vocab_size, smoothing, biased", [
    (1200, LARGE_V, 0.0, False), (1200, LARGE_V, 0.1, True), (B * T, V, 0.0, True), (1, V, 0.3, False),
])  # fmt: skip
def test_z_loss_is_the_weighted_square_of_log_z_in_loss_and_gradients(rows, vocab_size, smoothing, biased, precision):
    """The definition of PaLM (arXiv 2204.02311, section 5), by torch's logsumexp and autograd in float64."""
    hidden, weight, targets = loss_inputs(rows, vocab_size)
    targets[0] = 5
    bias = random_bias(vocab_size) if biased else None
    wanted = [hidden, weight, bias] if biased else [hidden, weight]
    exact = [tensor.double() for tensor in wanted]
    logits = F.linear(exact[0], exact[1][:vocab_size], exact[2][:vocab_size] if biased else None)
    log_Z = logits.logsumexp(1)[targets != IGNORE]
    theirs = plain_loss(*exact[:2], targets, vocab_size, *exact[2:], label_smoothing=smoothing)
    theirs = theirs + 0.01 * log_Z.square().sum()
    options = LossOptions(label_smoothing=smoothing, z_loss=0.01)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets, Vocabulary(vocab_size), bias, options)
    our_gradients = torch.autograd.grad(ours / 7, wanted)
    loss_bound, gradient_bound = (1e-5, 2e-5) if precision == torch.float32 else (2e-3, 0.05)
    assert ours.item() == pytest.approx(theirs.item(), rel=loss_bound)
    for our_gradient, their_gradient in zip(our_gradients, torch.autograd.grad(theirs / 7, wanted)):
        assert worst_error(our_gradient, their_gradient) < gradient_bound
    assert our_gradients[0][targets == IGNORE].eq(0).all()


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 fails to make C++ of it; on CUDA it makes Triton code")
@pytest.mark.parametrize("options", [LossOptions(), LossOptions(0.1, 0.01)], ids=["plain", "smoothed and z-loss"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_pass_over_logits_is_the_plain_one(dtype, biased, options):
    torch._dynamo.reset()
    logits, targets = torch.randn(B * T, V + 27).to(dtype), loss_inputs(B * T, V)[2][:, None]
    bias = torch.randn(V + 27) if biased else None
    for with_gradients in (True, False):
        plain, compiled = logits.clone(), logits.clone()
        sums = loss_pass(plain, bias, targets, Vocabulary(V), options, with_gradients)
        theirs = torch.compile(loss_pass)(compiled, bias, targets, Vocabulary(V), options, with_gradients)
        assert [x.item() for x in theirs] == pytest.approx([x.item() for x in sums], rel=1e-5)
        if with_gradients:
            assert worst_error(compiled.float(), plain.float()) < (1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("bias", [False, True])
def test_layers_stacked_into_one_matmul_give_each_ones_outputs_and_gradients(bias):
    layers, x = [Linear(20, n, bias=bias) for n in (15, 5, 10)], torch.randn(B, T, 20, requires_grad=True)
    params = [x, *(p for layer in layers for p in layer.parameters())]
    found = []
    for stacked in (False, True):
        outputs = linear_together(x, *layers, stacked=stacked)
        loss = sum((i + 1) * y.square().sum() for i, y in enumerate(outputs))
        found.append([*outputs, *torch.autograd.grad(loss, params)])
    for apart, stacked in zip(*found):
        torch.testing.assert_close(apart, stacked, rtol=1e-5, atol=1e-5)


def test_z_loss_is_for_training_alone():
    model, ids, targets = random_model(replace(SMALL, z_loss=0.1)), random_ids(), random_ids(3)
    with torch.no_grad():
        logits = model(ids).flatten(0, 1)
        plain = F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
        penalty = 0.1 * logits.logsumexp(1).square().sum().item()
        assert model.eval()(ids, targets=targets).item() == pytest.approx(plain, rel=1e-5)
        assert model.train()(ids, targets=targets).item() == pytest.approx(plain + penalty, rel=1e-5)


@pytest.mark.parametrize("cfg", [SMALL, BERT], ids=["clm", "mlm"])
def test_label_smoothing_is_for_training_alone(cfg):
    model, ids, targets = random_model(replace(cfg, label_smoothing=0.2)), random_ids(), random_ids(3)
    with torch.no_grad():
        logits = model(ids).flatten(0, 1)
        for training, smoothing in ((True, 0.2), (False, 0.0)):
            theirs = F.cross_entropy(logits, targets.flatten(), reduction="sum", label_smoothing=smoothing).item()
            assert model.train(training)(ids, targets=targets).item() == pytest.approx(theirs, rel=1e-5)


def test_loss_of_ignored_targets_alone_is_zero():
    hidden, weight, targets = loss_inputs(B * T, V)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE), Vocabulary(V))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.eq(0).all() and weight.grad.eq(0).all()


def test_loss_survives_logits_that_overflow_exp():
    hidden, weight, targets = loss_inputs(B * T, V)
    theirs, ours = plain_loss(hidden * 100, weight, targets, V), linear_cross_entropy(hidden * 100, weight, targets, Vocabulary(V))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5) and math.isfinite(ours.item())


@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_loss_in_bf16_is_close_and_sums_in_float32(biased):
    """torch's own, in bf16, sums in bf16 and is 15 % off; rounding each logit costs 0.4 % at most."""
    hidden, weight, targets = loss_inputs()
    bias = random_bias() if biased else None
    wanted = [hidden, weight, bias] if biased else [hidden, weight]
    theirs = plain_loss(hidden, weight, targets, LARGE_V, bias)
    their_gradients = torch.autograd.grad(theirs, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets, Vocabulary(LARGE_V), bias)
    our_gradients = torch.autograd.grad(ours, wanted)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=2e-3)
    assert ours.item() != pytest.approx(theirs.item(), rel=1e-9)  # or autocast would have been ignored
    for ours, theirs in zip(our_gradients, their_gradients):
        assert ours.dtype == torch.float32
        assert ((ours - theirs).norm() / theirs.norm()).item() < 0.02


def test_correct_targets_are_those_with_the_largest_logit_and_the_loss_beside_them_is_the_same():
    hidden, weight, targets = loss_inputs()
    bias = random_bias()
    with torch.no_grad():
        likeliest = F.linear(hidden, weight[:LARGE_V], bias[:LARGE_V]).argmax(1)
        targets[1::4] = likeliest[1::4]  # 300 rows, some of them where targets were ignored
        valid = targets != IGNORE
        wanted = (likeliest == targets)[valid].sum().item()
        loss, correct = linear_cross_entropy(hidden, weight, targets, Vocabulary(LARGE_V), bias, count_correct=True)
        assert loss.item() == linear_cross_entropy(hidden, weight, targets, Vocabulary(LARGE_V), bias).item()
    assert correct.item() == wanted and 300 <= wanted < valid.sum()


def test_an_ignored_target_is_never_correct():
    hidden, weight, targets = loss_inputs(B * T, V)
    for likely in (0, V - 1):
        bias = torch.zeros(64)
        bias[likely] = 1000.0  # so that this token is the likeliest everywhere
        targets[:] = IGNORE
        with torch.no_grad():
            assert linear_cross_entropy(hidden, weight, targets, Vocabulary(V), bias, count_correct=True)[1].item() == 0
            targets[3], targets[4] = likely, 5
            assert linear_cross_entropy(hidden, weight, targets, Vocabulary(V), bias, count_correct=True)[1].item() == 1


@KINDS
def test_a_model_counts_the_targets_that_its_logits_rank_first(cfg):
    model, ids = random_model(cfg).eval(), random_ids()
    positions, _, _ = masked_targets()
    with torch.no_grad():
        for where in (None, positions):
            logits = model(ids, positions=where)
            targets = torch.where(random_ids(5, 2, logits.shape[:2]) == 1, logits.argmax(-1), 3)
            targets[1] = IGNORE
            loss, correct = model(ids, targets=targets, positions=where, count_correct=True)
            wanted = (logits.argmax(-1) == targets).sum().item()
            assert correct.item() == wanted and 0 < wanted < 2 * targets.shape[1]
            assert loss.item() == model(ids, targets=targets, positions=where).item()


def test_targets_are_counted_without_gradients_alone():
    with pytest.raises(AssertionError, match="without gradients"):
        random_model()(random_ids(), targets=random_ids(), count_correct=True)


def loss_and_gradients(model, *args, **kwargs):
    model.zero_grad()
    loss = model(*args, **kwargs)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@KINDS
def test_a_sparse_head_gives_the_dense_ones_loss_and_gradients(cfg, smoothing):
    model, ids = random_model(replace(cfg, label_smoothing=smoothing)), random_ids()
    positions, targets, dense = masked_targets()
    loss, gradients = loss_and_gradients(model, ids, targets=dense)
    sparse_loss, sparse_gradients = loss_and_gradients(model, ids, targets=targets, positions=positions)
    assert sparse_loss == pytest.approx(loss, rel=1e-5) and loss > 1
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (sparse_gradients[name] - gradient).abs().max().item() < 1e-5 * largest, name
    with torch.no_grad():
        rows = model(ids).take_along_dim(positions[..., None], dim=1)
        torch.testing.assert_close(model(ids, positions=positions), rows, rtol=0, atol=1e-5)


def test_padding_of_positions_adds_nothing():
    model, ids = random_model(BERT), random_ids()
    positions, targets, _ = masked_targets()
    loss, gradients = loss_and_gradients(model, ids, targets=targets, positions=positions)
    wider, ignored = F.pad(positions, (0, 5)), F.pad(targets, (0, 5), value=IGNORE)
    wider_loss, wider_gradients = loss_and_gradients(model, ids, targets=ignored, positions=wider)
    assert wider_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert worst_error(wider_gradients[name], gradient) < 1e-5 or "attn.k.bias" in name, name  # which has none


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
        linear_cross_entropy(hidden, weight, targets, Vocabulary(LARGE_V)).backward()
    assert of_plain.elements == len(hidden) * LARGE_V
    assert of_ours.elements == 512 * len(weight) < of_plain.elements


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


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor", "sgd"])
@pytest.mark.parametrize("tied", [True, False])
def test_padding_rows_stay_zero_with_a_bias_and_label_smoothing_too(tied, optimizer):
    model, ids = Transformer(replace(BERT, tie_embeddings=tied, label_smoothing=0.1)), random_ids()
    model.init_weights(seed=1)
    positions, targets, _ = masked_targets()
    padded = [model.wte.weight, model.head.weight, model.head.bias]
    optimizer = build_optimizer(model, OptimConfig(optimizer=optimizer, learning_rate=0.1))
    for _ in range(3):
        model(ids, targets=targets, positions=positions).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p[V:].eq(0).all() for p in padded)
    assert model.head.weight[:V].ne(0).all() and model.head.bias[:V].ne(0).all()
    with torch.no_grad():
        before = model(ids, targets=targets, positions=positions).item()
        for p in padded:
            p[V:] = 50.0
        assert model(ids, targets=targets, positions=positions).item() == before


def test_gpt2s_vocabulary_is_padded_to_50304():
    assert ModelConfig(vocab_size=50257).padded_vocab_size == 50304
    assert ModelConfig(vocab_size=64).padded_vocab_size == 64


# ---- attention

@DECODERS
@pytest.mark.parametrize("t", [0, 3, 6])
def test_logits_never_depend_on_later_tokens(t, cfg):
    model, ids = random_model(cfg), random_ids()
    other = ids.clone()
    other[:, t] = (ids[:, t] + 1) % V
    with torch.no_grad():
        before, after = model(ids), model(other)
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t:] - after[:, t:]).abs().amax(-1).gt(1e-3).all()  # they do depend on this one and earlier ones


@pytest.mark.parametrize("t", [0, 3, 6])
@pytest.mark.parametrize("cfg", [BERT, replace(MODERN, objective="mlm")], ids=["bert", "modern"])
def test_logits_of_an_encoder_depend_on_every_token(cfg, t):
    model, ids = random_model(cfg), random_ids()
    other = ids.clone()
    other[:, t] = (ids[:, t] + 1) % V
    with torch.no_grad():
        assert (model(ids) - model(other)).abs().amax(-1).gt(1e-3).all()


@pytest.mark.parametrize("cfg", [SMALL, BERT, MODERN, replace(MODERN, objective="mlm")],
                         ids=["gpt2", "bert", "modern", "modern encoder"])  # fmt: skip
@pytest.mark.parametrize("side", ["right", "left"])
def test_masked_padding_never_influences_other_tokens(side, cfg):
    model, ids, real = random_model(cfg), random_ids(), REAL if side == "right" else REAL.flip(1)
    other = ids.where(real, (ids + 1) % V)
    with torch.no_grad():
        before, after = model(ids, attention_mask=real), model(other, attention_mask=real)
        assert torch.equal(before[real], after[real])
        if cfg.objective == "mlm" or side == "left":  # else padding is later, and of no influence anyway
            moved = (model(ids) - model(other)).abs().amax(-1) > 1e-3
            assert moved[real & ~real.all(1, keepdim=True)].all()
        everything = torch.ones(B, T, dtype=torch.bool)
        torch.testing.assert_close(model(ids, attention_mask=everything), model(ids), rtol=0, atol=1e-4)
    assert before[real].isfinite().all()


@pytest.mark.parametrize("cfg", [BERT, MODERN], ids=["bert", "modern"])
def test_a_token_that_may_look_at_nothing_spoils_no_gradient(cfg):
    model, ids = random_model(cfg), random_ids()
    real = REAL.flip(1).clone()
    real[1] = False  # a sequence of padding alone
    _, gradients = loss_and_gradients(model, ids, targets=ids.where(real, IGNORE), attention_mask=real)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("place", ["embedding", "attention", "attention's branch", "mlp's branch"])
@KINDS
def test_dropout_acts_in_each_of_its_places_in_training_and_in_none_in_evaluation(cfg, place):
    model, ids = random_model(replace(cfg, dropout=0.5)), random_ids()
    with torch.no_grad():
        if place != "embedding":
            model.dropout.p = 0.0
        for block in model.blocks:
            if place != "attention":
                block.attn.dropout = 0.0
            if "branch" not in place:
                block.dropout.p = 0.0
            silent = {"attention's branch": block.mlp.down, "mlp's branch": block.attn.proj}.get(place)
            if silent is not None:  # the other branch adds nothing, with dropout or without
                for p in silent.parameters():
                    p.zero_()
        assert not torch.equal(model(ids, attention_mask=REAL), model(ids, attention_mask=REAL))
        model.eval()
        assert torch.equal(model(ids, attention_mask=REAL), model(ids, attention_mask=REAL))


@DECODERS
@pytest.mark.parametrize("prompt", [1, 4, 11])
def test_cached_logits_are_the_uncached_ones(prompt, cfg):
    model, ids = random_model(cfg), random_ids(shape=(B, 11))
    with torch.no_grad():
        whole = model(ids)
        cache = Cache(model.cfg, B, "cpu", torch.float32)
        for _ in range(2):  # a cleared cache is as good as new
            cache.clear()
            steps = [model(ids[:, :prompt], cache=cache)]
            steps += [model(ids[:, i : i + 1], cache=cache) for i in range(prompt, 11)]
            torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, prompt - 1 :], rtol=0, atol=1e-4)
        assert cache.length == 11
    heads, width = (2, 8) if cfg is MODERN else (5, 4)  # of keys and values
    assert {layer.k.shape for layer in cache.layers} == {layer.v.shape for layer in cache.layers}
    assert cache.layers[0].k.shape == (B, heads, 11, width)


@DECODERS
def test_logits_at_a_place_are_the_uncached_ones_whatever_the_cache_has_behind_it(cfg):
    model, ids = random_model(cfg), random_ids(shape=(B, 11))
    cache = Cache(model.cfg, B, "cpu", torch.float32, n_tokens=16)
    for layer in cache.layers:
        layer.k.fill_(3.0), layer.v.fill_(100.0)
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
        steps = [model(ids[:, i : i + 1], cache=cache, place=torch.tensor([i])) for i in (*range(4, 11), 7)]
        expected = model(ids)[:, [*range(4, 11), 7]]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=1e-4)


def test_a_models_attention_has_as_many_heads_as_it_says():
    attn = Transformer(MODERN).blocks[0].attn
    assert {name: tuple(p.shape) for name, p in attn.named_parameters()} == {
        "q.weight": (48, 20), "k.weight": (16, 20), "v.weight": (16, 20), "proj.weight": (20, 48),
        "q_norm.weight": (8,), "k_norm.weight": (8,),
    }  # fmt: skip


@pytest.mark.parametrize("shape", [SMALL, MODERN], ids=["learned", "rope"])
def test_grouped_heads_share_keys_and_values_with_their_neighbours(shape):
    """6 heads over 2 are 6 heads over 6 whose keys and values repeat, three after three."""
    grouped = replace(shape, n_head=6, n_kv_head=2, head_dim=8)
    few, many = random_model(grouped), random_model(replace(grouped, n_kv_head=6))
    state = few.state_dict()
    for name, p in state.items():
        if ".attn.k." in name or ".attn.v." in name:
            state[name] = p.unflatten(0, (2, 8)).repeat_interleave(3, dim=0).flatten(0, 1)
    many.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(few(random_ids()), many(random_ids()), rtol=0, atol=1e-4)


# ---- attention

REAL_KEYS = torch.arange(T).lt(torch.tensor([[T], [5], [1]]))[:, None, None, :]  # B 1 1 T
MASKS = {"none": None, "padding": REAL_KEYS, "padding, causal": REAL_KEYS & torch.ones(T, T).tril().bool()}


def attention_by_its_formula(q, k, v, mask, causal):
    """arXiv 1706.03762, equation 1, in float64, a query at a time."""
    q, k, v = (x.double().repeat_interleave(6 // x.shape[1], dim=1) for x in (q, k, v))
    rows = []
    for t in range(T):
        seen = torch.ones(B, 1, T, dtype=torch.bool) if mask is None else mask[:, :, min(t, mask.shape[2] - 1)].clone()
        if causal:
            seen[..., t + 1 :] = False
        scores = (q[:, :, t, None] * k).sum(-1) / math.sqrt(8)
        weights = scores.exp() * seen
        rows.append((weights[..., None] * v).sum(2) / weights.sum(-1, keepdim=True))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize(
    "mask, causal", [("none", False), ("none", True), ("padding", False), ("padding, causal", False)]
)
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_attention_and_its_gradients_are_the_formula(dtype, atol, mask, causal, kv_heads):
    q, k, v = (heads(seed, shape).to(dtype).requires_grad_() for seed, shape in
               ((1, (B, 6, T, 8)), (2, (B, kv_heads, T, 8)), (3, (B, kv_heads, T, 8))))  # fmt: skip
    ours = attend(q, k, v, MASKS[mask], causal)
    theirs = attention_by_its_formula(q, k, v, MASKS[mask], causal)
    assert ours.dtype == dtype and ours.shape == q.shape
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=atol)
    up = heads(4).to(dtype)
    our_grads, their_grads = (torch.autograd.grad(y, (q, k, v), up.type_as(y)) for y in (ours, theirs))
    for our_grad, their_grad in zip(our_grads, their_grads):
        assert (our_grad - their_grad).norm() < atol * their_grad.norm()


@pytest.mark.parametrize("length, by_matmuls", [(512, True), (513, False)])
def test_attention_in_bf16_is_by_matmuls_up_to_512_tokens_and_both_ways_agree(length, by_matmuls):
    q, k, v = (heads(seed, (1, 2, length, 8)).bfloat16().requires_grad_() for seed in (1, 2, 3))
    with torch.no_grad(), torch.profiler.profile() as profiler:
        attend(q, k, v, causal=True)
    assert "aten::baddbmm" not in {event.name for event in profiler.events()}  # forward alone torch's kernel is faster
    with torch.profiler.profile() as profiler:
        ours = attend(q, k, v, causal=True)
    names = {event.name for event in profiler.events()}
    assert ("aten::baddbmm" in names) == by_matmuls and ("aten::scaled_dot_product_attention" in names) != by_matmuls
    theirs = F.scaled_dot_product_attention(*(x.float() for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=0.02)


def test_attention_by_matmuls_drops_weights_as_the_kernels_do():
    """Of uniform weights over ones, a share of 0.5 stays, at twice the size."""
    torch.manual_seed(1)
    q, v = torch.zeros(4, 6, 64, 8).bfloat16(), torch.ones(4, 6, 64, 8).bfloat16()
    dropped = attend(q, q, v, dropout=0.5).float()
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)  # of 1,536 sums, each with a deviation of 1 / 8
    assert 0.1 < dropped[..., 0].std().item() < 0.15


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 8), (4, 4), (17, 1), (5,), (), (0, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_of_few_rows_in_bf16_is_torchs(shape, bias):
    torch.manual_seed(1)
    layer, x = Linear(96, 40, bias=bias).bfloat16(), torch.randn(*shape, 96).bfloat16()
    theirs = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        ours = layer(x)
    assert ours.shape == theirs.shape == (*shape, 40) and ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    assert layer(x).requires_grad


@pytest.mark.parametrize("rows, the_other_way", [(1, "aten::mv"), (16, "aten::mm"), (17, None)])
def test_a_linear_layer_of_few_rows_in_bf16_multiplies_the_other_way_round(rows, the_other_way):
    with torch.no_grad(), torch.profiler.profile() as profiler:
        Linear(96, 40, bias=False).bfloat16()(torch.ones(rows, 96).bfloat16())
    names = {event.name for event in profiler.events()}
    assert ("aten::linear" in names) == (the_other_way is None) and (the_other_way or "aten::linear") in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_may_look_nowhere_spoils_no_other(dtype):
    """As those of padding on the left: what they find is anything, but never NaN."""
    q, k, v = (heads(seed).to(dtype).requires_grad_() for seed in (1, 2, 3))
    mask = REAL_KEYS.flip(3) & torch.ones(T, T).tril().bool()
    found = attend(q, k, v, mask)
    assert not mask[2, 0, 0].any() and found.isfinite().all()
    real = mask.any(-1)[:, 0]  # B T
    theirs = torch.stack([attention_by_its_formula(q, k, v, mask, False)[b, :, real[b]].mean() for b in range(B)])
    ours = torch.stack([found[b, :, real[b]].double().mean() for b in range(B)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)


# ---- rope

def heads(seed, shape=(B, 6, T, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rope_is_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    q, k, place = heads(1), heads(2, (B, 2, T, 8)), torch.arange(3, 3 + T)
    theirs = LlamaRotaryEmbedding(LlamaConfig(
        hidden_size=48, num_attention_heads=6, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 77.0}
    ))  # fmt: skip
    their_q, their_k = apply_rotary_pos_emb(q, k, *theirs(q, place.expand(B, T)))
    rope = rope_table(place, 8, 77.0)
    torch.testing.assert_close(rotate(q, rope), their_q, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotate(k, rope), their_k, rtol=0, atol=1e-5)


def test_products_of_queries_and_keys_depend_on_distances_alone():
    q, k = heads(1), heads(2)
    near, far, wrong = (rope_table(torch.arange(T) * stride + start, 8, 77.0) for stride, start in
                        ((1, 0), (1, 19), (2, 0)))  # fmt: skip
    products = rotate(q, near) @ rotate(k, near).mT
    torch.testing.assert_close(rotate(q, far) @ rotate(k, far).mT, products, rtol=0, atol=1e-4)
    assert not torch.allclose(rotate(q, wrong) @ rotate(k, wrong).mT, products, atol=0.1)


def test_rope_turns_but_never_stretches_and_leaves_the_first_position():
    x = heads(1)
    turned = rotate(x, rope_table(torch.arange(T), 8, 77.0))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert not torch.isclose(turned, x)[:, :, 1:].all(-1).any()
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    of_half = rotate(x.bfloat16(), rope_table(torch.arange(T), 8, 77.0))
    assert of_half.dtype == torch.float32
    torch.testing.assert_close(of_half, rotate(x.bfloat16().float(), rope_table(torch.arange(T), 8, 77.0)))


def test_ropes_wavelengths_grow_from_two_pi_by_its_base():
    cos, sin = rope_table(torch.arange(1, 2), 8, 10_000.0)
    for i, angle in enumerate((1, 0.1, 0.01, 0.001)):
        assert cos[0, i].item() == cos[0, 4 + i].item() == pytest.approx(math.cos(angle), rel=1e-6)
        assert sin[0, 4 + i].item() == -sin[0, i].item() == pytest.approx(math.sin(angle), rel=1e-5)


def test_norms_of_queries_and_keys_make_their_scale_irrelevant():
    model, ids = random_model(replace(MODERN, norm_eps=0.0)), random_ids()
    with torch.no_grad():
        before = model(ids)
        for block in model.blocks:
            block.attn.q.weight *= 7.0
            block.attn.k.weight *= 0.3
        torch.testing.assert_close(model(ids), before, rtol=0, atol=1e-3)
        model.blocks[0].attn.q_norm.weight *= 2.0
        assert not torch.allclose(model(ids), before, atol=0.1)


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


def drawn_ones(weights):
    """[(name, weight)] of what is drawn at random, after a check that biases are 0 and weights of norms 1."""
    drawn = []
    for name, w in weights.items():
        if name.endswith("bias"):
            assert w.eq(0).all(), name
        elif "norm" in name:
            assert w.eq(1).all(), name
        else:
            drawn.append((name, w))
    assert drawn
    return drawn


RESIDUAL = ("attn.proj.weight", "mlp.down.weight")


def test_initial_weights_are_gpt2s():
    weights = initial(ModelConfig(vocab_size=1000, block_size=300, n_layer=3, n_head=5, n_embd=200))
    for name, w in drawn_ones(weights):
        std = 0.02 / math.sqrt(6) if name.endswith(RESIDUAL) else 0.02  # 3 layers, 2 branches each
        drawn = w[:1000] if name == "wte.weight" else w
        assert drawn.std().item() == pytest.approx(std, rel=0.02), name
        assert abs(drawn.mean().item()) < 0.02 * std, name


@pytest.mark.parametrize("cfg", [BERT, replace(MODERN, norm_position="post", bias=True)], ids=["bert", "modern"])
def test_initial_weights_of_post_norm_models_are_berts(cfg):
    """Google's BERT draws every matrix and table at 0.02, from a normal that is cut off, which ours is not."""
    weights = initial(replace(
        cfg, objective="mlm", vocab_size=1000, block_size=300, n_embd=240, n_inner=None, head_dim=48, n_token_types=20,
        tie_embeddings=False,
    ))  # fmt: skip
    assert ("blocks.2.attn.q_norm.weight" in weights) == cfg.qk_norm
    for name, w in drawn_ones(weights):
        assert w[:1000].std().item() == pytest.approx(0.02, rel=0.04), name
    assert all(weights[name][1000:].eq(0).all() for name in ("wte.weight", "head.weight", "head.bias"))
    assert len(weights["wte.weight"]) == len(weights["head.weight"]) == len(weights["head.bias"]) == 1024


@pytest.mark.parametrize("cfg", [MODERN, replace(MODERN, objective="mlm", mlp="relu2", bias=True)])
def test_initial_weights_of_pre_norm_models_shrink_those_that_write_to_the_residual_stream(cfg):
    weights = initial(replace(cfg, vocab_size=1000, n_embd=240, n_inner=500, head_dim=48))
    drawn = {name: w for name, w in weights.items() if not name.endswith("bias") and "norm" not in name}
    for name, w in drawn.items():
        std = 0.02 / math.sqrt(6) if name.endswith(RESIDUAL) else 0.02
        assert w[:1000].std().item() == pytest.approx(std, rel=0.02), name
    assert all(w.eq(1).all() for name, w in weights.items() if "norm" in name and name.endswith("weight"))


def test_initial_weights_of_a_seed_are_what_they_always_were():
    """Runs are repeatable over versions of this code: three numbers each, written down when GPT-2 was all there was."""
    weights = initial(replace(SMALL, bias=False))
    for name, numbers in {
        "wte.weight": (0.0223431699, -0.0265895836, 0.0309317540),
        "blocks.2.attn.k.weight": (-9.40897e-06, 0.0427144766, 0.0071378849),
        "blocks.0.mlp.down.weight": (0.00072415679, -0.01049968135, -0.00115501601),
    }.items():
        last = weights[name][V - 1] if name == "wte.weight" else weights[name].flatten()
        assert last[[0, 1, -1]].tolist() == pytest.approx(numbers, rel=1e-4), name


@KINDS
def test_each_initial_weight_is_drawn_from_its_own_generator(cfg):
    for name, w in initial(cfg, seed=5).items():
        if not name.endswith("bias") and "norm" not in name:
            key = int.from_bytes(hashlib.sha256(f"5:{name}".encode()).digest()[:8], "big")
            rows = V if name == "wte.weight" else len(w)
            drawn = torch.randn(rows, w.shape[1], generator=torch.Generator().manual_seed(key))
            shrunk = cfg.norm_position == "pre" and name.endswith(RESIDUAL)
            assert torch.equal(w[:rows], drawn * (0.02 / math.sqrt(6) if shrunk else 0.02)), name


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
    ({"n_kv_head": 0}, "n_kv_head is 0; it must be at least 1"), ({"head_dim": 0}, "head_dim is 0"),
    ({"n_inner": 0}, "n_inner is 0"), ({"n_token_types": 0}, "n_token_types is 0"), ({"n_head": 0}, "n_head is 0"),
    ({"n_embd": 24, "n_head": 6, "n_kv_head": 4}, "n_head 6 is not a multiple of n_kv_head 4; n_kv_head .*3.* fit"),
    ({"n_kv_head": 10}, "n_head 5 is not a multiple of n_kv_head 10; n_kv_head 1, 5 would fit"),
    ({"n_embd": 15, "position": "rope"}, "head_dim is 3; rope rotates pairs"),
    ({"head_dim": 7, "position": "rope"}, "head_dim is 7; rope rotates pairs"),
    ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it must be at least 0 and below 1"),
    ({"label_smoothing": -0.1}, "label_smoothing is -0.1"), ({"norm_eps": -1e-5}, "norm_eps is -1e-05"),
    ({"rope_theta": 0.0}, "rope_theta is 0.0; it must be above 0"),
    ({"n_layer": 0, "dropout": 2.0}, "(?s)n_layer is 0.*dropout is 2.0"),
    ({"n_layer": 10**6, "n_embd": 10**7}, "(?s)n_layer is 1000000; it must be at most 1,024.*n_embd is 10000000; it must"),
])  # fmt: skip
def test_impossible_shapes_are_named(wrong, told):
    with pytest.raises(ValueError, match=told):
        replace(SMALL, **wrong)


@pytest.mark.parametrize("right", [
    {"head_dim": 7}, {"n_embd": 15}, {"n_kv_head": 1}, {"n_kv_head": 5}, {"n_embd": 21, "head_dim": 4},
    {"position": "rope"}, {"label_smoothing": 0.0}, {"norm_eps": 0.0},
])  # fmt: skip
def test_unusual_shapes_that_are_possible_are_accepted(right):
    assert Transformer(replace(SMALL, **right))(random_ids()).shape == (B, T, V)


# ---- all of it together

def has_no_gradient(name, cfg):
    """Whether a parameter cannot influence the loss: a shift of all keys alike shifts all scores of a query alike."""
    unplaced = cfg.position == "learned" and name.endswith(("attn.k.bias", "attn.k_norm.bias"))
    return unplaced and not (cfg.qk_norm and name.endswith("attn.k.bias"))


@pytest.mark.parametrize(("objective", "bf16"), [("clm", False), ("mlm", True), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in (("clm", True), ("mlm", False))
)])  # fmt: skip
def test_every_combination_of_options_trains_every_parameter(objective, bf16):
    ids, types = random_ids(), random_ids(3, 2)
    positions, targets, _ = masked_targets()
    masked = {"positions": positions, "targets": targets, "attention_mask": REAL, "token_types": types}
    batch = masked if objective == "mlm" else {"targets": random_ids(4)}
    for norm, where, position, mlp, qk_norm, bias in itertools.product(
        ("layernorm", "rmsnorm"), ("pre", "post"), ("learned", "rope"), ("gelu", "gelu_tanh", "swiglu", "relu2"),
        (True, False), (True, False),
    ):  # fmt: skip
        cfg = replace(
            SMALL, n_layer=2, n_head=4, n_kv_head=2, head_dim=6, n_embd=10, n_inner=14, objective=objective, norm=norm,
            norm_position=where, position=position, mlp=mlp, qk_norm=qk_norm, bias=bias,
            n_token_types=2 if objective == "mlm" else None,
        )  # fmt: skip
        model = random_model(cfg)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(ids, **batch)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite(), cfg
        largest = max(p.grad.abs().max().item() for p in model.parameters())
        for name, p in model.named_parameters():
            size = p.grad.abs().max().item()
            assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), (name, cfg)
            if not has_no_gradient(name, cfg):
                assert size > 1e-6 * largest, (name, cfg)
            elif not bf16:
                assert size < 1e-6 * largest, (name, cfg)


def test_token_types_that_do_not_occur_get_no_gradient():
    model, ids = random_model(BERT), random_ids()
    _, gradients = loss_and_gradients(model, ids, targets=ids)
    assert gradients["wtt.weight"][1].eq(0).all() and gradients["wtt.weight"][0].ne(0).any()
    _, gradients = loss_and_gradients(model, ids, targets=ids, token_types=torch.ones_like(ids))
    assert gradients["wtt.weight"][0].eq(0).all() and gradients["wtt.weight"][1].ne(0).any()


@KINDS
def test_bf16_logits_are_close(cfg):
    model, ids = random_model(cfg), random_ids()
    with torch.no_grad():
        exact = model(ids)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids)
    assert logits.dtype == torch.bfloat16
    assert ((logits - exact).norm() / exact.norm()).item() < 0.05


# ---- precision

@pytest.mark.parametrize("cfg", [SMALL, BERT, replace(MODERN, objective="mlm")], ids=["gpt2", "bert", "modern"])
@pytest.mark.parametrize("dtype, stream", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_the_residual_stream_is_bf16_under_its_autocast_and_float32_under_fp16s(cfg, dtype, stream):
    """fp16's range is too small for the sum over all layers."""
    model, seen = random_model(cfg), {}
    for name, module in model.named_modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0].dtype, out.dtype)}))
    with torch.autocast("cpu", dtype):
        model(random_ids(), random_ids()).backward()
    assert len(seen) == cfg.n_layer and set(seen.values()) == {(stream, stream)}, seen


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_norms_of_bf16_have_float32_statistics(norm):
    """A row of 4,097 numbers near 100: in bf16, its mean and mean square would be off by percents of its spread."""
    torch.manual_seed(0)
    x = (100 + torch.randn(3, 4097)).bfloat16()
    exact = norm(4097, eps=1e-5)(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(4097, eps=1e-5)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=2**-8, atol=1e-4)  # rounded once


@pytest.mark.parametrize("mlp, approximate", [("gelu", "none"), ("gelu_tanh", "tanh"), ("swiglu", "none")])
def test_the_transform_before_berts_head_has_the_mlps_gelu(mlp, approximate):
    model, x = random_model(replace(SMALL, objective="mlm", mlp=mlp)), torch.randn(B, T, 20)
    transform = model.transform
    expected = transform.norm(F.gelu(transform.dense(x), approximate=approximate))
    torch.testing.assert_close(transform(x), expected)


def test_two_mistakes_in_heads_are_named_together():
    with pytest.raises(ValueError) as error:
        ModelConfig(n_head=4, n_kv_head=3, head_dim=7, position="rope")
    assert [line.split(" is ")[0] for line in str(error.value).split("\n")] == ["head_dim", "n_head 4"]
