# GPT-2 1558M ("XL"): llm.c's recipe (scripts/run_gpt2_1558M.sh), 32,000 steps of 1,048,576 tokens. llm.c took 2.8 s a
# step on 8 x H100 80GB, 24 hours in all. FineWeb-10B is a third of that: three epochs.
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
