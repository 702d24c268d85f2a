"""Random models of transformers on disk, of odd sizes, for tests of what comes from there and goes there."""

import torch

V, T = 131, 23
SHAPE = {"vocab_size": V, "hidden_size": 30, "num_hidden_layers": 3, "num_attention_heads": 5, "intermediate_size": 33,
         "max_position_embeddings": T}  # fmt: skip
DECODER = SHAPE | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
                   "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
GPT2 = {"vocab_size": V, "n_embd": 20, "n_layer": 3, "n_head": 5, "n_positions": T, "bos_token_id": 0,
        "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip

# What each kind is: transformers' class, that of its config, and the config.
KINDS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2 untied": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"tie_word_embeddings": False, "n_inner": 33}),
    "gpt2 erf": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"activation_function": "gelu"}),
    "bert": ("BertForMaskedLM", "BertConfig", SHAPE | {"layer_norm_eps": 1e-3}),
    "bert untied": ("BertForMaskedLM", "BertConfig", SHAPE | {"tie_word_embeddings": False, "hidden_act": "gelu_new"}),
    "bert whole": ("BertForPreTraining", "BertConfig", SHAPE),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama tied, biases": ("LlamaForCausalLM", "LlamaConfig",
                           DECODER | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"rope_parameters": LLAMA3}),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER | {"sliding_window": 64}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER | {"head_dim": 10, "tie_word_embeddings": True}),
}  # fmt: skip


def random_model(kind, seed=1, **changes):
    """A model of transformers of a kind, each weight drawn, wide enough for mistakes to show in its logits."""
    import transformers

    architecture, config, settings = KINDS[kind]
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**settings | changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3).add_(1.0 if "norm" in name.lower() or "ln_" in name else 0.0)
    return model


def saved(kind, folder, seed=1, **changes):
    """A random model of a kind, and the folder that it is saved in."""
    model = random_model(kind, seed, **changes)
    model.save_pretrained(folder)
    return model, folder


def logits_of(model, ids, **inputs):
    """Logits of a model of transformers; of one with a next-sentence head those of tokens."""
    with torch.no_grad():
        out = model(ids, **inputs)
    return out.logits if "logits" in out else out.prediction_logits
