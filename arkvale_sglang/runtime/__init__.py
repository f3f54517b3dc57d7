"""Device steps: what happens to the store in each forward pass, without the host reading it."""
