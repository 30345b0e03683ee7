"""The learning rate of one configuration: the search of a study that has one arm and no runs to report."""

import dataclasses
from pathlib import Path

from fl_taskarith.config.rule import AUTO
from fl_taskarith.config.settings import Config
from fl_taskarith.storage.files import make_folder, write_atomically
from fl_taskarith.storage.folder_choice import run_name
from fl_taskarith.study.definition import Arm, Study
from fl_taskarith.study.results import StudyResults
from fl_taskarith.study.runner import run_what_is_left
from fl_taskarith.study.search import Choice, Search
from fl_taskarith.study.study_file import RUNNER_KEYS
from fl_taskarith.study.tables import trials_csv
from fl_taskarith.workspace.machine import on_this_machine

SEARCH_KEYS = (*RUNNER_KEYS, "learning-rate", "num-rounds")  # what a search decides for every run


def search_rate(
    config: Config, search: Search, root: Path, jobs: int = 1, budget: float | None = None
) -> tuple[Path, Choice | None]:
    """Search for a rate and write search.csv under root/search/<name of the run>; the same call resumes.

    Args:
        config: of `SEARCH_KEYS` its values do not matter.
        root, jobs, budget: see `run_studies`.

    Returns:
        The file, and the choice once there is one.

    Raises:
        StudyError: a run failed, or every rate diverged.
    """
    ignored = (*RUNNER_KEYS, "learning-rate")
    settings = {key: value for key, value in config.to_run_config().items() if key not in ignored}
    plain = dataclasses.replace(on_this_machine(config), learning_rate=AUTO, seed=search.seed, run_name="")
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
    return path, results.choice(arm)
