# A present-day model of GPT-2 124M's size to the validation loss of 3.28 that llm.c's GPT-2 124M ends at, on FineWeb.
#
#   python prepare.py config/speedrun_124m.py --max_shards=20
#   torchrun --nproc_per_node=8 train.py config/speedrun_124m.py --target_loss=3.28
#
# A prediction, not yet run: 3,600 steps, 1.9 B tokens, where llm.c's recipe takes 10 B. Its reasons: tuned Muon beside
# AdamW takes 3,250 steps of this batch at a fixed architecture of this size (modded-nanogpt, track 3, its baseline),
# 3,600 when first tried there; SwiGLU for its squared ReLU changes little; but there each kind of weight has a learning
# rate of its own, and logits are capped. Muon's rate and decay here are that baseline's, 0.025 and 0.05 in its scale of
# updates, for square matrices; so is the schedule. Time: 0.86 GFLOP a token make 1.6e18 in all, which is 8 minutes on 8
# H100 at 45 % MFU (989 TFLOP/s each by the data sheet), and 68 on one at 40 %.

from config.modern_124m import *

n_kv_head = None  # as many as queries: shared keys save a cache, which training has not
n_inner = 2048
tie_embeddings = False

max_steps = 3600
learning_rate = 4.5e-3
weight_decay = 0.28
muon_momentum = 0.95
beta1 = 0.8
beta2 = 0.95
schedule = "wsd"
cooldown_steps = 2520  # the last 70 %
warmup_steps = 50

eval_interval = 100
