# A modern encoder: modern_124m.py's blocks with attention in both directions, trained on masked tokens as BERT is, with
# 30 % of them masked (arXiv 2202.08005) and sequences of 1024 tokens. The tokenizer must have a mask token, so a BPE is
# trained on your text.
#
#   python prepare.py config/modern_bert.py
#   torchrun --nproc_per_node=8 train.py config/modern_bert.py

from config.modern_124m import *

objective = "mlm"
vocab_size = None  # the data's
n_kv_head = 12  # grouped heads would shrink the cache of generation, which an encoder does without
n_inner = 2048

dataset = None
input = "wikipedia/*.jsonl"
tokenizer = "bpe"
bpe_vocab_size = 32_768
data_dir = "data/modern_bert"
mask_prob = 0.3
