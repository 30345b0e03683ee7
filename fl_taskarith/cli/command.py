"""The command `fl-taskarith`: argument parsing only."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fl_taskarith.cli.arguments import LateParser, add_arguments, parse_words, split_words
from fl_taskarith.cli.bench_commands import add_benches
from fl_taskarith.cli.merge_command import add_merge, run_merge
from fl_taskarith.config import settings as configuration
from fl_taskarith.config.reference import help_text
from fl_taskarith.config.rule import shown
from fl_taskarith.config.toml import read_toml
from fl_taskarith.errors import ConfigError, FlTaskarithError
from fl_taskarith.server.interruption import Interrupted, ending_on_sigterm
from fl_taskarith.storage.paths import conf_file, results_root, shipped_file
from fl_taskarith.storage.run_log import lasting_output

MANY_LINES = 60  # in one figure: whoever draws more is told


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 on success, 1 with the cause on standard error on failure, 2 for wrong usage.

    It is 1, too, if standard output could not be written for another reason than that nobody reads it any more.
    """
    with lasting_output() as output:
        status = _run(arguments)
    return status or int(output.fault is not None and not isinstance(output.fault, BrokenPipeError))


def _run(arguments: Sequence[str] | None) -> int:
    parsed = parse_words(_parser(), arguments)
    try:
        with ending_on_sigterm():
            parsed.run(parsed)
    except FlTaskarithError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a file or folder that nothing more can be said about than the system does
        names = " and ".join(shown(name) for name in (error.filename, error.filename2) if name is not None)
        print(f"{type(error).__name__}: {names or 'the system'}: {error.strerror or error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(str(error) or "Interrupted. The same command goes on from what is saved.", file=sys.stderr)
        return error.exit_status if isinstance(error, Interrupted) else 130
    return 0


def _parser() -> argparse.ArgumentParser:
    raw, words = argparse.RawDescriptionHelpFormatter, read_toml(shipped_file("cli/commands.toml"))
    shared = words.pop("shared")
    overview = [
        f"{wish}:\n" + "\n".join(f"  {name:<16}{text['about']}" for name, text in group.items()) + "\n"
        for wish, group in words.items()
    ]
    parser = LateParser(
        prog="fl-taskarith",
        usage="fl-taskarith COMMAND ...",
        description="Federated learning under the lens of task arithmetic. fl-taskarith COMMAND --help says more.",
        epilog="\n".join([*overview, f"example: fl-taskarith simulate {words['run']['simulate']['example']}"]),
        formatter_class=raw,
    )
    commands = parser.add_subparsers(
        prog="fl-taskarith", required=True, metavar="COMMAND", help=argparse.SUPPRESS, parser_class=LateParser
    )
    for name, text in (pair for group in words.values() for pair in group.items()):
        about, example = text["about"], f"example: fl-taskarith {name} {text['example']}"
        command = commands.add_parser(
            name,
            description=f"{about[0].upper()}{about[1:]}. {text.get('more', '')}",
            epilog=f"{example}\n\n{help_text()}" if name == "simulate" else example,
            formatter_class=raw if name == "simulate" else argparse.HelpFormatter,
        )
        command.set_defaults(run=COMMANDS[name], name=name)
        for arguments in (text.get("arguments", {}), *(shared[group] for group in text.get("shared", ()))):
            add_arguments(command, arguments)
        if name == "merge":
            add_merge(command)
        if name == "bench":
            add_benches(command.add_subparsers(dest="name", required=True, metavar="NAME"))
    return parser


def _simulate(parsed: argparse.Namespace) -> None:
    config = _configured(parsed.words, {"strategy": "centralized"} if parsed.name == "centralized" else {})
    from fl_taskarith.server.simulate import simulate

    simulate(config)


def _configured(words: Sequence[str], fixed: Mapping[str, object], used: Sequence[str] = ()) -> configuration.Config:
    """Load the settings of an optional file, then of key=value words, then of `fixed`; for `used` see `load`."""
    files, assignments = split_words(words)
    if len(files) > 1:
        raise ConfigError(f"Several settings files, {' and '.join(map(shown, files))}: expected one, then key=value.")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    overrides = configuration.parse_overrides(assignments)
    for key, value in fixed.items():
        if overrides.setdefault(key, value) != value:
            raise ConfigError(f'This command runs {key} = "{value}": leave {key} out, or use another command.')
    return configuration.load(conf_file(files[0]) if files else None, overrides, used)


def _mask(parsed: argparse.Namespace) -> None:
    files = [word for word in split_words(parsed.words)[0] if word.endswith(".safetensors")]
    if not files:
        scored_by_clients = ("calibration-per-client",) if parsed.clients else ()
        config = _configured(parsed.words, {}, scored_by_clients)
    elif len(files) < len(parsed.words) or parsed.clients:
        raise ConfigError("Mask files are described as they are: leave settings and --clients out.")
    from fl_taskarith.describe.masks import compare_masks, make_masks

    if not files:
        make_masks(config, parsed.output, parsed.clients, parsed.overwrite)
        return
    compare_masks([Path(file) for file in files], parsed.output, parsed.overwrite)


def _shards(parsed: argparse.Namespace) -> None:
    config = _configured(parsed.words, {})
    from fl_taskarith.describe.shard_histogram import show_shards

    show_shards(config, parsed.output, parsed.overwrite)


def _one_shot(parsed: argparse.Namespace) -> None:
    from fl_taskarith.one_shot.benchmark import run_one_shot
    from fl_taskarith.one_shot.benchmark_file import load_one_shot

    files, assignments = split_words(parsed.words)
    overrides = configuration.parse_overrides(assignments)
    benchmarks = [load_one_shot(conf_file(file), overrides) for file in files]
    if not benchmarks:
        raise ConfigError("Name a benchmark before the settings, for example conf/one-shot/digits.toml.")
    for benchmark in benchmarks:
        run_one_shot(benchmark, results_root(parsed.results_dir) / "one-shot", parsed.jobs, parsed.budget)


def _pretrain_glyph(parsed: argparse.Namespace) -> None:
    from fl_taskarith.models.glyph_pretraining import pretrain_glyph
    from fl_taskarith.storage.files import make_folder, require_new

    require_new([parsed.output], parsed.overwrite)
    make_folder(parsed.output.parent)
    facts = pretrain_glyph(parsed.output, seed=parsed.seed, steps=parsed.steps, threads=parsed.threads)
    print(f"{parsed.output.resolve()}: accuracy on letters of fonts held out {facts['held_out_accuracy']:.4f}")


def _plot(parsed: argparse.Namespace) -> None:
    from fl_taskarith.config.choices import REGRESSION
    from fl_taskarith.figures.plots import curves, distances, save_figure
    from fl_taskarith.figures.run_groups import find_runs, members
    from fl_taskarith.figures.set_plots import plot_set, possible_figures
    from fl_taskarith.storage.files import make_folder, require_new

    if parsed.output is not None:
        if parsed.output.name in ("", ".."):
            raise ConfigError(f"--output {parsed.output}: expected a path without ending, for example figures/all.")
        require_new(possible_figures(parsed.output), parsed.overwrite)
    output, runs = parsed.output or parsed.folders[0] / "curves", find_runs(parsed.folders)
    make_folder(output.parent)
    if all(run.settings["dataset"] == REGRESSION for run in runs):
        paths = save_figure(distances(runs), output)
    elif len(runs) == 1:
        paths = save_figure(curves(runs[0]), output)
    else:
        if len(lines := members(runs)) > MANY_LINES:
            print(f"{len(lines)} lines of {len(runs)} runs are hard to read and take minutes: name fewer folders.",
                  file=sys.stderr, flush=True)  # fmt: skip
        paths = plot_set(lines, output)
    print(*(path.resolve() for path in paths), sep="\n")


def _study(parsed: argparse.Namespace) -> None:
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    from fl_taskarith.study.study_file import load_studies

    files, assignments = split_words(parsed.words)
    studies = load_studies([conf_file(file) for file in files], configuration.parse_overrides(assignments))
    if not studies:
        raise ConfigError("Name a study file before the settings, for example conf/study/digits/six-models.toml.")
    root = results_root(parsed.results_dir)
    from fl_taskarith.study.elsewhere import made_elsewhere
    from fl_taskarith.study.listing import list_study
    from fl_taskarith.study.pack import pack_runs
    from fl_taskarith.study.plan import plans_of
    from fl_taskarith.study.results import StudyResults
    from fl_taskarith.study.runner import run_studies
    from fl_taskarith.study.tables import write_tables

    if not parsed.list and not parsed.tables and not parsed.pack:
        run_studies(studies, root, jobs=parsed.jobs, budget=parsed.budget)
        return
    for study in studies:
        results = StudyResults(study, root)
        if parsed.list:
            for line in list_study(results, every_run=parsed.list == "all"):
                print(line, flush=True)
        if parsed.tables:
            write_tables(results)
            print(results.folder / "README.md", *made_elsewhere(results, plans_of(results)), sep="\n")
        if parsed.pack:
            path, number = pack_runs(results.runs)
            print(f"{number} run folders went into {path}.")


def _init(parsed: argparse.Namespace) -> None:
    from fl_taskarith.study.project import init_project

    files = init_project(parsed.folder)
    print(f"{len(files)} files in {parsed.folder.resolve()}. The commands are in {files[0].name}, in order.")


def _search(parsed: argparse.Namespace) -> None:
    config = _configured(parsed.words, {})
    given = configuration.parse_overrides(split_words(parsed.words)[1])
    from fl_taskarith.study.one_search import SEARCH_KEYS, search_rate

    if decided := sorted(given.keys() & set(SEARCH_KEYS)):
        raise ConfigError(
            f"{', '.join(decided)}: the search decides that itself, by --from, --to, --rounds, --seeds and "
            "--results-dir: leave it out."
        )
    from fl_taskarith.server.learning_rates import search_from
    from fl_taskarith.study.search import DECADES, Search

    low = search_from(config) if parsed.low is None else parsed.low
    high = float(f"{low * 10**DECADES:.3g}") if parsed.high is None else parsed.high
    seeds = tuple(parsed.seeds)
    rounds, bracket = tuple(parsed.rounds), not parsed.no_bracket
    search = Search(low, high, parsed.per_decade, rounds, parsed.keep, seeds, parsed.by, bracket=bracket)
    path, choice = search_rate(config, search, results_root(parsed.results_dir), parsed.jobs, parsed.budget)
    print(path)
    if choice is None:
        print("learning-rate: not chosen yet")
    else:
        print(f"learning-rate = {choice.rate:g}" + (" (an end of the grid: not tuned)" if choice.edge else ""))


def _evaluate(parsed: argparse.Namespace) -> None:
    files, assignments = split_words(parsed.words)
    if len(files) != 1:
        raise ConfigError("Name one run: its folder, or its model.safetensors; settings follow as key=value.")
    overrides = configuration.parse_overrides(assignments)
    from fl_taskarith.describe.evaluation import evaluate_run

    features, overwrite = not parsed.no_features, parsed.overwrite
    folder = evaluate_run(Path(files[0]), overrides, parsed.output, features, overwrite, best=parsed.best)
    print(folder.resolve())


def _results(parsed: argparse.Namespace) -> None:
    from fl_taskarith.describe.runs_at_hand import describe_results

    for line in describe_results(parsed.results_dir):
        print(line)


def _report(parsed: argparse.Namespace) -> None:
    if parsed.html:
        if parsed.authors or parsed.template or parsed.shipped_results:
            raise ConfigError("--html writes a page without authors or template: leave --authors, --template and "
                              "--shipped-results out.")  # fmt: skip
        from fl_taskarith.report.page import write_page

        print(write_page(parsed.folder, parsed.output or parsed.folder / "report").resolve())
        return
    from fl_taskarith.report.document import write_report

    output = parsed.output or parsed.folder / "report"
    for path in write_report(parsed.folder, output, parsed.authors, parsed.template, parsed.shipped_results):
        print(path.resolve())


def _mixture_study(parsed: argparse.Namespace) -> None:
    from fl_taskarith.mixtures.studies.run_studies import run_mixture_study
    from fl_taskarith.workspace.machine import available_threads

    jobs, root = parsed.jobs or available_threads(), results_root(parsed.results_dir)
    run_mixture_study(parsed.name, root, quick=parsed.quick, jobs=jobs, budget=parsed.budget, only_report=parsed.tables)


Run = Callable[[argparse.Namespace], None]
COMMANDS: Mapping[str, Run | None] = {
    "init": _init,
    "simulate": _simulate,
    "centralized": _simulate,
    "search": _search,
    "study": _study,
    "one-shot": _one_shot,
    "fed-em": _mixture_study,
    "br-ifca": _mixture_study,
    "report": _report,
    "evaluate": _evaluate,
    "results": _results,
    "plot": _plot,
    "mask": _mask,
    "shards": _shards,
    "merge": run_merge,
    "bench": None,  # each benchmark has a parser of its own, which says what runs it
    "pretrain-glyph": _pretrain_glyph,
}
"""What runs each command of commands.toml."""
