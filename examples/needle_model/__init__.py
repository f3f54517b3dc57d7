"""A small model that finds facts anywhere in a long context: words, tokenizer, training, weights."""
