"""Hugging Face's names for our models, settings and tensors.

Known are GPT-2, BERT, Llama with Mistral, and Qwen3, as transformers computes them.
"""

import itertools
import re
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch

import foreign
from config import UserError
from heads import SPAN, TunedModel
from interop.names import BERT_NAMES, GPT2_NAMES, HEADS, LLAMA_NAMES, QA_BASES
from model import ModelConfig, parameter_shapes


@dataclass(frozen=True)
class Family:
    """A kind of model in transformers that computes the same as ours with some settings."""

    name: str
    model_type: str
    architecture: str
    base: str  # prefix of tensor names; files of the model without its head lack it
    head: str  # module that tie_word_embeddings ties to the embedding
    names: dict  # {module: our modules}
    keys: dict  # {key of config.json: our setting}
    defaults: dict  # {key: its value where it is missing}; the other keys must be there
    activations: dict  # {theirs: our mlp}
    fixed: dict  # {our setting: the one value that it computes}
    filled: dict  # {our setting: its value}, for tensors that it always has; ours may lack them, zeros are equal
    needs: dict  # {key of config.json: the one value that ours computes}
    dropouts: tuple  # keys of config.json for our dropout
    biases: tuple = ()  # keys of config.json for our bias
    activation: str = "hidden_act"
    aliases: dict = field(default_factory=dict)  # {other name of a key: the key}
    more: tuple = ()  # further keys that model_config reads
    # Patterns of tensors' names; by default they match none.
    transposed: str = "$^"  # tensors whose matrices are (in, out)
    ignored: str = "$^"  # buffers that are no weights
    extra: str = "$^"  # weights that ours lack; kept, and exported unchanged

    @property
    def kinds(self):
        """{key of config.json that is read: kind of its value}, see foreign.check; sizes are checked with settings."""
        floats = {*self.dropouts, *(key for key, name in self.keys.items() if name == "norm_eps")}
        keys = (*self.keys, *self.needs, *self.aliases, *self.more, *self.biases, self.activation, *floats, *KINDS)
        rope = ROPE_KINDS if self.fixed["position"] == "rope" else {}
        kinds = dict.fromkeys(floats, (float, None)) | dict.fromkeys(self.biases, bool) | {self.activation: str}
        return {key: kinds.get(key) or LAYERS.get(key) or KINDS.get(key, object) for key in keys} | rope

    def complete(self, cfg):
        """The settings with everything in `filled`."""
        return replace(cfg, **{name: value for name, value in self.filled.items() if not getattr(cfg, name)})


# Keys of config.json that change nothing that our models compute, at any value
HARMLESS = frozenset(
    """
    model_type transformers_version use_cache initializer_range gradient_checkpointing
    attn_implementation bos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id tokenizer_class prefix name_or_path return_dict
    return_dict_in_generate output_hidden_states output_attentions output_scores output_past output_logits
    torchscript use_bfloat16 tf_legacy_loss use_return_dict keys_to_ignore_at_inference n_ctx
    reorder_and_upcast_attn chunk_size_feed_forward pretraining_tp classifier_dropout num_labels label2id
    finetuning_task task_specific_params summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout summary_last_dropout summary_hidden_size directionality
    pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
    tie_encoder_decoder cross_attention_hidden_size unsloth_fixed unsloth_version max_length min_length
    max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    suppress_tokens begin_suppress_tokens num_return_sequences remove_invalid_values
    exponential_decay_length_penalty is_decoder
    """.split()
)
NEEDS = {"is_encoder_decoder": False, "pruned_heads": {}, "auto_map": {}, "add_cross_attention": False}
CAUSAL = NEEDS | {"is_causal": True}
FULL = {"sliding_window": None, "layer_types": None, "use_sliding_window": False}
KINDS = {
    "dtype": (str, None), "torch_dtype": (str, None), "quantization_config": (dict, None), "tie_word_embeddings": bool,
    "eos_token_id": (int, [int], None), "architectures": ([str], None), "id2label": ({"*": str}, None),
    "problem_type": (str, None),
    "flatlm": ({"bias": bool, "n_token_types": (int, None), "block_size": range(1, 2**31)}, None),
}  # fmt: skip
LAYERS = {"layer_types": ([str], None), "sliding_window": (int, None), "use_sliding_window": (bool, None)}
ROPE = {"rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor",
        "original_max_position_embeddings"}  # fmt: skip
ROPE_ENTRIES = dict.fromkeys(ROPE, (float, None)) | {"rope_type": (str, None), "type": (str, None)}
ROPE_KINDS = {"rope_parameters": (ROPE_ENTRIES, None), "rope_scaling": (ROPE_ENTRIES, None)} | {
    key: ROPE_ENTRIES[key] for key in ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")
}

ALL_SEEN = {"window": None, "global_every": None}
CLASSIC = ALL_SEEN | {"norm": "layernorm", "position": "learned", "qk_norm": False}
MODERN = {"objective": "clm", "norm": "rmsnorm", "norm_position": "pre", "position": "rope", "n_token_types": None}
GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
LLAMA3_FACTORS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
COMMON_KEYS = {
    "vocab_size": "vocab_size", "max_position_embeddings": "block_size", "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "intermediate_size": "n_inner",
    "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
GPT2 = Family(
    name="GPT-2", model_type="gpt2", architecture="GPT2LMHeadModel", base="transformer.", head="lm_head",
    names=GPT2_NAMES,
    keys={"vocab_size": "vocab_size", "n_positions": "block_size", "n_embd": "n_embd", "n_layer": "n_layer",
          "n_head": "n_head", "n_inner": "n_inner", "layer_norm_epsilon": "norm_eps",
          "tie_word_embeddings": "tie_embeddings"},
    defaults={"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
              "activation_function": "gelu_new"},
    activation="activation_function", activations=GELUS,
    fixed=CLASSIC | {"objective": "clm", "norm_position": "pre", "n_token_types": None}, filled={"bias": True},
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    needs=CAUSAL | {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    aliases={"hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
             "num_hidden_layers": "n_layer"},
    transposed=r"\.(c_attn|c_proj|c_fc)\.weight$", ignored=r"\.attn\.(masked_)?bias$",  # old files' causal mask
)  # fmt: skip
BERT = Family(
    name="BERT", model_type="bert", architecture="BertForMaskedLM", base="bert.", head="cls.predictions.decoder",
    names=BERT_NAMES,
    keys=COMMON_KEYS | {"type_vocab_size": "n_token_types", "layer_norm_eps": "norm_eps"},
    defaults={"layer_norm_eps": 1e-12, "type_vocab_size": 2, "tie_word_embeddings": True, "hidden_act": "gelu"},
    activations=GELUS, fixed=CLASSIC | {"objective": "mlm", "norm_position": "post"},
    filled={"bias": True, "n_token_types": 2},
    dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    needs=NEEDS | {"position_embedding_type": "absolute", "is_decoder": False, "is_causal": False},
    ignored=r"\.position_ids$", extra=r"^(bert\.pooler|cls\.seq_relationship)\.",
)  # fmt: skip
LLAMA = Family(
    name="Llama", model_type="llama", architecture="LlamaForCausalLM", base="model.", head="lm_head",
    names=LLAMA_NAMES,
    keys=COMMON_KEYS | {"num_key_value_heads": "n_kv_head", "head_dim": "head_dim", "rms_norm_eps": "norm_eps"},
    defaults={"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
              "hidden_act": "silu"},
    activations={"silu": "swiglu"}, fixed=MODERN | {"qk_norm": False} | ALL_SEEN, filled={}, needs=CAUSAL | FULL,
    dropouts=("attention_dropout",), biases=("attention_bias", "mlp_bias"), ignored=r"\.rotary_emb\.inv_freq$",
)  # fmt: skip
MISTRAL = replace(
    LLAMA, name="Mistral", model_type="mistral", architecture="MistralForCausalLM",
    keys=LLAMA.keys | {"sliding_window": "window"}, needs=CAUSAL | dict.fromkeys(LLAMA.biases, False), biases=(),
    fixed=MODERN | {"qk_norm": False, "bias": False, "global_every": None}, more=("use_sliding_window",),
    defaults=LLAMA.defaults | {"num_key_value_heads": 8, "sliding_window": 4096},
)  # fmt: skip
QWEN3 = replace(
    LLAMA, name="Qwen3", model_type="qwen3", architecture="Qwen3ForCausalLM",
    defaults=LLAMA.defaults | {"head_dim": 128, "num_key_value_heads": 32},
    fixed=MODERN | {"qk_norm": True, "bias": False} | ALL_SEEN, biases=("attention_bias",),
    needs=CAUSAL | {"attention_bias": False},
    more=("sliding_window", "use_sliding_window", "layer_types", "max_window_layers"),
)  # fmt: skip
FAMILIES = {"gpt2": GPT2, "bert": BERT, "llama": LLAMA, "mistral": MISTRAL, "qwen3": QWEN3}


# ---- settings


def family_of(cfg):
    """The family that computes the same as a model; UserError with the settings that none has."""
    if not cfg.is_causal:
        family = BERT
    elif cfg.position == "learned":
        family = GPT2
    else:
        family = QWEN3 if cfg.qk_norm else MISTRAL if cfg.window else LLAMA
    ours, theirs = resolved(cfg) | {"objective": cfg.base}, family.fixed
    if cfg.position == "learned":
        theirs = theirs | {"n_kv_head": cfg.n_head, "head_dim": cfg.n_embd / cfg.n_head}
    wrong = [f"{name} is {ours[name]}, not {value}" for name, value in theirs.items() if ours[name] != value]
    if cfg.mlp not in family.activations.values():
        wrong.append(f"mlp is {cfg.mlp}, not {' or '.join(sorted({*family.activations.values()}))}")
    if wrong:
        raise UserError(f"transformers cannot compute this model; {family.name} is near, but {', '.join(wrong)}")
    return with_head(family, cfg) if isinstance(cfg, TunedModel) else family


def with_head(family, cfg):
    """The family's models with a TunedModel's head in place of that for tokens."""
    names = {theirs: ours for theirs, ours in family.names.items() if not ours[0].startswith(("head", "transform"))}
    ending, head, others = HEADS[cfg.task]
    names[others.get(family.model_type, head)] = ("classifier",)
    architecture = re.sub(r"(LMHeadModel|For\w+)$", ending, family.architecture)
    base = QA_BASES.get(family.model_type, family.base) if cfg.task == "qa" else family.base
    names = {base + theirs.removeprefix(family.base) if theirs.startswith(family.base) else theirs: ours
             for theirs, ours in names.items()}  # fmt: skip
    return replace(family, names=names, architecture=architecture, base=base, head="")


def _label_values(cfg):
    """config.json's entries on a TunedModel's labels."""
    by_id = {str(i): label for i, label in enumerate(cfg.labels)}
    more = {"classify": {"problem_type": "single_label_classification"}, "regress": {"problem_type": "regression"}}
    more["tag"] = {"classifier_dropout": cfg.dropout}  # a decoder's is otherwise 0.1
    return {"id2label": by_id, "label2id": {label: i for i, label in enumerate(cfg.labels)}, **more.get(cfg.task, {})}


def with_labels(config, cfg):
    """A TunedModel where a config.json's class has a head for labels, else cfg, a ModelConfig."""
    architecture, by_id = (config.get("architectures") or [""])[0], config.get("id2label") or {"0": "0", "1": "1"}
    if not (tasks := [task for task, (ending, *_) in HEADS.items() if architecture.endswith(ending)]):
        return cfg
    if by_id.keys() != {str(i) for i in range(len(by_id))}:
        raise UserError("its id2label does not count from 0; number its labels anew")
    is_regression = "regress" in tasks and (config.get("problem_type") == "regression" or len(by_id) == 1)
    labels = SPAN if tasks == ["qa"] else tuple(by_id[str(i)] for i in range(len(by_id)))
    return TunedModel(**vars(cfg), task="regress" if is_regression else tasks[0], labels=labels)


def config_of(cfg, special_ids, dtype, extra=()):
    """The content of a model's config.json; special_ids: {name of a token id: id}; dtype: a name such as float32.

    extra: names of extra tensors; a BERT with its next-sentence head has another class.
    """
    family = family_of(cfg)
    names, explicit = {*extra, *(t.name for t in tensors_of(family, cfg))}, resolved(family.complete(cfg))
    values = {key: explicit[name] for key, name in family.keys.items()} | dict.fromkeys(family.dropouts, cfg.dropout)
    values[family.activation] = next(theirs for theirs, ours in family.activations.items() if ours == cfg.mlp)
    own = {name: getattr(cfg, name) for name in family.filled if getattr(cfg, name) != explicit[name]}
    if cfg.position == "rope":
        values |= _rope_values(cfg) | dict.fromkeys(family.biases, cfg.bias)
        if cfg.rope_scale != 1:  # transformers expects the scaled length
            values["max_position_embeddings"] = max(cfg.block_size, int(cfg.rope_scale * cfg.rope_context))
            own["block_size"] = cfg.block_size
    return {
        "architectures": ["BertForPreTraining" if "cls.seq_relationship.weight" in names else family.architecture],
        "model_type": family.model_type,
        **values,
        **({"n_ctx": cfg.block_size} if family.model_type == "gpt2" else {}),  # converters of llama.cpp read it
        **special_ids,
        **(_label_values(cfg) if isinstance(cfg, TunedModel) else {}),
        "initializer_range": 0.02,
        "torch_dtype": dtype,
        **({"flatlm": own} if own else {}),  # read by model_config
    }


def _rope_values(cfg):
    """config.json's entries on rope, for transformers 5 (rope_parameters) and earlier."""
    scaling = None
    if cfg.rope_scale != 1:
        scaling = {"rope_type": "llama3", "factor": cfg.rope_scale, **LLAMA3_FACTORS}
        scaling["original_max_position_embeddings"] = cfg.rope_context
    parameters = {"rope_theta": cfg.rope_theta, **(scaling or {"rope_type": "default"})}
    return {"rope_theta": cfg.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}


def resolved(cfg):
    """A model's settings as a dict, with the widths that follow from others filled in."""
    return asdict(cfg) | {"n_kv_head": cfg.kv_heads, "head_dim": cfg.head_width, "n_inner": cfg.inner_width}


def model_config(config):
    """(our settings, longest sequence that we compute as transformers does; None: any) from a config.json's content.

    The values have their family's kinds. UserError where a key is missing, unknown, impossible, or asks for other work.
    """
    family = FAMILIES[config["model_type"]]
    settings, unsupported = _plain_settings(family, config), _unsupported(family, config)
    own = config.get("flatlm") or {}  # an export's own settings, where transformers' keys have none
    settings = family.filled | settings | {name: own[name] for name in family.filled if name in own}
    longest = settings["block_size"]
    if family.fixed["position"] == "rope":
        longest = None if "window" in settings else _sliding_window(config)
        settings["block_size"] = min(n for n in (settings["block_size"], longest, own.get("block_size")) if n)
        rope, unsupported_rope = _rope_settings(config)
        settings |= rope | {"bias": any(config.get(key, False) for key in family.biases)}
        unsupported += unsupported_rope
    if unsupported:
        raise UserError(f"it has {', '.join(unsupported)}, which our models do not compute; use another model")
    settings["dropout"] = config.get(family.dropouts[0]) or 0.0
    settings["mlp"] = family.activations[config.get(family.activation, family.defaults[family.activation])]
    return with_labels(config, foreign.settings_of(ModelConfig, settings | family.fixed, "it")), longest


def _plain_settings(family, config):
    """{our setting: value} for keys that stand for one setting each; missing keys have transformers' defaults."""
    if missing := [key for key in family.keys if key not in config and key not in family.defaults]:
        raise UserError(f"it lacks {', '.join(missing)}")
    settings = {name: config.get(key, family.defaults.get(key)) for key, name in family.keys.items()}
    left_open = {key for key, value in family.defaults.items() if config.get(key, value) is None}
    wrong = []
    for key, name in family.keys.items():
        value, largest = settings[name], foreign.LARGEST.get(name)
        if largest and key not in left_open and not (type(value) is int and 0 < value <= largest):
            wrong.append(f"{key} {value!r}")
    if wrong:
        raise UserError(f"it has {', '.join(wrong)}, where there must be whole numbers above 0 that a model can have")
    return settings


def _unsupported(family, config):
    """Keys and values of a config.json, rope's apart, that our models do not compute, or that we do not know."""
    wrong = [key for key, value in family.needs.items() if config.get(key, value) not in (value, value or None)]
    found = [f"{key} {config[key]!r}" for key in wrong if key != "layer_types" or {*config[key]} - {"full_attention"}]
    found += [f"{key} {config[key]!r} beside {of} {config[of]!r}" for key, of in family.aliases.items()
              if config.get(key, config[of]) != config[of]]  # fmt: skip
    found += [f"an unknown {key}" for key in config if not (key in family.kinds or key in HARMLESS or key[:1] == "_")]
    if config.get("quantization_config"):
        found.append("quantization_config")
    activation = config.get(family.activation, family.defaults[family.activation])
    if activation not in family.activations:
        found.append(f"{family.activation} {activation!r}")
    if len({config.get(key, False) for key in family.biases}) > 1:
        found.append("biases in one of attention and MLP alone")
    return found


def _sliding_window(config):
    """Tokens in the sliding window of some of Qwen3's layers; None where no layer has one."""
    layers = config.get("layer_types") or ["sliding_attention"]
    if odd := {*layers} - {"sliding_attention", "full_attention"}:
        raise UserError(f"it has layers of other types, {', '.join(sorted(odd))}")
    if not config.get("use_sliding_window") or "sliding_attention" not in layers:
        return None
    if (window := config.get("sliding_window", 4096)) is not None and window <= 0:
        raise UserError(f"it has sliding_window {window!r}, where there must be a whole number above 0")
    return window


def _rope_settings(config):
    """(our settings of rope, a config.json's keys and values on rope that our models do not compute)."""
    old, new = ({**(config.get(name) or {})} for name in ("rope_scaling", "rope_parameters"))
    unsupported = []
    for entries in (old, new):
        unsupported += [f"an unknown {key} of rope" for key in entries.keys() - ROPE]
        kind = entries.pop("type", None)  # its name in transformers below 5
        if kind is not None and entries.setdefault("rope_type", kind) != kind:
            unsupported.append(f"rope_type both {kind!r} and {entries['rope_type']!r}")
    if old and new:  # transformers takes the old one, whatever is in the new one
        keys = sorted({*old, *new} - {"rope_theta"}, key=str)
        twice = [key for key in keys if old.get(key) != new.get(key)]
        unsupported += [f"{key} both {old.get(key)!r} and {new.get(key)!r}" for key in twice]
    rope = {key: config[key] for key in ROPE & config.keys()}
    for entries in (old, new):
        twice = [key for key in sorted(rope.keys() & entries) if rope[key] != entries[key]]
        unsupported += [f"{key} both {rope[key]!r} and {entries[key]!r}" for key in twice]
        rope |= entries
    settings, kind = {"rope_theta": rope.get("rope_theta", 10_000.0)}, rope.get("rope_type") or "default"
    if kind == "llama3":
        context = rope.get("original_max_position_embeddings", config.get("max_position_embeddings"))
        settings |= {"rope_scale": rope.get("factor"), "rope_context": context}
        if (factors := {key: rope.get(key) for key in LLAMA3_FACTORS}) != LLAMA3_FACTORS:
            unsupported.append(f"rope of type 'llama3' with factors {(*factors.values(),)}")
    elif kind != "default":
        unsupported.append(f"rope of type {kind!r}")
    unsupported += [f"{name} {value!r}" for name, value in settings.items() if value is None]
    if rope.get("partial_rotary_factor") not in (None, 1):
        unsupported.append(f"partial_rotary_factor {rope['partial_rotary_factor']}")
    return settings, unsupported


# ---- tensors


class TheirTensor(NamedTuple):
    """A tensor of a Hugging Face model, and the tensors of ours that it consists of."""

    name: str  # theirs
    ours: dict  # {name: shape} of our tensors, in the order of its rows
    shape: list
    is_transposed: bool  # (in, out), where ours are (out, in)
    is_zero: bool  # our model lacks it


def tensors_of(family, cfg):
    """A TheirTensor for each tensor of a family's model with these settings."""
    own, shapes = parameter_shapes(cfg), parameter_shapes(family.complete(cfg))
    found = []
    for module, ours in family.names.items():
        if module == family.head and cfg.tie_embeddings:
            continue
        kinds = ("",) if module.endswith(".bias") else (".weight", ".bias")
        for i, kind in itertools.product(range(cfg.n_layer if "{i}" in module else 1), kinds):
            name, names = f"{module}{kind}".format(i=i), [f"{part}{kind}".format(i=i) for part in ours]
            if names[0] not in shapes:
                continue
            parts = {part: list(shapes[part]) for part in names}
            if names[0].startswith(("wte.", "head.")):
                parts[names[0]][0] = cfg.vocab_size  # theirs have no padding
            shape = [sum(rows for rows, *_ in parts.values()), *parts[names[0]][1:]]
            is_transposed = bool(re.search(family.transposed, name))
            shape = shape[::-1] if is_transposed else shape
            found.append(TheirTensor(name, parts, shape, is_transposed, names[0] not in own))
    return found


def their_tensors(cfg, read, extra):
    """Yields (name, shape, function that makes the tensor) for each tensor of a Hugging Face model's file.

    read(name) returns our tensor, whole and with padding; extra: {name: tensor}, exported unchanged.
    """

    def make(theirs):
        shapes = theirs.ours.items()
        parts = [torch.zeros(shape) if theirs.is_zero else read(name)[: shape[0]] for name, shape in shapes]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        return (tensor.T if theirs.is_transposed else tensor).contiguous()

    for theirs in tensors_of(family_of(cfg), cfg):
        if theirs.name not in extra:
            yield theirs.name, theirs.shape, partial(make, theirs)
    for name, tensor in extra.items():
        yield name, [*tensor.shape], tensor.clone
