"""Hugging Face's names for the modules of GPT-2, BERT, and Llama with its kin."""

# {their module: our modules}; several of ours are one of theirs with its rows in this order.
GPT2_NAMES = {
    "transformer.wte": ("wte",),
    "transformer.wpe": ("wpe",),
    "transformer.h.{i}.ln_1": ("blocks.{i}.norm1",),
    "transformer.h.{i}.attn.c_attn": ("blocks.{i}.attn.q", "blocks.{i}.attn.k", "blocks.{i}.attn.v"),
    "transformer.h.{i}.attn.c_proj": ("blocks.{i}.attn.proj",),
    "transformer.h.{i}.ln_2": ("blocks.{i}.norm2",),
    "transformer.h.{i}.mlp.c_fc": ("blocks.{i}.mlp.up",),
    "transformer.h.{i}.mlp.c_proj": ("blocks.{i}.mlp.down",),
    "transformer.ln_f": ("norm_f",),
    "lm_head": ("head",),
}
BERT_NAMES = {
    "bert.embeddings.word_embeddings": ("wte",),
    "bert.embeddings.position_embeddings": ("wpe",),
    "bert.embeddings.token_type_embeddings": ("wtt",),
    "bert.embeddings.LayerNorm": ("norm_e",),
    "bert.encoder.layer.{i}.attention.self.query": ("blocks.{i}.attn.q",),
    "bert.encoder.layer.{i}.attention.self.key": ("blocks.{i}.attn.k",),
    "bert.encoder.layer.{i}.attention.self.value": ("blocks.{i}.attn.v",),
    "bert.encoder.layer.{i}.attention.output.dense": ("blocks.{i}.attn.proj",),
    "bert.encoder.layer.{i}.attention.output.LayerNorm": ("blocks.{i}.norm1",),
    "bert.encoder.layer.{i}.intermediate.dense": ("blocks.{i}.mlp.up",),
    "bert.encoder.layer.{i}.output.dense": ("blocks.{i}.mlp.down",),
    "bert.encoder.layer.{i}.output.LayerNorm": ("blocks.{i}.norm2",),
    "cls.predictions.transform.dense": ("transform.dense",),
    "cls.predictions.transform.LayerNorm": ("transform.norm",),
    "cls.predictions.bias": ("head.bias",),  # in an untied model an extra tensor without effect
    "cls.predictions.decoder": ("head",),
    "bert.pooler.dense": ("pooler",),
    "cls.seq_relationship": ("pair_head",),
}
LLAMA_NAMES = {
    "model.embed_tokens": ("wte",),
    "model.layers.{i}.input_layernorm": ("blocks.{i}.norm1",),
    "model.layers.{i}.self_attn.q_proj": ("blocks.{i}.attn.q",),
    "model.layers.{i}.self_attn.k_proj": ("blocks.{i}.attn.k",),
    "model.layers.{i}.self_attn.v_proj": ("blocks.{i}.attn.v",),
    "model.layers.{i}.self_attn.q_norm": ("blocks.{i}.attn.q_norm",),
    "model.layers.{i}.self_attn.k_norm": ("blocks.{i}.attn.k_norm",),
    "model.layers.{i}.self_attn.o_proj": ("blocks.{i}.attn.proj",),
    "model.layers.{i}.post_attention_layernorm": ("blocks.{i}.norm2",),
    "model.layers.{i}.mlp.gate_proj": ("blocks.{i}.mlp.gate",),
    "model.layers.{i}.mlp.up_proj": ("blocks.{i}.mlp.up",),
    "model.layers.{i}.mlp.down_proj": ("blocks.{i}.mlp.down",),
    "model.norm": ("norm_f",),
    "lm_head": ("head",),
}

# {task of fine-tuning: (end of their class's name, name of the head, {model type: another name of it})}
HEADS = {
    "classify": ("ForSequenceClassification", "score", {"bert": "classifier"}),
    "regress": ("ForSequenceClassification", "score", {"bert": "classifier"}),
    "tag": ("ForTokenClassification", "score", {"bert": "classifier", "gpt2": "classifier"}),
    "qa": ("ForQuestionAnswering", "qa_outputs", {}),
}
QA_BASES = {"llama": "transformer.", "qwen3": "transformer."}  # {model type: another prefix of its tensors there}
