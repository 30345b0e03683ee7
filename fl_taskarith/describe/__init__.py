"""Masks and shards, described to a person."""
