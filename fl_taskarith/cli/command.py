"""The command `fl-taskarith`: argument parsing only."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_taskarith.cli.arguments import LateParser, ListAction, parse_words, positive, seconds
from fl_taskarith.cli.bench_commands import add_benches
from fl_taskarith.cli.merge_command import add_merge, run_merge
from fl_taskarith.config import settings as configuration
from fl_taskarith.config.fields import rules
from fl_taskarith.config.rule import to_toml
from fl_taskarith.errors import ConfigError, FlTaskarithError
from fl_taskarith.server.interruption import Interrupted, ending_on_sigterm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 on success, 1 with the cause on standard error on failure, 2 for wrong usage."""
    parsed = parse_words(_parser(), arguments)
    try:
        with ending_on_sigterm():
            parsed.run(parsed)
    except FlTaskarithError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(str(error) or "Interrupted. The same command goes on from what is saved.", file=sys.stderr)
        return error.exit_status if isinstance(error, Interrupted) else 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fl-taskarith", description="Federated learning under task arithmetic.")
    commands: argparse._SubParsersAction[Any] = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=LateParser
    )

    simulate = commands.add_parser(
        "simulate",
        help="run a federation in this process",
        epilog="settings (key=value):\n" + key_reference(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    simulate.add_argument("words", nargs="*", metavar="[CONF.toml] key=value", help="a settings file, then overrides")
    simulate.set_defaults(run=_simulate)

    centralized = commands.add_parser(
        "centralized", help="train without clients: the baseline (see simulate for settings)"
    )
    centralized.add_argument(
        "words", nargs="*", metavar="[CONF.toml] key=value", help="a settings file, then overrides"
    )
    centralized.set_defaults(run=_centralized)

    pretrain = commands.add_parser(
        "pretrain-glyph", help="remake the shipped weights of vit_glyph from rendered letters"
    )
    pretrain.add_argument("--output", type=Path, default=Path("vit_glyph.safetensors"), help="default: %(default)s")
    _add_overwrite(pretrain)
    pretrain.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    pretrain.add_argument("--steps", type=positive, default=4000, help="default: %(default)s, as shipped")
    pretrain.add_argument("--threads", type=positive, default=2, help="default: %(default)s")
    pretrain.set_defaults(run=_pretrain_glyph)

    mask = commands.add_parser(
        "mask",
        help="calibrate the mask of a run without the run, or describe and compare mask files",
        description="Calibrate the mask that a run of these settings uses (see simulate for settings), or, given "
        "mask files, describe them and their overlap.",
    )
    mask.add_argument(
        "words", nargs="*", metavar="[CONF.toml] key=value | MASK.safetensors", help="a settings file, then overrides"
    )
    mask.add_argument("--output", type=Path, help="folder (default: masks/NAME in the results; none for mask files)")
    _add_overwrite(mask)
    mask.add_argument(
        "--clients", type=positive, default=0, metavar="N", help="also a mask of each of the first N clients' own"
    )
    mask.set_defaults(run=_mask)

    shards = commands.add_parser(
        "shards",
        help="show which client owns how many examples of each class",
        description="Print and plot the class histogram of the shards of these settings (see simulate for settings).",
    )
    shards.add_argument("words", nargs="*", metavar="[CONF.toml] key=value", help="a settings file, then overrides")
    shards.add_argument("--output", type=Path, help="folder (default: shards/NAME in the results)")
    _add_overwrite(shards)
    shards.set_defaults(run=_shards)

    merge = commands.add_parser(
        "merge",
        help="merge fine-tuned models, given as .safetensors, into one",
        description="θ = θ₀ + λ · direction(τ_1, ..., τ_T): one round of federated averaging with T clients. Models "
        "are read tensor by tensor; any .safetensors of one architecture will do.",
    )
    merge.set_defaults(run=run_merge)
    add_merge(merge)

    one_shot = commands.add_parser(
        "one-shot", help="fine-tune a model per task, merge them by every method, and attribute the loss"
    )
    one_shot.add_argument("words", nargs="+", metavar="BENCHMARK.toml [key=value]", help="files; settings for all")
    one_shot.add_argument("--jobs", type=positive, default=1, help="processes to share the cells out to (default: 1)")
    one_shot.add_argument("--budget", type=seconds, help="start no cell after this time, for example 90s, 25m or 3h")
    one_shot.add_argument("--results-dir", default="", help="gets one-shot/NAME (default: results/ of the checkout)")
    one_shot.set_defaults(run=_one_shot)

    plot = commands.add_parser("plot", help="draw one run, or compare any set of runs (PNG and PDF)")
    plot.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's, or one with runs below it")
    plot.add_argument("--output", type=Path, help="path without ending (default: curves in the first folder)")
    _add_overwrite(plot)
    plot.set_defaults(run=_plot)

    bench = commands.add_parser("bench", help="measure ours against what it is to beat, side by side")
    add_benches(bench.add_subparsers(dest="name", required=True, metavar="NAME"))

    study = commands.add_parser("study", help="run the arms of study files over several seeds, and write their tables")
    study.add_argument("words", nargs="*", metavar="STUDY.toml [key=value]", help="study files; settings for all runs")
    study.add_argument(
        "--list",
        action=ListAction,
        help="say what is done, what is to do, and how long it takes here, by group (--list all: by run); run nothing",
    )
    study.add_argument("--tables", action="store_true", help="write the tables of what is done; run nothing")
    study.add_argument("--log", type=Path, help="write the tables, with printed lines for lost run folders")
    study.add_argument("--jobs", type=positive, default=1, help="processes to share the arms out to (default: 1)")
    study.add_argument("--budget", type=seconds, help="start no run after this time, for example 90s, 25m or 3h")
    study.add_argument("--results-dir", default="", help="folder of the studies (default: results/ of the checkout)")
    study.set_defaults(run=_study)
    _add_search(commands)
    _add_report(commands)

    for name, about in (("fed-em", "federated EM for mixtures of regressions"), ("br-ifca", "Byzantine-robust IFCA")):
        mixtures = commands.add_parser(name, help=f"the study of {about}: figures and tables; resumable")
        mixtures.add_argument("--quick", action="store_true", help="a part of it, in 5 minutes on two cores")
        mixtures.add_argument("--tables", action="store_true", help="write the report of what is done; run nothing")
        mixtures.add_argument("--jobs", type=positive, default=0, help="processes (default: one per core)")
        mixtures.add_argument("--budget", type=seconds, help="start nothing after this time, for example 90s or 25m")
        mixtures.add_argument("--results-dir", default="", help=f"for {name}/ (default: results/ of the checkout)")
        mixtures.set_defaults(run=_mixture_study, name=name)
    return parser


def _add_overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace other files at --output")


def _add_search(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    search = commands.add_parser(
        "search",
        help="choose the learning rate of one configuration, or of a run (its folder), on validation",
        description="A log grid under successive halving: all rates for the first number of rounds, the best for the "
        "next. Looks at validation accuracy only; a rate at an end of the grid is not tuned.",
    )
    search.add_argument("words", nargs="*", metavar="[CONF.toml] key=value", help="a settings file, then overrides")
    search.add_argument("--from", dest="low", type=float, help="lowest rate (default: two decades below a known one)")
    search.add_argument("--to", dest="high", type=float, help="highest rate (default: four decades above the lowest)")
    search.add_argument("--per-decade", type=positive, default=2, help="rates per factor of ten (default: 2)")
    search.add_argument("--rounds", type=positive, nargs="+", default=[4, 24], help="of each rung (default: 4 24)")
    search.add_argument("--keep", type=positive, default=2, help="rates that go on (default: %(default)s)")
    search.add_argument("--seed", type=int, default=0, help="of every run (default: %(default)s)")
    search.add_argument("--jobs", type=positive, default=1, help="processes (default: %(default)s)")
    search.add_argument("--budget", type=seconds, help="stop at a checkpoint after this time, for example 25m")
    search.add_argument("--results-dir", default="", help="for search/ (default: results/ of the checkout)")
    search.set_defaults(run=_search)


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    report = commands.add_parser("report", help="write a two-column paper from the results of studies (LaTeX, PDF)")
    report.add_argument("folder", type=Path, metavar="RESULTS_FOLDER", help="of one study, or of a folder per study")
    report.add_argument("--output", type=Path, help="folder (default: report in the results folder); your files in it, "
                        "main.tex and own.bib among them, stay as they are")  # fmt: skip
    report.add_argument("--authors", type=Path, metavar="AUTHORS.toml", help="[[author]] tables with name and id")
    report.add_argument(
        "--template", type=Path, metavar="TEMPLATE.tex", help="of main.tex, in place of the shipped one"
    )
    report.add_argument("--shipped-results", action="store_true", help="with --authors: the runs are not theirs but "
                        "shipped with the project, as the text then says")  # fmt: skip
    report.set_defaults(run=_report)


def key_reference() -> str:
    """Every setting with its default, what it accepts and what it does, one per line."""
    defaults = configuration.Config().to_run_config()
    return "\n".join(
        f"  {key} = {to_toml(defaults[key])}\n      {rule.about}; {rule.expected()}" for key, rule in rules().items()
    )


def _simulate(parsed: argparse.Namespace) -> None:
    _run(parsed.words, {})


def _centralized(parsed: argparse.Namespace) -> None:
    _run(parsed.words, {"strategy": "centralized"})


def _run(words: Sequence[str], fixed: Mapping[str, object]) -> None:
    """Run the settings of an optional file, then of key=value words, then of `fixed`."""
    config = _configured(words, fixed)
    from fl_taskarith.server.simulate import simulate

    simulate(config)


def _configured(words: Sequence[str], fixed: Mapping[str, object], used: Sequence[str] = ()) -> configuration.Config:
    """The settings of an optional file, then of key=value words, then of `fixed`; of `used` keys see `load`."""
    conf, assignments = (words[0], words[1:]) if words and "=" not in words[0] else (None, words)
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    overrides = configuration.parse_overrides(assignments)
    for key, value in fixed.items():
        if overrides.setdefault(key, value) != value:
            raise ConfigError(f'This command runs {key} = "{value}": leave {key} out, or use another command.')
    return configuration.load(conf, overrides, used)


def _mask(parsed: argparse.Namespace) -> None:
    files = [word for word in parsed.words if word.endswith(".safetensors") and "=" not in word]
    if not files:
        scored_by_clients = ("calibration-per-client",) if parsed.clients else ()
        config = _configured(parsed.words, {}, scored_by_clients)
        from fl_taskarith.describe.masks import make_masks

        make_masks(config, parsed.output, parsed.clients, parsed.overwrite)
        return
    if len(files) < len(parsed.words) or parsed.clients:
        raise ConfigError("Mask files are described as they are: leave settings and --clients out.")
    from fl_taskarith.describe.masks import compare_masks

    compare_masks([Path(file) for file in files], parsed.output, parsed.overwrite)


def _shards(parsed: argparse.Namespace) -> None:
    config = _configured(parsed.words, {})
    from fl_taskarith.describe.shard_histogram import show_shards

    show_shards(config, parsed.output, parsed.overwrite)


def _one_shot(parsed: argparse.Namespace) -> None:
    from fl_taskarith.one_shot.benchmark import run_one_shot
    from fl_taskarith.one_shot.benchmark_file import load_one_shot
    from fl_taskarith.storage.paths import results_root

    overrides = configuration.parse_overrides(word for word in parsed.words if "=" in word)
    benchmarks = [load_one_shot(Path(word), overrides) for word in parsed.words if "=" not in word]
    for benchmark in benchmarks:
        run_one_shot(benchmark, results_root(parsed.results_dir) / "one-shot", parsed.jobs, parsed.budget)


def _pretrain_glyph(parsed: argparse.Namespace) -> None:
    from fl_taskarith.models.glyph_pretraining import pretrain_glyph
    from fl_taskarith.storage.files import require_new

    require_new([parsed.output], parsed.overwrite)
    report = pretrain_glyph(parsed.output, seed=parsed.seed, steps=parsed.steps, threads=parsed.threads)
    print(f"{parsed.output.resolve()}: accuracy on letters of fonts held out {report.held_out_accuracy:.4f}")


def _plot(parsed: argparse.Namespace) -> None:
    from fl_taskarith.figures.plots import plot_curves, plot_distances
    from fl_taskarith.figures.run_groups import find_runs, has_regression_data, members
    from fl_taskarith.figures.set_plots import plot_set, possible_figures
    from fl_taskarith.storage.files import make_folder, require_new

    if parsed.output is not None:
        require_new(possible_figures(parsed.output), parsed.overwrite)
    output, runs = parsed.output or parsed.folders[0] / "curves", find_runs(parsed.folders)
    make_folder(output.parent)
    if all(map(has_regression_data, runs)):
        paths = plot_distances(runs, output)
    elif len(runs) == 1:
        paths = plot_curves(runs[0], output)
    else:
        paths = plot_set(members(runs), output)
    print(*(path.resolve() for path in paths), sep="\n")


def _study(parsed: argparse.Namespace) -> None:
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    from fl_taskarith.storage.paths import results_root
    from fl_taskarith.study.study_file import load_studies

    overrides = configuration.parse_overrides(word for word in parsed.words if "=" in word)
    studies = load_studies([Path(word) for word in parsed.words if "=" not in word], overrides)
    if not studies:
        raise ConfigError("Name a study file before the settings, for example conf/study/digits/six-models.toml.")
    root = results_root(parsed.results_dir)
    from fl_taskarith.study.from_log import LoggedResults
    from fl_taskarith.study.listing import list_study
    from fl_taskarith.study.results import StudyResults
    from fl_taskarith.study.runner import run_studies
    from fl_taskarith.study.tables import write_tables

    if parsed.log is not None:
        if len(studies) != 1:
            raise ConfigError(f"--log is of one study, and {len(studies)} files are named.")
        if parsed.list or parsed.tables or parsed.budget is not None:
            raise ConfigError("--log makes tables and runs nothing: leave out --list, --tables and --budget.")
        logged = LoggedResults.read(studies[0], root, parsed.log)
        write_tables(logged)
        print(logged.folder / "README.md")
        return
    if not parsed.list and not parsed.tables:
        run_studies(studies, root, jobs=parsed.jobs, budget=parsed.budget)
        return
    for study in studies:
        results = StudyResults(study, root)
        if parsed.list:
            for line in list_study(results, every_run=parsed.list == "all"):
                print(line, flush=True)
        if parsed.tables:
            write_tables(results)
            print(results.folder / "README.md")


def _search(parsed: argparse.Namespace) -> None:
    config = _configured(parsed.words, {})
    from fl_taskarith.server.learning_rates import search_from
    from fl_taskarith.storage.paths import results_root
    from fl_taskarith.study.one_search import SEARCH_KEYS, search_rate
    from fl_taskarith.study.search import DECADES, Search

    given = configuration.parse_overrides(word for word in parsed.words if "=" in word)
    if decided := sorted(given.keys() & set(SEARCH_KEYS)):
        raise ConfigError(
            f"{', '.join(decided)}: the search decides that itself, by --from, --to, --rounds, --seed and "
            "--results-dir: leave it out."
        )
    low = search_from(config) if parsed.low is None else parsed.low
    high = float(f"{low * 10**DECADES:.3g}") if parsed.high is None else parsed.high
    search = Search(low, high, parsed.per_decade, tuple(parsed.rounds), parsed.keep, parsed.seed)
    path, choice = search_rate(config, search, results_root(parsed.results_dir), parsed.jobs, parsed.budget)
    print(path)
    if choice is None:
        print("learning-rate: not chosen yet")
    else:
        print(f"learning-rate = {choice.rate:g}" + (" (an end of the grid: not tuned)" if choice.edge else ""))


def _report(parsed: argparse.Namespace) -> None:
    from fl_taskarith.report.document import write_report

    output = parsed.output or parsed.folder / "report"
    for path in write_report(parsed.folder, output, parsed.authors, parsed.template, parsed.shipped_results):
        print(path.resolve())


def _mixture_study(parsed: argparse.Namespace) -> None:
    from fl_taskarith.mixtures.studies.run_studies import run_mixture_study
    from fl_taskarith.storage.paths import results_root
    from fl_taskarith.workspace.machine import available_threads

    run_mixture_study(
        parsed.name,
        results_root(parsed.results_dir),
        quick=parsed.quick,
        jobs=parsed.jobs or available_threads(),
        budget=parsed.budget,
        only_report=parsed.tables,
    )
