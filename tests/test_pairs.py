"""Pairs of sentences: what they hold, that nothing gives their label away, and that training on them is BERT's."""

import json
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from config import UserError
from convert import export
from data import Loader, Split, eval_batches
from hugging_face import V, saved
from interop.pretrained import load_weights, open_model
from model import ModelConfig
from objective import IGNORE, PAIRS, NextSentence, ObjectiveConfig, windows_of
from order import TrainOrder
from pairs import Partners, pair_of
from perf.cost import flops_per_token, num_params
from prepare import write_meta
from ranks import records, settings, write_data
from shards import ShardWriter
from test_objective import restored

SPECIALS = {"<|endoftext|>": 0, "<|cls|>": 1, "<|sep|>": 2, "<|mask|>": 3, "<|pad|>": 4}
FIRST = 5  # the first id of text
SHORT, LONG = (3, 1, 9, 2, 14, 30, 1, 1, 6, 22), (300, 97, 41, 250)


def unique_data(folder, lengths, times, shard_tokens=10_000):
    """(a Split whose documents have these lengths, again and again, document of each token id): no id stands twice."""
    Path(folder).mkdir()
    ids, document = [], {}
    for number, length in enumerate(lengths * times):
        new = range(FIRST + len(document), FIRST + len(document) + length)
        document |= dict.fromkeys(new, number)
        ids += [*new, SPECIALS["<|endoftext|>"]]
    splits = {}
    for name in ("train", "val"):
        writer = ShardWriter(folder, name, np.uint16, shard_tokens)
        writer.write(np.array(ids))
        splits[name] = {"shards": writer.finish(), "tokens": len(ids), "documents": len(lengths) * times}
    write_meta(folder, {"vocab_size": FIRST + len(document), "splits": splits, "specials": SPECIALS})
    return Split(folder, "train", FIRST + len(document)), document


def pairs_of(split, seq_len, name="nsp", seed=1):
    return PAIRS[name](seq_len, 0.15, seed, split.vocab_size, SPECIALS)


def loaded(split, windows, n_steps, micro_steps=1, micro_batch=16, rank=0, ranks=1):
    """The batches of so many steps, as dictionaries of numpy arrays."""
    world = types.SimpleNamespace(data_rank=rank, data_ranks=ranks, device=torch.device("cpu"))
    loader = Loader(TrainOrder(split, windows.stride, 1), windows, 0, micro_steps, micro_batch, world)
    batches = [batch for _ in range(n_steps) for batch in loader.next()[0]]
    loader.close()
    return batches


def sequences(batches):
    """(A, B, label) of each sequence, without masks, and checks that each one is [CLS] A [SEP] B [SEP] and padding."""
    found = []
    for batch in batches:
        ids, targets, positions, real, kinds, _, labels = (x if x is None else x.numpy() for x in batch)
        for row, seen, kind, label in zip(restored(ids, targets, positions), real, kinds, labels.tolist()):
            assert (row[~seen] == SPECIALS["<|pad|>"]).all() and (kind[~seen] == 0).all()
            row, kind = row[seen].tolist(), kind[seen].tolist()
            assert row[0] == SPECIALS["<|cls|>"] and row[-1] == SPECIALS["<|sep|>"]
            middle = row.index(SPECIALS["<|sep|>"])
            assert kind == [0] * (middle + 1) + [1] * (len(row) - middle - 1)
            a, b = row[1:middle], row[middle + 1 : -1]
            assert min(a + b, default=FIRST) >= FIRST  # no special token, and no end of a document
            found.append((a, b, label))
    return found


@pytest.fixture(scope="module", params=["short", "long"])
def data(request, tmp_path_factory):
    lengths, times = {"short": (SHORT, 30), "long": (LONG, 6)}[request.param]
    return unique_data(tmp_path_factory.mktemp("data") / "unique", lengths, times, shard_tokens=1700)


# ---- what a pair is


def test_half_of_the_second_sentences_follow_the_first_and_the_others_are_of_other_documents(data):
    split, document = data
    found, n_labelled = sequences(loaded(split, pairs_of(split, 27), 12, micro_batch=40)), 0
    for a, b, label in found:
        assert a == [*range(a[0], a[0] + len(a))] and b == [*range(b[0], b[0] + len(b))] if label != IGNORE else not b
        if label == 0:
            assert b[0] == a[-1] + 1 and document[b[-1]] == document[a[0]]
        elif label == 1:
            assert document[a[0]] == document[a[-1]] != document[b[0]] == document[b[-1]]
        n_labelled += label != IGNORE
    share = sum(label == 1 for *_, label in found) / n_labelled
    assert n_labelled > 0.99 * len(found) and share == pytest.approx(0.5, abs=5 * 0.5 / n_labelled**0.5)


def test_swapped_sentences_are_half_of_those_of_sentence_order(data):
    split, document = data
    found = sequences(loaded(split, pairs_of(split, 27, "sop"), 12, micro_batch=40))
    for a, b, label in found:
        if label != IGNORE:
            first, second = (a, b) if label == 0 else (b, a)
            assert second[0] == first[-1] + 1 and document[first[0]] == document[second[-1]]
    labels = [label for *_, label in found if label != IGNORE]
    assert sum(labels) / len(labels) == pytest.approx(0.5, abs=5 * 0.5 / len(labels) ** 0.5)


def test_lengths_tell_nothing_of_the_label(data):
    """A pair has the same first text and the same length, whether its second text follows or is another's."""
    split, _ = data
    places = [(0, 24 * i, 24) for i in range(60)]
    others = places[30:] + places[:30]
    rows, partners = split.read(places, (60, 24)), Partners(split.read(others, (60, 24)), split, places, others)
    n_other = 0
    for i, row in enumerate(rows):
        for draw in (0, 5, 11, 2**63):
            pairs = [pair_of(row, 0, draw, turned, partners, i) for turned in (False, True)]
            if None not in pairs:
                (a, b, label), (c, d, other) = pairs
                assert a.tolist() == c.tolist() and len(b) == len(d) and label == 0
                n_other += other
    assert n_other > 100


def test_a_text_longer_than_many_windows_is_never_its_own_other_document(tmp_path):
    """Two documents, 400 tokens each: half of all partners are of the same one, and no window knows it."""
    split, document = unique_data(tmp_path / "data", (400,), 2)
    found = sequences(loaded(split, pairs_of(split, 13), 6, micro_batch=40))
    labels = [label for *_, label in found]
    assert all(document[a[0]] != document[b[0]] for a, b, label in found if label == 1)
    assert 0.15 < np.mean(labels) < 0.35  # a coin, and another: 0.25


def test_pairs_are_a_function_of_seed_and_number_alone(data):
    split, _ = data
    whole = loaded(split, pairs_of(split, 27), 2, micro_batch=12)
    parts = loaded(split, pairs_of(split, 27), 2, micro_steps=4, micro_batch=3)
    by_rank = [loaded(split, pairs_of(split, 27), 2, micro_steps=2, micro_batch=3, rank=r, ranks=2) for r in (0, 1)]
    mixed = [batch for pair in zip(*by_rank) for batch in pair]
    for name in (0, 1, 2, 3, 4, 6):
        wanted = torch.cat([batch[name] for batch in whole])
        assert all(torch.cat([batch[name] for batch in batches]).equal(wanted) for batches in (parts, mixed))
    other = loaded(split, pairs_of(split, 27, seed=2), 2, micro_batch=12)
    assert not torch.cat([batch[6] for batch in other]).equal(torch.cat([batch[6] for batch in whole]))


def test_evaluation_has_the_same_pairs_for_each_batch_size_and_number_of_ranks(data):
    split, document = data
    windows = pairs_of(split, 27)

    def pairs(batch_size, ranks):
        by_rank = [[*eval_batches(split, windows, 1009, batch_size, rank, ranks)] for rank in range(ranks)]
        in_order = [batch for batches in zip(*by_rank) for batch in batches]
        return [found for found in sequences(in_order) if found[0]]

    wanted = pairs(7, 1)
    assert all(pairs(*layout) == wanted for layout in ((1, 1), (64, 1), (3, 4)))
    labels = [label for *_, label in wanted if label != IGNORE]
    assert 0.3 < np.mean(labels) < 0.7  # also where neighbours in the data are one document


# ---- the loss


def ours_and_theirs(seed=1):
    """A BertForPreTraining of transformers with random weights, and our model with the same."""
    with tempfile.TemporaryDirectory() as folder:
        theirs, _ = saved("bert whole", folder, seed)
        source = open_model(folder)
        ours = ModelConfig(**{**vars(source.cfg), "objective": {"mlm": 1.0, "nsp": 1.0}}).build()
        assert load_weights(source, ours) == []
    return ours.eval(), theirs  # without dropout


def test_losses_and_gradients_are_those_of_bert_for_pre_training():
    ours, theirs = ours_and_theirs()
    g = torch.Generator().manual_seed(3)
    ids, targets = torch.randint(V, (2, 5, 17), generator=g)
    positions = torch.stack([torch.randperm(17, generator=g)[:4] for _ in range(5)])
    targets = targets.gather(1, positions)
    targets[0, 2:] = IGNORE
    real = torch.arange(17) < torch.tensor([17, 9, 17, 12, 5])[:, None]
    kinds = ((torch.arange(17) > 6) & real).long()
    labels = torch.tensor([0, 1, 1, IGNORE, 0])
    whole = torch.full((5, 17), IGNORE).scatter(1, positions, targets)
    sums = ours(ids, targets, positions, real, kinds, None, labels)
    n = torch.stack([(targets != IGNORE).sum(), (labels != IGNORE).sum()])
    (sums / n).sum().backward()
    out = theirs(ids, real.long(), kinds, labels=whole, next_sentence_label=labels)
    pair = F.cross_entropy(out.seq_relationship_logits, labels)
    torch.testing.assert_close((sums / n)[1], pair, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((sums / n).sum(), out.loss, rtol=1e-5, atol=1e-6)
    out.loss.backward()
    for name, param in (("pooler", theirs.bert.pooler.dense), ("pair_head", theirs.cls.seq_relationship)):
        for kind in ("weight", "bias"):
            wanted = getattr(param, kind).grad
            torch.testing.assert_close(getattr(getattr(ours, name), kind).grad, wanted, rtol=1e-4, atol=1e-6)
    wanted = theirs.bert.embeddings.word_embeddings.weight.grad  # that of id 0, their padding, lacks the lookups'
    torch.testing.assert_close(ours.wte.weight.grad[1:V], wanted[1:], rtol=1e-3, atol=1e-5)
    wanted = theirs.bert.encoder.layer[0].attention.self.value.weight.grad
    torch.testing.assert_close(ours.blocks[0].attn.v.weight.grad, wanted, rtol=1e-3, atol=1e-5)


def test_parameters_and_flops_count_the_heads_of_pairs():
    ours, theirs = ours_and_theirs()
    assert num_params(ours.cfg) == ours.num_params() == sum(p.numel() for p in theirs.parameters())
    plain = ModelConfig(**{**vars(ours.cfg), "objective": "mlm"})
    assert flops_per_token(ours.cfg, 10) - flops_per_token(plain, 10) == 6 * (30 * 30 + 2 * 30) / 10


# ---- runs

SMALL_BERT = "n_token_types = 2\nnorm_position = 'post'\nmlp = 'gelu'\nseq_len = 11\nbatch_tokens = 66\ndropout = 0.1\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data that a small run reads, with its meta.json's count of documents; no tokenizer has its ids."""
    folder = write_data(tmp_path_factory.mktemp("runs") / "data", specials=dict(zip(SPECIALS, range(32, 37))))
    meta = json.loads((folder / "meta.json").read_text())
    for split in meta["splits"].values():
        split["documents"] = split["tokens"] // 29
    write_meta(folder, {name: value for name, value in meta.items() if name != "tokenizer"})
    return folder


def run(folder, out_dir, objective, **changes):
    out_dir.mkdir(parents=True, exist_ok=True)
    preset = out_dir / "given.py"
    preset.write_text(f"{SMALL_BERT}objective = {objective!r}\n")
    train.main(settings(folder, out_dir, str(preset), **{"seq_len": 11, "batch_tokens": 66, **changes}))
    return out_dir


def test_a_run_logs_each_loss_and_evaluates_each_by_its_name_and_resumes_to_the_bit(folder, tmp_path, no_curves):
    weights = {"mlm": 0.5, "nsp": 2.0}
    whole = run(folder, tmp_path / "whole", weights)
    run(folder, tmp_path / "parts", weights, max_steps=4)
    parts = run(folder, tmp_path / "parts", weights)
    assert records(whole) == records(parts) and records(whole, "val_loss")[9] == records(parts, "val_loss")[9]
    for kind in ("mean", "val"):
        total, mlm, nsp = (records(whole, f"{kind}_loss{name}") for name in ("", "_mlm", "_nsp"))
        assert total and all(total[n] == pytest.approx(0.5 * mlm[n] + 2 * nsp[n]) for n in total)
    assert 0 < records(whole, "val_accuracy_nsp")[9] < 1


def test_one_objective_in_a_table_is_the_objective_by_its_name_to_the_bit(folder, tmp_path, no_curves):
    named, listed = (run(folder, tmp_path / str(i), o, max_steps=3) for i, o in enumerate(("mlm", {"mlm": 1.0})))
    assert records(named) == records(listed) and records(named, "val_loss") == records(listed, "val_loss")


def test_exports_are_berts_for_pre_training_and_come_back_whole(folder, tmp_path, no_curves, capsys):
    import transformers

    first = run(folder, tmp_path / "first", {"mlm": 1.0, "sop": 1.0}, max_steps=2)
    source = open_model(str(first))
    export(source, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["BertForPreTraining"]
    theirs, told = transformers.BertForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(theirs.bert.pooler.dense.weight, source.read("pooler.weight"))
    assert torch.equal(theirs.cls.seq_relationship.bias, source.read("pair_head.bias"))
    # The weights become the model's where the objective has use for them, and are carried otherwise.
    again = run(folder, tmp_path / "again", {"mlm": 1.0, "nsp": 1.0}, init_from=tmp_path / "out", max_steps=1, save_interval=1)
    assert not (again / "carried.safetensors").exists()
    plain = run(folder, tmp_path / "plain", "mlm", init_from=tmp_path / "out", max_steps=1, save_interval=1)
    carried = open_model(str(plain)).extra
    assert torch.equal(carried["bert.pooler.dense.weight"], theirs.bert.pooler.dense.weight)
    capsys.readouterr()
    back = run(folder, tmp_path / "back", {"mlm": 1.0, "nsp": 1.0}, init_from=plain, max_steps=1, learning_rate=1e-12)
    assert "drawn anew" not in capsys.readouterr().out
    torch.testing.assert_close(open_model(str(back)).read("pooler.weight"), theirs.bert.pooler.dense.weight)
    run(folder, tmp_path / "off", "mlm", init_from=first, max_steps=1)
    assert "left out, since no objective uses them: pooler.weight, pooler.bias, pair_head.weight" in capsys.readouterr().out
    none = run(folder, tmp_path / "none", "mlm", max_steps=1)
    capsys.readouterr()
    run(folder, tmp_path / "new", {"mlm": 1.0, "nsp": 1.0}, init_from=none, max_steps=1)
    assert "not there, drawn anew: pooler.weight, pooler.bias, pair_head.weight" in capsys.readouterr().out


# ---- mistakes


@pytest.mark.parametrize(("objective", "said"), [
    ({"clm": 1, "nsp": 1}, "objective has clm and nsp, which needs a model that sees all tokens; use mlm with it"),
    ({"mlm": 1, "nsp": 1, "sop": 1}, "objective has nsp and sop, which need different pairs"),
    ({"nsp": 1}, "objective has 0 of clm, mlm; name one of them"),
    ({"mlm": 1, "clm": 1}, "objective has 2 of clm, mlm; name one of them"),
    ({"mlm": 1, "nps": 1}, "objective names 'nps'; objectives are clm, mlm, nsp, sop, contrastive"),
    ({"mlm": 1, "nsp": 0}, "objective gives nsp the weight 0; only clm or mlm may have it, beside contrastive"),
    ({"mlm": 0}, "objective gives mlm the weight 0; only clm or mlm may have it, beside contrastive"),
    ({"mlm": -1}, "objective gives mlm the weight -1; it must be a number above 0"),
    ({"mlm": 1, "nsp": "1"}, "objective gives nsp the weight '1'; it must be a number above 0"),
    ({"mlm": float("inf")}, "objective gives mlm the weight inf; it must be a number above 0"),
])  # fmt: skip
def test_objectives_that_do_not_go_together_are_refused_in_a_line(objective, said):
    with pytest.raises(UserError) as error:
        ModelConfig(objective=objective, n_token_types=2)
    assert len(error.value.args) == 1 and said in str(error.value)


def test_pairs_need_token_types_and_documents_and_room():
    with pytest.raises(UserError, match="n_token_types is None, but nsp has two kinds of tokens; set it to 2"):
        ModelConfig(objective={"mlm": 1, "nsp": 1})
    meta = {"vocab_size": 40, "specials": SPECIALS, "splits": {"train": {"documents": 5}, "val": {"documents": 1}}}
    with pytest.raises(UserError, match="nsp takes text from documents, and the val split of the data has 1; make"):
        NextSentence.build(ObjectiveConfig(), 20, 1, meta)
    meta["splits"]["val"]["documents"] = 2
    windows_of({"mlm": 1, "nsp": 1}).build(ObjectiveConfig(), 20, 1, meta)
    with pytest.raises(UserError, match="document_mask is on, but with nsp"):
        NextSentence.build(ObjectiveConfig(document_mask=True), 20, 1, meta)
    with pytest.raises(UserError, match="seq_len is 4; masked training needs at least 5: "):
        NextSentence.build(ObjectiveConfig(), 4, 1, meta)
