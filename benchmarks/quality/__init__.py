"""Does recall keep what a model knows: tasks on real servers, one rule against another."""
