"""evaluate.py and training's tasks against lm-eval's own model (hf) on the export, on one rank and on several."""

import json
import math
import random
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import config
import evaluate
from config import UserError
from conftest import ROOT, slow
from interop.harness import HarnessConfig, generate_texts, generation_request, load_tasks, open_tasks
from interop.score import score_tokens
from ranks import on_ranks, records, run, settings, write_data
from test_harness import GENERATING, TASKS, TEXTS, instances, trained, write_tasks
from test_model import SMALL, random_model
from world import World, WorldConfig, init_world

NAMES = [*TASKS, *GENERATING]
ALONE = World(0, 1, torch.device("cpu"), "fp32")
PROMPTS = [" Rome", "The capital of Norway is", TEXTS[2], "a", "œuvre, naïve – 日本語 😀", "To be, or not", "R"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """(our model, its tokenizer, the export of the run beside it) with a context of 23 tokens."""
    return trained("gpt2", tmp_path_factory.mktemp("gpt2"))


def evaluated(run_dir, tasks, *args):
    """The line that evaluate.py adds to the run's evaluations.jsonl."""
    names = [f"--tasks={','.join(NAMES)}", f"--include_path={tasks}", "--device=cpu"]
    evaluate.main(config.load(evaluate.Settings, [f"--out_dir={run_dir}", *names, *args]))
    return json.loads((run_dir / "evaluations.jsonl").read_text().splitlines()[-1])


def figures(results):
    """{(task, metric): value} of lm-eval's results, without standard errors."""
    return {
        (task, metric): value
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "_stderr" not in metric
    }


def theirs(export, tasks, **options):
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(export), "device": "cpu"}, tasks=NAMES, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), **options,
    )  # fmt: skip
    return figures(found["results"])


@pytest.mark.parametrize("options", [*slow({}), {"num_fewshot": 2, "limit": 4}], ids=["whole", "few examples"])
def test_figures_are_those_of_lm_evals_own_model_on_the_export(gpt2, tasks, options, capsys):
    *_, export = gpt2
    args = [f"--{name}={value}" for name, value in options.items()]
    found = [evaluated(export.parent / "run", tasks, *args, f"--requests_per_batch={n}") for n in ("none", 1, 5)]
    printed, expected = capsys.readouterr().out, theirs(export, tasks, **options)
    assert {"acc,none", "acc_norm,none", "bits_per_byte,none", "chrf,none"} <= {metric for _, metric in expected}
    for record in found:
        assert figures(record["results"]) == pytest.approx(expected, rel=1e-6)
    assert found[0]["n-shot"]["capitals"] == options.get("num_fewshot", 0) and "step 1" in found[0]["model"]
    assert printed.count("bits_per_byte") == 3 and f"{expected['capitals', 'acc,none']:.4f}" in printed


@pytest.mark.parametrize("batch_size", [1, 5])
def test_generated_texts_are_those_of_lm_evals_own_model_whatever_the_batch(gpt2, batch_size):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, export = gpt2
    plain = {"until": [], "max_gen_toks": 9, "do_sample": False}
    harness = HFLM(pretrained=str(export), device="cpu", batch_size=1)
    pairs = [(prompt, plain) for prompt in PROMPTS]
    free = harness.generate_until(instances("generate_until", pairs), disable_tqdm=True)
    inside = [re.search(r"[^\ufffd]{2}", text[2:]) for text in free[:5]]  # two whole letters that the model writes
    until = [found[0] for found in inside if found] + ["zz"]
    pairs += [(prompt, {"until": until, "max_gen_toks": n}) for prompt in PROMPTS for n in (3, 12)]
    expected = harness.generate_until(instances("generate_until", pairs), disable_tqdm=True)
    requests = [generation_request(model, tokenizer, *pair) for pair in pairs]
    assert len({len(ids) for ids, *_ in requests}) > 4 and max(len(ids) for ids, *_ in requests) == 20
    assert generate_texts(model, tokenizer, requests, ALONE, batch_size) == expected
    assert len(until) > 3 and len({len(text) for text in expected}) > 5 and len(set(expected)) > 9


def test_texts_drawn_at_a_temperature_follow_from_the_seed_and_differ(gpt2):
    model, tokenizer, _ = gpt2
    request = generation_request(model, tokenizer, "a", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 9})
    first, again, other = (generate_texts(model, tokenizer, [request] * 3, ALONE, 2, seed) for seed in (1, 1, 2))
    assert first == again != other and len(set(first)) == 3


def test_generation_that_cannot_be_done_is_refused_not_changed(gpt2):
    model, tokenizer, _ = gpt2
    with pytest.raises(UserError, match="asks generation for num_beams, which is not here; run it by lm_eval on"):
        generation_request(model, tokenizer, "a", {"num_beams": 3})
    with pytest.raises(UserError, match="generates up to 23 tokens, and the model's context is 23; lower max_gen_toks"):
        generation_request(model, tokenizer, "a", {"max_gen_toks": 23})


def test_the_pages_recipe_for_beam_search_runs_on_an_export(gpt2):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    [recipe] = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    names = {}
    exec(recipe.replace("out/quickstart_hf", str(gpt2[2])).replace("max_new_tokens=64", "max_new_tokens=5"), names)
    assert names["beams"].shape[1] == names["inputs"]["input_ids"].shape[1] + 5


# ---- several ranks

REQUESTS = [
    ([i, 1], [2, (3 * i) % 37, 5][: 1 + i % 3]) for i in range(9)
]  # five batches, so that one fills the last turn
LAYOUTS = {"ddp": {}, "fsdp": {"strategy": "fsdp"}, "tp": {"tp": 2}}
EVEN = {"n_head": 2, "seq_len": 8, "micro_batch_size": 2, "batch_tokens": 64, "max_steps": 3}


def figures_in(folder, run_dir, tasks):
    args = [f"--output={folder}/ranks.jsonl", f"--tasks={','.join(NAMES)}", f"--include_path={tasks}", "--device=cpu"]
    evaluate.main(config.load(evaluate.Settings, [f"--out_dir={run_dir}", "--text=ROMEO", *args]))


def scores_by_rank(requests):
    """This rank's scores; it gets the same errors where rank 1 alone is broken."""
    with init_world(WorldConfig(device="cpu", precision="fp32")) as world:
        model = random_model(replace(SMALL, vocab_size=37)).eval()
        scores = score_tokens(model, requests, world, batch_size=2)
        if world.rank == 1:
            model.wpe.weight.data.fill_(math.nan)
        with pytest.raises(UserError, match="not finite"):
            score_tokens(model, requests, world, batch_size=2)
        model.wte = None if world.rank == 1 else model.wte
        with pytest.raises((TypeError, AttributeError), match="NoneType"):
            score_tokens(model, requests, world, batch_size=2)
        return scores


def run_in(data_dir, folder, changes):
    return run(data_dir, folder, **changes)


@pytest.fixture(scope="module")
def two_ranks(gpt2, tasks, data_dir, tmp_path_factory):
    """(the folder of what two ranks wrote, the scores that each returned)."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = [(run_in, data_dir, folder / name, asked(tasks, **EVEN, **layout)) for name, layout in LAYOUTS.items()]
    _, scores, *_ = on_ranks(2, (figures_in, folder, gpt2[2].parent / "run", tasks), (scores_by_rank, REQUESTS), *cases)
    return folder, scores


def check_figures(folder, run_dir, tasks):
    [line] = (folder / "ranks.jsonl").read_text().splitlines()
    assert json.loads(line)["results"] == evaluated(run_dir, tasks)["results"]


@pytest.mark.slow
def test_figures_on_two_ranks_are_those_of_one_to_the_bit(two_ranks, gpt2, tasks):
    check_figures(two_ranks[0], gpt2[2].parent / "run", tasks)


@pytest.mark.slow
def test_figures_on_four_ranks_are_those_of_one_to_the_bit(gpt2, tasks, tmp_path):
    on_ranks(4, (figures_in, tmp_path, gpt2[2].parent / "run", tasks))
    check_figures(tmp_path, gpt2[2].parent / "run", tasks)


@pytest.mark.slow
def test_ranks_share_batches_and_each_gets_all_scores_and_all_errors(two_ranks):
    alone = score_tokens(random_model(replace(SMALL, vocab_size=37)).eval(), REQUESTS, batch_size=2)
    assert two_ranks[1] == [alone, alone] and len({score.log_likelihood for score in alone}) == 9


@pytest.mark.slow
def test_ddp_fsdp_and_tp_log_the_figures_of_one_process(two_ranks, tasks, data_dir, tmp_path):
    alone = run(data_dir, tmp_path / "alone", **asked(tasks, **EVEN))
    for name in LAYOUTS:
        for figure in ("texts/bits_per_byte", "texts/byte_perplexity"):
            expected = records(alone, figure)
            assert records(two_ranks[0] / name, figure) == pytest.approx(expected, rel=1e-5) and len(expected) == 2
        assert records(two_ranks[0] / name, "capitals/acc")[0] == records(alone, "capitals/acc")[0]


# ---- mistakes


def test_a_task_whose_data_cannot_be_loaded_is_one_line(tmp_path):
    task = (
        TASKS["texts"]
        .replace("NAME", "lost")
        .replace("FOLDER", "/nowhere")
        .replace("cache_dir: /nowhere", f"cache_dir: {tmp_path}")
    )
    (tmp_path / "lost.yaml").write_text(task)
    told = r"^task lost cannot be loaded \(\w+: .*\); check its .yaml or, without a network, load it once where there is one"
    with pytest.raises(UserError, match=told) as error:
        load_tasks(HarnessConfig(tasks=("lost",), include_path=str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.slow  # reading lm-eval's own tasks takes ten seconds
def test_a_task_whose_file_is_broken_is_told_as_that(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"{TASKS['texts'].replace('NAME', 'broken')}\n  - [")
    with pytest.raises(UserError, match="^task broken is in .*mine.yaml, which lm-eval cannot read; check that") as error:
        load_tasks(HarnessConfig(tasks=("broken",), include_path=str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.slow  # reading lm-eval's own tasks takes ten seconds
def test_a_task_that_lm_eval_does_not_know_or_cannot_fetch_is_one_line(tasks, calls):
    for name, told in (
        ("lambada_openia", "is unknown to lm-eval; did you mean lambada_openai.*; --include_path= names a folder"),
        ("qqzzqqzz", "is unknown to lm-eval; lm_eval ls tasks lists all"),
        ("lambada_openai", r"cannot be loaded \(\w+: .*\); check its .yaml or, without a network, load it once"),
    ):
        with pytest.raises(UserError, match=f"^task {name} {told}") as error:
            load_tasks(HarnessConfig(tasks=("texts", name), include_path=str(tasks)))
        assert "\n" not in str(error.value)


def test_without_lm_eval_a_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match="^tasks need lm-eval; install it with: pip install lm-eval$"):
        load_tasks(HarnessConfig(tasks=("hellaswag",)))


def test_a_folder_of_tasks_that_is_none_and_a_limit_of_0_are_refused():
    with pytest.raises(UserError, match="include_path /nowhere is no folder; name one"):
        load_tasks(HarnessConfig(tasks=("hellaswag",), include_path="/nowhere"))
    with pytest.raises(UserError, match="limit is 0.0; it must be above 0, or none"):
        config.load(evaluate.Settings, ["--limit=0"])


@pytest.mark.slow
def test_a_pattern_names_all_tasks_that_match(tasks):
    loaded = load_tasks(HarnessConfig(tasks=("capital[s]", "texts"), include_path=str(tasks)))
    assert [*loaded["tasks"]] == ["capitals", "texts"]


# ---- in training


def asked(folder, **more):
    names = {"tasks": "capitals,texts", "include_path": folder, "tasks_interval": 3, "limit": 3, "vocab_size": None}
    return names | {"max_steps": 5, "save_interval": 5} | more


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), vocab_size=261)


def test_training_is_the_same_with_tasks_and_logs_their_figures(tasks, data_dir, tmp_path, capsys, no_curves):
    random.seed(5)
    np.random.seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist()
    with_tasks = run(data_dir, tmp_path / "with", **asked(tasks, dropout=0.1))
    assert states == (random.getstate(), np.random.get_state()[1].tolist())
    printed = capsys.readouterr().out
    without = run(data_dir, tmp_path / "without", vocab_size=None, max_steps=5, dropout=0.1)
    assert records(with_tasks) == records(without)
    logged = {
        name: records(with_tasks, name) for name in ("capitals/acc", "texts/bits_per_byte", "texts/byte_perplexity")
    }
    assert all([*by_step] == [0, 3, 5] for by_step in logged.values())
    last = logged["texts/bits_per_byte"][5]
    assert last != logged["texts/bits_per_byte"][3] and f"texts/bits_per_byte {last:.4f}" in printed
    args = [f"--out_dir={with_tasks}", "--tasks=capitals,texts", f"--include_path={tasks}", "--limit=3", "--device=cpu"]
    evaluate.main(config.load(evaluate.Settings, args))
    found = figures(json.loads((with_tasks / "evaluations.jsonl").read_text())["results"])
    for name, by_step in logged.items():
        task, metric = name.split("/")
        assert found[task, f"{metric},none"] == pytest.approx(by_step[5], rel=1e-6)


def test_a_task_that_fails_in_training_is_told_and_the_run_goes_on(
    tasks, data_dir, tmp_path, capsys, monkeypatch
):
    def fail(*args, **options):
        raise ZeroDivisionError("no\ndocuments")

    monkeypatch.setattr("lm_eval.evaluator.evaluate", fail)
    out_dir = run(data_dir, tmp_path / "run", **asked(tasks))
    told = "warning: evaluation by tasks failed (ZeroDivisionError: no); the run goes on without"
    assert capsys.readouterr().err.count(told) == 3
    assert (out_dir / "finished").exists() and records(out_dir, "val_loss").keys() == {0, 3, 5}


@pytest.mark.parametrize("changes, told", [
    ({"include_path": "/nowhere"}, "include_path /nowhere is no folder"),
    ({"tasks": "answers"}, "task answers generates text, which training does not; leave it to evaluate.py"),
    ({"objective": "mlm"}, "a masked model has no log-likelihood"),
])  # fmt: skip
def test_training_refuses_a_wrong_task_before_it_begins(changes, told, tasks, data_dir, tmp_path):
    cfg = settings(data_dir, tmp_path / "run", **asked(tasks, vocab_size=261) | changes)
    with pytest.raises(UserError, match=told):
        open_tasks(cfg, ALONE)
