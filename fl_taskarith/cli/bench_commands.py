"""The commands `fl-taskarith bench NAME`, from the table of benchmarks."""

import argparse
import importlib
from typing import Any

from fl_taskarith.bench import BENCHMARKS, Benchmark
from fl_taskarith.cli.arguments import NAMES, LateParser, by_rule
from fl_taskarith.config.fields import COMPILE_MODES
from fl_taskarith.config.rule import Rule

OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"help": "timm model"},
    "input_size": {"help": "pixels"},
    "input_sizes": {"help": "pixels, the first one in detail"},
    "device": {"help": "auto, cpu, ..."},
    "examples": {"help": "scored each time"},
    "clients": {"help": "per round (under scale: in the federation; under together: trained at once)"},
    "actors": {"help": "of Ray; 0 = one per two cores, as Flower does", "type": int},
    "without_ray": {"help": "leave Flower's simulation out", "action": "store_true"},
    "density": {"help": "share of weights trained; 0 = no mask"},
    "rounds": {"help": "from 300"},
    "precision": {"help": "of training", "choices": ("fp32", "tf32", "bf16", "fp16")},
    "compile": {"help": "torch.compile on both sides", "choices": ("off", *COMPILE_MODES)},
    "batch_size": {"help": "images per step"},
    "trainable_blocks": {"help": "last blocks that are trained"},
    "repeats": {"help": "measurements of each side"},
    "minutes": {"help": "after which what is left to measure is left out"},
    "dry_run": {"help": "run all of it on a CPU, in miniature", "action": "store_true"},
}
"""How argparse takes the options of the benchmarks, besides their defaults and what follows from these."""


def add_benches(names: "argparse._SubParsersAction[LateParser]") -> None:
    """Add a parser per benchmark, whose arguments are the options of its row."""
    for name, row in BENCHMARKS.items():
        parser = names.add_parser(name, help=row.about, description=f"Measure {row.about}.")
        parser.add_argument("--json", action="store_true", help="print the record instead of words")
        parser.add_argument("--results-dir", default="", help="for bench/NAME.json (default: results/ of the checkout)")
        for option, default in vars(row.with_options()).items():
            several = isinstance(default, list)
            first = default[0] if several else default
            kinds = {int: NAMES["positive"], float: by_rule(Rule(float, ""))}
            words = ({} if first is False else {"type": kinds.get(type(first), str)}) | OPTIONS[option]
            words["help"] += "" if first is False else " (default: %(default)s)"
            words |= {"nargs": "+"} if several else {}
            parser.add_argument(f"--{option.replace('_', '-')}", default=default, **words)
        parser.set_defaults(run=_bench, row=row)


def _bench(parsed: argparse.Namespace) -> None:
    row: Benchmark = parsed.row
    options = argparse.Namespace(**{option: getattr(parsed, option) for option in vars(row.with_options())})
    name = parsed.name.replace("-", "_")
    bench = getattr(importlib.import_module(f"fl_taskarith.bench.{row.module or name}"), f"bench_{name}")
    from fl_taskarith.bench.harness import Result
    from fl_taskarith.storage.files import make_folder
    from fl_taskarith.storage.paths import results_root

    folder = results_root(parsed.results_dir) / "bench"
    make_folder(folder)
    results = bench(options)
    for result in (results,) if isinstance(results, Result) else results:  # which may grow, and is written each time
        path = result.write(parsed.name, options, folder)
    heading = ", ".join(f"{option.replace('_', ' ')} {value}" for option, value in vars(options).items())
    print(path.read_text() if parsed.json else "\n".join((heading, *result.lines, str(path))))
    print("ratio: not measured" if result.ratio is None else f"ratio: {result.ratio:.2f}")
