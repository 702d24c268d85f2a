"""Tokenizers written as files that Hugging Face's libraries load: tokenizer.json, tokenizer_config.json."""

import itertools
import json
import re
from operator import itemgetter
from pathlib import Path

from config import UserError
from foreign import read_json
from shards import END_OF_TEXT
from text.tokenizer import HARD_TEXTS, ByteTokenizer, TiktokenTokenizer, byte_of_character

# {role: names that tokenizers have for the special token of that role}; the first that a tokenizer has counts.
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


def write_tokenizer(tokenizer, folder, objective, block_size):
    """Writes tokenizer.json and tokenizer_config.json into a folder; returns {name in config.json: id of the token}.

    objective: clm encodes text without special tokens, even where it spells one, as in training; mlm adds [CLS] and
    [SEP], and finds [MASK] in text. UserError where `tokenizers` would give other ids than ours.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("a tokenizer for Hugging Face needs tokenizers: pip install tokenizers") from error

    specials = by_role(tokenizer.specials, objective)
    saved = hub_json(tokenizer) | {"truncation": None, "padding": None, "post_processor": None}
    if objective == "mlm":
        saved |= _framing(saved, tokenizer, specials)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(saved))
    check_same_ids(tokenizer, theirs)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": objective == "clm",
        # Given token types, even if all are 0, transformers' GPT-2 would add an embedding for them.
        "model_input_names": ["input_ids", *["token_type_ids"] * (objective == "mlm"), "attention_mask"],
        **{f"{role}_token": name for role, name in specials.items()},
    }
    folder = Path(folder)
    (folder / "tokenizer.json").write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
    return {f"{role}_token_id": tokenizer.specials[name] for role, name in specials.items()}


def hub_json(tokenizer):
    """A tokenizer's tokenizer.json, as a dict."""
    if isinstance(tokenizer, ByteTokenizer):
        return _byte_level_bpe({bytes((b,)): b for b in range(256)}, tokenizer.specials, pattern=None)
    if isinstance(tokenizer, TiktokenTokenizer):
        encoding = tokenizer.encoding
        return _byte_level_bpe(encoding._mergeable_ranks, tokenizer.specials, encoding._pat_str)
    return tokenizer.saved


def check_same_ids(tokenizer, theirs):
    """UserError where tokenizers.Tokenizer `theirs` gives other ids than ours for one of a few hard texts."""
    refusal = f"the tokenizer {tokenizer.name} cannot be written for Hugging Face's libraries: they would"
    for name, id_ in tokenizer.specials.items():
        if (found := theirs.token_to_id(name)) != id_:
            raise UserError(f"{refusal} give {name} the id {found}, it is {id_}")
    special_ids = set(tokenizer.specials.values())
    own = tokenizer.decode([i for i in range(min(tokenizer.vocab_size, 4096)) if i not in special_ids])
    alphabet = getattr(tokenizer, "alphabet", None)
    for text in (*HARD_TEXTS, own):
        for token in theirs.get_added_tokens_decoder().values():  # they find special tokens in text, we do not
            text = text.replace(token.content, "")
        if alphabet is not None:
            text = "".join(c for c in text if c in alphabet)
        ours, ids = tokenizer.encode(text).tolist(), theirs.encode(text, add_special_tokens=False).ids
        if ours != ids:
            at = next((i for i, (a, b) in enumerate(zip(ours, ids)) if a != b), min(len(ours), len(ids)))
            here, there = ours[at : at + 5], ids[at : at + 5]
            raise UserError(f"{refusal} encode {tokenizer.decode(here)!r} as {there}, it is {here}")


def by_role(specials, objective):
    """{role: name} of the special tokens that a model of this objective has a use for."""
    roles = ROLES_OF_OBJECTIVE[objective]
    names = {role: next((name for name in ROLES[role] if name in specials), None) for role in roles}
    if objective == "clm":  # end-of-text also begins texts and pads batches, where no other token does
        names["bos"] = names["bos"] or names["eos"]
        names["pad"] = names["pad"] or names["eos"]
    return {role: name for role, name in names.items() if name is not None}


def _framing(saved, tokenizer, specials):
    """The entries of a tokenizer.json that make [CLS] text [SEP] of a text, and [CLS] text [SEP] text [SEP] of two."""
    from tokenizers.processors import TemplateProcessing

    if lacking := [role for role in ("mask", "cls", "sep", "pad") if role not in specials]:
        what = f"the tokenizer {tokenizer.name} has no {', '.join(lacking)} token, which masked models need"
        raise UserError(f"{what}; its special tokens are {', '.join(tokenizer.specials) or 'none'}")
    cls, sep = specials["cls"], specials["sep"]
    ids = [(name, tokenizer.specials[name]) for name in (cls, sep)]
    frame = TemplateProcessing(f"{cls} $A {sep}", f"{cls} $A {sep} $B:1 {sep}:1", ids)  # :1 is the token type
    # The blank before a masked word belongs to it, as in training.
    mask = {"lstrip": tokenizer.space_begins_word}
    added = [token | (mask if token["content"] == specials["mask"] else {}) for token in saved["added_tokens"]]
    return {"post_processor": json.loads(frame.__getstate__()), "added_tokens": added}


def frame_pairs(folder, tokenizer, task):
    """Lets a folder's tokenizer.json, if there is one, make of two texts what a decoder's head for labels has read.

    End-of-text stands between them and, in the task qa, behind them.
    """
    from tokenizers.processors import TemplateProcessing

    path, names = folder / "tokenizer.json", {id_: name for name, id_ in tokenizer.specials.items()}
    if tokenizer.eot is None or not path.exists():
        return
    saved, begin, end = read_json(path), [names[id_] for id_ in tokenizer.begin], names[tokenizer.eot]
    pair = [*begin, "$A", end, "$B"] + [end] * (task == "qa")
    frame = TemplateProcessing([*begin, "$A"], pair, [(name, tokenizer.specials[name]) for name in {*begin, end}])
    old = saved.get("post_processor") or {}
    kept = [part for part in old.get("processors", [old]) if part.get("type") == "ByteLevel"]  # for offsets
    saved["post_processor"] = {"type": "Sequence", "processors": [*kept, json.loads(frame.__getstate__())]}
    path.write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")


def _byte_level_bpe(ranks, specials, pattern):
    """The tokenizer.json, as a dict, of a byte-level BPE.

    ranks: {token's bytes: id}, ids in the order of merging. pattern: what cuts text into words, as tiktoken's pat_str;
    None: GPT-2's, which is ByteLevel's own.
    """
    import tokenizers

    character_of = {byte: character for character, byte in byte_of_character().items()}
    written = {token: "".join(character_of[b] for b in token) for token in ranks}
    vocab = {written[token]: id_ for token, id_ in sorted(ranks.items(), key=itemgetter(1))}
    specials = dict(sorted(specials.items(), key=itemgetter(1)))
    if [*vocab.values(), *specials.values()] != list(range(len(vocab) + len(specials))):
        vocab |= specials  # or `tokenizers` would give them the ids that are left out
    is_gpt2s = pattern is None or pattern.startswith(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}")
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_gpt2s)
    if not is_gpt2s:
        # `tokenizers`' engine reads `{1,3}+` as `({1,3})+`, and `$` as the end of a line.
        pattern = re.sub(r"([+*?]|\{\d+(?:,\d*)?\})\+", r"\1", pattern).replace("$", r"\z")
        cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        words = tokenizers.pre_tokenizers.Sequence([cut, words])
    merges = [(written[left], written[right]) for left, right in merges_of(ranks)]
    # ignore_merges is tiktoken's rule: a word that is a token does not go through merges.
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    bpe.pre_tokenizer, bpe.decoder = words, tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in specials])
    return json.loads(bpe.to_str())


def merges_of(ranks):
    """The merges that make the tokens of tiktoken's {token's bytes: rank}, in order, as pairs of bytes.

    Merging a token's bytes by the tokens of lower rank leaves its parts. If these are two, they are its merge;
    otherwise the token has no merge and comes up only as a whole word.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=itemgetter(1)):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            made = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            if (lowest := min(made)) >= rank:
                break
            at = made.index(lowest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges
