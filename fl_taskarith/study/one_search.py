"""The learning rate of one configuration: the search of a study that has one arm and no runs to report."""

import dataclasses
from pathlib import Path
from textwrap import fill

from fl_taskarith.config.effects import idle_reason
from fl_taskarith.config.rule import AUTO, to_toml
from fl_taskarith.config.settings import Config
from fl_taskarith.figures.plots import TITLE_CHARACTERS
from fl_taskarith.server.launch import require_own
from fl_taskarith.storage.files import make_folder, write_atomically
from fl_taskarith.storage.folder_choice import run_name
from fl_taskarith.study.definition import Arm, Study
from fl_taskarith.study.results import StudyResults
from fl_taskarith.study.runner import run_what_is_left
from fl_taskarith.study.search import Choice, Search
from fl_taskarith.study.search_plot import plot_search
from fl_taskarith.study.study_file import RUNNER_KEYS
from fl_taskarith.study.tables import trials_csv
from fl_taskarith.workspace.machine import on_this_machine

SEARCH_KEYS = (*RUNNER_KEYS, "learning-rate", "num-rounds")  # what a search decides for every run


def search_rate(
    config: Config, search: Search, root: Path, jobs: int = 1, budget: float | None = None
) -> tuple[Path, Choice | None]:
    """Search for a rate, and write what was tried under root/search/<name of the run>; the same call resumes.

    It writes search.csv, search.png and .pdf and, once there is a choice, chosen.toml: a settings file of `config` with
    the rate.

    Args:
        config: of `SEARCH_KEYS` its values do not matter.
        root, jobs, budget: see `run_studies`.

    Returns:
        search.csv, and the choice once there is one.

    Raises:
        ConfigError: what the settings name as one's own cannot be imported.
        StudyError: a run failed, or every rate diverged.
    """
    require_own(config)
    ignored = (*RUNNER_KEYS, "learning-rate")
    settings = {key: value for key, value in config.to_run_config().items() if key not in ignored}
    plain = dataclasses.replace(on_this_machine(config), learning_rate=AUTO, seed=search.seeds[0], run_name="")
    arm = Arm("", "search", "", settings)
    study = Study(
        f"Learning rate of {run_name(plain)}", f"search/{run_name(plain)}", "", (), "", {}, {}, search, (arm,)
    )
    results = StudyResults(study, root)
    path = results.folder / "search.csv"
    try:
        run_what_is_left([results], jobs, budget)
    finally:
        make_folder(results.folder)
        write_atomically(path, trials_csv(results))
    choice = results.choice(arm)
    title = fill(study.title, TITLE_CHARACTERS // 2)
    plot_search(results.scores(arm), search.by, choice, title, path.with_suffix(""))
    if choice is not None:
        write_atomically(path.with_name("chosen.toml"), settings_file(config, search, choice))
    return path, choice


def settings_file(config: Config, search: Search, choice: Choice) -> str:
    """Return what differs from the defaults in `config`, and the rate that was chosen, as a settings file."""
    usual = Config().to_run_config()
    given = {key: value for key, value in config.to_run_config().items() if value != usual[key]}
    given = {key: value for key, value in given.items()
             if key not in (*RUNNER_KEYS, "learning-rate") and idle_reason(config, key) is None}  # fmt: skip
    told = "at an end of the grid, so not tuned" if choice.edge else f"chosen by validation {search.by}"
    seeds = search.seeds_of(search.rounds[-1])
    told += f", seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    lines = [f"# learning-rate: {told} (search.csv beside this file has every rate that was tried).", ""]
    return "\n".join([*lines, *(f"{key} = {to_toml(value)}" for key, value in given.items()),
                      f"learning-rate = {choice.rate:g}", ""])  # fmt: skip
