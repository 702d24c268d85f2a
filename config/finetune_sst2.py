"""MiniLM, an encoder of 6 layers, fine-tuned on the sentences of SST-2."""

task = "classify"
init_from = "sentence-transformers/all-MiniLM-L6-v2"  # or a folder with the same files
train_file, eval_file = "data/sst2/train.tsv", "data/sst2/dev.tsv"
tsv_columns = ("text", "label")
batch_size = 32
epochs = 1
learning_rate = 5e-5
