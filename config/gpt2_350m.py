# GPT-2 350M ("medium"), by llm.c's recipe (scripts/run_gpt2_350M.sh): 31 B tokens, three epochs of FineWeb-10B. llm.c
# took about 820 ms per step on 8 x A100 80GB, 13.7 hours in all.
#
#   python prepare.py config/gpt2_350m.py
#   torchrun --nproc_per_node=8 train.py config/gpt2_350m.py

from config.gpt2_124m import *

n_layer = 24
n_head = 16
n_embd = 1024

max_steps = 60_000
learning_rate = 3e-4
