"""Benchmarks of ours against what it has to beat; benchmarks.toml lists them, and is read without importing torch."""

import tomllib
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """A row of benchmarks.toml."""

    about: str
    options: dict[str, Any]
    module: str = ""

    def with_options(self, **given: Any) -> Namespace:
        """Return the options, with what is given in place of the defaults."""
        return Namespace(**{"device": "auto", **self.options, **given})


BENCHMARKS = {
    name: Benchmark(**row)
    for name, row in tomllib.loads(Path(__file__).with_name("benchmarks.toml").read_text(encoding="utf-8")).items()
}
