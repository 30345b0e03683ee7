"""Arithmetic on task vectors. Pure: no Flower, no data set."""
