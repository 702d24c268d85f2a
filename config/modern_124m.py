# A modern decoder of GPT-2 124M's size: RMSNorm, rope, SwiGLU, grouped-query attention, QK-norm, no biases. Hugging
# Face loads it as Qwen3, and without qk_norm as Llama. Data and batch size as in gpt2_124m.py.
#
#   python prepare.py config/modern_124m.py
#   torchrun --nproc_per_node=8 train.py config/modern_124m.py
#
# Muon's updates are scaled to AdamW's size, so AdamW's learning rates and higher ones work. This preset has not been
# run at this size; docs compare optimizers on its shape at 6 layers.

from config.gpt2_124m import *

n_kv_head = 4
n_inner = 2432  # spends the parameters that grouped heads and rope save: 124.7 M in all
mlp = "swiglu"
norm = "rmsnorm"
norm_eps = 1e-6
qk_norm = True
position = "rope"
bias = False

optimizer = "muon"
learning_rate = 2e-3
