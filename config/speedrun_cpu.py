# Tiny Shakespeare to a validation loss of 1.898, where nanoGPT's documented run on a CPU ends, in seconds. Ten seeds
# ended between 1.830 and 1.880.
#
#   python prepare.py config/speedrun_cpu.py
#   python train.py config/speedrun_cpu.py --target_loss=1.898

from config.shakespeare_char import *

# A present-day block, two of them: most of what a step costs at this size is the number of operators.
n_layer = 2
position = "rope"
rope_theta = 30.0
qk_norm = True
mlp = "swiglu"
n_inner = 344
bias = False
tie_embeddings = False

# Steps of more tokens, few of them. In so short a run old gradients are wrong ones: low momentum.
batch_tokens = 32 * block_size
micro_batch_size = 32
max_steps = 100
optimizer = "muon"
learning_rate = 1.4e-2
min_lr = 0.0
schedule = "linear"
warmup_steps = 2
weight_decay = 0.0
muon_momentum = 0.8
beta1 = 0.9
beta2 = 0.95

eval_interval = 1000
save_interval = 1000
log_interval = 10
