"""A run from its settings to its results folder: with clients, without them, on regression data."""
