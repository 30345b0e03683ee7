"""Task arithmetic as one-shot federated learning: merging model files, and a benchmark of merging rules."""
