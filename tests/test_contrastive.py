"""Contrastive learning: its loss is the paper's, over all ranks' texts, and embeddings are those of transformers."""

import json
import math
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import heads
import train
from config import UserError
from data import Split, objective_for
from heads import contrastive_losses
from hugging_face import saved
from interop.pretrained import load_model
from model import ModelConfig
from objective import IGNORE
from perf.cost import flops_per_token
from ranks import on_ranks, records, settings, write_data
from sample import write_embeddings
from test_pairs import SPECIALS
from train import evaluate
from world import World

TINY = 1e-9  # dropout that drops nothing
GPT = ModelConfig(vocab_size=37, block_size=11, n_layer=2, n_head=2, n_embd=12, dropout=TINY,
                  objective={"clm": 1.0, "contrastive": 0.3})  # fmt: skip
BERT = replace(GPT, objective={"mlm": 1.0, "contrastive": 0.3}, norm_position="post", n_token_types=2)
WORLD = World(0, 1, torch.device("cpu"), "fp32")


def by_the_paper(first, second, temperature=0.05):
    """Equation 4 of arXiv 2104.08821, term by term."""

    def sim(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    losses = []
    for i, h in enumerate(first):
        exps = [math.exp(sim(h, other) / temperature) for other in second]
        losses.append(-math.log(exps[i] / sum(exps)))
    return losses


def test_losses_are_the_papers():
    first, second = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = contrastive_losses(F.normalize(first, dim=-1), F.normalize(second, dim=-1), torch.ones(5, dtype=torch.bool))
    assert found.tolist() == pytest.approx(by_the_paper(first, second), rel=1e-9)


def test_rows_that_are_no_texts_are_neither_compared_nor_counted():
    first, second = F.normalize(torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(1)), dim=-1)
    is_text = torch.tensor([True, False, True, True, False, True])
    found = contrastive_losses(first, second, is_text)
    few = contrastive_losses(first[is_text], second[is_text], torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(found[is_text], few)
    assert not found[~is_text].any()


def masked_batch():
    g = torch.Generator().manual_seed(2)
    clean = torch.randint(37, (4, 9), generator=g)
    positions = torch.stack([torch.randperm(9, generator=g)[:3] for _ in range(4)])
    targets, ids = clean.gather(1, positions), clean.scatter(1, positions, 36)
    targets[0, 0] = IGNORE  # a place that was not masked
    ids[0, positions[0, 0]] = clean[0, positions[0, 0]]
    real = torch.arange(9) < torch.tensor([9, 9, 7, 9])[:, None]
    return clean, ids, targets, positions, real


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_masked_models_loss_is_of_its_texts_without_masks(pooling):
    clean, ids, targets, positions, real = masked_batch()
    model = replace(BERT, pooling=pooling).build()
    model.init_weights(1)
    losses = model(ids, targets, positions, real)
    states = model.states(clean, real)
    texts = states[:, 0] if pooling == "cls" else torch.stack([x[r].mean(0) for x, r in zip(states, real)])
    assert losses[1].item() == pytest.approx(sum(by_the_paper(texts, texts)), rel=1e-4)
    plain = replace(BERT, objective="mlm").build()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(losses[0], plain(ids, targets, positions, real))


def test_a_causal_models_loss_and_gradients_are_those_of_two_plain_passes():
    ids, targets = torch.randint(37, (2, 5, 9), generator=torch.Generator().manual_seed(3))
    model = replace(GPT, dropout=0.2).build()
    model.init_weights(1)
    torch.manual_seed(5)
    losses = model(ids, targets)
    losses[1].backward()
    found = model.blocks[1].attn.v.weight.grad.clone()
    model.zero_grad()
    torch.manual_seed(5)
    states = model.states(torch.cat([ids, ids]))  # two views, since dropout differs from row to row
    first, second = F.normalize(model.norm_f(states).mean(1), dim=-1).split(5)
    wanted = F.cross_entropy(first @ second.T / 0.05, torch.arange(5), reduction="sum")
    wanted.backward()
    torch.testing.assert_close(losses[1], wanted)
    torch.testing.assert_close(found, model.blocks[1].attn.v.weight.grad)
    assert not torch.allclose(first, second)


ALONE = replace(BERT, objective={"mlm": 0.0, "contrastive": 1.0})


def test_a_sequence_is_computed_twice_and_a_masked_one_three_times():
    for cfg, n, head_share in ((GPT, 2, 1.0), (BERT, 3, 1.0), (ALONE, 2, 0.0)):
        plain = replace(cfg, objective=cfg.base)
        blocks = flops_per_token(plain, 10, 0.0) - flops_per_token(replace(plain, n_layer=1), 10, 0.0)
        assert flops_per_token(cfg, 10) - flops_per_token(plain, 10, head_share) == (n - 1) * 2 * blocks


@pytest.mark.parametrize("cfg", [replace(GPT, objective={"clm": 0.0, "contrastive": 1.0}, tie_embeddings=False), ALONE,
                                 replace(ALONE, objective={"mlm": 0.0, "nsp": 0.5, "contrastive": 1.0})])  # fmt: skip
def test_contrastive_alone_learns_as_beside_a_loss_that_does_not_count(cfg):
    """And only evaluation computes that loss."""
    _, *batch = masked_batch()
    batch = [batch[0], batch[0]] if cfg.is_causal else [*batch, None, None, torch.tensor([0, 1, IGNORE, 1])]
    batch = batch if "nsp" in cfg.objectives else batch[:4]
    alone, beside = cfg.build(), replace(cfg, objective=cfg.objectives | {cfg.base: 1.0}).build()
    alone.init_weights(1)
    beside.load_state_dict(alone.state_dict())
    losses, others = alone(*batch), beside(*batch)
    assert losses[0] == 0 and losses[1:].tolist() == pytest.approx(others[1:].tolist(), rel=1e-5)
    losses[1:].sum().backward()
    others[1:].sum().backward()
    for name, param in alone.named_parameters():
        is_head = name.startswith(("head", "transform"))
        assert param.requires_grad is not is_head or name == "head.weight" and cfg.tie_embeddings
        wanted = beside.get_parameter(name).grad
        torch.testing.assert_close(param.grad, None if is_head else wanted, rtol=1e-4, atol=1e-5)
    alone.eval(), beside.eval()
    with torch.no_grad():
        for here, there in zip(alone(*batch, count_correct=True), beside(*batch, count_correct=True)):
            assert torch.equal(here, there)


# ---- embeddings


@pytest.mark.parametrize(("kind", "auto"), [("gpt2", "GPT2Model"), ("bert", "BertModel")])
def test_embeddings_are_those_of_transformers_on_an_export(kind, auto, tmp_path):
    import transformers

    theirs, folder = saved(kind, tmp_path / "theirs")
    model, _ = load_model(str(folder), torch.device("cpu"))
    texts = ["ab", "The longest of them, cut.", "", "xy z"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    tokenizer = types.SimpleNamespace(begin=[], eot=0, specials={"[CLS]": 129, "[SEP]": 130},
                                      encode=lambda text: np.array([*text.encode()], dtype=np.int64))  # fmt: skip
    base = getattr(transformers, auto).from_pretrained(folder).eval()
    for pooling in ("mean", "cls") if kind == "bert" else ("mean",):
        model.cfg = replace(model.cfg, pooling=pooling)
        write_embeddings(model, tokenizer, str(tmp_path / "texts.txt"), torch.device("cpu"), batch_size=3)
        found = np.load(tmp_path / "texts.npy")
        assert found.shape == (4, model.cfg.n_embd) and found.dtype == np.float32
        for text, embedded in zip(texts, found):
            ids = [*text.encode()][: 23 - 2 * (kind == "bert")]
            ids = [129, *ids, 130] if kind == "bert" else ids or [0]
            with torch.no_grad():
                states = base(torch.tensor([ids])).last_hidden_state[0]
            wanted = states[0] if pooling == "cls" else states.mean(0)
            torch.testing.assert_close(torch.from_numpy(embedded), wanted, rtol=1e-5, atol=1e-5)


# ---- runs

SHAPE = "n_token_types = 2\nnorm_position = 'post'\nmlp = 'gelu'\nseq_len = 11\nbatch_tokens = 66\ndropout = 0.1\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("runs") / "data", specials=dict(zip(SPECIALS, range(32, 37))))


def settings_of(folder, out_dir, objective, **changes):
    out_dir.mkdir(parents=True, exist_ok=True)
    preset = out_dir / "given.py"
    preset.write_text(f"{SHAPE}objective = {objective!r}\n")
    return settings(folder, out_dir, str(preset), **{"seq_len": 11, "batch_tokens": 66, **changes})


@pytest.mark.parametrize("objective", [{"clm": 1.0, "contrastive": 0.5}, {"mlm": 0, "contrastive": 1.0}], ids=str)
def test_a_run_learns_to_tell_texts_apart_and_resumes_to_the_bit(objective, folder, tmp_path, no_curves):
    train.main(settings_of(folder, tmp_path / "whole", objective))
    train.main(settings_of(folder, tmp_path / "parts", objective, max_steps=4))
    train.main(settings_of(folder, tmp_path / "parts", objective))
    assert records(tmp_path / "whole") == records(tmp_path / "parts")
    losses = records(tmp_path / "whole", "val_loss_contrastive")
    assert losses[9] < losses[0]
    last = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()][-1]
    base = next(iter(objective))
    wanted = objective[base] * last[f"val_loss_{base}"] + objective["contrastive"] * last["val_loss_contrastive"]
    assert last["val_loss"] == pytest.approx(wanted) and "val_accuracy_contrastive" not in last


def losses_of(folder, out_dir, changes):
    objective = {"mlm": 0, "contrastive": 1.0}
    train.main(settings_of(folder, out_dir, objective, dropout=TINY, max_steps=3, eval_interval=3, **changes))
    return [records(out_dir, name) for name in ("loss", "val_loss", "val_loss_mlm")]


@pytest.mark.slow
def test_contrastive_alone_is_the_same_on_two_ranks(folder, tmp_path, no_curves):
    alone = losses_of(folder, tmp_path / "one", {"micro_batch_size": 6})
    cases = [(losses_of, folder, tmp_path / strategy, {"micro_batch_size": 3, "strategy": strategy})
             for strategy in ("ddp", "fsdp")]  # fmt: skip
    for by_case in on_ranks(2, *cases):
        for wanted, found in zip(alone, by_case[0]):
            assert found == pytest.approx(wanted, rel=1e-5)


def test_evaluation_compares_the_same_texts_for_each_batch_size(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "GROUP", 5)
    monkeypatch.setattr(train, "CONTRASTED", 17)
    cfg = settings_of(folder, tmp_path / "x", {"mlm": 1.0, "contrastive": 0.5}, eval_tokens=200)
    model, windows = BERT.build(), objective_for(cfg, 0)
    model.init_weights(1)
    splits = [Split(folder, "val", 37)]
    found = [evaluate(model, splits, windows, replace(cfg.data, micro_batch_size=n), WORLD) for n in (1, 3, 7, 64)]
    for figures in found[1:]:
        assert figures == pytest.approx(found[0], rel=1e-5)
    rows = Split(folder, "val", 37).read([(0, 9 * i, 9) for i in range(17)], (17, 9))
    ids = np.pad(rows, ((0, 0), (1, 1)), constant_values=33)
    ids[:, -1] = 34
    ids[ids == 32] = 34  # ends of documents are [SEP]
    with torch.no_grad():
        texts = model.eval().states(torch.from_numpy(ids)).mean(1)
    groups = [by_the_paper(group, group) for group in texts.split(5)]
    assert found[0]["val_loss_contrastive"] == pytest.approx(sum(map(sum, groups)) / 17, rel=1e-4)


@pytest.mark.parametrize(("changes", "said"), [
    ({"dropout": 0.0}, "dropout is 0, but contrastive compares a text's two outputs under dropout; set it to 0.1"),
    ({"pooling": "cls"}, "pooling is cls, but a causal model's first token sees itself alone; set it to mean"),
])  # fmt: skip
def test_what_contrastive_cannot_do_is_refused_in_a_line(changes, said):
    with pytest.raises(UserError, match=said):
        replace(GPT, **changes)


def test_documents_as_if_alone_have_no_embedding_of_the_sequence(folder, tmp_path):
    cfg = settings_of(folder, tmp_path / "x", {"mlm": 1.0, "contrastive": 0.5}, document_mask=True)
    with pytest.raises(UserError, match="document_mask is on, but contrastive embeds a sequence as one text"):
        objective_for(cfg, 0)
