"""Data sets, splits, shards and batches."""
