"""Sparse decoding behind a model's own ``generate``: caches, the loop, and the compiled calls they need."""
