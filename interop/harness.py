"""EleutherAI's evaluation harness (lm-eval) on our models: rank 0 runs its tasks, all ranks compute what they ask."""

import contextlib
import difflib
import functools
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import Config, Count, Positive, UserError, Whole
from console import report
from foreign import telling
from generation import GenerationConfig, UntilStop, generate
from interop.pretrained import check_ids
from interop.score import before_text, loglikelihood, loglikelihood_rolling, over_ranks, score_tokens, trained_context
from run.folder import tokenizer_of
from text.tokenizer import load_tokenizer

MASKED = "a masked model has no log-likelihood of a text; evaluate a model of --objective=clm"


@dataclass(frozen=True)
class HarnessConfig(Config):
    tasks: tuple = ()  # tasks of lm-eval, by name, group or pattern, as in lambada_openai,hellaswag,blimp_*
    tasks_interval: Count = 1000  # in training, steps between two evaluations by tasks; the last is at the end
    num_fewshot: Whole | None = None  # examples before each question; none: the task's own number
    limit: Positive | None = None  # documents of each task, or below 1 a share of them; none: all
    include_path: str | None = None  # folder with tasks of your own, .yaml files of lm-eval's format
    fewshot_seed: Whole = 1234  # seed that draws the examples, and what a task generates at a temperature
    requests_per_batch: Count | None = None  # requests in a forward pass; none: 8,192 tokens, or 256 MiB of logits


def load_tasks(cfg, in_training=False):
    """The tasks and groups of a HarnessConfig, with their data, for lm-eval's evaluate.

    UserError where lm-eval is absent, does not know a task, or cannot load it.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("tasks need lm-eval; install it with: pip install lm-eval") from error
    if cfg.include_path and not Path(cfg.include_path).is_dir():
        raise UserError(f"include_path {cfg.include_path} is no folder; name one with tasks' .yaml files")
    manager, loaded = TaskManager(include_path=cfg.include_path, include_defaults=False), {"tasks": {}, "groups": {}}
    if not {*cfg.tasks} <= {*manager.all_subtasks}:  # reading lm-eval's own, too, takes ten seconds
        manager = TaskManager(include_path=cfg.include_path)
    for name in cfg.tasks:
        if not (names := manager.match_tasks([name])):
            near = difflib.get_close_matches(name, manager.all_tasks, 3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists all"
            for path in Path(cfg.include_path or os.devnull).rglob("*.y*ml"):
                if re.search(rf"^(task|group): *{re.escape(name)} *$", path.read_text(errors="replace"), re.MULTILINE):
                    raise UserError(f"task {name} is in {path}, which lm-eval cannot read; check that it is valid YAML")
            raise UserError(f"task {name} is unknown to lm-eval; {hint}; --include_path= names a folder of your own")
        remedy = "check its .yaml or, without a network, load it once where there is one, and copy its HF_HOME"
        with telling(lambda reason: f"task {name} cannot be loaded ({reason}); {remedy}"):
            found = manager.load(names)  # a task may run any code, and its data is anywhere
        for kind, items in loaded.items():
            items |= found[kind]
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "sees more than text" if getattr(task, "MULTIMODAL", False) else "runs code that the model writes"
            raise UserError(f"task {name} {what}; run it by lm_eval on an export (convert.py --to_hf)")
        if in_training and task.OUTPUT_TYPE == "generate_until":
            raise UserError(f"task {name} generates text, which training does not; leave it to evaluate.py")
        own = task.get_config("num_fewshot")  # lm-eval keeps a 0 that the task itself sets
        task.set_config("num_fewshot", own or 0 if cfg.num_fewshot is None or own == 0 else cfg.num_fewshot)
    return loaded


@contextlib.contextmanager
def harness_seeds():
    """A context in which Python's and numpy's random numbers begin as lm-eval's command lets them; then, as before."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def run_tasks(tasks, cfg, model, tokenizer, call, **options):
    """lm-eval's results of a model for loaded tasks. call: what led_by_main gives; options: of lm-eval's evaluate."""
    import lm_eval.api.task
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate

    class Model(LM):
        """The model as lm-eval sees it: texts go in, log-likelihoods and texts come out."""

        def loglikelihood(self, requests):
            pairs, score = [request.args for request in requests], functools.partial(call, "score")
            return [(s.log_likelihood, s.is_greedy) for s in loglikelihood(model, tokenizer, pairs, score)]

        def loglikelihood_rolling(self, requests):
            texts, score = [request.args[0] for request in requests], functools.partial(call, "score")
            return [s.log_likelihood for s in loglikelihood_rolling(model, tokenizer, texts, score)]

        def generate_until(self, requests):
            asked = [(*request.args, f"task {request.task_name}") for request in requests]
            return call("generate", [generation_request(model, tokenizer, *request) for request in asked])

    for task in tasks["tasks"].values():
        task.set_fewshot_seed(cfg.fewshot_seed)
    lm_eval.api.task.tqdm = lambda documents, **_: documents  # its bar would stand among a run's lines
    return evaluate(Model(), tasks, limit=cfg.limit, log_samples=False, **options)


def generation_request(model, tokenizer, context, settings, name="a task"):
    """(a context's ids, stop strings, GenerationConfig) of a request of lm-eval; the ids leave room for the new ones.

    name: who asks, for errors.
    """
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    settings = normalize_gen_kwargs(settings, default_max_gen_toks=256)
    eot = None if tokenizer.eot is None else tokenizer.decode([tokenizer.eot])
    until = handle_stop_sequences(settings.pop("until", None), eot)
    n_new, draws = settings.pop("max_gen_toks"), settings.pop("do_sample")
    if unknown := settings.keys() - {"temperature", "top_k", "top_p", "min_p"}:
        what = f"{name} asks generation for {', '.join(sorted(unknown))}, which is not here"
        raise UserError(f"{what}; run it by lm_eval on an export (convert.py --to_hf)")
    if (room := trained_context(model) - n_new) < 1:
        what = f"{name} generates up to {n_new} tokens, and the model's context is {trained_context(model)}"
        raise UserError(f"{what}; lower max_gen_toks in a copy of the task, and name its folder by --include_path=")
    ids = [*tokenizer.begin, *tokenizer.encode(context).tolist()][-room:] or [before_text(tokenizer)]
    settings = settings if draws else {"temperature": 0.0}
    return ids, [stop for stop in until if stop], GenerationConfig(max_new_tokens=n_new, **settings)


def generate_texts(model, tokenizer, requests, world, batch_size=None, seed=0):
    """The text that follows each of generation_request's contexts, up to a stop string, end-of-text or last token."""
    order = sorted(range(len(requests)), key=lambda i: (repr(requests[i][2]), -len(requests[i][0])))
    batches, end, special_ids = [], 0, {*tokenizer.specials.values()}
    while end < len(order):
        ids, _, cfg = requests[order[end]]
        start, end = end, end + (batch_size or max(1, 2**13 // (len(ids) + cfg.max_new_tokens)))
        batches.append([i for i in order[start:end] if requests[i][2] == cfg])
        end = start + len(batches[-1])

    def run(batch):
        contexts, ends = [requests[i][0] for i in batch], [UntilStop(requests[i][1]) for i in batch]
        lengths, cfg = torch.tensor([*map(len, contexts)], device=world.device), requests[batch[0]][2]
        padded = [ids + [0] * (len(contexts[0]) - len(ids)) for ids in contexts]  # the first is the longest
        ids = torch.tensor(padded, device=world.device)
        has_ended, texts = [False] * len(batch), [b""] * len(batch)
        for tokens in generate(model, ids, cfg, seed + batch[0], tokenizer.vocab_size, lengths=lengths):
            for row, token in enumerate(tokens.tolist()):
                if not has_ended[row]:
                    if token not in special_ids:
                        texts[row] += ends[row].add(tokenizer.decode_bytes([token]))
                    has_ended[row] = token in tokenizer.stops or ends[row].has_ended
            if all(has_ended):
                break
        rows = zip(batch, texts, ends)
        return {i: (text + end.held).decode("utf-8", errors="replace") for i, text, end in rows}

    found = over_ranks(world, batches, run)
    return [found[i] for i in range(len(requests))]


def led_by_main(world, functions, lead):
    """lead(call) on rank 0, where call(name, requests) is functions[name](requests) on all ranks; None on the others.

    An error in lead ends all ranks.
    """
    if not world.is_main:
        while isinstance(job := world.from_main(None), tuple):
            with contextlib.suppress(Exception):  # over_ranks raises it on rank 0 as well
                functions[job[0]](job[1])
        if job is not None:
            raise SystemExit(1) if job == 1 else job
        return None

    def call(name, requests):
        return functions[name](world.from_main((name, requests))[1])

    ending = None
    try:
        return lead(call)
    except Exception as error:
        ending = error if isinstance(error, UserError) else 1
        raise
    finally:
        world.from_main(ending)


def open_tasks(cfg, world):
    """A function of a model in training: {"task/metric": value} of its tasks on rank 0, else {}; None without tasks.

    UserError where a task cannot be run. Where one fails later, a line says so, and the run goes on.
    """
    if not cfg.harness.tasks:
        return None
    if not cfg.model.is_causal:
        raise UserError(MASKED)
    if world.pp * world.cp > 1:
        rule = "tasks need whole models and texts on each rank; use evaluate.py after training"
        raise UserError(f"pp is {world.pp} and cp {world.cp}, but {rule}")
    tokenizer = check_ids(load_tokenizer(tokenizer_of(cfg.data.folder)), cfg.model.vocab_size, cfg.data.folder)
    with harness_seeds():
        tasks = led_by_main(world, {}, lambda call: load_tasks(cfg.harness, in_training=True))

    def figures(model):
        from parallel import reshard  # here, since DTensor takes half a second to import

        def lead(call):
            try:
                with harness_seeds():
                    results = run_tasks(tasks, cfg.harness, model, tokenizer, call, bootstrap_iters=0)["results"]
            except Exception as error:  # lm-eval and tasks raise anything
                why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                report(f"warning: evaluation by tasks failed ({why}); the run goes on without")
                return {}
            return {
                f"{name}/{metric.removesuffix(',none')}": value
                for name, metrics in results.items()
                for metric, value in metrics.items()
                if isinstance(value, float) and "_stderr" not in metric
            }

        batch_size = cfg.harness.requests_per_batch
        functions = {"score": functools.partial(score_tokens, model, world=world, batch_size=batch_size)}
        model.eval()
        with world.autocast(), torch.compiler.set_stance("force_eager"):  # it would compile for each length
            found = led_by_main(world, functions, lead)
        model.train()
        reshard(model)
        return found or {}

    return figures
