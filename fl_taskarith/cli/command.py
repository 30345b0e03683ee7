"""The command `fl-taskarith`: argument parsing only."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fl_taskarith.cli.arguments import ListAction, add_overwrite, add_settings, add_sharing, parse_words, positive
from fl_taskarith.cli.bench_commands import add_benches
from fl_taskarith.config import settings as configuration
from fl_taskarith.config.reference import help_text
from fl_taskarith.config.toml import read_toml
from fl_taskarith.errors import ConfigError, FlTaskarithError
from fl_taskarith.server.interruption import Interrupted, ending_on_sigterm
from fl_taskarith.storage.paths import results_root, shipped_file

MERGE_METHODS = ("task-arithmetic", "average", "fednova", "fedgma", "median", "cclip", "ties", "dare")
MERGE_PARAMETERS = {
    "threshold": "fedgma: agreement on a sign from which an entry is not damped, ρ",
    "radius": "cclip: largest norm of a task vector, ρ",
    "keep": "ties: share of entries of each task vector that stay",
    "drop": "dare: share of entries of each task vector that are dropped, p",
}


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
    raw, words = argparse.RawDescriptionHelpFormatter, read_toml(shipped_file("cli/commands.toml"))
    overview = [
        f"{wish}:\n" + "\n".join(f"  {name:<16}{text['about']}" for name, text in group.items()) + "\n"
        for wish, group in words.items()
    ]
    parser = argparse.ArgumentParser(
        prog="fl-taskarith",
        usage="fl-taskarith COMMAND ...",
        description="Federated learning under the lens of task arithmetic. fl-taskarith COMMAND --help says more.",
        epilog="\n".join([*overview, f"example: fl-taskarith simulate {words['run']['simulate']['example']}"]),
        formatter_class=raw,
    )
    commands = parser.add_subparsers(prog="fl-taskarith", required=True, metavar="COMMAND", help=argparse.SUPPRESS)
    for name, text in (pair for group in words.values() for pair in group.items()):
        about, example = text["about"], f"example: fl-taskarith {name} {text['example']}"
        command = commands.add_parser(
            name,
            description=f"{about[0].upper()}{about[1:]}. {text.get('more', '')}",
            epilog=f"{example}\n\n{help_text()}" if name == "simulate" else example,
            formatter_class=raw if name == "simulate" else argparse.HelpFormatter,
        )
        run, add_arguments = COMMANDS[name]
        command.set_defaults(run=run, name=name)
        add_arguments(command)
    return parser


def _add_merge(merge: argparse.ArgumentParser) -> None:
    merge.add_argument("models", nargs="+", type=Path, metavar="MODEL.safetensors", help="fine-tuned models or folders")
    merge.add_argument("--base", type=Path, help="θ₀, the model they were fine-tuned from")
    merge.add_argument("--task-vectors", action="store_true", help="the files hold θ - θ₀ already")
    merge.add_argument("--method", choices=MERGE_METHODS, default="task-arithmetic", help="default: %(default)s")
    merge.add_argument("--scale", type=float, help="λ (default: where equal models merge into themselves)")
    for name, about in MERGE_PARAMETERS.items():
        merge.add_argument(f"--{name}", type=float, help=about)
    merge.add_argument("--steps", type=float, nargs="+", default=(), help="fednova: local steps of each model")
    merge.add_argument("--seed", type=int, default=0, help="of what dare drops, and of tasks (default: %(default)s)")
    merge.add_argument("--search", type=Path, metavar="BENCHMARK.toml", help="choose λ and the rest on validation of "
                       "these tasks, one per model in order (see one-shot)")  # fmt: skip
    merge.add_argument("--data", default="", metavar="LEVEL", help="of the tasks, under --search (default: the first)")
    merge.add_argument("--output", type=Path, default=Path("merged.safetensors"), help="default: %(default)s; an "
                       "earlier merge there is replaced, an input never")  # fmt: skip
    add_overwrite(merge)


def _simulate(parsed: argparse.Namespace) -> None:
    config = _configured(parsed.words, {"strategy": "centralized"} if parsed.name == "centralized" else {})
    from fl_taskarith.server.simulate import simulate

    simulate(config)


def _configured(words: Sequence[str], fixed: Mapping[str, object], used: Sequence[str] = ()) -> configuration.Config:
    """Load the settings of an optional file, then of key=value words, then of `fixed`; for `used` see `load`."""
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


def _merge(parsed: argparse.Namespace) -> None:
    from fl_taskarith.merging.merge_rules import MERGE_RULES
    from fl_taskarith.one_shot.merge_checks import check_output
    from fl_taskarith.one_shot.merge_files import MergeSettings, describe_sources, merge, open_sources, write_merged
    from fl_taskarith.storage.files import make_folder

    given = {name: getattr(parsed, name) for name in MERGE_PARAMETERS if getattr(parsed, name) is not None}
    own = MERGE_RULES[parsed.method].parameter
    if foreign := given.keys() - {own}:
        raise ConfigError(f"The method {parsed.method} takes no --{', --'.join(sorted(foreign))}.")
    if parsed.steps and parsed.method != "fednova":
        raise ConfigError(f"--steps has no effect under --method {parsed.method}: leave it out, or choose fednova.")
    if parsed.search is None and (parsed.data or (parsed.seed and parsed.method != "dare")):
        unused = "--data" if parsed.data else f"--seed under --method {parsed.method}"
        raise ConfigError(f"{unused} has no effect without --search: leave it out.")
    read = [path for path in (*parsed.models, parsed.base, parsed.search) if path is not None]
    check_output(parsed.output, read, parsed.overwrite)
    sources = open_sources(parsed.base, parsed.models, parsed.task_vectors)
    print(describe_sources(sources))
    make_folder(parsed.output.parent)
    settings = MergeSettings(parsed.method, given.get(own), parsed.scale, parsed.steps, parsed.seed)
    if parsed.search is not None:
        if given or parsed.scale is not None:
            raise ConfigError(f"--search chooses --scale{' and --' + own if own else ''}: leave them out.")
        from fl_taskarith.one_shot.benchmark_file import load_one_shot
        from fl_taskarith.one_shot.search_files import search_files

        settings = search_files(sources, settings, load_one_shot(parsed.search), parsed.data)
    merged = merge(sources, settings)
    facts = dataclasses.asdict(settings) | {"models": [path.name for path in parsed.models]}
    write_merged(sources, merged, facts, parsed.output)
    print(parsed.output.resolve())


def _one_shot(parsed: argparse.Namespace) -> None:
    from fl_taskarith.one_shot.benchmark import run_one_shot
    from fl_taskarith.one_shot.benchmark_file import load_one_shot

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
    from fl_taskarith.workspace.machine import available_threads

    run_mixture_study(
        parsed.name,
        results_root(parsed.results_dir),
        quick=parsed.quick,
        jobs=parsed.jobs or available_threads(),
        budget=parsed.budget,
        only_report=parsed.tables,
    )


def _add_pretrain(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", type=Path, default=Path("vit_glyph.safetensors"), help="default: %(default)s")
    add_overwrite(command)
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--steps", type=positive, default=4000, help="default: %(default)s, as shipped")
    command.add_argument("--threads", type=positive, default=2, help="default: %(default)s")


def _add_mask(command: argparse.ArgumentParser) -> None:
    add_settings(command, "[CONF.toml] key=value | MASK.safetensors")
    command.add_argument("--output", type=Path, help="folder (default: masks/NAME in the results; none for mask files)")
    add_overwrite(command)
    about = "also a mask of each of the first N clients' own"
    command.add_argument("--clients", type=positive, default=0, metavar="N", help=about)


def _add_shards(command: argparse.ArgumentParser) -> None:
    add_settings(command)
    command.add_argument("--output", type=Path, help="folder (default: shards/NAME in the results)")
    add_overwrite(command)


def _add_one_shot(command: argparse.ArgumentParser) -> None:
    command.add_argument("words", nargs="+", metavar="BENCHMARK.toml [key=value]", help="files; settings for all")
    add_sharing(command, "cell", "one-shot/NAME")


def _add_plot(command: argparse.ArgumentParser) -> None:
    command.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's, or one with runs below it")
    command.add_argument("--output", type=Path, help="path without ending (default: curves in the first folder)")
    add_overwrite(command)


def _add_study(command: argparse.ArgumentParser) -> None:
    command.add_argument("words", nargs="*", metavar="STUDY.toml [key=value]", help="study files; settings for all")
    about = "say what is done, what is to do, and how long it takes here, by group (--list all: by run); run nothing"
    command.add_argument("--list", action=ListAction, help=about)
    command.add_argument("--tables", action="store_true", help="write the tables of what is done; run nothing")
    command.add_argument("--log", type=Path, help="write the tables, with printed lines for lost run folders")
    add_sharing(command, "run", "the studies")


def _add_search(command: argparse.ArgumentParser) -> None:
    add_settings(command)
    command.add_argument("--from", dest="low", type=float, help="lowest rate (default: two decades below a known one)")
    command.add_argument("--to", dest="high", type=float, help="highest rate (default: four decades above the lowest)")
    command.add_argument("--per-decade", type=positive, default=2, help="rates per factor of ten (default: 2)")
    command.add_argument("--rounds", type=positive, nargs="+", default=[4, 24], help="of each rung (default: 4 24)")
    command.add_argument("--keep", type=positive, default=2, help="rates that go on (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of every run (default: %(default)s)")
    add_sharing(command, "round", "search/")


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, metavar="RESULTS_FOLDER", help="of one study, or of a folder per study")
    about = "folder (default: report in the results folder); your own main.tex and own.bib in it stay"
    command.add_argument("--output", type=Path, help=about)
    command.add_argument("--authors", type=Path, metavar="AUTHORS.toml", help="[[author]] tables with name and id")
    about = "of main.tex, in place of the shipped one"
    command.add_argument("--template", type=Path, metavar="TEMPLATE.tex", help=about)
    about = "with --authors: the runs are not theirs but shipped with the project, as the text then says"
    command.add_argument("--shipped-results", action="store_true", help=about)


def _add_mixture_study(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quick", action="store_true", help="a part of it, in 5 minutes on two cores")
    command.add_argument("--tables", action="store_true", help="write the report of what is done; run nothing")
    add_sharing(command, "cell", "the study", jobs=0)


def _add_bench(command: argparse.ArgumentParser) -> None:
    add_benches(command.add_subparsers(dest="name", required=True, metavar="NAME"))


Run = Callable[[argparse.Namespace], None]
COMMANDS: Mapping[str, tuple[Run | None, Callable[[argparse.ArgumentParser], None]]] = {
    "simulate": (_simulate, add_settings),
    "centralized": (_simulate, add_settings),
    "search": (_search, _add_search),
    "study": (_study, _add_study),
    "one-shot": (_one_shot, _add_one_shot),
    "fed-em": (_mixture_study, _add_mixture_study),
    "br-ifca": (_mixture_study, _add_mixture_study),
    "report": (_report, _add_report),
    "plot": (_plot, _add_plot),
    "mask": (_mask, _add_mask),
    "shards": (_shards, _add_shards),
    "merge": (_merge, _add_merge),
    "bench": (None, _add_bench),  # each benchmark has a parser of its own, which says what runs it
    "pretrain-glyph": (_pretrain_glyph, _add_pretrain),
}
"""The function of each command, and what adds its arguments to its parser."""
