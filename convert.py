"""Models in and out.

    python convert.py --out_dir=out/quickstart --to_hf=exported         # a run, to a Hugging Face model
    python convert.py --out_dir=out/quickstart --to_gguf=model.gguf     # a run, to llama.cpp's file
    python convert.py --init_from=gpt2 --to_hf=copy                     # a Hugging Face model, to another one
    python convert.py --from_nanogpt=out/ckpt.pt --out_dir=out/nanogpt  # nanoGPT's checkpoint, to a run
    python convert.py --out_dir=out/quickstart --to_curve=curve.json    # a run's losses, for train.py --reference=

Weights of Hugging Face need no conversion to start from: train.py, sample.py, bench.py and plan.py take --init_from=.
"""

import contextlib
import json
import math
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import foreign
from config import UserError, only, run_script
from devices import tune_malloc
from heads import TunedModel
from interop.families import config_of, family_of, their_tensors
from interop.gguf import write_gguf
from interop.hub import ACCOMPANYING, TOKENIZER_FILES, HubModel, copy_files, save_tensors
from interop.names import HEADS
from interop.nanogpt import import_nanogpt
from interop.pretrained import TOKENIZER, RunModel, load_tokenizer_of, model_location, with_model
from interop.tokenizer import frame_pairs, write_tokenizer
from run.folder import RunConfig, run_dir_of
from run.reference import write_curve
from text.remote import bare_url, is_url

WEIGHTS = r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?$"
SHARD_BYTES = 5 * 10**9  # largest file of weights, as transformers below 5 writes


@dataclass(frozen=True)
class ConvertConfig:
    to_hf: str | None = None  # folder to write a Hugging Face model to
    hf_dtype: Literal["float32", "bfloat16", "float16"] | None = None  # dtype of the exported weights; none: unchanged
    to_gguf: str | None = None  # GGUF file to write, which llama.cpp runs
    gguf_type: Literal["f16", "q8_0", "f32"] = "f16"  # type of the matrices in it; q8_0: 8 bits
    from_nanogpt: str | None = None  # nanoGPT's ckpt.pt, to become a run in out_dir
    to_curve: str | None = None  # JSON file to write a run's validation losses to; in docs/curves, a preset's reference
    nanogpt_tokenizer: str | None = None  # meta.pkl of its data, or as in prepare.py; none: gpt2, if its size is that


@dataclass(frozen=True)
class Settings:
    convert: ConvertConfig
    run: RunConfig = only("out_dir", "init_from")
    presets: tuple = ()


def main(cfg):
    names = ("to_hf", "to_gguf", "to_curve", "from_nanogpt")
    given = [name for name in names if getattr(cfg.convert, name) is not None]
    if len(given) != 1:
        what = "to_hf, a folder, or to_gguf, a file, to write a model, or to_curve, a file, or from_nanogpt, a ckpt.pt"
        raise UserError(f"{' and '.join(given) or 'nothing'} is given; give one of {what}")
    if path := cfg.convert.from_nanogpt:
        if not (out_dir := cfg.run.out_dir):
            raise UserError("out_dir is none; name the folder of the run to make, as in --out_dir=out/nanogpt")
        lines = import_nanogpt(path, out_dir, cfg.convert.nanogpt_tokenizer)
        written = f"{path}: written to {out_dir} as a run; to continue it: python train.py {out_dir}/config.py"
        print(*lines, written, sep="\n")
        return
    if cfg.convert.to_curve:
        write_curve(run_dir_of(cfg), cfg.convert.to_curve)
        return
    tune_malloc(mmap_threshold=2**17)  # return freed tensors at once: glibc keeps those below 32 MiB
    if path := cfg.convert.to_gguf:
        with_model(model_location(cfg), lambda source: write_gguf(source, path, cfg.convert.gguf_type))
    else:
        with_model(model_location(cfg), lambda source: export(source, cfg.convert.to_hf, cfg.convert.hf_dtype))


def export(source, folder, dtype=None):
    """Writes an opened model as a Hugging Face model into a folder, config.json last, when all else is there.

    UserError where the folder is not empty, or transformers has no such model.
    """
    family, final, has_labels = family_of(source.cfg), Path(folder), isinstance(source.cfg, TunedModel)
    if re.search(r"[\ud800-\udfff]", str(folder)):
        raise UserError(f"to_hf {folder} is not UTF-8, as safetensors wants its paths; name another folder")
    tokenizer = load_tokenizer_of(source, may_lack=True)
    partial = final / ".flatlm_export"
    try:
        final.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # an interrupted export left it
        if any(final.iterdir()):
            raise UserError(f"{folder} is not empty; name another folder with --to_hf=, or remove it")
        partial.mkdir()
        special_ids = put_tokenizer(source, tokenizer, partial)
        if isinstance(source, HubModel):
            config = copied_config(source, dtype)
        else:
            config = config_of(source.cfg, special_ids, dtype or source.dtype, source.extra)
        write_json(config, partial / "config.json")
        if source.cfg.is_causal and not isinstance(source, HubModel) and not has_labels:
            known_ids = {name: id_ for name, id_ in special_ids.items() if id_ is not None}
            known_ids |= {name: ids for name, ids in source.kept_chat.items() if name == "eos_token_id"}
            write_json(known_ids, partial / "generation_config.json")
        itemsize = getattr(torch, dtype or source.dtype).itemsize
        n_bytes = write_weights(their_tensors(source.cfg, source.read, source.extra), partial, dtype, itemsize)
        name = Path(os.path.abspath(folder)).name
        if not (partial / "README.md").exists():
            text = card(source, family, name, tokenizer)  # it may name a file that is not UTF-8
            (partial / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, final / path.name)
    except OSError as error:
        raise UserError(f"to_hf {folder} cannot be written ({error}); make room, or name another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # the folder is not empty, as it should be
            final.rmdir()
    print(f"{source.name}: written to {folder} as {config['architectures'][0]}, {n_bytes / 1e6:,.1f} MB of weights")
    if isinstance(source, HubModel):
        others = {path.name for path in source.folder.iterdir() if not re.match(WEIGHTS, path.name)} - {*ACCOMPANYING}
        if others := sorted(others - {"config.json"}):
            print(f"left out: {', '.join(others[:9])}{' and others' * (len(others) > 9)}")


def put_tokenizer(source, tokenizer, folder):
    """Writes a run's tokenizer, if known, or copies a Hugging Face model's; returns {name: id} for the configs."""
    # None, not absent: transformers would fill in its defaults.
    special_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if isinstance(source, HubModel):
        copy_files(source.folder, folder, ACCOMPANYING)
    elif (kept := source.folder / TOKENIZER).is_dir():
        copy_files(kept, folder, TOKENIZER_FILES)
        theirs = foreign.read_json(kept / "config.json")
        special_ids |= {name: theirs[name] for name in special_ids if name in theirs}
        if (folder / "tokenizer_config.json").exists():
            config = foreign.read_json(folder / "tokenizer_config.json")
            longest = config.get("model_max_length", source.cfg.block_size)
            write_json(
                config | {"model_max_length": min(longest, source.cfg.block_size)}, folder / "tokenizer_config.json"
            )
        if special_ids["pad_token_id"] is None:  # a decoder's head looks for the last token that is none
            special_ids["pad_token_id"] = tokenizer and tokenizer.eot
    elif tokenizer:
        special_ids |= write_tokenizer(tokenizer, folder, source.cfg.base, source.cfg.block_size)
    if isinstance(source, RunModel) and isinstance(source.cfg, TunedModel) and source.cfg.is_causal:
        frame_pairs(folder, tokenizer, source.cfg.task)
    if not isinstance(source, HubModel) and source.kept_chat:
        (folder / "chat_template.jinja").write_text(source.kept_chat["chat_template"], encoding="utf-8")
        config = foreign.read_json(folder / "tokenizer_config.json", lacking={})
        config = {name: value for name, value in config.items() if name != "chat_template"}
        # The template's special tokens must be found in text.
        write_json(config | {"split_special_tokens": False}, folder / "tokenizer_config.json")
    return special_ids


def copied_config(source, dtype):
    """The config.json of a copy of a Hugging Face model: its own, but for a class that the weights do not make up."""
    config = {**source.config}
    classes = [name for name in config.get("architectures") or [] if isinstance(name, str)]
    if not any(name.endswith(("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForPreTraining")) for name in classes):
        config["architectures"] = [source.family.architecture]
    if dtype:
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"torch_dtype": dtype}
    return config


def write_weights(tensors, folder, dtype=None, itemsize=4, shard_bytes=SHARD_BYTES):
    """Writes tensors, each (name, shape, function that makes it), as safetensors; returns the bytes of all.

    shard_bytes: a file's largest size, reckoned with itemsize bytes a number. Memory holds the tensors of one file.
    dtype: of the written tensors; None: each one's own.
    """
    shards, n_bytes = [[]], 0
    for name, shape, make in tensors:
        size = math.prod(shape) * itemsize
        if shards[-1] and n_bytes + size > shard_bytes:
            shards, n_bytes = [*shards, []], 0
        shards[-1].append((name, make))
        n_bytes += size
    total, file_of = 0, {}
    for i, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        made = {name: make() if dtype is None else make().to(getattr(torch, dtype)) for name, make in shard}
        if wrong := [name for name, tensor in made.items() if not tensor.isfinite().all()]:
            what = f"the weights {wrong[0]} are not finite" + (f" in {dtype}" if dtype else "")
            raise UserError(f"{what}; use another hf_dtype, or other weights")
        save_tensors(made, folder / file, {"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors lets only the owner read
        file_of |= dict.fromkeys(made, file)
        total += sum(tensor.nbytes for tensor in made.values())
    if len(shards) > 1:
        write_json({"metadata": {"total_size": total}, "weight_map": file_of}, folder / "model.safetensors.index.json")
    return total


def write_json(value, path):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- the model card

PRIVATE = {
    *("out_dir", "resume", "device", "data_fingerprint", "teacher_fingerprint"),
    *("log_to", "wandb", "wandb_project", "wandb_run_name"),  # wandb: older runs'
    *("watch", "sample_prompts", "sample_tokens", "reference"),
}
PIPELINES = {"tag": "token-classification", "qa": "question-answering"}  # by task of fine-tuning
NUMBER = (float, None)
SPLITS = {"*": {"tokens": int, "bytes": int}}
# Kinds of values of a run's files from which a card is written (see foreign.check)
MANIFEST = {
    "step": int,
    "settings": dict,
    "state": {"sequences_seen": int, "hours": NUMBER, "val_loss": NUMBER, "evaluated_at": (int, None), "score": NUMBER},
}
DATA = {"splits": SPLITS, "settings": ({"tokenizer": str}, None), "tokenizer": str, "command": str}


def card(source, family, name, tokenizer):
    """README.md of an exported model: what it is, what it was trained on, how long, to which loss, how to use it."""
    cfg, is_masked = source.cfg, not source.cfg.is_causal
    auto, task = ("AutoModelForMaskedLM", "fill-mask") if is_masked else ("AutoModelForCausalLM", "text-generation")
    kind = "masked language model" if is_masked else "causal language model"
    if isinstance(cfg, TunedModel):
        ending, task = HEADS[cfg.task][0], PIPELINES.get(cfg.task, "text-classification")
        auto, kind = f"AutoModel{ending}", f"model for the task {cfg.task} ({', '.join(cfg.labels)})"
    blocks = [
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags: [flatlm]\n---\n# {name}",
        f"A {kind} of {family.name}'s kind: {cfg.n_layer} layers {cfg.n_embd} wide, {cfg.n_head} heads, "
        f"{cfg.vocab_size:,} token ids, sequences of up to {cfg.block_size:,} tokens.",
        "```python\n"
        f"from transformers import AutoTokenizer, {auto}\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = {auto}.from_pretrained("{name}")\n```',
    ]
    facts = training_facts(source)
    if getattr(source, "kept_chat", None):
        blocks.append("It answers in conversations: `tokenizer.apply_chat_template` makes their tokens.")
    elif facts and tokenizer and tokenizer.specials:
        how = "as that token" if is_masked else "as ordinary text, unless `split_special_tokens=False`"
        blocks.append(
            f"In training no text held special tokens, such as `{next(iter(tokenizer.specials))}`, whatever it spelt; "
            f"this tokenizer reads their names {how}."
        )
    return "\n\n".join(blocks + facts) + "\n"


def training_facts(source):
    """The model card's lines about the run; none for a model that comes from no run."""
    manifest = getattr(source, "manifest", None)
    if manifest is None:
        return []
    foreign.check(manifest, MANIFEST, source.path / "manifest.json")
    state, settings, data = manifest.get("state", {}), manifest.get("settings", {}), {}
    with contextlib.suppress(UserError):  # a damaged file was reported before
        data = foreign.read_json(source.folder / "meta.json", DATA, lacking={}, has_paths=True)
    shares = settings.get("data_dir")
    if isinstance(shares, dict):  # a mixture, of whose folders the run has the first one's meta.json alone
        data = {key: data[key] for key in ("settings", "tokenizer") if key in data}
    log = source.folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    losses = re.findall(r'"loss": ([-+.\de]+)', lines)
    bits = re.findall(rf'"step": {state.get("evaluated_at")}, .*"val_bpb": ([-+.\de]+)', lines)
    seen, seq_len = state.get("sequences_seen", 0), settings.get("seq_len")  # none in fine-tuning, by texts
    unit = "" if seq_len is None or isinstance(settings.get("objective"), dict) else " nats a token"
    rows = {
        "steps": f"{manifest['step']:,}",
        "texts trained on" if seq_len is None else "tokens trained on": f"{seen * (seq_len or 1):,}",
        "hours": f"{state.get('hours', 0):.2f}",
        "training loss, the last logged": f"{float(losses[-1]):.4f}{unit}" if losses else None,
        "validation loss": None if state.get("val_loss") is None else f"{state['val_loss']:.4f}{unit}",
        "validation metric": None if state.get("score") is None else f"{state['score']:.4f}",
    }
    if bits:
        rows["validation bits per byte"] = f"{float(bits[-1]):.4f}"
    tokenizer = (data.get("settings") or data).get("tokenizer")
    rows["tokenizer"] = tokenizer and without_places(tokenizer)
    rows["data made by"] = f"`{public_command(data['command'])}`" if data.get("command") else None
    for name, split in data.get("splits", {}).items():
        rows[f"{name} tokens of the data"] = f"{split.get('tokens', 0):,}"
    table = ["| training | |", "|---|---|"] + [f"| {name} | {value} |" for name, value in rows.items() if value]
    shown = {name: without_places(value) if isinstance(value, str) else value for name, value in settings.items()}
    if isinstance(shares, dict):
        shown["data_dir"] = {without_places(folder): share for folder, share in shares.items()}
        shown["data_schedule"] = {
            int(step): {without_places(folder): share for folder, share in of_step.items()}
            for step, of_step in (settings.get("data_schedule") or {}).items()
        } or None
    start = str(settings.get("init_from"))
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", start) and not os.path.exists(start):
        shown["init_from"] = start  # a name on the hub
    preset = [f"{name} = {value!r}" for name, value in shown.items() if name not in PRIVATE and value is not None]
    return ["\n".join(table), "Settings:", "```python\n" + "\n".join(preset) + "\n```"]


def public_command(command):
    """A command without what it says of the machine: see without_places; empty where it is no command."""
    try:
        words = [word.partition("=") for word in shlex.split(command)]
    except ValueError:  # quotes that do not match
        return ""
    kept = ("--doc_separator", "--text_field")
    words = [name + equals + (value if name in kept else without_places(value)) if equals else without_places(name)
             for name, equals, value in words]  # fmt: skip
    return shlex.join(words).replace("`", "'")


def without_places(text):
    """A text without folders, if it is a path, and without user, password, query and fragment, if it is a URL."""
    if is_url(text):
        return bare_url(text)
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1]


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
