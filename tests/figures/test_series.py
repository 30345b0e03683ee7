"""Sentences and numbers of tables that are made from a frame of runs."""

import pandas
import pytest

from fl_taskarith.figures.series import mean_and_sd, mean_difference


@pytest.mark.parametrize("common", range(4))
def test_a_difference_is_over_common_seeds_and_one_of_them_has_no_interval(common: int) -> None:
    runs = pandas.DataFrame({"seed": [0, 1, 2], "error": [0.1, 0.4, 0.2]})
    other = pandas.DataFrame({"seed": [2 - place + 3 * (place >= common) for place in range(3)], "error": [0.0] * 3})
    said = mean_difference(runs, other, "error")
    if common < 2:
        assert said == "not run"
    else:
        shared = [0.2, 0.4, 0.1][:common]
        assert said.startswith(f"{sum(shared) / common:+.3g} {'(' if common < 3 else '['}") and "nan" not in said


def test_a_mean_of_one_has_no_spread() -> None:
    frame = pandas.DataFrame({"error": [0.25]})
    assert mean_and_sd(frame, "error") == "0.25 (n = 1)"
    assert mean_and_sd(frame[:0], "error") == "not run"
