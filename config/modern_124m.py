# A present-day decoder of GPT-2 124M's size: RMSNorm, rope, SwiGLU, grouped-query attention, QK-norm and no biases. To
# Hugging Face it is a Qwen3 model, and without qk_norm a Llama. Data and batch are those of gpt2_124m.py.
#
#   python prepare.py config/modern_124m.py
#   torchrun --nproc_per_node=8 train.py config/modern_124m.py
#
# Muon with updates of AdamW's size takes AdamW's learning rates and higher. This preset has not been run at this size:
# its shape at 6 layers is what the README's table of optimizers compares.

from config.gpt2_124m import *

n_kv_head = 4
n_inner = 2432  # makes up for what grouped heads and rope save: 124.7 M parameters
mlp = "swiglu"
norm = "rmsnorm"
norm_eps = 1e-6
qk_norm = True
position = "rope"
bias = False

optimizer = "muon"
learning_rate = 2e-3
