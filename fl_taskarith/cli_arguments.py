"""Kinds of command-line arguments."""

import argparse


def seconds(text: str) -> float:
    """An argument that is a time with its unit, for example 25m."""
    number, unit = text[:-1], {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    if unit is None or not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a time: expected a whole number and s, m or h, such as 25m")
    return float(int(number) * unit)


def positive(text: str) -> int:
    """An argument that is a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)
