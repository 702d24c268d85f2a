# A modern model of GPT-2 124M's size, trained on FineWeb to a validation loss of 3.28, llm.c's result for GPT-2 124M.
#
#   python prepare.py config/speedrun_124m.py --max_shards=20
#   torchrun --nproc_per_node=8 train.py config/speedrun_124m.py --target_loss=3.28
#
# Not yet run. Prediction: 3,600 steps, 1.9 B tokens, where llm.c's recipe takes 10 B. Reasons: modded-nanogpt's track 3
# baseline, tuned Muon with AdamW, takes 3,250 steps of this batch size at a fixed architecture of this size, and took
# 3,600 when first tried; SwiGLU in place of its squared ReLU changes little. But there each kind of weight has its own
# learning rate, and logits are capped. Muon's learning rate and decay here are that baseline's for square matrices,
# 0.025 and 0.05 in its scale of updates; the schedule is its own too. Time: 0.86 GFLOP per token, 1.6e18 in all, which
# takes 8 minutes on 8 H100 at 45 % MFU (989 TFLOP/s each by the data sheet), and 68 minutes on one at 40 %.

from config.modern_124m import *

n_kv_head = None  # as many as queries; grouped heads shrink only the cache of generation
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
