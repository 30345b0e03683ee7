"""Which test images a final model classified right: the text in run.json, and what the run writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_taskarith import History, simulate
from fl_taskarith.errors import CheckpointError
from fl_taskarith.server.federated import FederatedRun
from fl_taskarith.storage.correctness import CORRECT, correct_images, packed


@given(st.lists(st.lists(st.booleans(), min_size=11, max_size=11), min_size=1, max_size=3))
def test_what_is_packed_comes_back_as_a_mean_over_groups(groups: list[list[bool]]) -> None:
    record = {"data": {"test": 11}, CORRECT: [packed(np.array(group)) for group in groups]}
    np.testing.assert_allclose(correct_images(record), np.mean(groups, axis=0))  # type: ignore[arg-type]


def test_a_run_of_a_version_without_it_says_none() -> None:
    assert correct_images({"data": {"test": 8}}) is None


@pytest.mark.parametrize("texts", [[], ["ff"], ["zzzz"], ["ffff", "ff"], [3], "ffff", 7])
def test_what_is_not_of_so_many_images_is_refused(texts: object) -> None:
    with pytest.raises(CheckpointError, match=r"test_correct in run.json is not a list of texts of 4 hexadecimal"):
        correct_images({"data": {"test": 12}, CORRECT: texts})


def _record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return record


def test_a_run_notes_it_of_its_final_model_also_if_it_was_cut_after_its_last_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path) -> History:
        return simulate(dataset="digits", num_clients=5, num_rounds=2, local_steps=1, mask_rule="none",
                        draw_curves=False, save_model=False, results_dir=folder)  # fmt: skip

    whole = run(tmp_path / "whole")
    right = correct_images(_record(whole.folder))
    assert right is not None
    assert right.mean() == pytest.approx(whole.rows[-1]["test_accuracy"])
    assert set(right) == {0, 1}

    with monkeypatch.context() as patch:
        patch.setattr(FederatedRun, "_end", cut)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    assert _record(run(tmp_path / "cut").folder)[CORRECT] == _record(whole.folder)[CORRECT]


def cut(_: object) -> None:
    raise KeyboardInterrupt
