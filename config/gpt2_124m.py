# GPT-2 124M on 10 B tokens of FineWeb, by llm.c's recipe (scripts/run_gpt2_124M.sh, commit f1e2ace).
#
#   python prepare.py config/gpt2_124m.py          # downloads the tokens, 20 GB
#   torchrun --nproc_per_node=8 train.py config/gpt2_124m.py
#
# Expected validation loss: 3.27 to 3.28. llm.c's code reached 3.2722 with these settings on 8 x H100, at 140 ms per
# step, in 45 minutes (modded-nanogpt, records/track_1_short/2024-10-13_llmc); on 8 x A100 80GB a step took 300 ms and
# the run 94 minutes (llm.c, scripts/run_gpt2_124M.sh). Memory at micro_batch_size 16 is about 10 GiB per GPU, by
# arithmetic: 2.1 for weights, gradients and optimizer, 5.1 for activations, up to 2.5 for a chunk of the loss.

vocab_size = 50_257
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0

dataset = "fineweb10b"
data_dir = "data/fineweb10b"
batch_tokens = 524_288
micro_batch_size = 16
eval_tokens = 10_485_760

max_steps = 19_073  # 10 B tokens
learning_rate = 6e-4
warmup_steps = 700
schedule = "cosine"
min_lr = 0.0
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

eval_interval = 250
save_interval = 1000
