# Fine-tunes OpenAI's GPT-2 124M, downloaded from the Hugging Face hub, on Shakespeare's plays: 0.3 M tokens of GPT-2's.
# Batch size, learning rate and steps as in nanoGPT's finetune_shakespeare.py.
#
#   python prepare.py config/finetune_gpt2.py
#   python train.py config/finetune_gpt2.py
#   python sample.py config/finetune_gpt2.py --prompt="ROMEO:"
#
# The weights bring the model's settings: --init_from=gpt2-medium, gpt2-large or gpt2-xl needs nothing else. A folder
# with a model of the GPT-2, Llama, Mistral, Qwen3 or (with data prepared for it) BERT family works too.

init_from = "gpt2"
seq_len = 1024  # a smaller one saves memory; the model's block_size is the limit

dataset = "shakespeare"
tokenizer = "gpt2"
val_fraction = 0.1
data_dir = "data/shakespeare_gpt2"

batch_tokens = 32 * 1024
micro_batch_size = 1
max_steps = 20
learning_rate = 3e-5
schedule = "constant"
warmup_steps = 0

eval_interval = 5
save_interval = 20
log_interval = 1
