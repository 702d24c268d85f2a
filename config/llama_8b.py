# Llama 3 8B's shape and learning rate (arXiv 2407.21783, table 3), 8,030 M parameters, for 15 T tokens. This preset
# plans; it has not been run at this size. `tokenizer.json` is Llama 3's, from its folder on the hub.
#
#   python plan.py config/llama_8b.py --n_gpus=256

input = "text/*.parquet"  # your own
tokenizer = "tokenizer.json"
data_dir = "data/llama3"

vocab_size = 128_256
block_size = 8192
n_layer = 32
n_head = 32
n_kv_head = 8
n_embd = 4096
n_inner = 14_336
mlp = "swiglu"
norm = "rmsnorm"
norm_eps = 1e-5
position = "rope"
rope_theta = 500_000.0
bias = False
tie_embeddings = False

batch_tokens = 4_194_304  # Llama 3 405B's first
micro_batch_size = 1
max_tokens = 15e12
learning_rate = 3e-4
min_lr = 3e-6
warmup_steps = 8000
weight_decay = 0.1

strategy = "fsdp"
activation_checkpointing = "full"
