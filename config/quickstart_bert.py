# Learns to fill gaps in Python: modern_bert.py's encoder on the quickstart's text, in at most 3 minutes on 2 CPU cores.
# `make bert` runs all three commands:
#
#   python prepare.py config/quickstart_bert.py
#   python train.py config/quickstart_bert.py
#   python sample.py config/quickstart_bert.py --prompt="for i in [MASK](10):"

from config.modern_bert import *
from config.quickstart import *

input = None  # dataset is the quickstart's
n_kv_head = None
n_inner = 704

learning_rate = 8e-3
max_steps = 900
eval_interval = 225
save_interval = 450
