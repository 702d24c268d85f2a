# BERT large, uncased: 24 layers, width 1024. bert_base.py describes data, phases and differences from Google's code.
#
#   torchrun --nproc_per_node=8 train.py config/bert_large.py
#   torchrun --nproc_per_node=8 train.py config/bert_large.py --seq_len=512 --batch_tokens=131072 \
#       --micro_batch_size=16 --init_from=out/bert_large --out_dir=out/bert_large_512 \
#       --max_steps=100000 --lr_decay_steps=none --learning_rate=1e-5 --warmup_steps=1000

from config.bert_base import *

n_layer = 24
n_head = 16
n_embd = 1024
n_inner = 4096
micro_batch_size = 32
