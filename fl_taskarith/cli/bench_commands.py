"""The commands `fl-taskarith bench NAME`."""

import argparse
import importlib

from fl_taskarith.cli.arguments import positive
from fl_taskarith.config.fields import COMPILE_MODES

BENCH_OUTPUT = ("name", "run", "json", "results_dir")  # of the parsed words, what a benchmark's function does not take


def add_benches(names: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """A parser per benchmark; what it parses beside `BENCH_OUTPUT` are the arguments of its function."""
    vit_s, glyph, own = ("vit_small_patch14_dinov2", 98), ("vit_glyph", 16), {}
    for name, (model, size), repeats, about in (
        ("fisher", vit_s, 3, "scoring of a mask's sensitivities, against a backward pass per example"),
        ("engine", vit_s, 5, "a round of clients that do nothing, against Flower's simulation with Ray"),
        ("round", vit_s, 3, "a round of federated averaging, against its steps in a bare PyTorch loop"),
        ("scale", glyph, 15, "a round among 100,000 virtual clients, against one among 100"),
        ("prefix", vit_s, 2, "a round on the frozen blocks' cached tokens, against one of all blocks"),
        ("together", glyph, 9, "a round whose clients are trained several at once, against one after the other"),
        ("class-token", vit_s, 5, "a step whose last block computes the class token alone, against one of every token"),
        ("throughput", ("vit_small_patch16_224.dino", 224), 5, "images per second, against a bare compiled loop"),
    ):
        bench = own[name] = names.add_parser(name, help=about, description=f"Measure {about}.")
        _add_common(bench, model, size)
        bench.add_argument("--repeats", type=positive, default=repeats, help="default: %(default)s")
    long_run = names.add_parser("long-run", help="time and memory of thousands of rounds, the last against the first")
    _add_common(long_run, *glyph)
    long_run.add_argument("--rounds", type=positive, default=2_000, help="from 300; default: %(default)s")
    memory = own["memory"] = names.add_parser("memory", help="the peak of a round, against that of a bare loop")
    _add_common(memory, *vit_s)
    for name, size in (
        ("round", 32),
        ("prefix", 32),
        ("class-token", 32),
        ("together", 16),
        ("throughput", 64),
        ("memory", 32),
    ):
        own[name].add_argument("--batch-size", type=positive, default=size, help="default: %(default)s")
    for name, usual in (("round", "fp32"), ("throughput", "bf16"), ("memory", "fp32")):
        own[name].add_argument(
            "--precision", choices=("fp32", "tf32", "bf16", "fp16"), default=usual, help="default: %(default)s"
        )
    own["throughput"].add_argument(
        "--compile",
        dest="compile_mode",
        choices=("off", *COMPILE_MODES),
        default="default",
        help="torch.compile on both sides (default: %(default)s)",
    )
    for name in ("prefix", "class-token"):
        own[name].add_argument("--trainable-blocks", type=positive, default=2, help="default: %(default)s")
    own["together"].add_argument("--clients", type=positive, nargs="+", default=[2, 5, 10], help="default: %(default)s")
    own["memory"].add_argument("--clients", type=positive, nargs="+", default=[2, 10, 40], help="default: %(default)s")
    own["fisher"].add_argument("--examples", type=positive, default=128, help="scored each time (default: %(default)s)")
    own["engine"].add_argument("--clients", type=positive, default=10, help="in every round (default: %(default)s)")
    own["engine"].add_argument(
        "--actors",
        type=positive,
        default=0,
        help="of Ray (default: one per two cores, as Flower does)",
    )
    own["round"].add_argument("--density", type=float, default=0.0, help="share of weights trained (default: no mask)")
    own["scale"].add_argument(
        "--clients", type=positive, nargs="+", default=[100, 1_000, 10_000, 100_000], help="default: %(default)s"
    )


def _add_common(bench: argparse.ArgumentParser, model: str, size: int) -> None:
    bench.add_argument("--json", action="store_true", help="print the record instead of words")
    bench.add_argument("--model", dest="model_name", default=model, help="timm model (default: %(default)s)")
    bench.add_argument("--input-size", type=positive, default=size, help="pixels (default: %(default)s)")
    bench.add_argument("--device", dest="device_name", default="auto", help="auto, cpu, ... (default: %(default)s)")
    bench.add_argument("--results-dir", default="", help="for bench/NAME.json (default: results/ of the checkout)")
    bench.set_defaults(run=_bench)


def _bench(parsed: argparse.Namespace) -> None:
    name = parsed.name.replace("-", "_")
    measure = getattr(importlib.import_module(f"fl_taskarith.bench.{name}"), f"bench_{name}")
    from fl_taskarith.storage.paths import results_root
    from fl_taskarith.workspace.machine import choose_device

    found = measure(**{name: value for name, value in vars(parsed).items() if name not in BENCH_OUTPUT})
    path = found.write(results_root(parsed.results_dir) / "bench", choose_device(parsed.device_name))
    print(path.read_text() if parsed.json else "\n".join((*found.lines, str(path))))
    print(f"ratio: {found.ratio:.2f}")
