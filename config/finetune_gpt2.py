# Fine-tunes OpenAI's GPT-2 124M, fetched from the Hugging Face hub, on Shakespeare's plays in GPT-2's tokens, 0.3 M of
# them. Batch, rate and length are those of nanoGPT's finetune_shakespeare.py.
#
#   python prepare.py config/finetune_gpt2.py
#   python train.py config/finetune_gpt2.py
#   python sample.py config/finetune_gpt2.py --prompt="ROMEO:"
#
# The weights determine the model's settings: --init_from=gpt2-medium, gpt2-large and gpt2-xl need no others, nor does
# a folder with any model of GPT-2's, Llama's, Mistral's, Qwen3's or (with data for it) BERT's kind.

init_from = "gpt2"
seq_len = 1024  # less saves memory; more than the model has is refused

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
