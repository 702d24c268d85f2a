# Learns to fill gaps in Python: the modern encoder on the quickstart's text, in at most 3 minutes on 2 CPU cores. `make
# bert` runs all three:
#
#   python prepare.py config/quickstart_bert.py
#   python train.py config/quickstart_bert.py
#   python sample.py config/quickstart_bert.py --prompt="for i in [MASK](10):"

from config.quickstart import *

objective = "mlm"
mask_prob = 0.3  # more to learn from each token than 0.15
mlp = "swiglu"
n_inner = 704
norm = "rmsnorm"
norm_eps = 1e-6
qk_norm = True
position = "rope"
bias = False
optimizer = "muon"
learning_rate = 8e-3
max_steps = 900
eval_interval = 225
save_interval = 450
