"""Curves, bands, sweeps and statistics over runs. Nothing here trains."""
