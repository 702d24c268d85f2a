"""Closed forms against counts: of parameters in the model, of FLOPs by torch's counter, of bytes in collectives."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import config
import parallel
import train
from model import ModelConfig, Transformer
from objective import ObjectiveConfig, head_share
from optim import OptimConfig, build_optimizer
from parallel import ParallelConfig, distribute
from perf import cost
from ranks import on_ranks
from train import train_step
from world import init_world

ODD = [
    {},
    {"bias": False},
    {"tie_embeddings": False},
    {"n_inner": 33, "bias": False, "tie_embeddings": False},
    {"n_head": 6, "n_kv_head": 2, "head_dim": 3},  # queries 18 wide, keys and values 6, the stream 20
    {"n_kv_head": 1, "bias": False},
    {"head_dim": 7},
    {"mlp": "swiglu"},
    {"mlp": "swiglu", "n_inner": 33, "bias": False},
    {"mlp": "relu2"},
    {"qk_norm": True},
    {"qk_norm": True, "norm": "rmsnorm", "head_dim": 6},
    {"norm": "rmsnorm"},
    {"position": "rope"},
    {"n_token_types": 3},
    {"norm_position": "post"},
    {"objective": "mlm"},
    {"objective": "mlm", "bias": False, "tie_embeddings": False},
    {"objective": "mlm", "tie_embeddings": False, "norm": "rmsnorm"},
    {"objective": "mlm", "norm_position": "post", "n_token_types": 2, "mlp": "gelu", "norm_eps": 1e-12},  # BERT
    {"n_head": 6, "n_kv_head": 3, "head_dim": 4, "n_inner": 33, "mlp": "swiglu", "norm": "rmsnorm", "qk_norm": True,
     "position": "rope", "bias": False, "objective": "mlm"},
]  # fmt: skip
GPT2 = {  # layers, heads, width: parameters, as Hugging Face's checkpoints count them
    (12, 12, 768): 124_439_808,
    (24, 16, 1024): 354_823_168,
    (36, 20, 1280): 774_030_080,
    (48, 25, 1600): 1_557_611_200,
}


def odd(changes, vocab_size=37):
    sizes = {"vocab_size": vocab_size, "block_size": 11, "n_layer": 3, "n_head": 5, "n_embd": 20}
    return ModelConfig(**sizes | changes)


@pytest.mark.parametrize("changes", ODD, ids=str)
def test_closed_form_of_parameters_is_the_models_count(changes):
    cfg = odd(changes)
    assert cost.num_params(cfg) == Transformer(cfg).num_params()


@pytest.mark.parametrize("shape, count", GPT2.items())
def test_closed_form_of_parameters_is_gpt2s(shape, count):
    layers, heads, width = shape
    assert cost.num_params(ModelConfig(n_layer=layers, n_head=heads, n_embd=width)) == count


@pytest.mark.parametrize(("preset", "count"), [("bert_base", 109_514_298), ("bert_large", 335_174_458)])
def test_closed_form_of_parameters_is_berts(preset, count):
    """As Hugging Face counts BertForMaskedLM of bert-base-uncased and bert-large-uncased."""
    assert cost.num_params(config.load(train.Settings, [f"config/{preset}.py"]).model) == count


MODERN = {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "bias": False}


@pytest.mark.parametrize(("changes", "count"), [
    ({"vocab_size": 151_936, "n_layer": 28, "n_embd": 1024, "n_head": 16, "n_kv_head": 8, "head_dim": 128,
      "n_inner": 3072, "qk_norm": True}, 596_049_920),
    ({"vocab_size": 32_000, "n_layer": 22, "n_embd": 2048, "n_head": 32, "n_kv_head": 4, "n_inner": 5632,
      "tie_embeddings": False}, 1_100_048_384),
    ({"vocab_size": 128_256, "n_layer": 32, "n_embd": 4096, "n_head": 32, "n_kv_head": 8, "n_inner": 14_336,
      "tie_embeddings": False}, 8_030_261_248),
], ids=["Qwen3-0.6B", "TinyLlama-1.1B", "Llama-3.1-8B"])  # fmt: skip
def test_closed_form_of_parameters_is_that_of_published_decoders(changes, count):
    assert cost.num_params(ModelConfig(**MODERN, **changes)) == count


@pytest.mark.parametrize("changes", ODD, ids=str)
def test_flops_are_what_torch_counts_in_forward_and_backward(changes):
    """Exactly: the vocabulary needs no padding, and attention's math kernel does both its matmuls whole."""
    cfg, ids = odd(changes, vocab_size=64), torch.zeros(3, 7, dtype=torch.long)
    model = Transformer(cfg)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, targets=ids).backward()
    assert counter.get_total_flops() == cost.flops_per_token(cfg, seq_len=7) * ids.numel()


@pytest.mark.parametrize("changes", [changes for changes in ODD if "objective" in changes], ids=str)
@pytest.mark.parametrize(("seq_len", "number"), [(8, 2), (8, 1), (10, 5)])
def test_flops_of_a_masked_model_are_what_torch_counts_with_the_head_at_masked_places_alone(changes, seq_len, number):
    cfg, ids = odd(changes, vocab_size=64), torch.zeros(3, seq_len, dtype=torch.long)
    share = head_share("mlm", ObjectiveConfig(mask_prob=number / seq_len), seq_len)
    targets = positions = torch.arange(number).expand(3, number)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        Transformer(cfg)(ids, targets, positions).backward()
    assert counter.get_total_flops() == cost.flops_per_token(cfg, seq_len, share) * ids.numel()


def test_causal_count_halves_attention_alone():
    cfg = ModelConfig()
    without_attention = cost.flops_per_token(cfg, seq_len=0)
    full, causal = (cost.flops_per_token(cfg, 1024, causal=causal) - without_attention for causal in (False, True))
    assert full == 2 * causal == 12 * 12 * 768 * 1024  # PaLM's 12 L H Q T


def test_causal_count_does_not_halve_the_attention_of_a_model_that_looks_to_both_sides():
    cfg = ModelConfig(objective="mlm")
    assert cost.flops_per_token(cfg, 1024, 0.15, causal=True) == cost.flops_per_token(cfg, 1024, 0.15, causal=False)


def test_causal_count_halves_attention_as_wide_as_its_queries():
    """Whose width is not the stream's, and whose keys are fewer."""
    cfg = ModelConfig(n_head=6, n_kv_head=2, head_dim=50, n_embd=99)
    saved = cost.flops_per_token(cfg, 1024) - cost.flops_per_token(cfg, 1024, causal=True)
    assert saved == 6 * 12 * 6 * 50 * 1024


def test_gpt2_124m_needs_6_flops_a_weight_and_attention():
    """nanoGPT's transformer_sizing notebook: 6 N + 12 L H Q T, N without positions; norms and biases are no matmuls."""
    cfg = ModelConfig(bias=False)
    notebook = 6 * (124_337_664 - 1024 * 768) + 12 * 12 * 768 * 1024
    norms = 6 * 25 * 768
    assert cost.flops_per_token(cfg, 1024) == notebook - norms


# ---- bytes sent

class Sent(TorchDispatchMode):
    """Counts bytes that this rank sends in collectives on tensors of at least so many numbers, by group's kind."""

    def __init__(self, smallest):
        super().__init__()
        self.smallest, self.n_bytes = smallest, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let it become collectives first
        name = function._schema.name
        if name == "c10d::_allgather_base_":
            self.add("weights", args[0].numel() - args[1].numel(), args[1])
        elif name == "c10d::_reduce_scatter_base_":
            self.add("gradients", args[1].numel() - args[0].numel(), args[1])
        elif name == "c10d::allreduce_" and args[0][0].is_floating_point():
            n = dist.ProcessGroup.unbox(args[1]).size()
            self.add("sums", sum(2 * (n - 1) / n * x.numel() for x in args[0]), args[0][0])
        elif name == "_c10d_functional::all_gather_into_tensor":
            self.add("layers", (args[1] - 1) * args[0].numel(), args[0])
        elif name == "_c10d_functional::reduce_scatter_tensor":
            self.add("layers", (args[2] - 1) / args[2] * args[0].numel(), args[0])
        return function(*args, **kwargs or {})

    def add(self, what, numbers, tensor):
        if tensor.numel() >= self.smallest:
            self.n_bytes[what] = self.n_bytes.get(what, 0) + numbers * tensor.element_size()


GPT = ModelConfig(vocab_size=64, block_size=8, n_layer=3, n_head=4, n_embd=32)
WIDE = ModelConfig(vocab_size=64, block_size=8, n_layer=1, n_head=4, n_embd=256)
BATCH, T, MICRO_STEPS = 6, 8, 2
LAYOUTS = {  # of 4 ranks: (copies, shards, settings)
    "ddp": (4, 1, {}),
    "ddp bf16": (4, 1, {"grad_compression": "bf16"}),
    "fsdp": (1, 4, {"strategy": "fsdp"}),
    "fsdp recomputed": (1, 4, {"strategy": "fsdp", "activation_checkpointing": "full"}),
    "fsdp kept": (1, 4, {"strategy": "fsdp", "reshard": False}),
    "fsdp whole": (1, 4, {"strategy": "fsdp", "accumulate": "whole"}),
    "hsdp": (2, 2, {"strategy": "fsdp", "shard_size": 2}),
    "tp": (1, 1, {"tp": 4}),
    "tp recomputed": (1, 1, {"tp": 4, "activation_checkpointing": "full"}),
    "ddp tp": (2, 1, {"tp": 2}),
    "fsdp tp": (1, 2, {"tp": 2, "strategy": "fsdp"}),
}


def counted(layout, precision):
    """Bytes that rank 0 sends in a step, by what for."""
    cfg = ParallelConfig(device="cpu", precision=precision, compile=False, **LAYOUTS[layout][2])
    with init_world(cfg) as world:
        with torch.device("meta"):
            model = Transformer(GPT)
        distribute(model, cfg, world, seed=1)
        optimizer = build_optimizer(model, OptimConfig(), world)
        ids, scaler = torch.randint(64, (BATCH, T)), torch.amp.GradScaler("cpu", enabled=False)
        for _ in range(2):  # DDP's first step is not like the others
            with Sent(BATCH * T * 32 // 4) as sent:
                train_step(model, optimizer, scaler, [(ids, ids)] * MICRO_STEPS, 1.0, world)
    return sent.n_bytes


FEW = {name: LAYOUTS[name] for name in ("hsdp", "tp recomputed")}


@pytest.mark.parametrize(("precision", "layouts"), [
    ("bf16", FEW),
    pytest.param("bf16", LAYOUTS, marks=pytest.mark.slow), pytest.param("fp32", LAYOUTS, marks=pytest.mark.slow),
], ids=["few", "bf16", "fp32"])  # fmt: skip
def test_bytes_sent_are_what_collectives_are_given(precision, layouts):
    found = on_ranks(4, *((counted, layout, precision) for layout in layouts))
    for (layout, (copies, shards, settings)), answers in zip(layouts.items(), found):
        cfg, sent = ParallelConfig(**settings), answers[0]
        setup = cost.Setup(T, BATCH, MICRO_STEPS, copies, shards, cfg.tp, precision, strategy=cfg.strategy,
                           reshard=cfg.reshard, accumulate=cfg.accumulate, grad_compression=cfg.grad_compression,
                           recomputed=cfg.activation_checkpointing)  # fmt: skip
        told = dict.fromkeys(("weights", "gradients", "copies", "layers"), 0) | cost.bytes_sent(GPT, setup)
        if cfg.strategy == "ddp" and cfg.tp == 1:
            told["sums"] = told.pop("gradients")
        else:
            told["sums"] = told.pop("copies")
        if cfg.tp > 1:  # the gradient of hidden states is summed by a plain all-reduce, apart from the layers
            of_hidden = 2 * (cfg.tp - 1) / cfg.tp * MICRO_STEPS * BATCH * T * GPT.n_embd * 4
            told["sums"] += of_hidden
            told["layers"] -= of_hidden
        for what in told | sent:
            # Under tensor parallelism norms' and biases' vectors stay whole, which the closed form leaves out.
            near = 0.05 if cfg.tp > 1 and what != "layers" else 1e-9
            assert sent.get(what, 0) == pytest.approx(told.get(what, 0), rel=near), (layout, precision, what)


def powersgd_sent():
    """Numbers that the hook sums in a step after it has started."""
    cfg = ParallelConfig(device="cpu", precision="fp32", grad_compression="powersgd", compile=False)
    with init_world(cfg) as world:
        with torch.device("meta"):
            model = Transformer(WIDE)
        distribute(model, cfg, world, seed=1)
        optimizer = build_optimizer(model, OptimConfig(), world)
        ids, scaler = torch.randint(64, (1, 8)), torch.amp.GradScaler("cpu", enabled=False)
        all_reduce, sizes = dist.all_reduce, []

        def counting(tensor, *args, **kwargs):
            sizes.append(tensor.numel() if tensor.dtype == torch.float32 else 0)
            return all_reduce(tensor, *args, **kwargs)

        for _ in range(parallel.POWERSGD_START + 2):
            sizes.clear()
            with mock.patch.object(dist, "all_reduce", counting):  # the hook's own threads, which no mode reaches
                train_step(model, optimizer, scaler, [(ids, ids)], 1.0, world)
        return sum(sizes)


def test_powersgd_sends_the_numbers_of_its_closed_form():
    sent = on_ranks(2, (powersgd_sent,))[0][0]
    assert sent == cost.powersgd_numbers(WIDE) < cost.num_params(WIDE) / 2
