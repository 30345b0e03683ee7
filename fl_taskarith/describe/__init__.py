"""Masks and shards, described for a person."""
