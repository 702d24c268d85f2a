"""A tokenizer to and from the files that Hugging Face's libraries load: tokenizer.json, tokenizer_config.json."""

import itertools
import json
import re
from pathlib import Path

from config import UserError
from text.tokenizer import END_OF_TEXT, ByteTokenizer, TiktokenTokenizer, byte_of_character, load_tokenizer

# The names of special tokens by what they are for, the usual one of each kind of tokenizer.
ROLES = {
    "bos": ("<|endoftext|>", "<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<｜begin▁of▁sentence｜>"),
    "eos": END_OF_TEXT,
    "pad": ("<|pad|>", "[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("<|cls|>", "[CLS]"),
    "sep": ("<|sep|>", "[SEP]"),
    "mask": ("<|mask|>", "[MASK]", "<mask>"),
}
ROLES_OF_OBJECTIVE = {"clm": ("bos", "eos", "pad", "unk"), "mlm": ("pad", "unk", "cls", "sep", "mask")}

HARD_TEXTS = (
    "The quick brown fox, don't WE'LL 'tis; I'm you're 'llama.\n\n\tx = 1234567890 + 3.14e-10 # §½²٣\r\n",
    "   blanks  \t \n\n\n  before and after   \n ",
    "def f(self, *args):\n        return {'a': [1, 2], \"b\": __name__}  # TODO\n",
    "naïve café Ünïcödé Straße e\u0301 日本語と한국어 Ελλάδα Москва العربية हिन्दी ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 \u202e\u00a0\u3000\u2003\x00\x85\ufeff\ufffd𐍈 ſs K",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa " + " " * 99 + "!" * 99 + "0" * 99 + "\n" * 9 + "//////\n--\n/",
)


def write_tokenizer(tokenizer, folder, objective, block_size):
    """Writes a tokenizer's tokenizer.json and tokenizer_config.json into a folder; returns {name: id} for its configs.

    objective: clm encodes text without special tokens, even where it spells one, as in training; mlm makes [CLS] text
    [SEP] and knows [MASK]. The returned names are config.json's, such as eos_token_id. UserError where `tokenizers`
    would give other ids.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("a tokenizer for Hugging Face needs tokenizers: pip install tokenizers") from error

    saved = hub_json(tokenizer) | {"post_processor": None}
    specials = _by_role(tokenizer.specials, objective)
    if objective == "mlm":
        saved = _framing(saved, tokenizer, specials)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(saved))
    check_same_ids(tokenizer, theirs)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": objective == "clm",
        # GPT-2 there adds an embedding for token types, even if all are 0, wherever it is given them.
        "model_input_names": ["input_ids", *["token_type_ids"] * (objective == "mlm"), "attention_mask"],
        **{f"{role}_token": name for role, name in specials.items()},
    }
    folder = Path(folder)
    (folder / "tokenizer.json").write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
    return {f"{role}_token_id": tokenizer.specials[name] for role, name in specials.items()}


def load_hub_tokenizer(folder):
    """The tokenizer of a Hugging Face folder, with the ids that it puts before a text; UserError without one."""
    path = hub_tokenizer_file(folder)
    tokenizer, config = load_tokenizer(path), read_json(Path(folder) / "tokenizer_config.json")
    if not path.endswith("tokenizer.json"):
        _check_plain(tokenizer, config, folder)
    roles = [config.get(role) for role in ("bos_token", "eos_token")]
    ids = [tokenizer.specials.get(str(role.get("content") if isinstance(role, dict) else role)) for role in roles]
    tokenizer.before_text = next((id_ for id_ in ids if id_ is not None), None)
    try:
        tokenizer.begin = _begin(tokenizer.saved, config.get("add_bos_token"), ids[0])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has a post-processor of no known form ({error}); copy it again") from error
    return tokenizer


def _begin(saved, adds_bos, bos):
    """Ids that a tokenizer.json's post-processor puts before a text; tokenizer_config.json's add_bos_token wins."""
    if adds_bos is not None:
        return [bos] if adds_bos and bos is not None else []
    steps = (saved or {}).get("post_processor") or {}
    template = next(
        (step for step in steps.get("processors", [steps]) if step.get("type") == "TemplateProcessing"), None
    )
    if template is None:
        return []
    names = [
        piece["SpecialToken"]["id"] for piece in itertools.takewhile(lambda p: "SpecialToken" in p, template["single"])
    ]
    return [id_ for name in names for id_ in template["special_tokens"][name]["ids"]]


def _check_plain(tokenizer, config, folder):
    """UserError where a folder's settings change the usual reading of its vocab.txt or vocab.json."""
    lowercase = ((tokenizer.saved or {}).get("normalizer") or {}).get("lowercase")
    usual = {
        "do_lower_case": lowercase,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "add_prefix_space": False,
    }
    odd = [f"{key} {config[key]}" for key, value in usual.items() if config.get(key, value) not in (value, None)]
    odd += ["added_tokens.json"] if (Path(folder) / "added_tokens.json").exists() else []
    if odd:
        raise UserError(
            f"{folder} has no tokenizer.json, and {', '.join(odd)}, which only transformers knows to heed; "
            f"write one with it: AutoTokenizer.from_pretrained(X).save_pretrained(X)"
        )


def hub_tokenizer_file(folder):
    """The file of a Hugging Face folder to give to load_tokenizer, as a path."""
    folder = Path(folder)
    for name in ("tokenizer.json", "vocab.txt"):
        if (folder / name).is_file():
            return str(folder / name)
    is_gpt2 = read_json(folder / "config.json").get("model_type", "gpt2") == "gpt2"  # others cut words in other ways
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file() and is_gpt2:
        return str(folder / "vocab.json")
    raise UserError(
        f"{folder} holds no tokenizer that can be read: neither tokenizer.json nor BERT's vocab.txt nor GPT-2's "
        f"vocab.json and merges.txt; write one with transformers: AutoTokenizer.from_pretrained(X).save_pretrained(X)"
    )


def read_json(path):
    """The object in a JSON file of someone else's; {} where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); copy it from its source again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; copy it from its source again")
    return value


def hub_json(tokenizer):
    """A tokenizer's tokenizer.json, as a dict; a file's as it is, but that it cuts no texts and fills up none."""
    if isinstance(tokenizer, ByteTokenizer):
        return _byte_level_bpe({bytes((b,)): b for b in range(256)}, tokenizer.specials, pattern=None)
    if isinstance(tokenizer, TiktokenTokenizer):
        encoding = tokenizer.encoding
        return _byte_level_bpe(encoding._mergeable_ranks, tokenizer.specials, encoding._pat_str)
    return tokenizer.saved | {"truncation": None, "padding": None}


def check_same_ids(tokenizer, theirs):
    """UserError where tokenizers.Tokenizer `theirs` gives other ids than ours for one of a few hard texts."""
    kept = set(tokenizer.specials.values())
    for name, id_ in tokenizer.specials.items():
        if theirs.token_to_id(name) != id_:
            raise UserError(
                f"the tokenizer {tokenizer.name} cannot be written for Hugging Face's libraries: they would give "
                f"{name} the id {theirs.token_to_id(name)}, it is {id_}"
            )
    own = tokenizer.decode([i for i in range(min(tokenizer.vocab_size, 4096)) if i not in kept])
    for text in (*HARD_TEXTS, own):
        for token in theirs.get_added_tokens_decoder().values():  # special ones, which they find in text, are not ours
            text = text.replace(token.content, "")
        if (alphabet := getattr(tokenizer, "alphabet", None)) is not None:
            text = "".join(c for c in text if c in alphabet)
        ours, ids = tokenizer.encode(text).tolist(), theirs.encode(text, add_special_tokens=False).ids
        if ours != ids:
            at = next((i for i, (a, b) in enumerate(zip(ours, ids)) if a != b), min(len(ours), len(ids)))
            raise UserError(
                f"the tokenizer {tokenizer.name} cannot be written for Hugging Face's libraries: they would encode "
                f"{tokenizer.decode(ours[at : at + 5])!r} as {ids[at : at + 5]}, it is {ours[at : at + 5]}"
            )


def _by_role(specials, objective):
    """{role: name} of the special tokens that a model of this objective has a use for."""
    names = {
        role: next((name for name in ROLES[role] if name in specials), None) for role in ROLES_OF_OBJECTIVE[objective]
    }
    if objective == "clm":  # end-of-text is what stands before a text, too, and what fills up where nothing else does
        names["bos"] = names["bos"] or names["eos"]
        names["pad"] = names["pad"] or names["eos"]
    return {role: name for role, name in names.items() if name is not None}


def _framing(saved, tokenizer, specials):
    """A tokenizer.json that makes [CLS] text [SEP] of a text, and [CLS] text [SEP] text [SEP] of a pair."""
    if lacking := [role for role in ("mask", "cls", "sep", "pad") if role not in specials]:
        raise UserError(
            f"the tokenizer {tokenizer.name} has no {', '.join(lacking)} token, which masked models need; "
            f"its special tokens are {', '.join(tokenizer.specials) or 'none'}"
        )
    cls, sep, mask = (specials[role] for role in ("cls", "sep", "mask"))
    frame = {
        "type": "TemplateProcessing",
        "single": _pieces((cls, 0), ("A", 0), (sep, 0)),
        "pair": _pieces((cls, 0), ("A", 0), (sep, 0), ("B", 1), (sep, 1)),
        "special_tokens": {
            name: {"id": name, "ids": [tokenizer.specials[name]], "tokens": [name]} for name in (cls, sep)
        },
    }
    # The blank before a masked word belongs to it, as in training.
    added = [
        token | {"lstrip": tokenizer.space_begins_word} if token["content"] == mask else token
        for token in saved["added_tokens"]
    ]
    return saved | {"post_processor": frame, "added_tokens": added}


def _pieces(*parts):
    """A template in tokenizer.json's words; parts: (name, token type), the texts being A and B."""
    return [
        {"Sequence" if name in ("A", "B") else "SpecialToken": {"id": name, "type_id": type_id}}
        for name, type_id in parts
    ]


def _byte_level_bpe(ranks, specials, pattern):
    """The tokenizer.json, as a dict, of a byte-level BPE.

    ranks: {token's bytes: id}, ids in the order of merging. pattern: what cuts text into words, as tiktoken's pat_str;
    None: GPT-2's, which is ByteLevel's own.
    """
    character_of = {byte: character for character, byte in byte_of_character().items()}
    written = {token: "".join(character_of[b] for b in token) for token in ranks}
    vocab = {written[token]: id_ for token, id_ in sorted(ranks.items(), key=lambda item: item[1])}
    if [*vocab.values(), *sorted(specials.values())] != list(range(len(vocab) + len(specials))):
        vocab |= specials  # or `tokenizers` would give them the ids that are left out
    is_gpt2s = pattern is None or pattern.startswith(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}")
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": is_gpt2s}
    if not is_gpt2s:
        cut = {"type": "Split", "pattern": {"Regex": _for_oniguruma(pattern)}, "behavior": "Isolated", "invert": False}
        words = {"type": "Sequence", "pretokenizers": [cut, words]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": id_, "content": name, **flags} for name, id_ in sorted(specials.items(), key=lambda item: item[1])]
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": True,  # tiktoken's rule: a word that is a token does not go through merges
        "vocab": vocab, "merges": [[written[left], written[right]] for left, right in merges_of(ranks)],
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": words, "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
    }  # fmt: skip


def merges_of(ranks):
    """The merges, in order, as pairs of bytes, of tiktoken's {token's bytes: rank}: of each token its last one.

    A token's parts are what merging its bytes by the tokens before it leaves. Where these are not two it has no merge:
    such a token comes up only as a whole word.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            made = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:])]
            lowest = min(made)
            if lowest >= rank:
                break
            at = made.index(lowest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def _for_oniguruma(pattern):
    """tiktoken's pattern for the engine of `tokenizers`, which reads `{1,3}+` as `({1,3})+` and `$` as a line's end."""
    return re.sub(r"([+*?]|\{\d+(?:,\d*)?\})\+", r"\1", pattern).replace("$", r"\z")
