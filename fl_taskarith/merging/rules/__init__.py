"""Merge rules: every function under `@merge_rule` in a file of this folder is one, by its name."""
