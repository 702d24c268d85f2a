"""Fine-tuning to tag words: heads, data, metrics and exports as transformers and seqeval have them."""

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
from tuning import losses, predictions, small_bert, tune, write_records, write_tables

import config
import convert
from checkpoint import checkpoints
from heads import TunedModel
from hugging_face import T, V, saved
from interop.hub import HubModel
from interop.pretrained import RunModel, load_weights
from metrics import tags
from ops import IGNORE
from ranks import records
from text.examples import Examples, Framing, read_columns
from text.tasks import TASKS
from text.tokenizer import load_tokenizer

needs_seqeval = pytest.mark.skipif(importlib.util.find_spec("seqeval") is None, reason="needs seqeval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("tables"))


def pair_of(task, kind, labels, folder):
    """(our model with a head, transformers' with the same weights, {our head's modules: theirs})."""
    import transformers

    saved(kind, folder)
    auto = {"tag": transformers.AutoModelForTokenClassification}[task]
    theirs = auto.from_pretrained(folder, num_labels=len(labels), pad_token_id=V - 1).eval()
    source = HubModel(folder)
    ours = TunedModel(**dataclasses.asdict(source.cfg), task=task, labels=labels).build().eval()
    load_weights(source, ours)
    head = "classifier" if kind in ("bert", "gpt2") else "score"
    with torch.no_grad():
        for part in ("weight", "bias"):
            p = ours.get_parameter(f"classifier.{part}").normal_(std=0.3)
            theirs.get_parameter(f"{head}.{part}").copy_(p)
    return ours, theirs, head


def assert_gradients_equal(ours, theirs, head, kind):
    lowest = {"bert": "bert.embeddings.word_embeddings", "gpt2": "transformer.wte"}
    names = {"classifier": head, "wte": lowest.get(kind, "model.embed_tokens")}
    for name, other in names.items():
        here, there = (model.get_submodule(x).weight.grad for model, x in ((ours, name), (theirs, other)))
        torch.testing.assert_close(here[: len(there)], there, rtol=1e-4, atol=1e-5 * there.abs().max().item())


# ---- tag


class Plain:
    """A tokenizer whose words are ids with dashes between."""

    eot, begin, specials = None, (), {"[PAD]": V - 1, "[CLS]": V - 2, "[SEP]": V - 3}

    def encode(self, text, continues=False):
        return np.array([int(id_) for id_ in text.split("-")])

    def decode_bytes(self, ids):
        return b"x"


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "mistral", "qwen3"])
def test_tagging_loss_and_gradients_equal_transformers_with_padding(kind, tmp_path):
    labels, random = ("B-X", "I-X", "O"), np.random.default_rng(4)
    ours, theirs, head = pair_of("tag", kind, labels, tmp_path)
    task, rows = TASKS["tag"](labels, Framing(Plain(), kind != "bert", T)), []
    for n in (3, 7, 1, 15, 4):
        words = ["-".join(map(str, random.integers(0, V - 3, random.integers(1, 3)))) for _ in range(n)]
        rows += task.rows([words], [labels[i] for i in random.integers(0, 3, n)], "")
    ids, targets, positions, mask, types = Examples(rows, task.framing).batch(range(5), 5)
    by_token = torch.full(ids.shape, IGNORE)
    for i, row in enumerate(rows):
        by_token[i, row.positions] = torch.from_numpy(row.targets)
    inputs = {"input_ids": ids, "attention_mask": mask.long()} | ({} if types is None else {"token_type_ids": types})
    out = theirs(**inputs, labels=by_token)
    logits, loss = ours(ids, None, positions, mask, types), ours(ids, targets, positions, mask, types)
    loss = loss / (targets != IGNORE).sum()
    for i, row in enumerate(rows):
        here, there = logits[i, : len(row.positions)], out.logits[i, row.positions]
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    out.loss.backward()
    assert_gradients_equal(ours, theirs, head, kind)


@pytest.mark.parametrize("block_size", [T, 9])
def test_labels_stand_at_the_first_tokens_of_words_as_transformers_recipe_has_them(block_size, folder):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    task = TASKS["tag"](("0", "1"), Framing(load_tokenizer(str(folder / "vocab.txt")), False, block_size))
    words, label = ["good", "abc", "film", "\u200b", "wasnt", "Is", "xy"], [1, 0, 1, 1, 0, 1, 0]
    wanted = theirs(words, is_split_into_words=True, truncation=True, max_length=block_size)
    targets, last = [], None
    for number in wanted.word_ids():  # the recipe of transformers' documentation
        targets.append(IGNORE if number is None or number == last else label[number])
        last = number
    [row] = task.rows([words], label, "")
    by_token = np.full(len(row.ids), IGNORE)
    by_token[row.positions] = row.targets
    assert row.ids.tolist() == wanted["input_ids"] and by_token.tolist() == targets
    assert task.framing.n_cut == (block_size == 9)
    found = [*task.predictions([row], [np.eye(2)[row.targets]])][0]["prediction"]
    assert found == (
        ["1", "0", "1", None, "0", "1", "0"] if block_size == T else ["1", "0", "1", None, "0", None, None]
    )


def test_a_decoders_words_have_a_blank_before_them_and_labels_behind_it(tmp_path):
    import transformers

    from text.tokenizer import train_bpe

    train_bpe(["the film is good " * 9], 270, tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    words = ["the", "film", "12", "naïve"]
    for name in (str(tmp_path / "tokenizer.json"), "byte"):
        tokenizer = load_tokenizer(name)
        [row] = TASKS["tag"](("a", "b"), Framing(tokenizer, True, 99)).rows([words], None, "")
        assert tokenizer.decode(row.ids) == " the film 12 naïve" and (row.targets == IGNORE).all()
        if name != "byte":
            assert row.ids.tolist() == theirs(" the film 12 naïve")["input_ids"]
        firsts = [tokenizer.decode([row.ids[place]]).strip()[0] for place in row.positions]
        assert firsts == ["t", "f", "1", "n"]


@needs_seqeval
def test_entities_count_as_conlleval_counts_them():
    """By hand: 3 entities are right of 5 found, where there are 4; the first one's end is wrong."""
    truths = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "B-LOC"], ["O"]]
    guesses = [["B-PER", "O", "O", "I-LOC"], ["B-LOC", "B-LOC"], ["I-PER"]]
    found = tags(guesses, truths, True)
    assert found == pytest.approx({"f1": 6 / 9, "precision": 3 / 5, "recall": 3 / 4, "accuracy": 4 / 7})
    nothing = tags([["O"]], [["O"]], True)
    assert nothing == {"f1": 0, "precision": 0, "recall": 0, "accuracy": 1}


def test_tags_that_are_no_entities_have_the_mean_over_tags():
    found = tags([["N", "N"], ["V", "D"]], [["N", "V"], ["V", "D"]], False)
    mean = {"f1": (2 / 3 + 2 / 3 + 1) / 3, "precision": (1 / 2 + 1 + 1) / 3, "recall": (1 + 1 / 2 + 1) / 3}
    assert found == pytest.approx(mean | {"accuracy": 3 / 4})
    framing = Framing(Plain(), False, T)
    assert (
        TASKS["tag"](("D", "N"), framing).metrics[0] == "accuracy"
        and TASKS["tag"](("I-D", "O"), framing).metrics[0] == "f1"
    )


def test_lines_of_words_and_tags_are_read_as_lists(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text('EU\tB-ORG\nrejects\tO\n\n\n"\tO\n\nPeter\tB-PER\n', encoding="utf-8")
    both = {"words": [["EU", "rejects"], ['"'], ["Peter"]], "tags": [["B-ORG", "O"], ["O"], ["B-PER"]]}
    assert read_columns(path, ["words", "tags"], ("words", "tags"), by_word=True) == both
    path.write_text("EU\nrejects\n\nPeter\n")
    assert read_columns(path, ["words"], ("words", "tags"), by_word=True) == {"words": [["EU", "rejects"], ["Peter"]]}


@needs_seqeval
@pytest.mark.parametrize("more", [{}, {"lora_rank": 2, "focal_gamma": 1.5}])
def test_tagger_is_exported_and_read_again(more, folder, tables, tmp_path, caplog, capfd):
    import transformers

    tune(folder, tables, tmp_path / "run", task="tag", **more)
    convert.export(RunModel(tmp_path / "run"), tmp_path / "hf")
    capfd.readouterr()
    caplog.clear()
    model = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    told = "".join(capfd.readouterr())
    assert not caplog.records and "MISSING" not in told and "UNEXPECTED" not in told
    assert model.dropout.p == 0.0 and "AutoModelForTokenClassification" in (tmp_path / "hf/README.md").read_text()
    wanted = predictions(tmp_path / "run")
    for words, found in zip(read_columns(tables / "dev_tag.jsonl", ["words"])["words"], wanted):
        batch = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            numbers = model(**batch).logits[0].argmax(1).tolist()
        ids = batch.word_ids()
        assert [model.config.id2label[numbers[ids.index(i)]] for i in range(len(words))] == found
    again, source = HubModel(tmp_path / "hf"), RunModel(tmp_path / "run")
    assert (again.cfg.task, again.cfg.labels) == ("tag", source.cfg.labels)
    still = {"learning_rate": 0, "max_steps": 1, "eval_interval": 1}
    tune(tmp_path / "hf", tables, tmp_path / "again", task="tag", **still)
    assert predictions(tmp_path / "again") == wanted


@needs_seqeval
def test_logged_metrics_are_those_of_the_predicted_tags(folder, tables, tmp_path):
    tune(folder, tables, tmp_path / "run", task="tag", max_steps=2, eval_interval=1, metric="accuracy")
    by_step, truths = records(tmp_path / "run", "accuracy"), read_columns(tables / "dev_tag.jsonl", ["tags"])["tags"]
    found = predictions(tmp_path / "run")
    assert [*map(len, found)] == [*map(len, truths)]
    right = [a == b for pair in zip(found, truths) for a, b in zip(*pair)]
    assert np.mean(right) == pytest.approx(max(by_step[1], by_step[2]))
    assert tags(found, truths, True)["f1"] in records(tmp_path / "run", "f1").values()


@needs_seqeval
def test_words_beyond_block_size_are_counted_and_have_no_tag(folder, tables, tmp_path, capsys):
    new = write_records(tmp_path / "new.jsonl", [{"words": ["film", "xyz"]}, {"words": ["plot"] * 40}])
    tune(folder, tables, tmp_path / "run", task="tag", max_steps=1, eval_interval=1, predict_file=new)
    assert f"at most {T}; 1 of them were longer and are cut to block_size" in capsys.readouterr().out
    first, second = predictions(tmp_path / "run")
    assert len(first) == 2 and None not in first + second[: T - 2] and second[T - 2 :] == [None] * (42 - T)


@needs_seqeval
def test_tagging_is_independent_of_micro_batches(folder, tables, tmp_path):
    (one, weight), (four, other) = (
        losses(folder, tables, tmp_path / str(n), task="tag", micro_batch_size=n) for n in (1, 4)
    )
    assert one == pytest.approx(four, rel=1e-5) and predictions(tmp_path / "1") == predictions(tmp_path / "4")
    torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("record", "line"), [
    ({"words": ["a", "b"], "tags": ["O"]}, "record 1 has ['O'], where there must be a list of 2 tags"),
    ({"words": ["a"], "tags": ["B-Z"]}, "record 1 has the label 'B-Z', which train_file has not; its labels are B-X"),
    ({"words": [], "tags": []}, "record 1 has [], where there must be a list of words"),
    ({"words": ["a", " "], "tags": ["O", "O"]}, "record 1 has ['a', ' '], where there must be a list of words"),
    ({"words": "a film", "tags": ["O", "O"]}, "record 1 has 'a film', where there must be a list of words"),
    ({"words": ["\u200b"], "tags": ["O"]}, "record 1 has no word of which the tokenizer makes tokens that fit"),
    ({"words": ["a"], "labels": ["O"]}, "has no column tags; its columns are words, labels"),
])  # fmt: skip
def test_wrong_records_of_words_are_told_in_a_line(record, line, folder, tables, tmp_path):
    path = write_records(tmp_path / "odd.jsonl", [record])
    with pytest.raises(config.UserError) as error:
        tune(folder, tables, tmp_path / "run", task="tag", eval_file=path)
    assert line in str(error.value) and "\n" not in str(error.value) and not checkpoints(tmp_path / "run")


@pytest.mark.parametrize(("change", "line"), [
    ({"second_column": "b"}, "second_column is b, but tag has one list of words"),
    ({"train_file": "{tmp}/odd.jsonl"}, "column tags has 'O', where there must be a list of tags"),
    ({"metric": "matthews"}, "metric is matthews, which tag does not have; use one of f1, precision, recall, accuracy"),
])  # fmt: skip
def test_settings_that_do_not_fit_tagging_are_told_in_a_line(change, line, folder, tables, tmp_path):
    write_records(tmp_path / "odd.jsonl", [{"words": ["a"], "tags": "O"}])
    change = {name: value.format(tmp=tmp_path) for name, value in change.items()}
    with pytest.raises(config.UserError, match=line):
        tune(folder, tables, tmp_path / "run", task="tag", **change)
