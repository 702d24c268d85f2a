"""Models and files of other people: Hugging Face, nanoGPT, the evaluation harness."""
