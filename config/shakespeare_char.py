# Tiny Shakespeare with one token per byte, at the size that nanoGPT's README trains on a CPU; there the validation loss
# over the whole split is 1.898.
#
#   python prepare.py config/shakespeare_char.py
#   python train.py config/shakespeare_char.py
#   python sample.py config/shakespeare_char.py --prompt="ROMEO:"

dataset = "shakespeare"
tokenizer = "byte"
val_fraction = 0.1
data_dir = "data/shakespeare"

block_size = 64
n_layer = 4
n_head = 4
n_embd = 128

batch_tokens = 12 * block_size
micro_batch_size = 12
max_steps = 2000
learning_rate = 1e-3
min_lr = 1e-4
warmup_steps = 100
beta2 = 0.99

eval_interval = 250
save_interval = 1000
log_interval = 50
