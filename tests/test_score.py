"""Log-likelihoods against log_softmax over whole sequences, windows against the harness's; more in test_harness.py."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

import config
import evaluate
from config import UserError
from evaluate import print_scores, read_requests
from interop.score import encode_pair, loglikelihood, loglikelihood_rolling, score_tokens, windows
from ranks import run, write_data
from test_model import MODERN, SMALL, random_model
from text.tokenizer import SPECIALS, load_tokenizer, train_bpe

BYTE = load_tokenizer("byte")


@pytest.fixture(scope="module", params=[SMALL, MODERN], ids=["gpt2", "modern"])
def model(request):
    """A model of bytes with more ids than its tokenizer, which take part in the softmax."""
    return random_model(replace(request.param, vocab_size=BYTE.vocab_size + 9)).eval()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A tokenizer whose tokens hold the space before a word."""
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(["the cat and the other cat, that is the end. "] * 9, 290, path)
    return load_tokenizer(str(path))


def random_sequences(n, longest, seed=1, vocab_size=261):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (n,), generator=generator).tolist()
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


# ---- windows and pairs


@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 11])
def test_windows_are_those_of_the_harness(block_size):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for n in range(5 * block_size + 2):
        ids = list(range(n))
        theirs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, 99, block_size, 1)]
        ours = windows(ids, 99, block_size)
        assert ours == theirs
        assert [i for _, continuation in ours for i in continuation] == ids
        assert all(len(context) + len(continuation) <= block_size + 1 for context, continuation in ours)


def test_blanks_that_end_a_context_go_to_the_continuation(bpe):
    def ids(text):
        return bpe.encode(text).tolist()

    assert len(ids(" cat")) == 1, "or nothing is at stake"
    assert encode_pair(bpe, "the", " cat") == encode_pair(bpe, "the ", "cat") == (ids("the"), ids(" cat"))
    assert encode_pair(bpe, "the \n", "cat") == (ids("the"), ids("the \ncat")[1:])
    assert encode_pair(bpe, "", "the cat") == ([bpe.eot], ids("the cat"))
    assert encode_pair(bpe, " \t", "cat") == ([bpe.eot], ids(" \tcat"))


def test_where_a_token_would_span_both_the_continuation_is_what_both_together_have_beyond_the_context(bpe):
    the, th, cat = (bpe.encode(text).tolist() for text in ("the", "th", " cat"))
    assert len(the) == len(th) == len(cat) == 1 and the != th
    assert encode_pair(bpe, "th", "e cat") == (th, cat)
    assert encode_pair(bpe, "th", "e") == (th, [])


# ---- scores


def test_scores_are_log_softmax_summed_over_the_continuation(model):
    sequences = random_sequences(40, 12)
    requests = [(ids[: 1 + i % (len(ids) - 1)], ids[1 + i % (len(ids) - 1) :]) for i, ids in enumerate(sequences)]
    for (context, continuation), score in zip(requests, score_tokens(model, requests)):
        with torch.no_grad():
            log_p = model(torch.tensor([context + continuation])[:, :-1])[0].double().log_softmax(-1)
        expected = sum(log_p[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))
        assert score.log_likelihood == pytest.approx(expected, rel=1e-5)
        assert score.n_tokens == len(continuation)
    assert torch.tensor([score.log_likelihood for score in score_tokens(model, requests)]).std() > 3


def test_of_what_is_longer_than_the_model_the_context_begins_later(model):
    [ids] = random_sequences(1, 40)[:1]
    ids = (ids * 20)[:30]
    assert score_tokens(model, [(ids[:25], ids[25:])]) == score_tokens(model, [(ids[-12:25], ids[25:])])
    assert score_tokens(model, [(ids[:25], ids[25:])]) != score_tokens(model, [(ids[-11:25], ids[25:])])


def test_neither_padding_nor_other_batches_nor_order_change_a_score(model):
    sequences = random_sequences(2000, 12)  # three batches
    requests = [(ids[:1], ids[1:]) for ids in sequences]
    together = score_tokens(model, requests)
    assert {len(ids) for ids in sequences} == set(range(2, 13))
    for i in range(0, 2000, 97):
        [alone] = score_tokens(model, [requests[i]])
        assert together[i].log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-5)
        assert together[i][1:] == alone[1:]
    turned = score_tokens(model, requests[::-1])[::-1]
    assert [s.log_likelihood for s in turned] == pytest.approx([s.log_likelihood for s in together], rel=1e-5)


def test_greedy_means_every_token_is_the_likeliest(model):
    ids = [7]
    for _ in range(9):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    others = [[*ids[:i], (ids[i] + 1) % 261, *ids[i + 1 :]] for i in range(1, 10)]
    scores = score_tokens(model, [(row[:1], row[1:]) for row in (ids, *others, ids[:4])])
    assert [score.is_greedy for score in scores] == [True] + [False] * 9 + [True]


@pytest.mark.parametrize("n", [1, 10, 11, 12, 22, 29])
def test_a_texts_score_is_the_sum_over_its_windows_each_token_once(model, n):
    text = "To be, or not to be: that is the question."[:n]
    [score], ids, expected = loglikelihood_rolling(model, BYTE, [text]), [BYTE.eot, *text.encode()], 0.0
    for target in range(1, n + 1):
        # A window of 11 begins with the last token of the one before; the last window reaches as far back as fits.
        first = (target - 1) // 11 * 11
        first = max(0, n - 11) if first + 11 >= n else first
        with torch.no_grad():
            expected += model(torch.tensor([ids[first:target]]))[0, -1].double().log_softmax(-1)[ids[target]].item()
    assert score.log_likelihood == pytest.approx(expected, rel=1e-5) and score.n_tokens == n


def test_texts_keep_their_order_and_an_empty_one_scores_nothing(model):
    texts = ["a" * 30, "", "ROMEO", "b"]
    scores = loglikelihood_rolling(model, BYTE, texts)
    assert [score.n_tokens for score in scores] == [30, 0, 5, 1] and scores[1].log_likelihood == 0
    for text, score in zip(texts, scores):
        [alone] = loglikelihood_rolling(model, BYTE, [text])
        assert score.log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-5)


def test_a_whole_text_scores_as_the_continuation_of_nothing_does(model):
    assert loglikelihood_rolling(model, BYTE, ["ROMEO: ay"]) == loglikelihood(model, BYTE, [("", "ROMEO: ay")])


@pytest.mark.parametrize("continuation, n", [("", 0), ("a" * 12, 12)])
def test_a_continuation_of_no_token_or_longer_than_the_model_is_refused(model, continuation, n):
    assert loglikelihood(model, BYTE, [("x", "a" * 11)])[0].n_tokens == 11
    with pytest.raises(UserError, match=rf"has {n} tokens of its own; it must have 1 to 11 \(the model.s context\)"):
        loglikelihood(model, BYTE, [("x", "a"), ("x", continuation)])


def test_without_end_of_text_continuations_are_scored_and_whole_texts_refused(model):
    bare = load_tokenizer("byte")
    bare.specials, bare.eot = {}, None
    assert loglikelihood(model, bare, [("x", "a")]) == loglikelihood(model, BYTE, [("x", "a")])
    for score in (lambda: loglikelihood_rolling(model, bare, ["a"]), lambda: loglikelihood(model, bare, [("", "a")])):
        with pytest.raises(UserError, match='byte has no end-of-text, .*; score what follows a context: {"context"'):
            score()


def test_logits_that_are_not_finite_are_told():
    broken = random_model(replace(SMALL, vocab_size=261)).eval()
    with torch.no_grad():
        broken.norm_f.bias[3] = math.nan
    with pytest.raises(UserError, match="not finite; take an earlier checkpoint"):
        loglikelihood_rolling(broken, BYTE, ["a"])


# ---- in and out


def test_a_jsonl_file_has_a_request_a_line_and_all_else_is_one_text(tmp_path):
    lines = [{"text": "a\n\u2028b", "id": 3}, {"continuation": " c", "context": ""}]
    text = "\ufeff" + "\r\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    (tmp_path / "x.jsonl").write_bytes(text.encode())
    (tmp_path / "x.txt").write_bytes(text.encode())
    assert read_requests(f"FILE:{tmp_path / 'x.jsonl'}") == [(None, "a\n\u2028b"), ("", " c")]
    for setting in (f"FILE:{tmp_path / 'x.txt'}", text):
        assert read_requests(setting) == [(None, text)]


@pytest.mark.parametrize("line, problem", [
    ('{"text": "a', "is no JSON .*; mend the line"),
    ("import os", "is no JSON"),
    ('"import os"', "is no object; write one"),
    ("7", "is no object"),
    ("[]", "is no object"),
    ("{}", "is neither a text nor a context"),
    ('{"text": 7}', "is neither"),
    ('{"text": null}', "is neither"),
    ('{"context": "a"}', "is neither"),
    ('{"continuation": "a"}', "is neither"),
    ('{"text": "a", "continuation": "b"}', "is neither"),
    ('{"context": ["a"], "continuation": "b"}', "is neither"),
    ('{"text": ""}', "has an empty text; leave the line out"),
    ('{"context": "a", "continuation": ""}', "has an empty text"),
])  # fmt: skip
def test_a_wrong_line_is_named_with_its_number_the_rule_and_the_remedy(line, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n')
    with pytest.raises(UserError, match=f"^x.jsonl line 3 {problem}") as error:
        read_requests("FILE:x.jsonl")
    assert "\n" not in str(error.value) and ";" in str(error.value)


def test_nothing_to_score_is_refused(tmp_path):
    for name, text, told in (("x.txt", "", "x.txt is empty; leave --text out"), ("x.jsonl", "\n", "has no texts; write one")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=told):
            read_requests(f"FILE:{tmp_path / name}")
    with pytest.raises(UserError, match="there is nothing to evaluate; give --tasks=lambada_openai or --text="):
        evaluate.main(config.load(evaluate.Settings, [f"--out_dir={tmp_path}"]))


def table(printed):
    """The lines of a printed table, split at blanks, without the header."""
    header, *rows = printed.splitlines()
    assert header.split() == ["log_likelihood", "tokens", "perplexity", "bits/byte", "greedy", "text"]
    return [re.split(r" +", row.strip(), maxsplit=5) for row in rows]


def test_each_text_has_a_line_and_all_have_their_sum(model, capsys):
    requests = [(None, "naïve\n" * 9), ("RO", "MEO"), (None, "b")]
    print_scores(model, BYTE, requests)
    *rows, total = table(capsys.readouterr().out)
    scores = [loglikelihood_rolling(model, BYTE, [text])[0] if context is None
              else loglikelihood(model, BYTE, [(context, text)])[0] for context, text in requests]  # fmt: skip
    for row, score, n_bytes in zip(rows, scores, (63, None, 1)):
        assert float(row[0]) == pytest.approx(score.log_likelihood, abs=1e-3) and int(row[1]) == score.n_tokens
        assert float(row[2]) == pytest.approx(math.exp(-score.log_likelihood / score.n_tokens), rel=1e-3)
        assert row[3] == "-" or float(row[3]) == pytest.approx(-score.log_likelihood / math.log(2) / n_bytes, abs=1e-3)
    assert [row[3] == "-" for row in rows] == [False, True, False]
    assert [row[4] for row in rows] == ["-", "no", "-"]
    assert [row[5] for row in rows] == [repr(("naïve\n" * 9)[:37] + "..."), "'MEO'", "'b'"]
    assert float(total[0]) == pytest.approx(sum(score.log_likelihood for score in scores), abs=1e-2)
    assert total[1] == "67" and total[3:] == ["-", "0/1", "sum of 3"]
    print_scores(model, BYTE, [(None, "naïve"), (None, "b")])
    *_, total = table(capsys.readouterr().out)
    assert float(total[3]) == pytest.approx(-float(total[0]) / math.log(2) / 7, rel=1e-3) and total[4] == "-"


def test_what_the_model_would_write_itself_is_marked_as_greedy(model, capsys):
    with torch.no_grad():
        likeliest = model(torch.arange(128)[:, None])[:, 0].argmax(-1).tolist()
    first, then = next((chr(a), chr(b)) for a, b in enumerate(likeliest) if chr(a).isalpha() and b < 128)
    print_scores(model, BYTE, [(first, then), (first, chr(ord(then) ^ 1))])
    assert [row[4] for row in table(capsys.readouterr().out)] == ["yes", "no", "1/2"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of three steps on bytes."""
    folder = tmp_path_factory.mktemp("score")
    data = write_data(folder / "data", vocab_size=261)
    return run(data, folder / "run", vocab_size=None, max_steps=3, log_interval=3)


def scored(capsys, *args):
    """What evaluate.py --text prints, and what it says of itself."""
    evaluate.main(config.load(evaluate.Settings, ["--device=cpu", *args]))
    return capsys.readouterr()


def test_a_run_is_scored_in_float32_unless_told_otherwise(run_dir, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("world.pick_precision", lambda name, device: "bf16" if name == "auto" else name)
    capsys.readouterr()
    (tmp_path / "x.jsonl").write_text('{"text": "ROMEO"}\n{"context": "RO", "continuation": "MEO"}\n')
    printed = scored(capsys, f"--out_dir={run_dir}", f"--text=FILE:{tmp_path / 'x.jsonl'}")
    assert "fp32" in printed.err
    model, _ = evaluate.load_model(run_dir, "cpu")
    expected = [*loglikelihood_rolling(model, BYTE, ["ROMEO"]), *loglikelihood(model, BYTE, [("RO", "MEO")])]
    *rows, total = table(printed.out)
    assert [float(row[0]) for row in rows] == pytest.approx([s.log_likelihood for s in expected], abs=1e-4)
    printed = scored(capsys, f"--out_dir={run_dir}", "--text=ROMEO", "--precision=bf16")
    assert "bf16" in printed.err
    [text, total] = table(printed.out)
    assert float(text[0]) == pytest.approx(expected[0].log_likelihood, rel=0.02) and text[0] == total[0] != rows[0][0]


def test_a_masked_model_scores_nothing_and_says_so(tmp_path):
    ids = {name: 256 + i for i, name in enumerate(SPECIALS)}
    data = write_data(tmp_path / "data", vocab_size=261, specials=ids)
    run_dir = run(data, tmp_path / "run", vocab_size=None, objective="mlm", max_steps=1)
    for asked in ("--text=a", "--tasks=lambada_openai"):
        with pytest.raises(UserError, match="masked model has no log-likelihood .*; evaluate a model of"):
            evaluate.main(config.load(evaluate.Settings, ["--device=cpu", f"--out_dir={run_dir}", asked]))


def test_a_wrong_file_is_refused(run_dir, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\nimport os\n')
    with pytest.raises(UserError, match="x.jsonl line 2 is no JSON"):
        scored(capsys, f"--out_dir={run_dir}", f"--text=FILE:{tmp_path / 'x.jsonl'}")
