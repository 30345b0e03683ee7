"""What a report tells of contrasts that were named beforehand, and of intervals over seeds and test images."""

from pathlib import Path

import pytest
from small_studies import STUDY, FakeTraining, KnowingTraining, study_of, table

from fl_taskarith.config.settings import Config
from fl_taskarith.errors import CheckpointError
from fl_taskarith.report.contrasts import difference
from fl_taskarith.report.document import write_report
from fl_taskarith.report.read_results import read_study
from fl_taskarith.study.runner import run_studies

pytestmark = pytest.mark.usefixtures("no_tex", "no_table_figures")

SEEDS = "seeds = [0, 1]\nshard-seeds = [0, 1, 2]"
CONTRASTS = """
[[arm]]
name = "twin"
settings = { learning-rate = 0.02 }
[[primary]]
arm = "head alone"
against = "dense"
[[primary]]
arm = "twin"
against = "dense"
"""


def accuracy(config: Config) -> float:
    return 0.7 + 0.2 * (config.trainable == "head") + 0.005 * config.shard_seed


def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: type[FakeTraining]) -> Path:
    monkeypatch.setattr("fl_taskarith.server.simulate.simulate", training(accuracy, test=lambda value: value))
    study = study_of((STUDY + CONTRASTS).replace("seeds = [0, 1, 2]", SEEDS), tmp_path)
    run_studies([study], tmp_path)
    return tmp_path / "tiny"


def test_the_report_reads_the_intervals_of_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = results(tmp_path, monkeypatch, KnowingTraining)
    study = read_study(folder)
    for (arm, against), row in zip(study.primary, table(folder / "primary.csv"), strict=True):
        pairs = difference(arm, against)
        assert (arm.label, against.label, pairs.over, pairs.n) == (row["arm"], row["against"], row["over"], 3)
        assert (pairs.low, pairs.high, pairs.p) == (float(row["low"]), float(row["high"]), float(row["p"]))
    assert len(study.primary[0][0].test) == 6


@pytest.mark.parametrize(("training", "over"), [(KnowingTraining, "test images"), (FakeTraining, "$t$ intervals")])
def test_primary_contrasts_come_first_and_all_else_is_exploratory(
    training: type[FakeTraining], over: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = results(tmp_path, monkeypatch, training)
    main = write_report(folder, tmp_path / "report")[0]
    numbers, text = (main.with_name(name).read_text() for name in ("numbers.tex", "main.tex"))
    assert text.index("Primary contrasts") < text.index("Centralized training")
    assert "All other differences in this report are exploratory." in numbers
    assert over in numbers[numbers.index("reportIntervals") :].partition("}\n")[0]
    assert "each with every seed of the division of the data (0, 1, 2)" in numbers
    lines = (tmp_path / "report" / "tables" / "primary.tex").read_text()
    assert ("head alone against dense" in lines) and ("twin against dense" in lines)
    assert "cannot tell" in lines or training is KnowingTraining, "seeds that are all alike do not tell their spread"
    if training is KnowingTraining:
        assert "different" in lines
        assert "Head alone is more accurate than dense" in numbers


def test_a_contrast_of_an_arm_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = results(tmp_path, monkeypatch, FakeTraining)
    settings = folder / "settings.json"
    settings.write_text(settings.read_text().replace('"against": "dense"', '"against": "gone"'))
    with pytest.raises(CheckpointError, match=r'a primary contrast of "gone", an arm that table.csv does not have'):
        read_study(folder)
