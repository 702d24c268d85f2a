# BERT base, uncased: model and recipe of google-research/bert (arXiv 1810.04805), masked tokens and next sentence. It
# needs BERT's vocab.txt (in any bert-base-uncased folder) and your text, as documents; BERT read Wikipedia and books,
# 3.3 B words.
#
#   python prepare.py config/bert_base.py
#
# BERT trained on sequences of 128 tokens for the first 90 % of its steps, then of 512, 256 sequences per step. This
# preset is phase 1. Phase 2 starts from its weights, at the learning rate where BERT's linear decay has arrived:
#
#   python train.py config/bert_base.py
#   python train.py config/bert_base.py --seq_len=512 --batch_tokens=131072 \
#       --micro_batch_size=32 --init_from=out/bert_base --out_dir=out/bert_base_512 \
#       --max_steps=100000 --lr_decay_steps=none --learning_rate=1e-5 --warmup_steps=1000
#
# The batch is small for a modern GPU, so one is enough: 8 of them (torchrun --nproc_per_node=8, --micro_batch_size=32)
# get 4,096 tokens each and wait for their hosts, as `python plan.py config/bert_base.py --micro_batch_size=32` says.
#
# Differences from Google's code:
# - A and B meet at any token of a document, theirs at the end of a sentence; another document's B is as long as the own
#   one would be; all sequences are as long as their document allows, 10 % of theirs are shorter
# - new masks each time a sequence is seen; theirs has ten, drawn beforehand
# - AdamW corrects its means' bias and adds 1e-8; theirs does not and adds 1e-6
# - the decay starts after warm-up, theirs at step 0
# - initial weights are normal, theirs truncated at two standard deviations
# - phase 2 starts with an empty optimizer state and its own warm-up

objective = {"mlm": 1.0, "nsp": 1.0}
vocab_size = 30_522
block_size = 512
n_layer = 12
n_head = 12
n_embd = 768
n_inner = 3072
mlp = "gelu"
norm_position = "post"
norm_eps = 1e-12
n_token_types = 2
dropout = 0.1

input = "wikipedia/*.jsonl"
tokenizer = "vocab.txt"
data_dir = "data/bert"
seq_len = 128
mask_prob = 0.15
batch_tokens = 256 * 128
micro_batch_size = 128  # 2 micro-steps on one GPU, 5 GiB of activations
eval_tokens = 1_048_576

max_steps = 900_000
lr_decay_steps = 1_000_000
learning_rate = 1e-4
warmup_steps = 10_000
schedule = "linear"
weight_decay = 0.01
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0

eval_interval = 5000
save_interval = 5000
