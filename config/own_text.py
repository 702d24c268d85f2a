# Your own text, about 1 MB, on a laptop: a modern decoder of 2.0 M parameters and a BPE trained on the text.
#
#   python prepare.py config/own_text.py --input=notes.txt      # or a folder, or a glob in quotes
#   python train.py config/own_text.py
#   python sample.py config/own_text.py --prompt="ROMEO:"
#
# Measured on Tiny Shakespeare, 1.1 MB: 2.14 bits per byte on its last 10 %, where gzip -9 needs 3.19, after 700 steps:
# 1.4 M tokens, 3.5 epochs. More steps help while the validation loss still falls.
#
# For other sizes add to the command of prepare.py:   and to train.py's:
#   100 KB      --bpe_vocab_size=512                  --n_embd=128 --n_inner=344 --max_steps=200
#   10 MB       --bpe_vocab_size=4096                 --n_embd=256 --n_inner=704 --max_steps=4000
# The first 100 KB of Tiny Shakespeare gave 2.22 bits per byte (0.9 M parameters, 9 epochs); gzip -9 needs 3.68 there.
# The row of 10 MB has not been run.

input = "notes.txt"
tokenizer = "bpe"
bpe_vocab_size = 1024
val_fraction = 0.1
data_dir = "data/own_text"

vocab_size = None  # the data's
block_size = 128
n_layer = 4
n_head = 4
n_embd = 192
n_inner = 512
mlp = "swiglu"
norm = "rmsnorm"
position = "rope"
qk_norm = True
bias = False
dropout = 0.1

batch_tokens = 2048
micro_batch_size = 16
max_steps = 700
optimizer = "muon"
learning_rate = 1e-2
schedule = "linear"
warmup_steps = 50

eval_interval = 100
save_interval = 100
