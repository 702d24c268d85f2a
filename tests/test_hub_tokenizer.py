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

from config import UserError
from conftest import ROOT, slow
from interop import tokenizer as hub_tokenizer
from interop.hub_tokenizer import QWEN_WORDS, hub_tokenizer_file, load_hub_tokenizer
from interop.tokenizer import check_same_ids, merges_of, write_tokenizer
from sample import masked_ids
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


@pytest.mark.parametrize("path", [REAL_TEXTS[1], *slow(REAL_TEXTS[0], REAL_TEXTS[2])], ids=lambda path: path.stem)
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
    ({"do_lower_case": False}, None), ({"do_lower_case": True}, None), ({}, "has a vocabulary with capitals"),
    ({"do_lower_case": True, "strip_accents": False}, None),
    ({"do_lower_case": False, "tokenize_chinese_chars": False}, None),
    ({"do_lower_case": False, "tokenizer_class": "RobertaTokenizer"}, "is no file of a RobertaTokenizer"),
    ({"do_lower_case": False, "added_tokens_decoder": {"200": {"content": "x", "special": False}}}, "other added tokens"),
])  # fmt: skip
def test_a_vocabulary_alone_gives_autotokenizers_ids_or_is_refused(says, told, tmp_path):
    vocab_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(says))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    if told is None:
        ours, theirs = load_hub_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in ("The quick É é 日日 self, ToKen", CORPUS[1][:999]):
            assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    else:
        with pytest.raises(UserError, match=told):
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
    with pytest.raises(UserError, match="tokenizer.json has a post-processor of no known form .PanicException.*; copy it"):
        load_hub_tokenizer(tmp_path)


def first_by(processor, name, id_):
    """A post-processor of tokenizers that puts a token before a text; None for one that puts nothing."""
    from tokenizers import processors

    template = processors.TemplateProcessing(f"{name} $A", f"{name} $A $B", [(name, id_)])
    return {"template": template, "sequence": processors.Sequence([processors.ByteLevel(), template]), "none": None,
            "bytes": processors.ByteLevel(), "bert": processors.BertProcessing((name, id_), (name, id_)),
            "roberta": processors.RobertaProcessing((name, id_), (name, id_))}[processor]  # fmt: skip


@pytest.mark.parametrize("post", ["template", "sequence", "bytes", "none", "bert", "roberta"])
@pytest.mark.parametrize("adds", [True, False, None])
@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "GPT2TokenizerFast", "Qwen2TokenizerFast",
                                  *slow("TokenizersBackend", "LlamaTokenizerFast")])  # fmt: skip
def test_what_begins_a_text_is_what_autotokenizer_puts_there(name, adds, post, tmp_path):
    made = byte_level_like("qwen3" if name == "Qwen2TokenizerFast" else "gpt2")
    made.post_processor = first_by(post, "<|endoftext|>", made.token_to_id("<|endoftext|>"))
    saved = json.loads(made.to_str())
    if name == "Qwen2TokenizerFast":
        saved["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = QWEN_WORDS
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    says = {"tokenizer_class": name, "bos_token": "<|endoftext|>"} | ({} if adds is None else {"add_bos_token": adds})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(says))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2" if name[:3] == "GPT" else "llama"}))
    ours, theirs = load_hub_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = [*ours.begin, *ours.encode("hello").tolist()]
    ends = [ours.eot] * (post in ("bert", "roberta"))  # what ends a text does not belong to a prompt
    assert theirs("hello")["input_ids"] == ids + ends
    assert ours.before_text == made.token_to_id("<|endoftext|>")


CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", "GPT2TokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer",
           "BertTokenizer", "RobertaTokenizer", None)  # fmt: skip
SAYS = ({}, {"add_prefix_space": True}, {"add_prefix_space": False, "add_bos_token": True, "bos_token": "<s>"},
        {"do_lower_case": True, "legacy": True}, {"do_lower_case": False, "strip_accents": True},
        {"tokenize_chinese_chars": False, "do_lower_case": False})  # fmt: skip
OWN_CLASS = {"gpt2": "GPT2TokenizerFast", "llama2": "LlamaTokenizer", "metaspace": "LlamaTokenizer",
             "qwen3": "Qwen2Tokenizer", "bert": "BertTokenizer"}  # fmt: skip
MODEL_TYPES = {"gpt2": "gpt2", "qwen3": "qwen3", "bert": "bert", "metaspace": "mistral"}
SOME_TEXTS = [" led", "\n the  A b\tC", "The Éa café 日本語x", "don't 'S 1234", "<think>x</think> a<think>", *TEXTS[-40:]]


def folder_of(kind, name, says, folder):
    """A folder with a tokenizer.json of a kind that is loaded by a class with settings."""
    if kind == "bert":
        load_tokenizer(vocab_file(folder)).save(folder / "tokenizer.json")
        (folder / "vocab.txt").unlink()
    else:
        made = {"gpt2": byte_level_like, "qwen3": byte_level_like, "llama3": byte_level_like, "unigram": unigram_like}
        made.get(kind, sentencepiece_like)({"llama2": "prepend"}.get(kind, kind)).save(str(folder / "tokenizer.json"))
        if kind == "qwen3":
            saved = json.loads((folder / "tokenizer.json").read_text())
            saved["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = QWEN_WORDS
            (folder / "tokenizer.json").write_text(json.dumps(saved))
    named = {} if name is None else {"tokenizer_class": name}
    (folder / "tokenizer_config.json").write_text(json.dumps(says | named))
    (folder / "config.json").write_text(json.dumps({"model_type": MODEL_TYPES.get(kind, "llama")}))
    return folder


@pytest.mark.parametrize("says", SAYS, ids=lambda says: " ".join(says))
@pytest.mark.parametrize("kind, name", [
    pytest.param(kind, name, marks=[] if name == OWN_CLASS.get(kind, CLASSES[0]) else pytest.mark.slow)
    for kind in ("gpt2", "qwen3", "llama2", "metaspace", "llama3", "unigram", "bert") for name in CLASSES])  # fmt: skip
def test_every_class_and_setting_gives_autotokenizers_ids_or_is_refused(kind, name, says, tmp_path):
    folder = folder_of(kind, name, says, tmp_path)
    try:
        ours = load_hub_tokenizer(folder)
    except UserError as error:
        assert "\n" not in str(error)
        keeps_capitals = kind == "bert" and "do_lower_case" not in says
        assert name not in (OWN_CLASS.get(kind), "PreTrainedTokenizerFast", "TokenizersBackend") or keeps_capitals
        return
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in SOME_TEXTS:
        if not any(special in text for special in ours.specials):
            assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"], text
            if kind != "bert":
                ids = [*ours.begin, *ours.encode(text).tolist()]
                assert theirs(text)["input_ids"] == ids, text


@pytest.mark.parametrize("kind, says", [("llama2", {}), ("llama2", {"legacy": True}), ("metaspace", {}), ("unigram", {}),
    ("gpt2", {"add_prefix_space": True}), ("qwen3", {}), ("llama3", {}), ("bert", {"do_lower_case": True})])  # fmt: skip
@pytest.mark.parametrize("own", [True, False], ids=["its class", "the file alone"])
def test_text_in_pieces_has_the_ids_of_the_whole(kind, says, own, tmp_path):
    """prepare.py cuts long text between a letter or digit and a blank."""
    folder = folder_of(kind, OWN_CLASS.get(kind) if own else "PreTrainedTokenizerFast", says, tmp_path)
    ours, theirs = load_hub_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in (CORPUS[1][:9000], "a\n\nb c\td \n e  f\r\ng"):
        pieces = re.split(r"(?<=[0-9A-Za-z])(?=\s)", text)
        assert len(pieces) > 5
        ids = [id_ for i, piece in enumerate(pieces) for id_ in ours.encode(piece, continues=i > 0).tolist()]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind, says", [("llama2", {}), ("gpt2", {"add_prefix_space": True}),
                                        ("bert", {"do_lower_case": True, "strip_accents": False})])  # fmt: skip
def test_a_folders_tokenizer_that_is_saved_as_a_file_has_its_ids(kind, says, tmp_path):
    ours = load_hub_tokenizer(folder_of(kind, OWN_CLASS[kind], says, tmp_path))
    alone = load_tokenizer(str(tmp_path / "tokenizer.json"))
    ours.save(tmp_path / "saved.json")
    again = load_tokenizer(str(tmp_path / "saved.json"))
    assert any(ours.encode(text).tolist() != alone.encode(text).tolist() for text in SOME_TEXTS)
    assert all(ours.encode(text).tolist() == again.encode(text).tolist() for text in SOME_TEXTS)


def test_words_added_to_a_bert_tokenizer_are_tokens(tmp_path):
    theirs = transformers.BertTokenizer(
        vocab={token: i for i, token in enumerate(Path(vocab_file(tmp_path)).read_text().splitlines())},
        do_lower_case=False)
    (tmp_path / "vocab.txt").unlink()
    theirs.add_tokens(["covid19", "aspirin", "The quick"])
    theirs.add_special_tokens({"additional_special_tokens": ["[DRUG]"]})
    theirs.save_pretrained(tmp_path)
    ours, theirs = load_hub_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs) and ours.specials == {
        token.content: i for i, token in theirs.added_tokens_decoder.items() if token.special}  # fmt: skip
    for text in ("the quick took aspirin and covid19", "The quick covid19covid19, aspirins", *CORPUS[1:2]):
        assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.specials["[DRUG]"] not in ours.encode("the [DRUG] x").tolist()
    assert ours.decode(ours.encode("the aspirin")) == " the aspirin" and len(ours.continuations) > 9


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Lowercase"}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
], ids=["lower case", "prefix space", "words uncut"])  # fmt: skip
def test_what_a_file_of_our_own_shape_has_beyond_it_is_heeded(change, tmp_path, request):
    train_bpe(CORPUS, 400, tmp_path / "tokenizer.json")
    plain = load_tokenizer(str(tmp_path / "tokenizer.json"))
    saved = json.loads((tmp_path / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    ours, theirs = load_hub_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The Quick self.encode", CORPUS[1][:999]):
        assert ours.encode(text).tolist() == theirs(text)["input_ids"]
        assert "words uncut" in request.node.name or ours.encode(text).tolist() != plain.encode(text).tolist()


@pytest.mark.parametrize("listed, told", [
    ({"added_tokens_decoder": {"600": {"content": "new", "special": False}}}, "lists other added tokens"),
    ({"added_tokens_decoder": {}}, None), ({"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "auto_map, which we do not"),
    ({"added_tokens_decoder": {"x": {"content": "new", "special": True}}}, "lists other added tokens"),
    ({"tokenizer_class": "RobertaTokenizerFast"}, "tokenizer_class RobertaTokenizer, which we do not know"),
])  # fmt: skip
def test_tokens_that_only_other_files_list_are_refused(listed, told, tmp_path):
    byte_level_like("gpt2").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(listed))
    if told is None:
        assert load_hub_tokenizer(tmp_path).vocab_size == 556
        (tmp_path / "tokenizer_config.json").unlink()
        (tmp_path / "added_tokens.json").write_text('{"<|endoftext|>": 555, "new": 556}')
        told = "has tokens in added_tokens.json that are not in tokenizer.json"
    with pytest.raises(UserError, match=told) as caught:
        load_hub_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("files, stops", [
    ({"generation_config": {"eos_token_id": [3, 5]}, "config": {"eos_token_id": 4}}, {3, 5}),
    ({"generation_config": {"eos_token_id": 7}, "config": {"eos_token_id": 4}}, {7}),
    ({"generation_config": {}, "config": {"eos_token_id": [4]}}, {4}), ({"config": {"eos_token_id": 0}}, {0}),
    ({"config": {}}, {556}), ({"config": {"eos_token_id": None}, "tokenizer_config": {}}, {555}),
])  # fmt: skip
def test_generation_stops_at_the_tokens_that_the_folder_names(files, stops, tmp_path):
    made = byte_level_like("gpt2")
    made.add_special_tokens(["<|im_end|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    for name, content in ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}} | files).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    tokenizer = load_hub_tokenizer(tmp_path)
    assert (tokenizer.stops, tokenizer.eot) == (stops, 555)
    assert load_tokenizer("byte").stops == {256}


def test_a_regex_that_panics_is_an_error_of_one_line(tmp_path, capfd):
    saved = json.loads(byte_level_like("gpt2").to_str())
    cut = {"type": "Split", "pattern": {"Regex": r"(?:a+)+\1?(a|b|ab)*c"}, "behavior": "Isolated", "invert": False}
    saved["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, saved["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = load_hub_tokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot encode the text .PanicException: .*retry-limit") as caught:
        tokenizer.encode("a" * 4000 + "b")
    assert "\n" not in str(caught.value)
