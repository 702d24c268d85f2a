# Llama 3 70B's shape and learning rate (arXiv 2407.21783, table 3): 70,554 M parameters. This preset plans; it has not
# been run at this size. Each layer is split over a machine's 8 GPUs, and the blocks over 4 stages.
#
#   python plan.py config/llama_70b.py --n_gpus=1024

from config.llama_8b import *

n_layer = 80
n_head = 64
n_embd = 8192
n_inner = 28_672

learning_rate = 1.5e-4
min_lr = 1.5e-6

tp = 8
pp = 4
