"""Models as GGUF: transformers reads back the same model, and llama.cpp writes the same tokens."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import config
import convert
from config import UserError
from interop.gguf import write_gguf
from interop.pretrained import load_model, open_model
from test_convert import BERT, GPT2, LLAMA, V, make_run
from text.tokenizer import HARD_TEXTS, load_tokenizer, train_bpe

gguf = pytest.importorskip("gguf")
# transformers reads no number of GPT-2's positions and no width of Qwen3's heads, but takes their defaults.
QWEN3 = replace(LLAMA, qk_norm=True, head_dim=128)
MODELS = {"gpt2": replace(GPT2, block_size=1024), "llama": LLAMA, "llama tied": replace(LLAMA, tie_embeddings=True),
          "qwen3": QWEN3}  # fmt: skip
IDS = torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The path of a tokenizer of our own making, and text that it was made from."""
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    texts = [
        "The cat sat on the mat, and the dog on the log: 3 of 17.\n\n  They'll sit there  all day.",
        *HARD_TEXTS,
    ] * 9
    train_bpe(texts, 300, path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_the_same_model(name, tmp_path):
    import transformers

    run = make_run(tmp_path / "run", MODELS[name])
    write_gguf(open_model(run), tmp_path / "model.gguf", "f32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, load_model(run, "cpu")[0](IDS), rtol=1e-5, atol=3e-5)


def test_transformers_reads_the_same_tokenizer(words, tmp_path):
    import transformers

    tokenizer = load_tokenizer(str(words))
    run = make_run(tmp_path / "run", replace(LLAMA, vocab_size=tokenizer.vocab_size + 3), tokenizer=None)
    shutil.copy(words, tmp_path / "run/tokenizer.json")
    meta = {"tokenizer": "tokenizer.json", "vocab_size": tokenizer.vocab_size}
    (tmp_path / "run/meta.json").write_text(json.dumps(meta))
    write_gguf(open_model(run), tmp_path / "model.gguf", "f16")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in HARD_TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).tolist()
    assert theirs.eos_token_id == tokenizer.eot


def test_added_tokens_are_found_in_text_unless_they_are_special(words, tmp_path):
    saved = json.loads(words.read_text())
    n = 1 + max(token["id"] for token in saved["added_tokens"])
    saved["added_tokens"].append(saved["added_tokens"][0] | {"id": n, "content": "<tool>", "special": False})
    run = make_run(tmp_path / "run", replace(LLAMA, vocab_size=n + 1), tokenizer=None)
    (tmp_path / "run/tokenizer.json").write_text(json.dumps(saved))
    (tmp_path / "run/meta.json").write_text(json.dumps({"tokenizer": "tokenizer.json", "vocab_size": n + 1}))
    write_gguf(open_model(run), tmp_path / "model.gguf", "f16")
    kinds = gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert kinds[n] == gguf.TokenType.USER_DEFINED and kinds[n - 1] == gguf.TokenType.CONTROL


def test_bytes_that_begin_texts_with_a_blank_are_no_known_words():
    from interop.gguf import WORDS, words_of

    cut = {"type": "Split", "pattern": {"Regex": list(WORDS)[1]}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    for last, is_known in ((bytes_, True), (bytes_ | {"add_prefix_space": True}, False)):
        words = words_of({"type": "Sequence", "pretokenizers": [cut, last]})
        assert (words in WORDS) == is_known


def test_matrices_have_the_type_that_is_asked_for(tmp_path):
    run = open_model(make_run(tmp_path / "run", replace(LLAMA, n_inner=64)))
    for kind in ("f32", "f16", "q8_0"):
        write_gguf(run, tmp_path / f"{kind}.gguf", kind)
    exact, half, bits8 = (
        {t.name: t for t in gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors} for kind in ("f32", "f16", "q8_0")
    )
    assert exact.keys() == half.keys() == bits8.keys() and len(exact) == 3 + 9 * LLAMA.n_layer
    for name, tensor in exact.items():
        value = tensor.data
        if value.ndim == 1:
            assert np.array_equal(half[name].data, value) and np.array_equal(bits8[name].data, value)
            continue
        assert half[name].data.dtype == np.float16 and np.array_equal(half[name].data, value.astype(np.float16))
        found = gguf.quants.dequantize(bits8[name].data, bits8[name].tensor_type)
        if value.shape[-1] % 32:  # 48 wide
            assert np.array_equal(found, value.astype(np.float16))
        else:
            step = np.abs(value.reshape(-1, 32)).max(1, keepdims=True) / 127
            assert np.abs((found - value).reshape(-1, 32)).max() <= (0.51 * step).max()
            assert bits8[name].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert any(t.tensor_type == gguf.GGMLQuantizationType.Q8_0 for t in bits8.values())


def characters(run):
    """Gives a run a tokenizer of characters."""
    from text.tokenizer import write_character_tokenizer

    write_character_tokenizer("abc ", run / "tokenizer.json")
    (run / "meta.json").write_text(json.dumps({"tokenizer": "tokenizer.json", "vocab_size": V}))


@pytest.mark.parametrize(("cfg", "change", "line"), [
    (BERT, None, "llama.cpp computes no BERT with objective mlm"),
    (replace(LLAMA, window=4), None, "llama.cpp computes no Mistral with window"),
    (replace(GPT2, mlp="gelu"), None, "GPT-2 with mlp gelu_tanh alone, and this model has gelu"),
    (replace(GPT2, norm="rmsnorm"), None, "transformers cannot compute this model; GPT-2 is near, but norm is rmsnorm"),
    (GPT2, characters, "which is no byte-level BPE"),
    (GPT2, lambda run: (run.parent / "model.gguf").touch(), "model.gguf exists; name another file"),
    (GPT2, lambda run: (run / "meta.json").unlink(), "has no meta.json, so its tokenizer is unknown"),
])  # fmt: skip
def test_what_llama_cpp_cannot_run_is_told_in_a_line(cfg, change, line, tmp_path):
    run = make_run(tmp_path / "run", cfg)
    if change:
        change(tmp_path / "run")
    there = {*tmp_path.iterdir()}
    with pytest.raises(UserError) as error:
        write_gguf(open_model(run), tmp_path / "model.gguf", "f16")
    assert line in str(error.value) and "\n" not in str(error.value) and {*tmp_path.iterdir()} == there


def test_command_writes_one_file_or_folder_at_a_time(tmp_path, capsys):
    run = make_run(tmp_path / "run", GPT2)
    argv = [f"--out_dir={run}", f"--to_gguf={tmp_path / 'm.gguf'}"]
    convert.main(config.load(convert.Settings, argv))
    assert "as llama.cpp's gpt2, f16, 0.1 MB" in capsys.readouterr().out
    for wrong in (argv[:1], [*argv, f"--to_hf={tmp_path / 'hf'}"]):
        with pytest.raises(UserError, match="give one of to_hf, a folder, or to_gguf, a file"):
            convert.main(config.load(convert.Settings, wrong))
    with pytest.raises(UserError, match="cannot be written"):
        convert.main(config.load(convert.Settings, [argv[0], f"--to_gguf={tmp_path}/none/m.gguf"]))


RUN_THERE = {
    "gpt2": GPT2, "gpt2 without biases": replace(GPT2, bias=False), "llama": LLAMA,
    "llama with biases": replace(LLAMA, bias=True), "llama 3.1": replace(LLAMA, rope_scale=8.0, rope_context=64),
    "qwen3": replace(QWEN3, head_dim=10),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_THERE)
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_llama_cpp_writes_the_same_tokens(name, tokenizer, words, tmp_path):
    """48 of them, greedily, float32 here, f32 and f16 there; all logits agree in f32."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which builds with gcc and cmake")
    ours = load_tokenizer("byte" if tokenizer == "byte" else str(words))
    cfg = replace(RUN_THERE[name], vocab_size=ours.vocab_size + 2, block_size=64)
    run = make_run(tmp_path / "run", cfg, tokenizer=None)
    if tokenizer == "bpe":
        shutil.copy(words, tmp_path / "run/tokenizer.json")
    names = {"tokenizer": "byte" if tokenizer == "byte" else "tokenizer.json", "vocab_size": ours.vocab_size}
    (tmp_path / "run/meta.json").write_text(json.dumps(names))
    model, ids = load_model(run, "cpu")[0], ours.encode("The cat sat").tolist()
    theirs = {}
    for kind in ("f32", "f16"):
        write_gguf(open_model(run), tmp_path / f"{kind}.gguf", kind)
        path = str(tmp_path / f"{kind}.gguf")
        exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # its cache is f16 else
        theirs[kind] = llama_cpp.Llama(path, n_ctx=64, logits_all=True, verbose=False, n_threads=1, **exact)
    for text in HARD_TEXTS:
        assert theirs["f32"].tokenize(text.encode(), add_bos=False, special=False) == ours.encode(text).tolist()
    theirs["f32"].eval(ids)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0]
    found = torch.tensor(theirs["f32"].scores[: len(ids), : len(logits[0])])
    # llama.cpp looks GPT-2's activation up in a table of 16 bits.
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=2e-2 if name.startswith("gpt2") else 2e-4)
    here, n_sure = list(ids), 0
    theirs["f16"].eval(ids)
    for _ in range(48):
        with torch.no_grad():
            best = model(torch.tensor([here]))[0, -1].topk(2)
        here.append(int(best.indices[0]))
        assert here[-1] == theirs["f32"].scores[theirs["f32"].n_tokens - 1].argmax()
        if best.values[0] - best.values[1] > 0.1:  # a random model has near ties, which 16 bits may turn
            n_sure += 1
            assert here[-1] == theirs["f16"].scores[theirs["f16"].n_tokens - 1].argmax()
        for llama in theirs.values():
            llama.eval(here[-1:])
    assert n_sure > 30
