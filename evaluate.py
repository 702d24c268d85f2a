"""Evaluates a model: by tasks of EleutherAI's harness (lm-eval), or by the log-likelihoods of texts.

python evaluate.py --out_dir=out/quickstart --tasks=lambada_openai,hellaswag
torchrun --nproc_per_node=8 evaluate.py --out_dir=out/gpt2_124m --tasks=mmlu --num_fewshot=5
python evaluate.py --out_dir=out/quickstart --text="import os"
python evaluate.py --out_dir=out/quickstart --text=FILE:texts.jsonl
"""

import functools
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch

from config import Config, UserError, only, run_script
from interop.harness import MASKED, HarnessConfig, generate_texts, harness_seeds, led_by_main, load_tasks, run_tasks
from interop.pretrained import RunModel, load_model, load_tokenizer_of, model_location
from interop.score import loglikelihood, loglikelihood_rolling, score_tokens, start_of, total
from run.folder import RunConfig
from shards import refusing_system_errors
from text.examples import json_objects
from text.files import read_text
from world import WorldConfig, init_world


@dataclass(frozen=True)
class EvaluateConfig(Config):
    text: str = ""  # text to score; FILE:path reads a file, - reads stdin, FILE:x.jsonl scores each line's
    output: str | None = None  # file that gets the tasks' results, a line of JSON; none: evaluations.jsonl of the run


@dataclass(frozen=True)
class Settings:
    evaluate: EvaluateConfig
    harness: HarnessConfig = only("tasks", "num_fewshot", "limit", "include_path", "fewshot_seed", "requests_per_batch")
    run: RunConfig = only("out_dir", "init_from")
    world: WorldConfig = only("device", "precision", "timeout_minutes")
    presets: tuple = ()


def main(cfg):
    if not (cfg.harness.tasks or cfg.evaluate.text):
        raise UserError("there is nothing to evaluate; give --tasks=lambada_openai or --text=, a text or FILE:x.jsonl")
    precision = "fp32" if cfg.world.precision == "auto" else cfg.world.precision
    with init_world(replace(cfg.world, precision=precision)) as world:
        model, source = load_model(model_location(cfg), world.device, world)
        if not model.cfg.is_causal:
            raise UserError(MASKED)
        model.to(world.dtype)  # as lm-eval's own models are
        tokenizer = load_tokenizer_of(source)
        if world.is_main:
            where = f"{world.size} x {world.device.type} in {world.precision}"
            print(f"{source.name}, {model.num_params():,} parameters on {where}", file=sys.stderr)
        options = {"world": world, "batch_size": cfg.harness.requests_per_batch}
        functions = {
            "score": functools.partial(score_tokens, model, **options),
            "generate": functools.partial(generate_texts, model, tokenizer, seed=cfg.harness.fewshot_seed, **options),
        }

        def lead(call):
            if cfg.evaluate.text:
                score = functools.partial(call, "score")
                print_scores(model, tokenizer, read_requests(cfg.evaluate.text), score)
            if cfg.harness.tasks:
                os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's resampling would fork a process that holds a GPU
                with harness_seeds():
                    tasks = load_tasks(cfg.harness)
                    results = run_tasks(tasks, cfg.harness, model, tokenizer, call, bootstrap_iters=1000)
                report_results(cfg, source, world, results)

        led_by_main(world, functions, lead)


# ---- tasks


def report_results(cfg, source, world, results):
    """Prints lm-eval's tables of results, and appends them as a line to the file of output, or of the run."""
    import lm_eval
    from lm_eval.utils import handle_non_serializable, make_table

    for kind in ("results", "groups"):
        if results.get(kind):
            print(make_table(results, kind))
    path = cfg.evaluate.output or (source.folder / "evaluations.jsonl" if isinstance(source, RunModel) else None)
    if path is None:
        return
    names = ("results", "groups", "n-shot", "n-samples", "higher_is_better")
    record = {
        "model": source.name,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "settings": asdict(cfg.harness) | {"precision": world.precision},
        "versions": {"lm_eval": lm_eval.__version__, "torch": torch.__version__, "tasks": results["versions"]},
        **{name: results[name] for name in names if name in results},
    }
    remedy = "use another --output, or make room and repeat the command"
    with refusing_system_errors(f"{path} cannot be written to", remedy), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, default=handle_non_serializable) + "\n")
    print(f"results are in {path}", file=sys.stderr)


# ---- texts


def read_requests(setting):
    """[(context, continuation)] of the text that --text names; the context is None for a text to score whole.

    FILE:x.jsonl has an object a line, {"text": ...} or {"context": ..., "continuation": ...}; any other is one text.
    """
    text = read_text(setting, "text")
    if not (setting.startswith("FILE:") and setting.endswith(".jsonl")):
        return [(None, text)]
    requests = [_request(*found) for found in json_objects(text.removeprefix("\ufeff"), setting[5:])]
    if not requests:
        raise UserError(f'{setting[5:]} has no texts; write one a line, as in {{"text": "import os"}}')
    return requests


def _request(fields, place):
    """An object's (context, continuation); place: file and line, for errors."""
    shape = 'write {"text": ...} or {"context": ..., "continuation": ...}, with strings, on a line of its own'
    names = {"text", "context", "continuation"} & fields.keys()
    if names not in ({"text"}, {"context", "continuation"}) or not all(isinstance(fields[name], str) for name in names):
        raise UserError(f"{place} is neither a text nor a context with its continuation; {shape}")
    continuation = fields.get("continuation", fields.get("text"))
    if not continuation:
        raise UserError(f"{place} has an empty text; leave the line out")
    return fields.get("context"), continuation


def print_scores(model, tokenizer, requests, score=None):
    """Scores what read_requests returns and prints a line for each, then their sum.

    Perplexity is per token. Bits per byte, for whole texts, do not depend on the tokenizer. Greedy tells whether the
    model, always taking the likeliest token, would write the continuation.
    """
    whole, pairs = [text for context, text in requests if context is None], [r for r in requests if r[0] is not None]
    whole_scores = loglikelihood_rolling(model, tokenizer, whole, score)
    pair_scores = loglikelihood(model, tokenizer, pairs, score)
    print(f"{'log_likelihood':>16} {'tokens':>9} {'perplexity':>11} {'bits/byte':>10} {'greedy':>9}  text")
    whole_left, pairs_left = iter(whole_scores), iter(pair_scores)
    for context, text in requests:
        found = next(whole_left if context is None else pairs_left)
        greedy = "-" if context is None else "yes" if found.is_greedy else "no"
        _print_row(found, start_of(text), [text] if context is None else [], greedy)
    greedy = f"{sum(score.is_greedy for score in pair_scores)}/{len(pairs)}" if pairs else "-"
    _print_row(total(whole_scores + pair_scores), f"sum of {len(requests)}", [] if pairs else whole, greedy)


def _print_row(score, label, texts, greedy):
    """Prints a line of the table; texts: the whole texts that were scored, whose bytes count."""
    nats, n_bytes = -score.log_likelihood / score.n_tokens, sum(len(text.encode(errors="replace")) for text in texts)
    perplexity = math.exp(nats) if nats < 700 else math.inf
    bits = f"{-score.log_likelihood / math.log(2) / n_bytes:.4f}" if n_bytes else "-"
    print(f"{score.log_likelihood:>16.4f} {score.n_tokens:>9} {perplexity:>11.5g} {bits:>10} {greedy:>9}  {label}")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
