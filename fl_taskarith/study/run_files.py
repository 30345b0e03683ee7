"""The command `study` as a function that returns its tables."""

from collections.abc import Sequence
from pathlib import Path

import pandas

from fl_taskarith.config.fields import kebab
from fl_taskarith.storage.paths import conf_file, results_root
from fl_taskarith.study.results import StudyResults
from fl_taskarith.study.runner import run_studies
from fl_taskarith.study.study_file import load_studies


def study(
    files: Path | str | Sequence[Path | str],
    *,
    jobs: int = 1,
    budget: float | None = None,
    results_dir: str = "",
    **overrides: object,
) -> pandas.DataFrame:
    """Run what is left of studies, write their tables, and return these as one frame, a row per arm.

    Args:
        files: study files, or their names below conf/study.
        jobs: processes that share the runs.
        budget: seconds after which the study stops; the same call goes on.
        results_dir: folder of the results; by default the results folder.
        overrides: settings of all runs, by their Python names.

    Raises:
        StudyError: runs failed; all others were run and are in the tables.
        FlTaskarithError: anything else that the user can mend.
    """
    names = [files] if isinstance(files, Path | str) else files
    given = {kebab(key): value for key, value in overrides.items()}
    studies, root = load_studies([conf_file(name) for name in names], given), results_root(results_dir)
    run_studies(studies, root, jobs=jobs, budget=budget)
    tables = {each.name: pandas.read_csv(StudyResults(each, root).folder / "table.csv") for each in studies}
    return pandas.concat(tables, names=["study", None]).reset_index(level=0).reset_index(drop=True)
