# Fine-tunes MiniLM, an encoder of 6 layers, to tell positive from negative sentences (SST-2, a line `text<tab>label`).
#
#   python finetune.py config/finetune_sst2.py --seeds=3

task = "classify"
init_from = "sentence-transformers/all-MiniLM-L6-v2"  # or the folder of any model of a kind in docs/weights.md
train_file = "data/sst2/train.tsv"
eval_file = "data/sst2/dev.tsv"
tsv_columns = ("text", "label")
batch_examples = 32
epochs = 1
learning_rate = 5e-5
