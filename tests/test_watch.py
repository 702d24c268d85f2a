"""What a run looks at in its model: equal to torch's and transformers' figures, and without a trace in training."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import run.watch
from config import UserError
from conftest import slow
from data import Split
from generation import GenerationConfig, generate
from hugging_face import KINDS, T, V, saved
from interop.pretrained import load_model
from objective import NextToken
from ops import Packed, locate, mask_of
from ranks import codes, launch, records, settings, write_data
from ranks import run as trained
from run.log import Log
from run.watch import Watch, attention_entropy, watching
from text.tokenizer import SPECIALS, load_tokenizer
from world import World

LAYERS = ["wte", "wpe", "blocks.0", "blocks.1", "blocks.2", "norm_f"]
TEXTS = {"vocab_size": 300, "sample_prompts": '["ab,", "c"]', "sample_tokens": 4}  # bytes are ids below 256
LOOKED_AT = {"watch": "norms", "dropout": 0.1, "eval_interval": 3, "block_size": 7, **TEXTS}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("watch") / "data", vocab_size=300)


@pytest.fixture(scope="module")
def watched(data_dir, tmp_path_factory):
    """A run that looks at everything; not to be written to."""
    return trained(data_dir, tmp_path_factory.mktemp("watched"), **LOOKED_AT)


def last_found(out_dir):
    """{name: figure} of the last look."""
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "sample/0" in line or "weight_norm/wte" in line][-1]


def entropy(weights):
    """The mean entropy of the rows of attention weights (B, H, T, T), each by its definition."""
    rows = weights.flatten(0, 2).tolist()
    return sum(-sum(p * math.log(p) for p in row if p) for row in rows) / len(rows)


def test_looking_changes_no_loss_and_no_weight(watched, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(Log, "_look", lambda *_: None)  # as if nothing were ever looked at
    changes = {name: value for name, value in LOOKED_AT.items() if name not in ("watch", "sample_prompts")}
    blind = trained(data_dir, tmp_path, **changes)
    for name in ("loss", "grad_norm", "val_loss"):
        assert records(watched, name) == records(blind, name), name
    assert list(records(watched, "sample/0")) == list(records(watched, "weight_norm/wte")) == [0, 3, 6, 9]
    (ours, _), (theirs, _) = load_model(watched, "cpu"), load_model(blind, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_norms_by_layer_are_torchs(watched, data_dir):
    model, _ = load_model(watched, "cpu")
    tokens = torch.from_numpy(Split(data_dir, "val", 300, "").shards[0][:22].astype(int))
    logits = model(tokens[:21].view(3, 7))
    F.cross_entropy(logits.flatten(0, 1), tokens[1:]).backward()
    found = last_found(watched)
    for layer in LAYERS:
        params = [p for name, p in model.named_parameters() if name.startswith(layer)]
        for name, tensors in (("weight_norm", params), ("val_grad_norm", [p.grad for p in params])):
            wanted = torch.linalg.vector_norm(torch.cat([t.detach().flatten() for t in tensors])).item()
            assert found[f"{name}/{layer}"] == pytest.approx(wanted, rel=1e-4), (name, layer)
    assert found["val_logit_scale"] == pytest.approx(logits.square().mean().sqrt().item(), rel=1e-5)
    assert found["val_logit_max"] == pytest.approx(logits.abs().max().item(), rel=1e-5)
    names = {name.partition("/")[2] for name in found if name.startswith(("weight_norm/", "val_grad_norm/"))}
    assert names == {*LAYERS}, "no layer is left out, and none counts twice"


@pytest.mark.parametrize("kind", ["gpt2", "bert", "qwen3"])
def test_entropy_and_logits_are_those_of_transformers(kind, tmp_path):
    theirs, folder = saved(kind, tmp_path)
    theirs.set_attn_implementation("eager")
    ids, seen = torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1)), {}
    with torch.no_grad():
        wanted = theirs(ids, output_attentions=True)
    model, _ = load_model(folder, "cpu")
    with watching(model, seen):
        model(ids, ids)
    for layer, weights in enumerate(wanted.attentions):
        assert seen[f"val_attention_entropy/blocks.{layer}"] == pytest.approx(entropy(weights), rel=1e-4)
    assert seen["val_logit_scale"] == pytest.approx(wanted.logits.square().mean().sqrt().item(), rel=1e-4)
    assert len(wanted.attentions) == 3 and len(seen) == 5 and KINDS[kind]


@pytest.mark.parametrize("kind", ["documents", "packed documents", "window", "packed window", "padding", "causal", "none"])
def test_entropy_counts_what_a_query_may_look_at(kind):
    B, H, N, D = 3, 6, 7, 4
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(B, heads, N, D, generator=generator) for heads in (H, 2))
    starts = torch.tensor([0, 4, 7, 14, 16, 21, 21], dtype=torch.int32)  # of 5 documents in 3 rows, and of none
    lengths, padding = [7, 5, 2], torch.arange(N) < torch.tensor([[7], [5], [2]])
    documents, shape = (starts, *locate(starts, torch.Size([B, N]))), torch.Size([B, N])
    mask = {
        "documents": lambda: mask_of(q, shape, True, None, documents),
        "packed documents": lambda: mask_of(q, shape, True, None, documents, packed=True),
        "window": lambda: mask_of(q, shape, False, 3),
        "packed window": lambda: mask_of(q, shape, False, 3, packed=True),
        "padding": lambda: mask_of(q, shape, False, attention_mask=padding),
    }.get(kind, lambda: None)()
    causal, weights = kind in ("causal", "documents", "packed documents"), torch.zeros(B, H, N, N)
    for b in range(B):
        for i in range(N):
            may = {
                "window": lambda j: abs(i - j) < 3,
                "documents": lambda j: documents[1][b, i] == documents[1][b, j] and j <= i,
                "padding": lambda j: j < lengths[b],
                "causal": lambda j: j <= i,
                "none": lambda j: True,
            }[kind.removeprefix("packed ")]
            keys = [j for j in range(N) if may(j)]
            for h in range(H):
                weights[b, h, i, keys] = (k[b, h // 3, keys] @ q[b, h, i] / D**0.5).softmax(0)
    assert isinstance(mask, Packed) == kind.startswith("packed")
    assert attention_entropy(q, k, mask, causal).item() == pytest.approx(entropy(weights), rel=1e-5)


def test_samples_are_what_the_checkpoint_generates(data_dir, tmp_path, capsys):
    out_dir = trained(data_dir, tmp_path, **TEXTS | {"sample_prompts": "ab,"}, max_steps=2)
    model, _ = load_model(out_dir, "cpu")
    tokenizer = load_tokenizer("byte")
    never = [token for token in tokenizer.specials.values() if token not in tokenizer.stops]
    steps = generate(model, torch.tensor([[*b"ab,"]]), GenerationConfig(max_new_tokens=4), 1337, tokenizer.vocab_size, never)
    ids = torch.stack(list(steps))[:, 0].tolist()
    assert len(ids) == 4 and last_found(out_dir)["sample/0"] == tokenizer.decode([*b"ab,", *ids])
    assert "step 2/2  sample/0  ab," in capsys.readouterr().out
    cfg = settings(data_dir, tmp_path, **TEXTS | {"sample_prompts": "ab,"})
    watch = Watch(cfg, World(0, 1, torch.device("cpu"), "fp32"), model, [Split(data_dir, "val", 300, "")], NextToken(7))
    assert watch()["sample/0"] == tokenizer.decode([*b"ab,", *ids])
    watch.tokenizer.stops.add(ids[1])
    assert watch()["sample/0"] == tokenizer.decode([*b"ab,", ids[0]])


def test_a_forkers_figures_go_to_the_log_and_see_the_model_in_evaluation(data_dir, tmp_path, monkeypatch):
    def figures(model, batch):
        assert not model.training and batch[0].shape == (3, 7)
        return {"mine/std": model.wte.weight.std().item(), "word": "x"}

    monkeypatch.setattr(run.watch, "own_figures", figures)
    out_dir = trained(data_dir, tmp_path, vocab_size=300, max_steps=2, eval_interval=1)
    assert records(out_dir, "mine/std").keys() == {0, 1, 2} and records(out_dir, "word") == dict.fromkeys(range(3), "x")
    model, _ = load_model(out_dir, "cpu")
    assert records(out_dir, "mine/std")[2] == model.wte.weight.std().item()


def test_figures_that_fail_end_no_run_and_leave_training_alone(watched, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.watch, "own_figures", lambda model, batch: {"mine": 1 / 0})
    out_dir = trained(data_dir, tmp_path, **LOOKED_AT)
    assert capsys.readouterr().err.count("warning: watch failed (ZeroDivisionError: ") == 1
    assert records(out_dir) == records(watched) and (out_dir / "finished").exists()


@pytest.mark.parametrize(("changes", "rule"), [
    ({"objective": "mlm", "sample_prompts": "a"}, "sample_prompts is a, but a masked model continues no text"),
    ({"sample_prompts": "abcdef", "sample_tokens": 2}, "a text of 6 tokens and sample_tokens is 2, but seq_len is 7; shorten"),
    ({"vocab_size": 37, "sample_prompts": "a"}, "sample_prompts has 'a' with the id 97, vocab_size is 37"),
    ({"sample_prompts": "[1]"}, "sample_prompts is .1.; it must be text, or a JSON list of texts"),
])  # fmt: skip
def test_prompts_that_cannot_be_continued_are_refused_before_training(changes, rule, tmp_path):
    changes = {"vocab_size": 300} | changes
    special = {name: changes["vocab_size"] - 5 + i for i, name in enumerate(SPECIALS)}
    folder = write_data(tmp_path / "data", vocab_size=changes["vocab_size"], specials=special)
    with pytest.raises(UserError, match=rule):
        trained(folder, tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_what_needs_whole_layers_is_refused_where_ranks_split_them(data_dir, tmp_path):
    cfg, world = settings(data_dir, tmp_path, watch="norms", vocab_size=300), World(0, 2, torch.device("cpu"), "fp32", pp=2)
    with pytest.raises(UserError, match="watch is norms, but tp is 1, cp 1 and pp 2: .* use --strategy=fsdp alone"):
        Watch(cfg, world, None, [None], None)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", slow("ddp", "fsdp"))
def test_ranks_see_what_one_process_sees_and_train_as_if_they_had_not_looked(strategy, data_dir, tmp_path):
    changes, runs = LOOKED_AT | {"dropout": 0}, {"looking": True, "blind": False}
    for name, looks in runs.items():
        if not looks:
            changes = {n: v for n, v in changes.items() if n not in ("watch", "sample_prompts")}
        processes = launch(2, settings(data_dir, tmp_path / name, strategy=strategy, **changes), tmp_path / "told")
        assert codes(processes) == [0, 0], (tmp_path / "told").read_text()
    for name in ("loss", "grad_norm", "val_loss"):
        assert records(tmp_path / "looking", name) == records(tmp_path / "blind", name), name
    one = trained(data_dir, tmp_path / "one", **LOOKED_AT | {"dropout": 0})
    ours, wanted = last_found(tmp_path / "looking"), last_found(one)
    assert [ours.pop(name) == wanted.pop(name) for name in ("sample/0", "sample/1")] == [True, True]
    assert ours == pytest.approx(wanted, rel=1e-3)
