"""Nouns of the cache: page geometry, sizes, and the tensors that hold pages and tables."""
