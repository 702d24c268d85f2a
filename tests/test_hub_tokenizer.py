"""Tokenizers as Hugging Face's files: what AutoTokenizer makes of them is what ours does, in both directions."""

import json
import logging
import re
import warnings
from pathlib import Path

import pytest
import tiktoken
import tokenizers
import transformers
from test_tokenizer import (
    BERT_VOCAB,
    CHARACTERS,
    CORPUS,
    GPT2_FILES,
    HOSTILE,
    byte_level_like,
    random_texts,
    sentencepiece_like,
    unigram_like,
    vocab_file,
)  # fmt: skip

from config import UserError
from conftest import ROOT
from interop import tokenizer as hub_tokenizer
from interop.hub_tokenizer import hub_tokenizer_file, load_hub_tokenizer
from interop.tokenizer import check_same_ids, merges_of, write_tokenizer
from sample import masked_ids
from text.tokenizer import (
    BERT_SPECIALS,
    SPECIALS,
    TiktokenTokenizer,
    load_tokenizer,
    train_bpe,
    write_character_tokenizer,
)

DATA = Path(ROOT).parent / "shared/data"
REAL_TEXTS = [DATA / name for name in ("tinyshakespeare.txt", "wikitext2/valid.txt", "sst2/dev.tsv")]
MASKED = ("byte", "bpe", "cased", "uncased")
KINDS = (*MASKED, "gpt2", "cl100k_base", "o200k_base", "gpt2 file", "llama3 file", "llama2 file", "unigram file",
         "characters")  # fmt: skip
TEXTS = HOSTILE + CORPUS + random_texts(200, seed=1)


def tiktoken_pattern(name, monkeypatch):
    """How an encoding of tiktoken's cuts words, without fetching its vocabulary."""
    import tiktoken_ext.openai_public

    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    return getattr(tiktoken_ext.openai_public, name)()["pat_str"]


def make(kind, folder):
    """A tokenizer of each kind; gpt2's and BERT's are their own, others small."""
    path = folder / "tokenizer.json"
    if kind == "gpt2" and not GPT2_FILES.is_dir() or kind == "uncased" and not BERT_VOCAB.exists():
        pytest.skip(f"the vocabulary of {kind} is absent")
    if kind in ("byte", "gpt2"):
        return load_tokenizer(kind)
    if kind in ("cased", "uncased"):
        return load_tokenizer(vocab_file(folder) if kind == "cased" else str(BERT_VOCAB))
    if kind == "characters":
        write_character_tokenizer(CHARACTERS, path)
    elif kind.endswith("file"):
        name = kind.split()[0]
        made = {"llama2": sentencepiece_like, "unigram": unigram_like}.get(name, byte_level_like)
        made("prepend" if name == "llama2" else name).save(str(path))
    else:
        train_bpe(CORPUS, 777, path)
    if not kind.endswith("_base"):
        return load_tokenizer(str(path))
    with pytest.MonkeyPatch.context() as patch:
        pattern = tiktoken_pattern(kind, patch)
    specials = {"<|endoftext|>": 775, "<|endofprompt|>": 790}  # ids with gaps, as theirs have
    ranks = load_tokenizer(str(path)).encoding._mergeable_ranks
    encoding = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    return TiktokenTokenizer(kind, encoding)


def written(tokenizer, folder, objective):
    """(what AutoTokenizer loads, the ids that write_tokenizer returned); any warning is an error."""
    ids = write_tokenizer(tokenizer, folder, objective, block_size=99_999_999)
    return loaded(folder), ids


def loaded(folder):
    """What AutoTokenizer makes of a folder; nothing may be warned of."""
    records, handler = [], logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []
    return theirs


@pytest.fixture(scope="module", params=KINDS)
def causal(request, tmp_path_factory):
    """(kind, our tokenizer, theirs, ids returned, folder) of a causal model."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    (folder / "out").mkdir()
    ours = make(request.param, folder)
    return request.param, ours, *written(ours, folder / "out", "clm"), folder / "out"


@pytest.fixture(scope="module", params=MASKED)
def masked(request, tmp_path_factory):
    """(our tokenizer, theirs, ids returned) of a masked model."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "out").mkdir()
    ours = make(request.param, folder)
    return ours, *written(ours, folder / "out", "mlm"), folder / "out"


def plain(texts, kind, ours):
    """Texts that name no special token, which Hugging Face finds in text; of characters alone, what is made of them."""
    if kind == "characters":
        texts = ["".join(c for c in text if c in CHARACTERS) for text in texts]
    return [text for text in texts if not any(name in text for name in ours.specials)]


def nameless(text, kind, ours):
    """A text without the names of special tokens; wikitext has <unk>."""
    for name in ours.specials:
        text = text.replace(name, "")
    return plain([text], kind, ours)[0]


def test_autotokenizer_gives_our_ids_and_text(causal):
    kind, ours, theirs, _, _ = causal
    texts = plain(TEXTS, kind, ours)
    assert len(texts) > 100
    for text in texts:
        ids = ours.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text[:50]
        if kind not in ("cased", "uncased", "unigram file", "llama2 file"):  # which do not keep all spaces
            assert theirs.decode(ids) == ours.decode(ids)
        if kind not in ("llama2 file", "llama3 file"):  # whose files, written as they are, put a token before each text
            assert theirs(text)["input_ids"] == ids


@pytest.mark.parametrize("path", REAL_TEXTS, ids=lambda path: path.stem)
def test_autotokenizer_gives_our_ids_of_real_texts(causal, path):
    kind, ours, theirs, _, _ = causal
    if not path.exists():
        pytest.skip(f"{path} is absent")
    text = nameless(path.read_text(encoding="utf-8")[:60_000], kind, ours)
    ids = ours.encode(text).tolist()
    assert len(ids) > 9000 or kind == "characters" or len(ids) > 2000
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids


@pytest.mark.slow
@pytest.mark.parametrize("path", REAL_TEXTS, ids=lambda path: path.stem)
def test_autotokenizer_gives_our_ids_of_whole_real_texts(causal, path):
    kind, ours, theirs, _, _ = causal
    if not path.exists():
        pytest.skip(f"{path} is absent")
    text = nameless(path.read_text(encoding="utf-8"), kind, ours)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text).tolist()


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_words_are_cut_alike_at_every_kind_of_character(causal, step):
    kind, ours, theirs, _, _ = causal
    codes = [c for c in [*range(0, 0x3000, step), *range(0x3000, 0x110000, 997 * step)] if not 0xD800 <= c < 0xE000]
    texts = [f"a{chr(c)}b {chr(c)}{chr(c)} x'{chr(c)}'S\n{chr(c)}" for c in codes]
    texts = plain(["".join(texts[i : i + 32]) for i in range(0, len(texts), 32)], kind, ours)
    for text, ids in zip(texts, theirs(texts, add_special_tokens=False)["input_ids"]):
        assert ours.encode(text).tolist() == ids, ascii(text)


def test_what_is_written_comes_back_as_the_same_tokenizer(causal, tmp_path):
    kind, ours, _, ids, folder = causal
    again = load_tokenizer(hub_tokenizer_file(folder))
    assert (again.vocab_size, again.specials, again.eot) == (ours.vocab_size, ours.specials, ours.eot)
    for text in plain(TEXTS, kind, ours):
        assert again.encode(text).tolist() == ours.encode(text).tolist()
    if kind not in ("characters", "cased", "uncased"):
        for text in TEXTS:  # with special tokens' names
            assert again.encode(text).tolist() == ours.encode(text).tolist()
    if kind == "gpt2":
        return  # as the smaller ones, and slow
    assert write_tokenizer(again, tmp_path, "clm", 99_999_999) == ids
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((folder / name).read_text())


def test_causal_models_have_end_of_text_before_and_after_texts(causal):
    kind, ours, theirs, ids, folder = causal
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == tuple(
        ids.get(f"{role}_token_id") for role in ("eos", "bos", "pad"))
    assert theirs.eos_token_id == ours.eot
    if kind == "characters":
        return
    pad = ours.specials.get("<|pad|>", ours.specials.get("[PAD]", ours.specials.get("<pad>", ours.eot)))
    assert theirs.pad_token_id == pad
    assert theirs.bos_token_id == ours.specials.get("<s>", ours.specials.get("<|begin_of_text|>", ours.eot))
    batch = theirs(["the", "the quick self"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}  # token types would add an embedding in GPT-2
    assert pad in batch["input_ids"][0] and batch["attention_mask"][0][-1] == 0
    assert theirs.model_max_length == 99_999_999
    assert not json.loads((folder / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"]


@pytest.mark.parametrize("model_type, kind", [
    ("gpt2", "bpe"), ("llama", "llama2 file"), ("qwen3", "llama3 file"), ("mistral", "unigram file"), ("bert", "cased"),
])  # fmt: skip
def test_a_models_config_beside_it_changes_no_ids(tmp_path, model_type, kind):
    ours = make(kind, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text(json.dumps({"model_type": model_type}))
    theirs, _ = written(ours, tmp_path / "out", "mlm" if kind == "cased" else "clm")
    for text in plain(TEXTS, kind, ours):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text).tolist()


# ---- masked models

def role(ours, name):
    return ours.specials.get(f"<|{name}|>", ours.specials.get(f"[{name.upper()}]"))


def test_masked_models_texts_are_framed_as_in_training(masked):
    ours, theirs, ids, folder = masked
    cls, sep = role(ours, "cls"), role(ours, "sep")
    again = load_tokenizer(hub_tokenizer_file(folder))
    assert (again.specials, again.continuations) == (ours.specials, ours.continuations)
    for text in plain(TEXTS, "masked", ours):
        own = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == [cls, *own, sep]
        assert theirs(text, add_special_tokens=False)["input_ids"] == again.encode(text).tolist() == own
    for name in ("mask", "cls", "sep", "pad"):
        assert getattr(theirs, f"{name}_token_id") == ids[f"{name}_token_id"] == role(ours, name)
    assert theirs.unk_token_id == ids.get("unk_token_id") == ours.specials.get("[UNK]")
    assert theirs.eos_token_id is None and theirs.bos_token_id is None
    assert theirs.encode("the", padding="max_length", max_length=20)[-1] == role(ours, "pad")


def test_pairs_have_token_types(masked):
    ours, theirs, _, _ = masked
    cls, sep = role(ours, "cls"), role(ours, "sep")
    a, b = ours.encode("the quick").tolist(), ours.encode("self").tolist()
    pair = theirs("the quick", "self")
    assert pair["input_ids"] == [cls, *a, sep, *b, sep]
    assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)


def test_masks_in_a_prompt_stand_where_sample_puts_them(masked):
    ours, theirs, ids, _ = masked
    for prompt in ("import {}", "import {} as {}.", "{}", "a{}b", "{} {}"):
        expected = masked_ids(ours, prompt.replace("{}", "[MASK]"))
        assert theirs(prompt.replace("{}", theirs.mask_token))["input_ids"] == expected
        assert expected.count(ids["mask_token_id"]) == prompt.count("{}")


def test_fill_mask_pipeline_runs(masked):
    ours, theirs, ids, folder = masked
    cfg = transformers.BertConfig(
        vocab_size=ours.vocab_size, hidden_size=20, num_hidden_layers=1, num_attention_heads=5, intermediate_size=20,
        max_position_embeddings=33, pad_token_id=ids["pad_token_id"])
    model = transformers.BertForMaskedLM(cfg).eval()
    import torch

    found = transformers.pipeline("fill-mask", model=model, tokenizer=theirs)(f"import {theirs.mask_token} as", top_k=3)
    with torch.no_grad():
        logits = model(torch.tensor([masked_ids(ours, "import [MASK] as")])).logits[0]
    place = masked_ids(ours, "import [MASK] as").index(ids["mask_token_id"])
    assert [guess["token"] for guess in found] == logits[place].topk(3).indices.tolist()


def test_masked_model_needs_its_special_tokens(tmp_path):
    ours = make("gpt2 file", tmp_path)
    with pytest.raises(UserError, match="has no mask, cls, sep, pad token, which masked models need"):
        write_tokenizer(ours, tmp_path, "mlm", 99)


# ---- tiktoken's ranks as merges

def test_merges_are_those_that_were_learnt(tmp_path):
    train_bpe(CORPUS, 777, tmp_path / "t.json")
    learnt = json.loads((tmp_path / "t.json").read_text())["model"]["merges"]
    write_tokenizer(load_tokenizer(str(tmp_path / "t.json")), tmp_path, "clm", 99)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"] == learnt
    assert len(learnt) == 777 - 256 - len(SPECIALS)


@pytest.mark.skipif(not GPT2_FILES.is_dir(), reason=f"{GPT2_FILES} is absent")
def test_merges_of_gpt2_are_those_of_its_own_file():
    merges = merges_of(load_tokenizer("gpt2").encoding._mergeable_ranks)
    files = [path.read_text(encoding="utf-8") for path in GPT2_FILES.iterdir()]
    own = next(text for text in files if text.startswith("#version"))
    character = {byte: c for c, byte in hub_tokenizer.byte_of_character().items()}
    ours = [" ".join("".join(character[b] for b in part) for part in pair) for pair in merges]
    assert ours == own.strip().split("\n")[1:] and len(ours) == 50_000


def test_a_word_that_no_merges_make_is_still_its_token(tmp_path):
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256, b" whole": 257, b"abab": 258}
    encoding = tiktoken.Encoding("odd", pat_str=r"\p{L}+| \p{L}+|\s+|.", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 300})
    ours = TiktokenTokenizer("odd", encoding)
    theirs, ids = written(ours, tmp_path, "clm")
    assert ids["eos_token_id"] == 300 == theirs.eos_token_id
    for text, expected in ((" whole", [257]), (" wholes", [*b" wholes"]), ("ababab", [258, 256]), ("cab", [99, 256])):
        assert ours.encode(text).tolist() == theirs(text)["input_ids"] == expected


def test_tokenizer_that_would_give_other_ids_is_not_written(tmp_path, monkeypatch):
    ours = make("bpe", tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(hub_tokenizer, "merges_of", lambda ranks: merges_of(ranks)[1:])
    with pytest.raises(UserError, match="cannot be written for Hugging Face's libraries: they would encode") as caught:
        write_tokenizer(ours, tmp_path / "out", "clm", 99)
    assert "\n" not in str(caught.value) and list((tmp_path / "out").iterdir()) == []
    shifted = json.loads((tmp_path / "tokenizer.json").read_text())
    shifted["added_tokens"] = shifted["added_tokens"][1:] + shifted["added_tokens"][:1]
    with pytest.raises(UserError, match=re.escape("they would give <|endoftext|> the id 776, it is 772")):
        check_same_ids(ours, tokenizers.Tokenizer.from_str(json.dumps(shifted)))


# ---- a folder's tokenizer

def test_tokenizer_of_a_folder_is_the_newest_kind_that_is_there(tmp_path):
    told = re.escape("write one with transformers: AutoTokenizer.from_pretrained(X).save_pretrained(X)")
    with pytest.raises(UserError, match=told):
        hub_tokenizer_file(tmp_path)
    saved = json.loads(byte_level_like("gpt2").to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(saved["vocab"] | {"<|endoftext|>": 555}))
    with pytest.raises(UserError, match=told):
        hub_tokenizer_file(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, saved["merges"])))
    assert load_tokenizer(hub_tokenizer_file(tmp_path)).eot == 555
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')  # whose words are cut in another way
    with pytest.raises(UserError, match=told):
        hub_tokenizer_file(tmp_path)
    vocab_file(tmp_path)
    assert load_tokenizer(hub_tokenizer_file(tmp_path)).specials.keys() == set(BERT_SPECIALS)
    byte_level_like("qwen3").save(str(tmp_path / "tokenizer.json"))
    assert hub_tokenizer_file(tmp_path) == str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("says, told", [
    ({"do_lower_case": False}, None), ({"do_lower_case": True}, "do_lower_case True"),
    ({"strip_accents": False}, "strip_accents False"), ({"tokenize_chinese_chars": False}, "tokenize_chinese_chars False"),
    ({}, "added_tokens.json"),
])  # fmt: skip
def test_a_vocabulary_that_is_not_used_in_the_usual_way_is_refused(says, told, tmp_path):
    vocab_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(says))
    if told == "added_tokens.json":
        (tmp_path / told).write_text("{}")
    if told is None:
        assert load_hub_tokenizer(tmp_path).specials.keys() == set(BERT_SPECIALS)
    else:
        with pytest.raises(UserError, match=f"has no tokenizer.json, but {told}, which we do not heed"):
            load_hub_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 99_999])
def test_a_damaged_config_of_a_tokenizer_is_refused_in_one_line(text, tmp_path):
    byte_level_like("gpt2").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer_config.json .*copy it from its source again") as caught:
        load_hub_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_post_processor_that_names_what_it_lacks_is_refused_in_one_line(tmp_path):
    saved = json.loads(byte_level_like("gpt2").to_str())
    single = [{"SpecialToken": {"id": "<gone>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    saved["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="tokenizer.json has a post-processor of no known form .'<gone>'.; copy it"):
        load_hub_tokenizer(tmp_path)


@pytest.mark.parametrize("adds, begin", [(None, ["<|endoftext|>"]), (True, ["<|endoftext|>"]), (False, [])])
def test_what_begins_a_text_is_what_the_file_says_unless_the_config_says_otherwise(adds, begin, tmp_path):
    saved = json.loads(byte_level_like("gpt2").to_str())
    end = next(token["id"] for token in saved["added_tokens"] if token["content"] == "<|endoftext|>")
    pieces = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    saved["post_processor"] = {
        "type": "TemplateProcessing", "single": pieces, "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [end], "tokens": ["<|endoftext|>"]}},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    says = {"bos_token": {"content": "<|endoftext|>"}} | ({} if adds is None else {"add_bos_token": adds})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(says))
    tokenizer = load_hub_tokenizer(tmp_path)
    assert tokenizer.begin == [tokenizer.specials[name] for name in begin]
    assert tokenizer.before_text == end
