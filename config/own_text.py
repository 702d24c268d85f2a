# Your own text, about 1 MB, on a laptop: a modern decoder of 2.0 M parameters and a BPE trained on the text.
#
#   python prepare.py config/own_text.py --input=notes.txt      # or a folder, or a glob in quotes
#   python train.py config/own_text.py
#   python sample.py config/own_text.py --prompt="ROMEO:"
#
# Measured on Tiny Shakespeare, 1.1 MB: 0.41 M training tokens, 700 steps, 1.4 M tokens, 3.5 epochs; @BPB@ bits per byte
# on the last 10 %, where gzip -9 needs 3.19.
#
# An epoch of 1 MB is about 200 steps. For another size of text, remove the data and the run, and add to both commands:
#   100 KB    --bpe_vocab_size=512 --n_embd=128 --n_inner=344 --max_steps=200
#   10 MB     --bpe_vocab_size=4096 --n_embd=256 --n_inner=704 --max_steps=4000
# (prepare.py takes bpe_vocab_size alone, train.py the rest.) More steps help while the validation loss falls.

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
