"""Studies: arms that run over several seeds at searched learning rates, and their tables."""
