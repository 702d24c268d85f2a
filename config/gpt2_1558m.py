# GPT-2 1558M ("XL"), by llm.c's recipe (scripts/run_gpt2_1558M.sh): 32,000 steps of 1,048,576 tokens, three epochs of
# FineWeb-10B. llm.c took 2.8 s per step on 8 x H100 80GB, 24 hours in all.
#
#   python prepare.py config/gpt2_1558m.py
#   torchrun --nproc_per_node=8 train.py config/gpt2_1558m.py

from config.gpt2_124m import *

n_layer = 48
n_head = 25
n_embd = 1600

micro_batch_size = 8
batch_tokens = 1_048_576
max_steps = 32_000
learning_rate = 6e-4
min_lr = 6e-5
