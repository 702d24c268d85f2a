"""Fine-tuning to tag words and to find answers: heads, data, metrics and exports as transformers and seqeval have them."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
import torch

import config
import convert
import finetune
from checkpoint import checkpoints
from conftest import slow
from heads import SPAN, TunedModel
from hugging_face import T, V, saved
from interop.hub import HubModel
from interop.pretrained import RunModel, load_weights
from metrics import answers, tags
from ops import IGNORE
from ranks import records
from text.examples import Examples, Framing, read_columns
from text.tasks import TASKS
from text.tokenizer import FileTokenizer, load_tokenizer, train_bpe
from tuning import losses, predictions, small_bert, tune, write_records, write_tables


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
    auto = {"tag": transformers.AutoModelForTokenClassification, "qa": transformers.AutoModelForQuestionAnswering}[task]
    theirs = auto.from_pretrained(folder, num_labels=len(labels), pad_token_id=V - 1).eval()
    base = getattr(theirs, theirs.base_model_prefix)  # Llama's and Qwen3's class for answers does not find it by itself
    base.load_state_dict(transformers.AutoModel.from_pretrained(folder).state_dict(), strict=False)
    source = HubModel(folder)
    ours = TunedModel(**dataclasses.asdict(source.cfg), task=task, labels=labels).build().eval()
    load_weights(source, ours)
    head = "qa_outputs" if task == "qa" else "classifier" if kind in ("bert", "gpt2") else "score"
    with torch.no_grad():
        for part in ("weight", "bias"):
            p = ours.get_parameter(f"classifier.{part}").normal_(std=0.3)
            theirs.get_parameter(f"{head}.{part}").copy_(p)
    return ours, theirs, head


def assert_gradients_equal(ours, theirs, head, kind):
    lowest = {"bert": "embeddings.word_embeddings", "gpt2": "wte"}.get(kind, "embed_tokens")
    names = {"classifier": head, "wte": f"{theirs.base_model_prefix}.{lowest}"}
    for name, other in names.items():
        here, there = (model.get_submodule(x).weight.grad for model, x in ((ours, name), (theirs, other)))
        torch.testing.assert_close(here[: len(there)], there, rtol=1e-4, atol=1e-5 * there.abs().max().item())


def task_of(name, labels, framing, **changes):
    names = {"second_column": "context"} if name == "qa" else {}
    return TASKS[name](labels, framing, finetune.FinetuneConfig(task=name, **names, **changes))


class Plain:
    """A tokenizer whose texts are ids with dashes between."""

    eot, begin, specials = V - 4, (), {"[PAD]": V - 1, "[CLS]": V - 2, "[SEP]": V - 3}

    def encode(self, text, continues=False):
        return np.array([int(id_) for id_ in text.split("-")])

    def decode_bytes(self, ids):
        return b"x"

    def spans(self, text):
        found = [*re.finditer("[0-9]+", text)]
        return self.encode(text), np.array([m.start() for m in found]), np.array([m.end() for m in found])


# ---- tag


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "mistral", "qwen3"])
def test_tagging_loss_and_gradients_equal_transformers_with_padding(kind, tmp_path):
    labels, random = ("B-X", "I-X", "O"), np.random.default_rng(4)
    ours, theirs, head = pair_of("tag", kind, labels, tmp_path)
    task, rows = task_of("tag", labels, Framing(Plain(), kind != "bert", T)), []
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
    task = task_of("tag", ("0", "1"), Framing(load_tokenizer(str(folder / "vocab.txt")), False, block_size))
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

    train_bpe(["the film is good " * 9], 270, tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    words = ["the", "film", "12", "naïve"]
    for name in (str(tmp_path / "tokenizer.json"), "byte"):
        tokenizer = load_tokenizer(name)
        [row] = task_of("tag", ("a", "b"), Framing(tokenizer, True, 99)).rows([words], None, "")
        assert tokenizer.decode(row.ids) == " the film 12 naïve" and (row.targets == IGNORE).all()
        if name != "byte":
            assert row.ids.tolist() == theirs(" the film 12 naïve")["input_ids"]
        firsts = [tokenizer.decode([row.ids[place]]).strip()[0] for place in row.positions]
        assert firsts == ["t", "f", "1", "n"]


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
        task_of("tag", ("D", "N"), framing).metrics[0] == "accuracy"
        and task_of("tag", ("I-D", "O"), framing).metrics[0] == "f1"
    )


def test_lines_of_words_and_tags_are_read_as_lists(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text('EU\tB-ORG\nrejects\tO\n\n\n"\tO\n\nPeter\tB-PER\n', encoding="utf-8")
    both = {"words": [["EU", "rejects"], ['"'], ["Peter"]], "tags": [["B-ORG", "O"], ["O"], ["B-PER"]]}
    assert read_columns(path, ["words", "tags"], ("words", "tags"), by_word=True) == both
    path.write_text("EU\nrejects\n\nPeter\n")
    assert read_columns(path, ["words"], ("words", "tags"), by_word=True) == {"words": [["EU", "rejects"], ["Peter"]]}


@pytest.mark.parametrize("more", [{}, *slow({"lora_rank": 2, "focal_gamma": 1.5})])
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


def test_logged_metrics_are_those_of_the_predicted_tags(folder, tables, tmp_path):
    tune(folder, tables, tmp_path / "run", task="tag", max_steps=2, eval_interval=1, metric="accuracy")
    by_step, truths = records(tmp_path / "run", "accuracy"), read_columns(tables / "dev_tag.jsonl", ["tags"])["tags"]
    found = predictions(tmp_path / "run")
    assert [*map(len, found)] == [*map(len, truths)]
    right = [a == b for pair in zip(found, truths) for a, b in zip(*pair)]
    assert np.mean(right) == pytest.approx(max(by_step[1], by_step[2]))
    assert tags(found, truths, True)["f1"] in records(tmp_path / "run", "f1").values()


def test_words_beyond_block_size_are_counted_and_have_no_tag(folder, tables, tmp_path, capsys):
    new = write_records(tmp_path / "new.jsonl", [{"words": ["film", "xyz"]}, {"words": ["plot"] * 40}])
    tune(folder, tables, tmp_path / "run", task="tag", max_steps=1, eval_interval=1, predict_file=new)
    assert f"at most {T}; 1 of them were longer and are cut to block_size" in capsys.readouterr().out
    first, second = predictions(tmp_path / "run")
    assert len(first) == 2 and None not in first + second[: T - 2] and second[T - 2 :] == [None] * (42 - T)


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
    ({"second_column": "b"}, "second_column is b, but task tag reads 1 of text_column and second_column"),
    ({"train_file": "{tmp}/odd.jsonl"}, "column tags has 'O', where there must be a list of tags"),
    ({"metric": "matthews"}, "metric is matthews, which tag does not have; use one of f1, precision, recall, accuracy"),
])  # fmt: skip
def test_settings_that_do_not_fit_tagging_are_told_in_a_line(change, line, folder, tables, tmp_path):
    write_records(tmp_path / "odd.jsonl", [{"words": ["a"], "tags": "O"}])
    change = {name: value.format(tmp=tmp_path) for name, value in change.items()}
    with pytest.raises(config.UserError, match=line):
        tune(folder, tables, tmp_path / "run", task="tag", **change)


# ---- qa


def questions(lengths, seed=3):
    """Records of ids: (question, context, answers), of three ids and of so many."""
    random, records = np.random.default_rng(seed), []
    for n in lengths:
        asked, context = (random.integers(0, V - 4, k).tolist() for k in (3, n))
        first, last = sorted(random.integers(0, n, 2))
        start = len("-".join(map(str, context[:first] + [""]))) if first else 0
        text = "-".join(map(str, context[first : last + 1]))
        records.append(
            ("-".join(map(str, asked)), "-".join(map(str, context)), {"text": [text], "answer_start": [start]})
        )
    return records


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "mistral", "qwen3"])
def test_answers_loss_and_gradients_equal_transformers_without_padding(kind, tmp_path):
    ours, theirs, head = pair_of("qa", kind, SPAN, tmp_path)
    framing = Framing(Plain(), kind != "bert", T)
    task = task_of("qa", SPAN, framing, stride=0)
    n = 16 - 3 - (3 if kind == "bert" else 2)
    rows = [row for *texts, label in questions([n] * 4) for row in task.rows(texts, label, "")]
    ids, targets, positions, mask, types = Examples(rows, framing).batch(range(4), 4)
    assert mask.all() and ids.shape == (4, 16)
    inputs = {"input_ids": ids} | ({} if types is None else {"token_type_ids": types})
    out = theirs(**inputs, start_positions=targets[:, 0], end_positions=targets[:, 1])
    logits, loss = ours(ids, None, positions, mask, types), ours(ids, targets, positions, mask, types) / targets.numel()
    torch.testing.assert_close(logits[..., 0], out.start_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[..., 1], out.end_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    out.loss.backward()
    assert_gradients_equal(ours, theirs, head, kind)


def test_padding_is_no_answer(tmp_path):
    """The loss of rows of several lengths is that of each alone; transformers' counts the padding in."""
    ours, *_ = pair_of("qa", "bert", SPAN, tmp_path)
    framing = Framing(Plain(), False, T)
    task = task_of("qa", SPAN, framing, stride=0)
    examples = Examples(
        [row for *texts, label in questions([2, 9, 17]) for row in task.rows(texts, label, "")], framing
    )
    ids, targets, positions, mask, types = examples.batch(range(3), 5)
    together, logits = ours(ids, targets, positions, mask, types), ours(ids, None, positions, mask, types)
    alone, found = 0, []
    for i, row in enumerate(examples.rows):
        short = torch.from_numpy(row.ids)[None].long()
        types = (torch.arange(len(row.ids)) >= row.n_first).long()[None]
        alone += ours(short, torch.from_numpy(row.targets)[None], None, None, types)
        found.append(logits[i, : len(row.ids)].detach().numpy())
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits.isinf().any(-1), ~mask)
    assert task.loss(examples.rows, found) == pytest.approx(alone.item() / 6, rel=1e-5)


def test_windows_and_targets_are_transformers(folder):
    """By the recipe of transformers' documentation for SQuAD."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    task = task_of("qa", SPAN, Framing(load_tokenizer(str(folder / "vocab.txt")), False, 14), stride=3)
    context = "The  film is very very good, a plot was not the bad film is good a the plot and it is not very bad"
    for asked, answer in (
        ("good film", "very good"),
        ("plot", "bad film"),
        ("a", "The"),
        ("is it", "very bad"),
        ("x", None),
    ):
        start = None if answer is None else context.index(answer)
        label = {"text": [answer] if answer else [], "answer_start": [start] if answer else []}
        wanted = theirs(asked, context, truncation="only_second", max_length=14, stride=3, return_overflowing_tokens=True,
                        return_offsets_mapping=True)  # fmt: skip
        rows = task.rows((asked, context), label, "")
        assert [row.ids.tolist() for row in rows] == wanted["input_ids"] and len(rows) > 1
        for i, row in enumerate(rows):
            places, is_context = wanted["offset_mapping"][i], [part == 1 for part in wanted.sequence_ids(i)]
            n = sum(is_context)
            assert [*zip(row.about.starts, row.about.ends)] == [*itertools.compress(places, is_context)]
            inside = [
                k
                for k, (a, b) in enumerate(places)
                if answer and is_context[k] and a < start + len(answer) and b > start
            ]
            is_whole = inside and places[inside[0]][0] <= start and places[inside[-1]][1] >= start + len(answer)
            assert row.targets.tolist() == ([inside[0], inside[-1]] if is_whole else [0, 0])
            assert row.about.first == is_context.index(True) and n == len(row.about.starts)


@pytest.mark.parametrize("text", ["the film", " naïve  café\n日本語 🙂👩‍👩‍👧 x12\t", "\ud800 half a pair", "e\u0301 ﬁ"])
def test_spans_of_tokens_are_those_of_tokenizers(text, tmp_path):
    train_bpe(["the film is naïve 日本 " * 9], 290, tmp_path / "tokenizer.json")
    ours = load_tokenizer(str(tmp_path / "tokenizer.json"))
    theirs = FileTokenizer("", ours.saved)
    for here, there in zip(ours.spans(text), theirs.spans(text)):
        assert here.tolist() == there.tolist()
    ids, starts, ends = load_tokenizer("byte").spans(text)
    by_character = [len(c.encode("utf-8", errors="replace")) for c in text]
    assert starts.tolist() == np.repeat(np.arange(len(text)), by_character).tolist() == (ends - 1).tolist()
    assert len(ids) == len(starts)


def test_answer_is_the_best_span_in_all_windows_by_trying_each():
    framing, random = Framing(Plain(), False, T), np.random.default_rng(8)
    task = task_of("qa", SPAN, framing, stride=4, max_answer_tokens=3)
    for lacks_some in (False, True):
        task.lacks_some = lacks_some
        for *texts, _ in questions([40, 17, 1], seed=int(lacks_some)):
            rows = task.rows(texts, None, "")
            logits = [
                random.normal(size=(len(row.ids), 2)).astype(np.float32) + np.array([2, 1]) * (i == 1)
                for i, row in enumerate(rows)
            ]
            best, text = -np.inf, None
            for row, scores in zip(rows, logits):
                for i in range(len(row.about.starts)):
                    for j in range(i, min(i + 3, len(row.about.starts))):
                        score = scores[row.about.first + i, 0] + scores[row.about.first + j, 1]
                        if score > best:
                            best, text = (
                                score,
                                "-".join(map(str, row.ids[row.about.first + i : row.about.first + j + 1])),
                            )
            is_none = lacks_some and all(scores[0].sum() > best for scores in logits)
            [found] = task.predictions(rows, logits)
            assert found["prediction"] == ("" if is_none else text)
            assert is_none or texts[1][found["answer_start"] :].startswith(text)
        rows = task.rows(("1", "2-3"), None, "")
        [found] = task.predictions(rows, [np.array([[9.0, 9.0]] + [[0.0, 0.0]] * (len(rows[0].ids) - 1))])
        assert found == (
            {"prediction": "", "answer_start": None} if lacks_some else {"prediction": "2", "answer_start": 0}
        )


def test_squads_metrics_equal_their_description_by_hand():
    guesses = ["The Film!", "good film", "a", "", "plot", "very good film", "x", "U.S."]
    truths = [["film"], ["good plot"], [""], [], [], ["film", "good film"], ["the", "x y"], ["us"]]
    f1 = [1, 1 / 2, 1, 1, 0, 4 / 5, 2 / 3, 1]
    assert answers(guesses, truths) == pytest.approx({"exact_match": 4 / 8, "f1": sum(f1) / 8})


def test_model_of_answers_is_exported_and_read_again(folder, tables, tmp_path, caplog, capfd):
    import transformers

    tune(folder, tables, tmp_path / "run", task="qa")
    assert f"{tables}/dev_qa.jsonl in " in capfd.readouterr().out
    convert.export(RunModel(tmp_path / "run"), tmp_path / "hf")
    capfd.readouterr()
    caplog.clear()
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    told = "".join(capfd.readouterr())
    assert not caplog.records and "MISSING" not in told and "UNEXPECTED" not in told
    assert "pipeline_tag: question-answering" in (tmp_path / "hf/README.md").read_text()
    columns, n = read_columns(tables / "dev_qa.jsonl", ["question", "context"]), 0
    for question, context, found in zip(*columns.values(), predictions(tmp_path / "run")):
        batch = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
        places, inside = batch.pop("offset_mapping")[0].tolist(), [part == 1 for part in batch.sequence_ids(0)]
        if len(inside) > T:
            continue
        with torch.no_grad():
            out = model(**batch)
        sums = {(i, j): (out.start_logits[0, i] + out.end_logits[0, j]).item()
                for i in range(len(inside)) for j in range(i, len(inside)) if inside[i] and inside[j]}  # fmt: skip
        i, j = max(sums, key=sums.get)
        is_none = (out.start_logits[0, 0] + out.end_logits[0, 0]).item() > sums[i, j]
        assert found == ("" if is_none else context[places[i][0] : places[j][1]])
        n += 1
    assert n > 2
    assert (HubModel(tmp_path / "hf").cfg.task, RunModel(tmp_path / "run").cfg.labels) == ("qa", SPAN)
    tune(tmp_path / "hf", tables, tmp_path / "again", task="qa", learning_rate=0, max_steps=1, eval_interval=1)
    assert predictions(tmp_path / "again") == predictions(tmp_path / "run")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mistral"])
@pytest.mark.parametrize("task", ["qa", "tag"])
def test_heads_of_decoders_are_exported_as_transformers_names_them(kind, task, tmp_path):
    import transformers
    from safetensors.torch import load_file

    ours, theirs, _ = pair_of(task, kind, SPAN if task == "qa" else ("a", "b"), tmp_path / "base")
    (tmp_path / "theirs").mkdir()
    theirs.save_pretrained(tmp_path / "theirs")
    source = HubModel(tmp_path / "theirs")
    assert source.cfg.task == task and torch.equal(
        source.read("classifier.bias"), ours.get_parameter("classifier.bias")
    )
    wanted = load_file(tmp_path / "theirs/model.safetensors")
    found = {name: make() for name, _, make in convert.their_tensors(source.cfg, source.read, {})}
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    architecture = json.loads((tmp_path / "theirs/config.json").read_text())["architectures"][0]
    assert architecture == convert.family_of(source.cfg).architecture and hasattr(transformers, architecture)


def test_a_decoder_answers_at_the_end_that_there_is_no_answer(tmp_path):
    tokenizer = load_tokenizer("byte")
    task = task_of("qa", SPAN, Framing(tokenizer, True, 16), stride=2)
    rows = task.rows(("why?", "a film is good"), {"text": ["film"], "answer_start": [2]}, "")
    assert [tokenizer.decode(row.ids) for row in rows] == [
        f"why?<|endoftext|>{part}<|endoftext|>" for part in ("a film is ", "s good")
    ]
    assert [row.targets.tolist() for row in rows] == [[7, 10], [11, 11]]


def test_answering_is_independent_of_micro_batches(folder, tables, tmp_path):
    (one, weight), (four, other) = (
        losses(folder, tables, tmp_path / str(n), task="qa", micro_batch_size=n) for n in (1, 4)
    )
    assert one == pytest.approx(four, rel=1e-5) and predictions(tmp_path / "1") == predictions(tmp_path / "4")
    torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5)


GOOD = {"question": "plot", "context": "a good film", "answers": {"text": ["good"], "answer_start": [2]}}


@pytest.mark.parametrize(("change", "line"), [
    ({"answers": {"text": ["film"], "answer_start": [2]}}, "record 1 has the answer 'film' at 2, where the context has 'good'"),
    ({"answers": {"text": ["good"], "answer_start": []}}, "where there must be {text: [...], answer_start: [...]} with lists"),
    ({"answers": "good"}, "record 1 has 'good', where there must be {text: [...], answer_start: [...]}"),
    ({"answers": {"text": [""], "answer_start": [0]}}, "record 1 has the answer '' at 0; give its text and place"),
    ({"answers": {"text": ["\u200b"], "answer_start": [11]}, "context": "a good film\u200b"}, "of which the tokenizer makes no token"),
    ({"context": "\u200b"}, "record 1 has a context of which the tokenizer makes no token"),
    ({"context": " "}, "record 1 has ' ', where there must be a text"),
    ({"context": None}, "has no context in record 1"),
    ({"question": ["a"]}, "record 1 has ['a'], where there must be a text"),
])  # fmt: skip
def test_wrong_questions_are_told_in_a_line(change, line, folder, tables, tmp_path):
    path = write_records(tmp_path / "odd.jsonl", [GOOD | change])
    with pytest.raises(config.UserError) as error:
        tune(folder, tables, tmp_path / "run", task="qa", eval_file=path)
    assert line in str(error.value) and "\n" not in str(error.value) and not checkpoints(tmp_path / "run")


@pytest.mark.parametrize(("change", "line"), [
    ({"second_column": "none"}, "second_column is none, but task qa reads 2 of text_column and second_column"),
    ({"second_column": "text"}, "has no column text; its columns are question, context, answers"),
    ({"stride": 20}, "stride is 20, but block_size 23 leaves 19 tokens for a window of the context in .*; lower stride"),
    ({"focal_gamma": 1}, "focal_gamma is 1.0, but task qa has no classes"),
    ({"label_smoothing": 0.1}, "label_smoothing is 0.1, but task qa has no classes"),
])  # fmt: skip
def test_settings_that_do_not_fit_answers_are_told_in_a_line(change, line, folder, tables, tmp_path):
    with pytest.raises(config.UserError, match=line):
        tune(folder, tables, tmp_path / "run", task="qa", **change)
