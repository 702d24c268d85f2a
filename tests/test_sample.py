"""Generation against a model that is asked anew for each token; sampling against probabilities worked out by hand."""

import ast
import copy
import io
import math
import re
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import config
import generation
import sample
from cache import Cache
from config import UserError
from devices import pick_precision
from generation import GenerationConfig, draw, generate, kept_probabilities, next_tokens
from model import ModelConfig, Transformer
from objective import special_id
from ranks import run, write_data
from sample import generation_dtype, masked_ids, print_candidates, stream
from text.files import read_text
from text.tokenizer import SPECIALS, load_tokenizer, train_bpe, write_character_tokenizer

V = 37
SMALL = ModelConfig(vocab_size=V, block_size=11, n_layer=3, n_head=5, n_embd=20)


MODERN = replace(
    SMALL,
    n_head=6,
    n_kv_head=2,
    head_dim=4,
    mlp="swiglu",
    norm="rmsnorm",
    qk_norm=True,
    position="rope",
    rope_scale=3.0,
)


@pytest.fixture(scope="module", params=[SMALL, MODERN], ids=["gpt2", "modern"])
def model(request):
    """A model of wide random weights, whose likeliest token changes with the tokens before."""
    torch.manual_seed(4)
    model = Transformer(replace(request.param, bias=False, tie_embeddings=False))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=1.0)
    return model.eval()


def prompts(length, batch=3):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(6))


class WithoutWaiting(TorchDispatchMode):
    """Fails at what a CUDA graph cannot hold: values or shapes that the host must know, and numbers sent to the GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags), function
        numbers = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim() == 0]
        assert not numbers, f"{function} takes a number as a tensor, which is on the CPU"
        return function(*args, **(kwargs or {}))


class Replayed:
    """Stands for Captured on a CPU: runs a function to warm up, notes its operators, and from then on knows only these.

    Inputs and outputs keep their places in memory, as a CUDA graph's do.
    """

    def __init__(self, function):
        self.function, self.operators = function, None

    def __call__(self, *inputs):
        if self.operators is None:
            self.inputs = [x.clone() for x in inputs]
            with WithoutWaiting():
                self.output = self.function(*self.inputs).clone()
            self.operators = make_fx(self.function)(*self.inputs)
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        return self.output.copy_(self.operators(*self.inputs))


STEPS = pytest.mark.parametrize("record", [None, Replayed], ids=["views", "recorded"])


def tokens_of(model, ids, seed=1, record=None, **settings):
    """What generate yields, (B, tokens); with record, what its steps on a GPU would be."""
    cfg = GenerationConfig(**{"temperature": 0.0, "max_new_tokens": 5} | settings)
    args = model, ids, cfg, seed, V
    return torch.stack(list(next_tokens(*args, record=record) if record else generate(*args)), dim=1)


def test_special_tokens_that_are_no_text_are_never_drawn(model):
    """An untrained model draws all tokens alike; with a fifth of them left out, 300 draws would show one."""
    never = list(range(0, V, 5))
    cfg, ids = GenerationConfig(max_new_tokens=100), prompts(1)
    drawn = torch.stack(list(generate(model, ids, cfg, 1, V, never)), dim=1)
    assert not set(drawn.flatten().tolist()) & set(never) and len(set(drawn.flatten().tolist())) > 1
    assert set(torch.stack(list(generate(model, ids, cfg, 1, V)), dim=1).flatten().tolist()) & set(never)


def slow_greedy(model, ids, n):
    """Greedy tokens with no cache, each from all tokens in sight; where they would not fit, the last half stays."""
    seen, out = ids, []
    with torch.no_grad():
        for _ in range(n):
            if seen.shape[1] > SMALL.block_size:
                seen = seen[:, -(SMALL.block_size // 2) :]
            out.append(model(seen)[:, -1].argmax(-1, keepdim=True))
            seen = torch.cat([seen, out[-1]], dim=1)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("prompt, n", [(1, 5), (4, 7), (11, 1)])
def test_greedy_cached_generation_is_argmax_over_full_recomputation(model, prompt, n):
    ids = prompts(prompt)
    ours = tokens_of(model, ids, max_new_tokens=n)
    assert torch.equal(ours, slow_greedy(model, ids, n))
    assert len(ours.unique()) > 3 or n == 1  # or any model would do


@pytest.mark.parametrize(
    "prompt, record", [(1, None), (4, None), (10, None), (11, None), (1, Replayed), (10, Replayed)]
)
def test_past_block_size_the_window_slides_as_an_uncached_one_does(model, prompt, record):
    ids = prompts(prompt)
    assert torch.equal(tokens_of(model, ids, max_new_tokens=40, record=record), slow_greedy(model, ids, 40))


@pytest.mark.parametrize(("record", "window"), [
    (None, None), (None, 4), (Replayed, 4), pytest.param(Replayed, None, marks=pytest.mark.slow),
])  # fmt: skip
def test_prompts_of_several_lengths_go_on_as_each_alone(model, record, window):
    if window:
        weights, model = model.state_dict(), Transformer(replace(model.cfg, window=window, global_every=2)).eval()
        model.load_state_dict(weights)
    ids, lengths = prompts(7), torch.tensor([3, 7, 4])
    for tail in (ids, ids + 1):  # what pads a shorter prompt does not matter
        padded = torch.where(torch.arange(7) < lengths[:, None], ids, tail % V)
        cfg = GenerationConfig(temperature=0.0, max_new_tokens=5)
        drawn = torch.stack(list(next_tokens(model, padded, cfg, 1, V, lengths=lengths, record=record)), dim=1)
        for row, length, tokens in zip(ids, lengths, drawn):
            assert torch.equal(tokens[None], slow_greedy(model, row[None, :length], 5))


@STEPS
def test_a_block_of_one_token_still_generates(record):
    tiny = Transformer(replace(SMALL, block_size=1)).eval()
    assert tokens_of(tiny, prompts(1), max_new_tokens=4, record=record).shape == (3, 4)


def token_at(number, probs, top_k=V, top_p=1.0):
    """The token at which the sum of the probabilities kept, in the vocabulary's order, reaches a share 1 - number."""
    likeliest, kept = sorted(range(V), key=lambda token: -probs[token])[:top_k], []
    share = top_p * sum(probs[token] for token in likeliest)
    while likeliest and sum(probs[token] for token in kept) < share:
        kept.append(likeliest.pop(0))
    left = (1 - number) * sum(probs[token] for token in kept)
    for token in sorted(kept):
        left -= probs[token]
        if left <= 0:
            return token


@STEPS
@pytest.mark.parametrize("settings", [{"top_k": 9}, {"top_p": 0.9}])
def test_a_steps_tokens_follow_from_the_seeds_numbers_for_that_step(model, settings, record):
    """The reference has no cache; its numbers are drawn at once, and a step's are a row of them."""
    ids, n = prompts(4), 30
    ours = tokens_of(model, ids, seed=7, temperature=5.0, max_new_tokens=n, record=record, **settings)
    seen = ids
    for row in torch.rand(n, 3, generator=torch.Generator().manual_seed(7)).tolist():
        if seen.shape[1] > SMALL.block_size:
            seen = seen[:, -(SMALL.block_size // 2) :]
        with torch.no_grad():
            probs = (model(seen)[:, -1].double() / 5.0).softmax(-1).tolist()
        tokens = [token_at(number, p, **settings) for number, p in zip(row, probs, strict=True)]
        assert ours[:, 0].tolist() == tokens
        seen, ours = torch.cat([seen, ours[:, :1]], dim=1), ours[:, 1:]
    assert len(seen.unique()) > 5


def test_a_graph_cannot_hold_what_waits_for_a_value_or_sends_a_number():
    x = torch.ones(2)
    for waits in (lambda: x[0].item(), lambda: x.nonzero(), lambda: x.where(x > 2, 0.0), lambda: torch.equal(x, x)):
        with WithoutWaiting(), pytest.raises(AssertionError):
            waits()


def test_several_tokens_at_a_place_are_refused_not_wrong(model):
    cache = Cache(model.cfg, 3, "cpu", torch.float32)
    with torch.no_grad(), pytest.raises(AssertionError, match="at a given place there is one token"):
        model(prompts(2), cache=cache, place=torch.tensor([0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}, {"temperature": 2.0, "top_k": 9, "top_p": 0.9}])
@pytest.mark.parametrize("prompt", [1, 4, 10, 11])
def test_captured_steps_draw_what_others_do(model, prompt, settings, group, monkeypatch):
    """Over 40 tokens, so that the window slides and groups are whole and partial."""
    monkeypatch.setattr(generation, "GROUP", group)
    model, ids = copy.deepcopy(model).cuda(), prompts(prompt).cuda()
    cfg = GenerationConfig(**{"temperature": 0.0, "max_new_tokens": 40} | settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="CUDA graphs do not work here")  # Captured only warns
        captured = torch.stack(list(generate(model, ids, cfg, 1, V)), dim=1)
        first = next(generate(model, ids, cfg, 1, V))  # stops with steps still running
    assert captured.device.type == "cpu" and torch.equal(first, captured[:, 0])
    for record in (None, lambda step: step):
        others = torch.stack(list(next_tokens(model, ids, cfg, 1, V, record=record)), dim=1)
        assert torch.equal(captured, others.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tells_of_logits_that_are_not_finite(model):
    broken = copy.deepcopy(model).cuda()
    broken.head.weight.data[5] = math.nan
    with pytest.raises(UserError, match="not finite; take an earlier checkpoint"):
        list(generate(broken, prompts(4).cuda(), GenerationConfig(), 1, V))


def test_temperature_zero_ignores_the_seed_and_others_do_not(model):
    ids = prompts(4)
    assert torch.equal(tokens_of(model, ids, seed=1), tokens_of(model, ids, seed=2))
    hot = {"temperature": 3.0, "max_new_tokens": 9}
    assert torch.equal(tokens_of(model, ids, seed=1, **hot), tokens_of(model, ids, seed=1, **hot))
    assert not torch.equal(tokens_of(model, ids, seed=1, **hot), tokens_of(model, ids, seed=2, **hot))


def test_top_k_1_is_greedy(model):
    ids = prompts(4)
    assert torch.equal(tokens_of(model, ids, top_k=1, temperature=2.0), tokens_of(model, ids))


def test_samples_of_one_prompt_differ(model):
    out = tokens_of(model, prompts(4, batch=1).repeat(3, 1), temperature=2.0, max_new_tokens=9)
    assert len({tuple(row) for row in out.tolist()}) == 3


def test_padding_ids_are_never_drawn(model):
    assert tokens_of(model, prompts(4), temperature=100.0, max_new_tokens=200).max() < V


# ---- one draw

PROBS = [0.4, 0.3, 0.15, 0.1, 0.05]


def numbers(n, seed=1):
    """n rows' numbers in [0, 1)."""
    return torch.rand(n, 1, generator=torch.Generator().manual_seed(seed))


def frequencies(temperature=1.0, **settings):
    """How often draw takes each token, of 40,000 draws from PROBS in another order."""
    order = torch.tensor([3, 0, 4, 1, 2])
    logits = torch.tensor(PROBS).log()[order].expand(40_000, 5) + 3.0
    drawn = draw(logits, GenerationConfig(temperature=temperature, **settings), numbers(40_000))
    return (torch.bincount(order[drawn], minlength=5) / 40_000).tolist()


@pytest.mark.parametrize("settings, expected", [
    ({}, PROBS),
    ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
    ({"top_k": 9}, PROBS),
    ({"top_p": 1.0}, PROBS),
    ({"top_p": 0.6}, [4 / 7, 3 / 7, 0, 0, 0]),  # 0.4 is not enough, 0.7 is
    ({"top_p": 0.75}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
    ({"top_p": 0.01}, [1, 0, 0, 0, 0]),  # the likeliest always stays
    ({"top_k": 3, "top_p": 0.8}, [4 / 7, 3 / 7, 0, 0, 0]),  # of three, two have 0.7 / 0.85 = 0.82
    ({"min_p": 0.3}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),  # 0.3 * 0.4 = 0.12
    ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
    ({"temperature": 0.5, "min_p": 0.3}, [0.16 / 0.25, 0.09 / 0.25, 0, 0, 0]),  # of the probabilities at 0.5
    ({"temperature": 0.5}, [p * p / sum(q * q for q in PROBS) for p in PROBS]),
    ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
])  # fmt: skip
def test_draws_follow_the_distribution(settings, expected):
    assert frequencies(**settings) == pytest.approx(expected, abs=0.012)  # five standard deviations
    assert [f == 0 for f in frequencies(**settings)] == [e == 0 for e in expected]


@pytest.mark.parametrize("settings", [{"min_p": 0.02}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8, "min_p": 0.1}])
def test_tokens_that_are_kept_are_those_of_transformers(settings):
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = 2.0 * torch.randn(50, V, generator=torch.Generator().manual_seed(3))
    kinds = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    warpers = [TemperatureLogitsWarper(0.7), *(kinds[name](value) for name, value in settings.items())]
    theirs = LogitsProcessorList(warpers)(None, logits).softmax(-1)
    cfg = GenerationConfig(temperature=0.7, **settings)
    ours = kept_probabilities(logits - logits.amax(-1, keepdim=True), cfg)
    torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), theirs)
    assert 1 < (theirs > 0).sum(-1).float().mean() < V - 5


def test_top_k_takes_k_tokens_even_where_they_are_equally_likely():
    logits = torch.zeros(20_000, 5)
    drawn = draw(logits, GenerationConfig(temperature=1.0, top_k=2), numbers(20_000))
    assert len(drawn.unique()) == 2


# ---- text

BYTE = load_tokenizer("byte")


def test_characters_split_over_tokens_come_whole(capsys):
    text = "aé€😀z"
    printed = [*text.encode()]

    def steps():
        seen = ""
        for byte in printed:
            yield torch.tensor([byte])
            seen += capsys.readouterr().out
            assert "\ufffd" not in seen and text.startswith(seen)

    samples = stream(steps(), BYTE, "", 1)
    assert samples == [list(text.encode())]


def test_half_a_character_at_the_end_is_marked(capsys):
    stream(iter([torch.tensor([b]) for b in "a€".encode()[:-1]]), BYTE, "", 1)
    assert capsys.readouterr().out == "a\ufffd\n"


def test_a_prompts_file_is_read_as_it_is(tmp_path):
    (tmp_path / "prompt.txt").write_bytes("a\r\nœ\rb\n".encode())
    assert read_text(f"FILE:{tmp_path / 'prompt.txt'}", "prompt") == "a\r\nœ\rb\n"


def test_each_sample_stops_at_its_end_of_text_and_all_stop_together(capsys):
    a, b, c, eot = *b"abc", BYTE.eot
    rest = iter([torch.tensor(t) for t in ([a, b], [eot, b], [c, b], [c, eot], [c, c])])
    assert stream(rest, BYTE, "p", 2) == [[a], [b, b, b]]
    assert capsys.readouterr().out == "pa\n" + "-" * 40 + "\npbbb\n"
    assert len(list(rest)) == 1  # the fifth was not asked for


def streamed(capsys, tokens, stops, num_samples=1):
    """What stream prints after a prompt p, for tokens of each sample, and after which of its tokens each had ended."""
    samples = stream(iter(torch.tensor(row) for row in zip(*tokens)), BYTE, "p", num_samples, stops)
    return capsys.readouterr().out.removesuffix("\n"), [len(sample) for sample in samples]


@pytest.mark.parametrize("text, stops, printed, n", [
    ("ab\n\ncd", ["\n\n"], "ab", 4),
    ("ab\ncd", ["\n\n"], "ab\ncd", 5),  # half of it held back, then let go
    ("ab\n", ["\n\n"], "ab\n", 3),  # and let go at the end
    ("aabaac", ["aac"], "aab", 6),
    ("a bUser:c", ["Bot:", "User:", "x"], "a b", 8),
    ("abcd", ["cd", "bcx"], "ab", 4),
    ("abcd", ["d", "bcd"], "a", 4),  # both end here; the one that begins first is cut
    ("né日本", ["日本"], "né", 9),
    ("né日月", ["日本"], "né日月", 9),
    ("aé", ["é"], "a", 3),
    ("abc", ["ab"], "", 2),
    ("p", ["pp"], "p", 1),  # the prompt, which is p, does not count
])  # fmt: skip
def test_text_ends_before_the_first_stop_string_whatever_tokens_it_comes_in(text, stops, printed, n, capsys):
    assert streamed(capsys, [list(text.encode())], stops) == (f"p{printed}", [n])
    rest = list("-" * len(text.encode()))
    both = [list("".join(rest).encode()), list(text.encode())]
    out, lengths = streamed(capsys, both, stops, num_samples=2)
    assert out.endswith("-" * 40 + f"\np{printed}") and lengths[1] == n


def test_no_part_of_a_stop_string_is_printed_meanwhile(capsys):
    def steps():
        for byte in b"ab\nUser: c":
            yield torch.tensor([byte])
            seen.append(capsys.readouterr().out)

    seen = []
    stream(steps(), BYTE, "", 1, ["\nUser:"])
    assert "".join(seen) == "ab" and len(seen) == 7


def test_a_stop_string_of_one_token_with_more_text_ends_before_it(capsys):
    class Words:
        stops = ()

        def decode_bytes(self, ids):
            return b"".join({1: b"so. ", 2: b"END of", 3: b"x EN", 4: b"D"}[i] for i in ids)

    stream(iter([torch.tensor([1]), torch.tensor([2])]), Words(), "", 1, ["END"])
    assert capsys.readouterr().out == "so. \n"
    stream(iter([torch.tensor([3]), torch.tensor([4])]), Words(), "", 1, ["END"])
    assert capsys.readouterr().out == "x \n"


def test_where_overlapping_stop_strings_end_a_text_does_not_depend_on_its_tokens():
    for pieces in ([b"xabcd"], [b"xa", b"bcd"], [b"x", b"a", b"b", b"c", b"d"], [b"xab", b"cd"]):
        end = generation.UntilStop(["abcd", "bc", "c"])
        assert b"".join(end.add(piece) for piece in pieces if not end.has_ended) == b"xa"


@pytest.mark.parametrize("stop, stops", [
    (None, []), ("User:", ["User:"]), ('["\\n\\n", "User:"]', ["\n\n", "User:"]), ("[INST]", ["[INST]"]), ("\\n\\n", ["\n\n"]),
])  # fmt: skip
def test_a_stop_is_a_text_or_a_json_list_of_texts(stop, stops):
    assert sample.SampleConfig(stop=stop).stops == stops


@pytest.mark.parametrize("stop", ['[""]', '["a", 7]', "[[]]", "[]", ""])
def test_a_stop_that_is_no_text_is_refused(stop):
    with pytest.raises(UserError, match="stop is .*; it must be text, or a JSON list of texts, as in --stop="):
        sample.SampleConfig(stop=stop)


# ---- a run's folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of three steps, whose data is gone."""
    folder = tmp_path_factory.mktemp("sample")
    data = write_data(folder / "data", vocab_size=261)
    run_dir = run(data, folder / "run", vocab_size=None, max_steps=3, log_interval=3)
    shutil.rmtree(data)
    return run_dir


def sampled(capsys, *args):
    """What sample.py prints to stdout."""
    sample.main(config.load(sample.Settings, ["--device=cpu", "--precision=fp32", *args]))
    return capsys.readouterr().out


def test_a_run_folder_alone_is_enough_to_sample_from(run_dir, capsys):
    args = f"--out_dir={run_dir}", "--prompt=ROM", "--num_samples=3", "--max_new_tokens=30"
    out = sampled(capsys, *args)
    assert out.startswith("ROM") and out.count("-" * 40) == 2
    assert out == sampled(capsys, *args)
    assert out != sampled(capsys, *args, "--seed=5")
    assert sampled(capsys, *args, "--precision=bf16").startswith("ROM")


def test_a_sample_ends_at_its_stop_string(run_dir, capsys):
    args = f"--out_dir={run_dir}", "--prompt=ROM", "--max_new_tokens=30"
    whole = sampled(capsys, *args)[3:-1]
    stop = whole[5:7]
    assert sampled(capsys, *args, f"--stop={stop}") == "ROM" + whole[: whole.index(stop)] + "\n"


def test_prompts_come_from_files_stdin_and_nowhere(run_dir, capsys, tmp_path, monkeypatch):
    greedy = f"--out_dir={run_dir}", "--max_new_tokens=5", "--temperature=0"
    expected = sampled(capsys, *greedy, "--prompt=aé")
    (tmp_path / "prompt.txt").write_text("aé", encoding="utf-8")
    assert sampled(capsys, *greedy, f"--prompt=FILE:{tmp_path / 'prompt.txt'}") == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("aé"))
    assert sampled(capsys, *greedy, "--prompt=-") == expected
    assert sampled(capsys, *greedy)
    in_c_locale = "aé".encode().decode("ascii", "surrogateescape")
    assert sampled(capsys, *greedy, f"--prompt={in_c_locale}") == expected
    monkeypatch.setattr("sys.stdin", io.StringIO(in_c_locale))
    assert sampled(capsys, *greedy, "--prompt=-") == expected


@pytest.mark.parametrize("text", ["None", "none"])
def test_a_prompt_is_text_whatever_it_says(run_dir, capsys, text):
    assert sampled(capsys, f"--out_dir={run_dir}", f"--prompt={text}", "--max_new_tokens=1").startswith(text)


def test_a_prompt_that_is_empty_or_no_text_is_refused(run_dir, capsys, tmp_path, monkeypatch):
    (tmp_path / "empty").touch()
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for prompt, told in (("-", "stdin is empty; leave --prompt out"), ("\udcff", "prompt cannot be read as UTF-8"),
                         (f"FILE:{tmp_path / 'empty'}", "empty is empty"), ("\ud800", "cannot be read as UTF-8")):  # fmt: skip
        with pytest.raises(UserError, match=told):
            sampled(capsys, f"--out_dir={run_dir}", f"--prompt={prompt}")


def test_an_empty_prompt_is_as_none(run_dir, capsys):
    argv = [f"--out_dir={run_dir}", "--max_new_tokens=3"]
    assert sampled(capsys, *argv, "--prompt=") == sampled(capsys, *argv)


def test_what_has_no_end_is_refused(run_dir, capsys, monkeypatch):
    monkeypatch.setattr("text.files.TEXT_BYTES", 1000)
    with pytest.raises(UserError, match="prompt file /dev/zero has more than 1,000 bytes; give less text"):
        sampled(capsys, f"--out_dir={run_dir}", "--prompt=FILE:/dev/zero")
    with pytest.raises(UserError, match="num_samples is 1000000000000; it must be at least 1 and at most 100,000"):
        sampled(capsys, f"--out_dir={run_dir}", "--num_samples=1000000000000")


def test_a_prompt_longer_than_the_context_is_refused(run_dir, capsys):
    assert sampled(capsys, f"--out_dir={run_dir}", "--prompt=" + "a" * 7, "--max_new_tokens=1")
    with pytest.raises(UserError, match="prompt has 8 tokens, the model's context is 7; shorten it"):
        sampled(capsys, f"--out_dir={run_dir}", "--prompt=" + "a" * 8)


def test_a_prompt_file_that_is_no_text_is_refused(run_dir, capsys, tmp_path):
    (tmp_path / "bad").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read as UTF-8 text"):
        sampled(capsys, f"--out_dir={run_dir}", f"--prompt=FILE:{tmp_path / 'bad'}")
    with pytest.raises(UserError, match="No such file"):
        sampled(capsys, f"--out_dir={run_dir}", f"--prompt=FILE:{tmp_path / 'gone'}")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_told_not_drawn_from(model, logit, temperature):
    logits = torch.zeros(2, V)
    logits[1, 3] = logit
    drawn = draw(logits, GenerationConfig(temperature=temperature), numbers(2))
    assert drawn[0] >= 0 and drawn[1] == -1
    broken = copy.deepcopy(model)
    broken.head.weight.data[5] = logit
    with pytest.raises(UserError, match="not finite; take an earlier checkpoint"):
        tokens_of(broken, prompts(4), temperature=temperature)
    assert (tokens_of(broken, prompts(4), temperature=temperature, record=lambda step: step) == -1).all()


@pytest.mark.parametrize("precision, device, n_params, dtype", [
    ("auto", "cpu", 2**24 - 1, torch.float32),
    ("auto", "cpu", 2**24, torch.bfloat16 if pick_precision("auto", torch.device("cpu")) == "bf16" else torch.float32),
    ("bf16", "cpu", 1, torch.bfloat16),
    ("fp16", "cuda", 1, torch.float16),
])  # fmt: skip
def test_small_models_generate_in_float32_on_a_cpu_unless_told_otherwise(precision, device, n_params, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert generation_dtype(precision, torch.device(device), n_params) == dtype


@pytest.mark.parametrize(
    "args, told",
    [
        (["--temperature=-1"], "temperature is -1"),
        (["--top_p=0"], "top_p is 0"),
        (["--top_p=1.5"], "top_p is 1.5"),
        (["--min_p=0"], "min_p is 0"),
        (["--min_p=1.1"], "min_p is 1.1"),
        (["--top_k=0"], "top_k is 0"),
        (["--num_samples=0"], "num_samples is 0"),
        ([], "out_dir is none"),
        (["--out_dir=/nowhere"], "/nowhere does not exist"),
    ],
)
def test_impossible_requests_are_refused_by_name(args, told, capsys):
    with pytest.raises(UserError, match=told):
        sampled(capsys, *args)


def test_a_tiny_temperature_is_greedy():
    logits = torch.randn(5, 37, generator=torch.Generator().manual_seed(1))
    drawn = draw(logits, GenerationConfig(temperature=1e-40), numbers(5))
    assert torch.equal(drawn, logits.argmax(-1))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path, capsys):
    data = write_data(tmp_path / "data", tokenizer="byte")
    run_dir = run(data, tmp_path / "run", max_steps=1)
    with pytest.raises(UserError, match="has 261 ids, the model a vocab_size of 37"):
        sampled(capsys, f"--out_dir={run_dir}")


# ---- masked models

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "import", "os", "##path", "as", "a", ",", "numpy", "in", "for"]


@pytest.fixture(scope="module", params=["byte", "bpe", "wordpiece"])
def with_mask(request, tmp_path_factory):
    """A tokenizer that has a mask token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte":
        return BYTE
    if request.param == "bpe":
        train_bpe(["import os as o, for a in import os.path, import numpy as np"] * 5, 290, folder / "tokenizer.json")
        return load_tokenizer(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(VOCAB))
    return load_tokenizer(str(folder / "vocab.txt"))


@pytest.mark.parametrize("name", ["[MASK]", "<|mask|>"])
def test_a_prompt_is_framed_and_its_masks_are_special_under_both_names(with_mask, name):
    cls, sep, mask = (special_id(with_mask.specials, role) for role in ("cls", "sep", "mask"))

    def text(part):
        return with_mask.encode(part).tolist()

    before = text("import") if with_mask.space_begins_word else text("import ")
    assert masked_ids(with_mask, f"import {name} as a") == [cls, *before, mask, *text(" as a"), sep]
    assert masked_ids(with_mask, f"{name}os{name}{name},") == [cls, mask, *text("os"), mask, mask, *text(","), sep]
    assert masked_ids(with_mask, name) == [cls, mask, sep]
    assert masked_ids(with_mask, "os") == [cls, *text("os"), sep]
    assert masked_ids(with_mask, f"a\n{name} ") == [cls, *text("a\n"), mask, *text(" "), sep]


def test_the_space_before_a_mask_goes_into_the_word_of_bpe_and_stands_alone_in_bytes(with_mask):
    space = with_mask.encode("a ").tolist()[len(with_mask.encode("a")) :]
    assert with_mask.name == "byte" or space != [32]
    ids = masked_ids(with_mask, "a [MASK] [MASK]")
    between = ids[ids.index(special_id(with_mask.specials, "mask")) + 1 : -2]
    assert between == ([32] if with_mask.name == "byte" else [])


def masked_model(tokenizer, block_size=23):
    """A model of wide random weights with more ids than its tokenizer."""
    torch.manual_seed(5)
    model = Transformer(replace(SMALL, objective="mlm", vocab_size=tokenizer.vocab_size + 9, block_size=block_size))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model.eval()


def expected_candidates(model, tokenizer, prompt):
    """For each mask, (probability, token) of all that can stand there, likeliest first, from the whole logits."""
    ids = torch.tensor(masked_ids(tokenizer, prompt))
    with torch.no_grad():
        logits = model(ids[None])[0].double()
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.specials.values()]
    out = []
    for place in (ids == special_id(tokenizer.specials, "mask")).nonzero()[:, 0]:
        probs = logits[place, ordinary].exp() / logits[place, ordinary].exp().sum()
        out.append(sorted(((p.item(), i) for p, i in zip(probs, ordinary)), reverse=True))
    return ids.tolist(), out


@pytest.mark.parametrize("prompt", ["import [MASK] as a", "for [MASK] in a, [MASK]"])
@pytest.mark.parametrize("k", [1, 5])
def test_candidates_are_the_likeliest_of_the_models_own_softmax_without_special_tokens(with_mask, prompt, k, capsys):
    model = masked_model(with_mask)
    print_candidates(model, with_mask, prompt, k, "cpu")
    *lines, filled = capsys.readouterr().out.split("\n")[:-1]
    ids, expected = expected_candidates(model, with_mask, prompt)
    assert max(probs[0][0] for probs in expected) > 0.02  # so that what is printed differs
    for number, candidates in enumerate(expected, start=1):
        head, *rest = lines[: k + 1]
        lines = lines[k + 1 :]
        assert head == (f"[MASK] {number}" if len(expected) > 1 else "[MASK]")
        found = [re.fullmatch(r" +([0-9.]+)%  ('.*'|\".*\")", line).groups() for line in rest]
        assert [text for _, text in found] == [repr(with_mask.decode([token])) for _, token in candidates[:k]]
        percents = [float(percent) for percent, _ in found]
        assert percents == pytest.approx([100 * p for p, _ in candidates[:k]], abs=0.0501)
        assert percents == sorted(percents, reverse=True)
        ids[ids.index(special_id(with_mask.specials, "mask"))] = candidates[0][1]
    assert lines == [] and filled == with_mask.decode(ids[1:-1])


def test_more_candidates_than_there_are_tokens_are_not_asked_for(with_mask, capsys):
    print_candidates(masked_model(with_mask), with_mask, "[MASK]", 10_000, "cpu")
    assert capsys.readouterr().out.count("%  ") >= with_mask.vocab_size - len(with_mask.specials)


def test_a_masked_models_prompt_without_a_mask_or_too_long_is_refused_with_the_remedy(with_mask, capsys):
    for prompt in ("import os", "", "[mask] MASK"):
        with pytest.raises(UserError, match=r"fills in each \[MASK\]; write at least one, as in --prompt="):
            print_candidates(masked_model(with_mask), with_mask, prompt, 5, "cpu")
    print_candidates(masked_model(with_mask), with_mask, "[MASK]" * 21, 5, "cpu")
    with pytest.raises(UserError, match="prompt has 24 tokens, the model.s context is 23; shorten it"):
        print_candidates(masked_model(with_mask), with_mask, "[MASK]" * 22, 5, "cpu")


def test_a_trained_masked_run_is_sampled_from_its_folder_alone(tmp_path, capsys):
    ids = {name: 256 + i for i, name in enumerate(SPECIALS)}
    data = write_data(tmp_path / "data", vocab_size=261, specials=ids)
    run_dir = run(data, tmp_path / "run", vocab_size=None, objective="mlm", max_steps=3, log_interval=3)
    shutil.rmtree(data)
    capsys.readouterr()
    args = f"--out_dir={run_dir}", "--prompt=ab[MASK]d[MASK]"
    shown = re.fullmatch(r"\[MASK\] 1\n(( .*\n){5})\[MASK\] 2\n(( .*\n){5})(.*)\n", sampled(capsys, *args), re.DOTALL)
    likeliest = [ast.literal_eval(shown[i].split("%", 1)[1].split("\n")[0].strip()) for i in (1, 3)]
    assert shown[5] == f"ab{likeliest[0]}d{likeliest[1]}"
    assert sampled(capsys, *args, "--top_k=2", "--seed=7").count("%  ") == 4
    assert sampled(capsys, *args, "--precision=bf16").count("%  ") == 10
    with pytest.raises(UserError, match=r"each \[MASK\]; write at least one"):
        sampled(capsys, f"--out_dir={run_dir}")


def test_a_run_in_characters_goes_on_from_a_prompt_and_asks_for_one(tmp_path, capsys):
    data = write_data(tmp_path / "data", vocab_size=16)
    run_dir = run(data, tmp_path / "run", vocab_size=16, max_steps=3, log_interval=3)
    write_character_tokenizer("\nabcdefghijklmno", tmp_path / "run/tokenizer.json")
    (tmp_path / "run/meta.json").write_text('{"tokenizer": "tokenizer.json"}')
    capsys.readouterr()
    args = f"--out_dir={run_dir}", "--max_new_tokens=9", "--num_samples=2"
    first, second = sampled(capsys, *args, "--prompt=\nab").split("\n" + "-" * 40 + "\n")
    assert first.startswith("\nab") and second.startswith("\nab") and len(first) == len("\nab") + 9
    with pytest.raises(UserError, match="has no end-of-text token to start from; give a --prompt="):
        sampled(capsys, *args)
    with pytest.raises(UserError, match="knows only 16 characters, and the text has others: 'é'"):
        sampled(capsys, *args, "--prompt=aé")


def test_a_masked_model_refuses_the_settings_that_it_would_ignore(with_mask, monkeypatch):
    monkeypatch.setattr(sample, "model_location", lambda cfg: None)
    monkeypatch.setattr(sample, "load_model", lambda where, device: (masked_model(with_mask), config.ROOT))
    monkeypatch.setattr(sample, "load_tokenizer_of", lambda source: with_mask)
    args = ["--device=cpu", "--prompt=[MASK]"]
    sample.main(config.load(sample.Settings, args))
    for given, told in (
        (["--stop=a"], "stop"), (["--min_p=0.1", "--stop=a"], "stop and min_p"), (["--suffix=b"], "suffix")
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^{told}: a masked model fills each"):
            sample.main(config.load(sample.Settings, [*args, *given]))
