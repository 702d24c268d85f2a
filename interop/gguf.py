"""Models written as GGUF, the file that llama.cpp runs."""

import os
import re
from pathlib import Path

import numpy as np

from config import UserError
from heads import TunedModel
from interop.families import family_of, their_tensors
from interop.hub_tokenizer import QWEN_WORDS
from interop.tokenizer import hub_json
from ops import frequencies_of

# {family: llama.cpp's architecture}
ARCHITECTURES = {"gpt2": "GPT2", "llama": "LLAMA", "qwen3": "QWEN3"}
# {pattern that cuts text into words, None: GPT-2's: llama.cpp's name of it}
WORDS = {None: "gpt-2", QWEN_WORDS: "qwen2", QWEN_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|"): "llama-bpe"}
NORMAL, CONTROL, IN_TEXT, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens


def write_gguf(source, path, kind):
    """Writes an opened causal model with its tokenizer as GGUF.

    kind: f32, f16 or q8_0, the type of the matrices; vectors and positions are f32. UserError where llama.cpp has no
    such model or tokenizer, or the file exists.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("to_gguf needs gguf; pip install gguf") from error
    architecture, tokenizer = architecture_of(source.cfg), source.load_tokenizer()
    if os.path.lexists(path):
        raise UserError(f"to_gguf {path} exists; name another file, or remove it")
    partial = Path(f"{path}.partial")
    writer = gguf.GGUFWriter(partial, architecture.lower())
    put_settings(writer, source.cfg, Path(path).stem)
    put_tokenizer(writer, tokenizer, source.cfg.vocab_size)
    tensors = list(gguf_tensors(gguf, source, architecture))
    types = {name: tensor_type(gguf, name, shape, kind) for name, shape, _ in tensors}
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, shape, _ in tensors:
        dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(types[name].name, np.uint8))
        as_bytes = gguf.quant_shape_to_byte_shape(shape, types[name]) if dtype == np.uint8 else shape
        writer.add_tensor_info(name, as_bytes, dtype, int(np.prod(as_bytes)) * dtype.itemsize, types[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, _, make in tensors:
            tensor = make().float().numpy()
            if types[name].name == "F16" and not np.isfinite(tensor.astype(np.float16)).all():
                raise UserError(f"the weights {name} are not finite in f16; use --gguf_type=f32")
            writer.write_tensor_data(gguf.quants.quantize(tensor, types[name]))
        writer.close()
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"to_gguf {path} cannot be written ({error}); make room, or name another file") from error
    finally:
        partial.unlink(missing_ok=True)
    size = os.path.getsize(path) / 1e6
    print(f"{source.name}: written to {path} as llama.cpp's {architecture.lower()}, {kind}, {size:,.1f} MB")


def architecture_of(cfg):
    """llama.cpp's architecture that computes the same as a model; UserError where none does."""
    if isinstance(cfg, TunedModel):
        raise UserError(f"llama.cpp has no models that {cfg.task} texts; use --to_hf")
    family = family_of(cfg)
    if family.model_type not in ARCHITECTURES:
        what = "window, a sliding window" if cfg.is_causal else "objective mlm"
        raise UserError(f"llama.cpp computes no {family.name} with {what}; use --to_hf")
    if family.model_type == "gpt2" and cfg.mlp != "gelu_tanh":
        raise UserError(f"llama.cpp computes GPT-2 with mlp gelu_tanh alone, and this model has {cfg.mlp}; use --to_hf")
    return ARCHITECTURES[family.model_type]


def put_settings(writer, cfg, name):
    """Writes a model's settings."""
    writer.add_name(name)
    writer.add_context_length(cfg.block_size)
    writer.add_embedding_length(cfg.n_embd)
    writer.add_block_count(cfg.n_layer)
    writer.add_feed_forward_length(cfg.inner_width)
    writer.add_head_count(cfg.n_head)
    writer.add_head_count_kv(cfg.kv_heads)
    (writer.add_layer_norm_rms_eps if cfg.norm == "rmsnorm" else writer.add_layer_norm_eps)(cfg.norm_eps)
    writer.add_vocab_size(cfg.vocab_size)
    if cfg.position == "rope":
        writer.add_key_length(cfg.head_width)
        writer.add_value_length(cfg.head_width)
        writer.add_rope_dimension_count(cfg.head_width)
        writer.add_rope_freq_base(cfg.rope_theta)


def put_tokenizer(writer, tokenizer, vocab_size):
    """Writes a byte-level BPE with its special tokens; UserError where llama.cpp has no such tokenizer."""
    saved, model = hub_json(tokenizer), hub_json(tokenizer)["model"]
    refusal = f"llama.cpp has no tokenizer such as {tokenizer.name}"
    if model["type"] != "BPE" or saved.get("normalizer") not in (None, {"type": "NFC"}):
        raise UserError(f"{refusal}, which is no byte-level BPE; use --to_hf")
    if (words := words_of(saved.get("pre_tokenizer"))) not in WORDS:
        raise UserError(f"{refusal}, which cuts text into words by {words}; use --to_hf")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    pre, made = WORDS[words], {pair.replace(" ", "") for pair in merges}
    added = {token["content"]: token for token in saved["added_tokens"]}
    tokens, kinds = [f"[unused{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for token, id_ in (model["vocab"] | {name: token["id"] for name, token in added.items()}).items():
        kind = NORMAL if token not in added else CONTROL if added[token]["special"] else IN_TEXT
        tokens[id_], kinds[id_] = token, kind
        if pre != "llama-bpe" and kinds[id_] == NORMAL and len(token) > 1 and token not in made:
            raise UserError(f"{refusal}: no merge makes its token {token!r}; use --to_hf")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # llama.cpp wants merges, and bytes have none: these two tokens never stand side by side in text.
    writer.add_token_merges(merges or [f"{tokens[0]} {tokens[0]}{tokens[0]}"])
    writer.add_add_bos_token(bool(tokenizer.begin))
    if tokenizer.begin:
        writer.add_bos_token_id(tokenizer.begin[0])
    if tokenizer.eot is not None:
        writer.add_eos_token_id(tokenizer.eot)


def words_of(pre_tokenizer):
    """The pattern that cuts text into words, None for GPT-2's; where bytes do not follow it, the whole entry."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if steps == [bytes_ | {"use_regex": True}]:
        return None
    cut = {"type": "Split", "behavior": "Isolated", "invert": False}
    if len(steps) == 2 and steps[0].items() >= cut.items() and steps[1] == bytes_ | {"use_regex": False}:
        return steps[0]["pattern"].get("Regex")
    return str(pre_tokenizer)


def gguf_tensors(gguf, source, architecture):
    """Yields (name, shape, function that makes the tensor) in GGUF's names and order of dimensions."""
    cfg = source.cfg
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], cfg.n_layer)
    transposed = family_of(cfg).transposed
    for theirs, shape, make in their_tensors(cfg, source.read, {}):
        is_transposed = bool(re.search(transposed, theirs))
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        heads = {"q": cfg.n_head, "k": cfg.kv_heads}.get((re.findall(r"\.([qk])_proj\.", theirs) or [None])[0])

        def made(make=make, heads=heads, is_transposed=is_transposed):
            tensor = make()
            if is_transposed:
                return tensor.T.contiguous()
            return in_pairs(tensor, heads) if heads and architecture == "LLAMA" else tensor

        yield name, shape[::-1] if is_transposed else shape, made
    if cfg.rope_scale != 1:
        plain, scaled = (frequencies_of(cfg.head_width, cfg.rope_theta, *scale)
                         for scale in ((), (cfg.rope_scale, cfg.rope_context)))  # fmt: skip
        yield "rope_freqs.weight", [len(plain)], lambda: plain / scaled


def in_pairs(tensor, n_head):
    """A query's or key's rows with the channels that rope rotates together side by side, as in llama.cpp's Llama."""
    halves = tensor.view(n_head, 2, len(tensor) // n_head // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def tensor_type(gguf, name, shape, kind):
    """The type of a tensor in the file: vectors and positions are f32, rows that Q8_0 cannot cut into 32s are f16."""
    if len(shape) == 1 or kind == "f32" or name.startswith("position_embd"):
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType.F16 if kind == "f16" or shape[-1] % 32 else gguf.GGMLQuantizationType.Q8_0
