"""results/COLUMNS.md names every column of the CSV files that the project writes."""

import csv
import re
import subprocess
from pathlib import Path

from fl_taskarith.config.fields import rules
from fl_taskarith.storage.run_folder import COLUMNS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


def test_every_column_of_the_committed_csvs_is_explained() -> None:
    said = re.sub(r"```.*?```", "", (RESULTS / "COLUMNS.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    named = {*re.findall(r"`([^`]+)`", said), *(key.replace("-", "_") for key in rules()), *map(str, range(10))}
    assert set(COLUMNS) <= named
    git = subprocess.run(["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True, check=False)
    files = [ROOT / line for line in git.stdout.split() if line.endswith(".csv")] or list(RESULTS.rglob("*.csv"))
    assert len(files) > 80
    for file in files:
        with open(file, encoding="utf-8", newline="") as lines:
            header = next(csv.reader(lines))
        plain = {re.sub(r"^(gain|difference)_(sd|n|low|high|over|detectable)$", r"\1_mean", name) for name in header}
        unknown = {name.removesuffix("_sd") for name in plain} - named
        assert not unknown, f"{file.relative_to(ROOT)} has columns that COLUMNS.md does not explain: {unknown}"
