# Learns to write Python from Python's standard library, 12 MB, in at most 3 minutes on 2 CPU cores. Expected: about 1.4
# bits per byte on held-out files; gzip -9 needs 1.95. `make` runs all three commands:
#
#   python prepare.py config/quickstart.py
#   python train.py config/quickstart.py
#   python sample.py config/quickstart.py --prompt="def main("

dataset = "stdlib"
tokenizer = "bpe"
bpe_vocab_size = 4096
val_fraction = 0.05
data_dir = "data/quickstart"

vocab_size = None  # the data's
block_size = 128
n_layer = 2
n_head = 4
n_embd = 256

batch_tokens = 2048
micro_batch_size = 8
max_steps = 1050
max_minutes = 2.9  # a slow machine stops here; the same command continues
learning_rate = 2e-3
warmup_steps = 50

eval_interval = 210
save_interval = 525
