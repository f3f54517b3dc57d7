"""A small model that finds facts anywhere in a long context: words, training, weights."""
