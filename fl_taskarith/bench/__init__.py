"""Benchmarks of ours against what it has to beat; their table, which the command line reads without torch."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

VIT_S = {"model": "vit_small_patch14_dinov2", "input_size": 98, "device": "auto"}
GLYPH = {"model": "vit_glyph", "input_size": 16, "device": "auto"}
VIT_224 = {"model": "vit_small_patch16_224.dino", "input_size": 224, "device": "auto"}


@dataclass(frozen=True)
class Benchmark:
    """A row of `BENCHMARKS`: what is measured, the module whose `bench_NAME` does it, and its options with defaults."""

    about: str
    module: str
    defaults: dict[str, Any]

    def options(self, **given: Any) -> Namespace:
        """Return the defaults with what is given in their place."""
        return Namespace(**(self.defaults | given))


BENCHMARKS = {
    "fisher": Benchmark(
        "scoring of a mask's sensitivities, against a backward pass per example",
        "fisher", {**VIT_S, "examples": 128, "repeats": 3},
    ),
    "engine": Benchmark(
        "a round of clients that do nothing, against Flower's simulation with Ray",
        "engine", {**VIT_S, "clients": 10, "actors": 0, "repeats": 5},
    ),
    "round": Benchmark(
        "a round of federated averaging, against its steps in a bare PyTorch loop",
        "round", {**VIT_S, "batch_size": 32, "density": 0.0, "precision": "fp32", "repeats": 3},
    ),
    "scale": Benchmark(
        "a round among 100,000 virtual clients, against one among 100",
        "scale", {**GLYPH, "clients": (100, 1_000, 10_000, 100_000), "repeats": 15},
    ),
    "prefix": Benchmark(
        "a round on the frozen blocks' cached tokens, against one of all blocks",
        "arms", {**VIT_S, "trainable_blocks": 2, "batch_size": 32, "repeats": 2},
    ),
    "together": Benchmark(
        "a round whose clients are trained several at once, against one after the other",
        "arms", {**GLYPH, "batch_size": 16, "clients": (2, 5, 10), "repeats": 9},
    ),
    "class-token": Benchmark(
        "a step whose last block computes the class token alone, against one of every token",
        "class_token", {**VIT_S, "batch_size": 32, "trainable_blocks": 2, "repeats": 5},
    ),
    "throughput": Benchmark(
        "images per second, against a bare compiled loop",
        "throughput", {**VIT_224, "batch_size": 64, "precision": "bf16", "compile": "default", "repeats": 5},
    ),
    "long-run": Benchmark(
        "time and memory of thousands of rounds, the last against the first",
        "long_run", {**GLYPH, "rounds": 2_000},
    ),
    "memory": Benchmark(
        "the peak of a round, against that of a bare loop",
        "memory", {**VIT_S, "batch_size": 32, "clients": (2, 10, 40), "precision": "fp32"},
    ),
}  # fmt: skip
