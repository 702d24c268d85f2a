"""Text, before it becomes tokens: documents and tokenizers."""
