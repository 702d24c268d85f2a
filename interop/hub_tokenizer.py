"""The tokenizer of a Hugging Face folder, as transformers' AutoTokenizer (5) reads it."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from config import UserError
from foreign import read_bytes, read_json, telling
from text.tokenizer import TOKEN_ID, saved_tokenizer, tokenizer_of_saved

WRITE_ONE = "write one with transformers: AutoTokenizer.from_pretrained(X).save_pretrained(X)"
NAME = (str, {"content!": str}, None)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
ADDED = {"content!": str, "special!": bool} | dict.fromkeys(FLAGS, bool)
TEMPLATE = {"name!": str, "template!": str}
STOPS = {"eos_token_id": (int, [int], None)}
# Kinds of values of tokenizer_config.json, special_tokens_map.json and the model's config.json (see foreign.check)
CONFIG = {
    "tokenizer_class": (str, None), "added_tokens_decoder": ({"*": ADDED}, None), "bos_token": NAME, "eos_token": NAME,
    "unk_token": NAME, "add_bos_token": (bool, None), "add_prefix_space": (bool, None), "legacy": (bool, None),
    "do_lower_case": (bool, None), "tokenize_chinese_chars": (bool, None), "strip_accents": (bool, None),
}  # fmt: skip
MODEL = STOPS | {"tokenizer_class": (str, None), "model_type": (str, None)}
REGISTERED = {"gpt2": "GPT2Tokenizer", "bert": "BertTokenizer", "qwen3": "Qwen2Tokenizer", "mistral": "Tokenizers"}
PLAIN = ("Tokenizers", "TokenizersBackend", "PreTrainedTokenizer", "PythonBackend")
# Options that a class takes from tokenizer_config.json and not from tokenizer.json
OPTIONS = {"add_prefix_space", "prepend_scheme", "trim_offsets", "lowercase", "strip_accents", "handle_chinese_chars"}
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_2 = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]


class Class(NamedTuple):
    """The parts that a tokenizer class of transformers makes itself; vocabulary and merges come from a file."""

    normalizer: dict | None
    pre_tokenizer: dict
    model: dict  # its kind and options
    bos: str | None
    eos: str | None


def load_hub_tokenizer(folder):
    """The tokenizer of a Hugging Face folder, with the ids before a text and those that end a generated one.

    UserError where the folder has none, or where we would give other ids than AutoTokenizer.
    """
    folder = Path(folder)
    path = hub_tokenizer_file(folder)
    config, model = (read_json(folder / f"{name}.json", kinds, lacking={})
                     for name, kinds in (("tokenizer_config", CONFIG), ("config", MODEL)))  # fmt: skip
    if "added_tokens_decoder" not in config:
        config |= read_json(folder / "special_tokens_map.json", CONFIG, lacking={})
    saved, made = saved_tokenizer(path), None
    if odd := [key for key in ("auto_map", "fix_mistral_regex") if config.get(key)]:
        raise UserError(f"{folder}/tokenizer_config.json has {', '.join(odd)}, which we do not heed; {WRITE_ONE}")
    if name := _class_name(saved, path, config, model):
        made = _class_of(name, saved, config, folder)
        saved = _as_class(name, made, saved, path)
    _check_added(saved, config, folder)
    tokenizer = tokenizer_of_saved(path, saved)
    ids = tokenizer.specials | {token["content"]: token["id"] for token in saved.get("added_tokens") or []}
    vocab = saved["model"]["vocab"]
    ids = (vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}) | ids
    bos, eos = (ids.get(_content(config.get(f"{role}_token", getattr(made, role, None)))) for role in ("bos", "eos"))
    tokenizer.before_text = eos if bos is None else bos
    if path.endswith("tokenizer.json"):
        tokenizer.begin = _begin(saved.get("post_processor"), path)
    elif config.get("add_bos_token") and bos is not None:
        tokenizer.begin = [bos]
    tokenizer.stops = stop_ids(folder, model) or ({eos} if eos is not None else tokenizer.stops)
    return tokenizer


def stop_ids(folder, model):
    """The ids that end a generated text, by generation_config.json or config.json's content; empty: they name none."""
    generation = read_json(Path(folder) / "generation_config.json", STOPS, lacking={})
    ids = next((c["eos_token_id"] for c in (generation, model) if c.get("eos_token_id") is not None), [])
    return {*ids} if isinstance(ids, list) else {ids}


def chat_settings(folder):
    """(a Hugging Face folder's chat template, None where it has none; {a template's variable: the special token})."""
    folder = Path(folder)
    config = read_json(folder / "special_tokens_map.json", lacking={})
    config |= read_json(folder / "tokenizer_config.json", {"chat_template": (str, [TEMPLATE], None)}, lacking={})
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((each["template"] for each in template if each["name"] == "default"), None)
    if os.path.lexists(path := folder / "chat_template.jinja"):
        with telling(lambda reason: f"{path} cannot be read ({reason}); copy it again"):
            template = read_bytes(path).decode()
    names = {key: _content(value) for key, value in config.items() if key.endswith("_token")}
    return template, {key: name for key, name in names.items() if isinstance(name, str)}


def hub_tokenizer_file(folder):
    """The file of a Hugging Face folder to give to load_tokenizer, as a path."""
    folder = Path(folder)
    for name in ("tokenizer.json", "vocab.txt"):
        if os.path.lexists(folder / name):
            return str(folder / name)
    is_gpt2 = read_json(folder / "config.json", lacking={}).get("model_type", "gpt2") == "gpt2"  # others cut otherwise
    if os.path.lexists(folder / "vocab.json") and os.path.lexists(folder / "merges.txt") and is_gpt2:
        return str(folder / "vocab.json")
    files = "tokenizer.json, BERT's vocab.txt, or GPT-2's vocab.json and merges.txt"
    raise UserError(f"{folder} has no tokenizer that can be read: no {files}; {WRITE_ONE}")


def _content(name):
    return name.get("content") if isinstance(name, dict) else name


def _class_name(saved, path, config, model):
    """The class that AutoTokenizer takes, if it makes parts of the tokenizer itself; None where the file has them all."""
    declared = config.get("tokenizer_class") or model.get("tokenizer_class")
    registered = REGISTERED.get(model.get("model_type"))
    if path.endswith(("vocab.txt", "vocab.json")):
        registered = "BertTokenizer" if path.endswith("vocab.txt") else "GPT2Tokenizer"
        if declared and declared.removesuffix("Fast") != registered:
            raise UserError(f"{path} is no file of a {declared}, the folder's tokenizer_class; {WRITE_ONE}")
    name = (declared or registered or PLAIN[0]).removesuffix("Fast")
    steps = json.dumps([saved.get("pre_tokenizer"), saved.get("decoder")])
    if name == "LlamaTokenizer" and (registered in PLAIN or '"ByteLevel"' in steps):
        return None
    if name in PLAIN or (registered in PLAIN and name != registered):
        return None
    return name


def _class_of(name, saved, config, folder):
    """The parts that the class of a name makes from a folder's settings."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": bool(config.get("add_prefix_space")), "trim_offsets": True,
                  "use_regex": True}  # fmt: skip
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
           "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}  # fmt: skip
    if name == "GPT2Tokenizer":
        return Class(None, byte_level, bpe, "<|endoftext|>", "<|endoftext|>")
    if name == "Qwen2Tokenizer":
        cut = {"type": "Split", "pattern": {"Regex": QWEN_WORDS}, "behavior": "Isolated", "invert": False}
        words = {"type": "Sequence", "pretokenizers": [cut, byte_level | {"use_regex": False}]}
        return Class({"type": "NFC"}, words, bpe, None, "<|endoftext|>")
    if name == "LlamaTokenizer":
        scheme = "always" if config.get("legacy") else "first"
        scheme = "never" if config.get("add_prefix_space") is False else scheme
        words = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        return Class(None, words, bpe | {"fuse_unk": True, "byte_fallback": True}, "<s>", "</s>")
    if name == "BertTokenizer":
        lower = config.get("do_lower_case")
        if lower is None and (saved.get("normalizer") or {}).get("lowercase") is False:
            what = f"{folder} has a vocabulary with capitals, which transformers would not use"
            raise UserError(f'{what}; write "do_lower_case": false into its tokenizer_config.json')
        normalizer = {
            "type": "BertNormalizer", "clean_text": True, "strip_accents": config.get("strip_accents"),
            "handle_chinese_chars": config.get("tokenize_chinese_chars", True) is not False,
            "lowercase": lower is not False,
        }  # fmt: skip
        model = {"type": "WordPiece", "unk_token": _content(config.get("unk_token", "[UNK]")),
                 "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}  # fmt: skip
        return Class(normalizer, {"type": "BertPreTokenizer"}, model, None, None)
    what = f"{folder} has the tokenizer_class {name}, which we do not know"
    raise UserError(f'{what}; if tokenizer.json is the whole of it, write "PreTrainedTokenizerFast" there')


def _as_class(name, made, saved, path):
    """A tokenizer.json with a class's parts; UserError where it has others, so that libraries disagree on its ids."""
    parts = {"normalizer": saved.get("normalizer"), "pre_tokenizer": saved.get("pre_tokenizer")}
    if name == "LlamaTokenizer" and (parts["normalizer"] or {}).get("normalizers") == LLAMA_2:
        parts = {"normalizer": None, "pre_tokenizer": made.pre_tokenizer}  # the older form of the same
    ours = {"normalizer": made.normalizer, "pre_tokenizer": made.pre_tokenizer}
    odd = [part for part in ours if _fixed(ours[part]) != _fixed(parts[part])]
    kept = {key: saved["model"].get(key, value) or None for key, value in made.model.items()}
    if made.model.get("byte_fallback") and all(f"<0x{byte:02X}>" in saved["model"]["vocab"] for byte in range(256)):
        kept["unk_token"] = None  # nothing is unknown
    odd += [f"model ({key} {kept[key]!r})" for key, value in made.model.items() if kept[key] != (value or None)]
    if odd:
        what = f"{path} has another {', '.join(odd)} than {name}, its tokenizer_class, makes, so libraries disagree"
        raise UserError(f'{what}; write "tokenizer_class": "PreTrainedTokenizerFast" there to go by the file')
    return saved | ours | {"model": saved["model"] | made.model}


def _fixed(part):
    """A part of a tokenizer.json without what tokenizer_config.json sets."""
    if isinstance(part, dict):
        part = {"use_regex": True} | part if part.get("type") == "ByteLevel" else part
        return {key: _fixed(value) for key, value in part.items() if key not in OPTIONS}
    return [_fixed(item) for item in part] if isinstance(part, list) else part


def _check_added(saved, config, folder):
    """UserError where the folder's other files list other tokens that text may contain than tokenizer.json."""

    def words(tokens):
        return {token["content"]: (id_, *(token.get(flag, flag == "normalized") for flag in FLAGS))
                for id_, token in tokens if not token.get("special")}  # fmt: skip

    own = [(token["id"], token) for token in saved.get("added_tokens") or []]
    if (listed := config.get("added_tokens_decoder")) is not None:
        if not all(id_.isdecimal() for id_ in listed) or words(own) != words((int(i), t) for i, t in listed.items()):
            raise UserError(
                f"{folder} lists other added tokens in tokenizer_config.json than tokenizer.json; {WRITE_ONE}"
            )
        return
    known = {token["content"]: id_ for id_, token in own}
    others = read_json(folder / "added_tokens.json", {"*": TOKEN_ID}, lacking={})
    if any(known.get(token) != id_ for token, id_ in others.items()):
        raise UserError(f"{folder} has tokens in added_tokens.json that are not in tokenizer.json; {WRITE_ONE}")


def _begin(post_processor, path):
    """Ids that a tokenizer.json's post-processor puts before a text."""
    import tokenizers

    tiny = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    with telling(lambda reason: f"{path} has a post-processor of no known form ({reason}); copy it again"):
        framed = tokenizers.Tokenizer.from_str(json.dumps(tiny | {"post_processor": post_processor})).encode("a")
        is_special = framed.special_tokens_mask
        return framed.ids[: is_special.index(0) if 0 in is_special else 0]
