"""EleutherAI's evaluation harness on exported models, and score.py beside it."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import config
import sample
from checkpoint import CheckpointConfig, CheckpointWriter
from convert import export
from hugging_face import saved
from interop.pretrained import load_model, load_tokenizer_of, open_model
from interop.score import loglikelihood, loglikelihood_rolling, score_tokens
from run.folder import tokenizer_of
from test_model import MODERN, SMALL, random_model
from text.tokenizer import load_tokenizer, train_bpe
from world import World

KINDS = {"gpt2": SMALL, "llama": replace(MODERN, qk_norm=False, n_embd=24), "qwen3": MODERN}
TEXTS = ["a", "ROMEO: what light?\n\n", "To be, or not to be: that is the question. " * 5, "œuvre, naïve – 日本語 😀"]
TEXTS += ["<|endoftext|>x", "a <|mask|> b"]
PAIRS = [
    ("The capital of France is", " Paris"), ("The capital of France is ", "Paris"), ("", "Paris is"), ("x \n\t ", " y"),
    ("not to b", "e or not"), ("To be, or not to be: that is the question. " * 5, "To be"), ("日本", "語 😀"),
    ("", "<|endoftext|>"), ("<|endoftext|>", "x"),
]  # fmt: skip


# Tasks of the two kinds, in words that the harness knows; FOLDER stands for theirs.
TASK = """
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/NAME.jsonl}, cache_dir: FOLDER/cache}
test_split: test
task: NAME
"""
TASKS = {
    "capitals": TASK + """
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "texts": TASK + """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
}
GENERATING = {
    "answers": TASK + """
output_type: generate_until
doc_to_text: question
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 9}
metric_list: [{metric: chrf}]
""",
}
CITIES = {"France": "Paris", "Italy": "Rome", "Norway": "Oslo", "Japan": "Tokyo", "Peru": "Lima"}
DOCUMENTS = {
    "capitals": [
        {"question": f"The capital of {country} is", "choices": list(CITIES.values()), "label": i}
        for i, country in enumerate(CITIES)
    ],
    "texts": [{"text": text} for text in TEXTS],
}
DOCUMENTS["answers"] = DOCUMENTS["capitals"]


def write_tasks(folder):
    for name, task in (TASKS | GENERATING).items():
        (folder / f"{name}.yaml").write_text(task.replace("FOLDER", str(folder)).replace("NAME", name))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS[name]))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The folder of three tasks made here: their .yaml and their data."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(our model, its tokenizer, the folder it is exported to) of a run of random weights."""
    return trained(request.param, tmp_path_factory.mktemp(request.param))


def trained(kind, folder):
    (run_dir := folder / "run").mkdir()
    train_bpe([*TEXTS, *(f"The capital of {country} is {city}. " for country, city in CITIES.items())] * 2, 340,
              run_dir / "tokenizer.json")  # fmt: skip
    (run_dir / "meta.json").write_text(json.dumps({"tokenizer": "tokenizer.json"}))
    tokenizer = load_tokenizer(tokenizer_of(run_dir))
    model = random_model(replace(KINDS[kind], vocab_size=tokenizer.vocab_size, block_size=23)).eval()
    writer = CheckpointWriter(run_dir, CheckpointConfig(), World(0, 1, torch.device("cpu"), "fp32"))
    writer.save(1, model, None, {})
    writer.wait()
    export(open_model(str(run_dir)), folder / "hf")
    return model, tokenizer, folder / "hf"


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_the_harness(pair, batch_size):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, folder = pair
    harness = HFLM(pretrained=str(folder), device="cpu", batch_size=batch_size)
    assert harness.max_length == 23 and len(tokenizer.encode(TEXTS[2])) > 46, "several windows"
    assert [harness.tok_encode(text) for text in TEXTS] == [tokenizer.encode(text).tolist() for text in TEXTS]
    ours = loglikelihood(model, tokenizer, PAIRS)
    theirs = harness.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    assert [s.log_likelihood for s in ours] == pytest.approx([value for value, _ in theirs], rel=1e-6, abs=1e-4)
    assert [s.is_greedy for s in ours] == [greedy for _, greedy in theirs]
    ours = loglikelihood_rolling(model, tokenizer, TEXTS)
    theirs = harness.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in TEXTS]), disable_tqdm=True)
    assert [s.log_likelihood for s in ours] == pytest.approx(theirs, rel=1e-6, abs=1e-4)


BEGINS = {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(our model, its tokenizer, the folder) of a Llama of transformers whose tokenizer puts a token before each text."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("begun")
    train_bpe(TEXTS * 2, 300, folder / "bpe.json")
    theirs = Tokenizer.from_file(str(folder / "bpe.json"))
    theirs.add_special_tokens(["<|begin|>"])
    begin = theirs.token_to_id("<|begin|>")
    theirs.post_processor = processors.Sequence([
        processors.ByteLevel(),
        processors.TemplateProcessing(single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", begin)]),
    ])  # fmt: skip
    saved("llama", folder / "hf", vocab_size=340)
    PreTrainedTokenizerFast(tokenizer_object=theirs, split_special_tokens=True, **BEGINS).save_pretrained(folder / "hf")
    model, source = load_model(str(folder / "hf"), "cpu")
    return model, load_tokenizer_of(source), folder / "hf"


def test_scores_are_those_of_the_harness_where_a_token_begins_each_text(begun):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, folder = begun
    assert len(tokenizer.begin) == 1 and tokenizer.before_text == tokenizer.begin[0] != tokenizer.eot
    harness = HFLM(pretrained=str(folder), device="cpu", batch_size=3)
    pairs = [pair for pair in PAIRS if pair[0].strip() or not pair[0]]  # of blanks alone the harness makes nothing
    ours = loglikelihood(model, tokenizer, pairs)
    theirs = harness.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert [s.log_likelihood for s in ours] == pytest.approx([value for value, _ in theirs], rel=1e-6, abs=1e-4)
    ours = loglikelihood_rolling(model, tokenizer, TEXTS)
    theirs = harness.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in TEXTS]), disable_tqdm=True)
    assert [s.log_likelihood for s in ours] == pytest.approx(theirs, rel=1e-6, abs=1e-4)


def test_samples_are_those_of_transformers_where_a_token_begins_each_text(begun, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, tokenizer, folder = begun
    arguments = [f"--init_from={folder}", "--prompt=ROMEO: what", "--temperature=0", "--max_new_tokens=9", "--device=cpu"]
    sample.main(config.load(sample.Settings, arguments))
    ids = AutoTokenizer.from_pretrained(folder)("ROMEO: what", return_tensors="pt")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    never = [id_ for id_ in tokenizer.specials.values() if id_ != tokenizer.eot]  # sample.py writes text alone,
    never += range(tokenizer.vocab_size, theirs.config.vocab_size)  # in ids that its tokenizer knows
    out = theirs.generate(**ids, do_sample=False, max_new_tokens=9, suppress_tokens=never)[0].tolist()
    assert out[0] == tokenizer.begin[0] and tokenizer.eot not in out
    assert capsys.readouterr().out == tokenizer.decode(out[1:]) + "\n"


def test_scores_of_ids_are_those_of_the_harness_greedy_or_not(pair):
    from lm_eval.models.huggingface import HFLM

    model, _, folder = pair
    harness = HFLM(pretrained=str(folder), device="cpu", batch_size=3)
    generator, requests = torch.Generator().manual_seed(1), []
    for context, continuation in [(1, 1), (1, 23), (4, 20), (5, 19), (30, 2), (2, 5), (7, 1), (23, 1)]:
        ids = torch.randint(model.cfg.vocab_size, (context,), generator=generator).tolist()
        likeliest = list(ids)
        for _ in range(continuation):
            likeliest.append(model(torch.tensor([likeliest[-23:]]))[0, -1].argmax().item())
        other = torch.randint(model.cfg.vocab_size, (continuation,), generator=generator).tolist()
        if context + continuation <= 24:  # or the context that is cut off would have changed what is likeliest
            requests.append((ids, likeliest[context:]))
            requests.append((ids, likeliest[context:-1] + [(likeliest[-1] + 1) % model.cfg.vocab_size]))
        requests.append((ids, other))
    ours = score_tokens(model, requests)
    theirs = harness._loglikelihood_tokens([(("", ""), *request) for request in requests], disable_tqdm=True)
    assert [s.log_likelihood for s in ours] == pytest.approx([value for value, _ in theirs], rel=1e-6, abs=1e-4)
    assert [s.is_greedy for s in ours] == [greedy for _, greedy in theirs]
    assert sum(s.is_greedy for s in ours) == 7


def expected(model, tokenizer):
    """What the tasks' metrics are by our scores, and the log-likelihoods of each document's requests."""
    documents = DOCUMENTS["capitals"]
    pairs = [(document["question"], f" {choice}") for document in documents for choice in document["choices"]]
    # The harness puts a space between, which does not count in a choice's length.
    by_choice = torch.tensor([s.log_likelihood for s in loglikelihood(model, tokenizer, pairs)]).view(len(CITIES), -1)
    lengths = torch.tensor([len(choice) - 1 for _, choice in pairs]).view(len(CITIES), -1)
    labels = torch.tensor([document["label"] for document in documents])
    texts = [s.log_likelihood for s in loglikelihood_rolling(model, tokenizer, TEXTS)]
    bits = -sum(texts) / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    metrics = {
        "capitals": {
            "acc,none": (by_choice.argmax(1) == labels).double().mean().item(),
            "acc_norm,none": ((by_choice / lengths).argmax(1) == labels).double().mean().item(),
        },
        "texts": {"bits_per_byte,none": bits, "byte_perplexity,none": 2**bits},
    }
    return metrics, {"capitals": by_choice.tolist(), "texts": [[value] for value in texts]}


def test_the_harness_runs_its_two_kinds_of_task_on_an_export_and_finds_our_scores(pair, tasks, calls):
    import lm_eval
    from lm_eval.tasks import TaskManager

    model, tokenizer, folder = pair
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(folder), "device": "cpu"}, tasks=list(TASKS), log_samples=True,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    metrics, values = expected(model, tokenizer)
    for name in TASKS:
        assert {metric: found["results"][name][metric] for metric in metrics[name]} == pytest.approx(metrics[name])
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        theirs = [[r[0][0] if name == "capitals" else r[0] for r in sample["resps"]] for sample in samples]
        for ours, row in zip(values[name], theirs, strict=True):
            assert row == pytest.approx(ours, rel=1e-6, abs=1e-4)
    assert calls == []


@pytest.mark.slow
def test_the_readmes_command_of_the_harness_runs_offline(tasks, tmp_path):
    model, tokenizer, folder = trained("gpt2", tmp_path)
    command = f"--model hf --model_args pretrained={folder} --include_path {tasks} --tasks {','.join(TASKS)}"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    lm_eval = [str(Path(sys.executable).with_name("lm_eval")), *command.split(), "--device", "cpu"]
    done = subprocess.run(lm_eval, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    printed = {m: float(v) for m, v in re.findall(r"\|(\w+) *\|[↑↓] *\| *([0-9.]+)\|", done.stdout)}
    metrics, _ = expected(model, tokenizer)
    ours = {name.removesuffix(",none"): value for task in metrics.values() for name, value in task.items()}
    assert printed == pytest.approx(ours, abs=1e-4)
