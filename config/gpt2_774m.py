# GPT-2 774M ("large"), by llm.c's recipe (scripts/run_gpt2_774M.sh): 150 B tokens. llm.c took about 1.7 s per step on
# 8 x A100 80GB, 5.6 days in all. FineWeb-10B would be read 15 times; a serious run needs more text.
#
#   python prepare.py config/gpt2_774m.py
#   torchrun --nproc_per_node=8 train.py config/gpt2_774m.py

from config.gpt2_124m import *

n_layer = 36
n_head = 20
n_embd = 1280

micro_batch_size = 8
max_steps = 286_102
learning_rate = 2.5e-4
