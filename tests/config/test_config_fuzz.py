"""Configurations drawn at random: each is accepted, or refused by an error that names a key; accepted ones run."""

import datetime
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from fuzz import accepted_ones_run, fuzz, try_arguments, try_mapping, try_toml

from fl_taskarith.config.settings import from_mapping, load, parse_overrides
from fl_taskarith.errors import ConfigError


def test_hundreds_of_configurations_are_accepted_or_refused_by_key(tmp_path: Path) -> None:
    for tally in fuzz(200, tmp_path, start=1):
        assert tally.lost == [], tally.fault
        assert tally.outcomes["accepted"] > 0 < tally.outcomes["refused, naming a key"]


@pytest.mark.slow
def test_thousands_of_configurations_are_accepted_or_refused_by_key(tmp_path: Path) -> None:
    for tally in fuzz(3000, tmp_path, start=2):
        assert tally.lost == [], tally.fault


def test_a_few_accepted_configurations_run(tmp_path: Path) -> None:
    assert accepted_ones_run(3, tmp_path, start=3).lost == []


@pytest.mark.slow
def test_many_accepted_configurations_run(tmp_path: Path) -> None:
    tally = accepted_ones_run(100, tmp_path, start=4)
    assert tally.lost == []
    assert tally.outcomes["finished"] > 70


ODD = {
    "huge": 10**5000,
    "beyond floats": Fraction(10) ** 400,
    "array": np.arange(3),
    "long": "x" * 100_000,
    "surrogate": "\ud800",
    "NUL": "a\0b",
    "nan": float("nan"),
    "nested": [[]],
    "date": datetime.date.min,
}


@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("key", ["seed", "clients-at-once", "learning-rate", "ridge-lambda", "nesterov", "sharding"])
def test_what_cannot_even_be_written_down_is_refused(key: str, what: str) -> None:
    assert try_mapping({key: ODD[what]}) == "refused, naming a key"


def test_a_key_that_is_none_is_refused_in_few_words() -> None:
    for key in ("\ud800", "x" * 100_000, "", "num clients", "num-clients\0", "__class__"):
        assert try_mapping({key: 1}) == "refused, naming a key"


def test_keys_that_are_no_strings_are_refused() -> None:
    for key in (1, None, ("a",)):
        with pytest.raises(ConfigError, match="keys are strings"):
            from_mapping({key: 1})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "text",
    ["seed = " + "9" * 5000, "seed = 0x" + "f" * 5000, "seed = " + "[" * 5000, "\udcff", "[seed]\na = 1", "seed.a = 1"],
    ids=["decimal", "hexadecimal", "nested", "not UTF-8", "table", "dotted"],
)
def test_a_settings_file_that_breaks_parsers_is_refused(text: str, tmp_path: Path) -> None:
    assert try_toml(text, tmp_path) == "refused, naming a key"


def test_a_word_that_breaks_parsers_is_refused() -> None:
    for word in ("seed=" + "[" * 5000, "seed=" + "9" * 5000, "seed=1\nnum-rounds=2", "seed=\ud800"):
        assert try_arguments([word]) == "refused, naming a key"


def test_a_word_is_one_setting() -> None:
    assert parse_overrides(["weights=a\nb"]) == {"weights": "a\nb"}
    assert parse_overrides(["run-name=1\nseed = 2"]) == {"run-name": "1\nseed = 2"}


def test_a_key_in_both_spellings_is_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("num-clients = 5\nnum_clients = 6\n")
    with pytest.raises(ConfigError, match='"num-clients" is given twice'):
        load(path)


def test_a_file_that_is_not_there_is_answered_with_one_that_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/fedavg-iid.toml").touch()
    for path in ("conf/fedavg-idd.toml", "fedavg-idd.toml", "fedavg-iid", "nowhere/fedavg-iid.toml"):
        with pytest.raises(ConfigError, match=rf"no configuration {path}: did you mean conf/fedavg-iid.toml\?"):
            load(path)
    (tmp_path / "conf/more").mkdir()
    (tmp_path / "conf/more/fedavg-iid.toml").touch()
    with pytest.raises(ConfigError, match=r"did you mean conf/fedavg-iid.toml or conf/more/fedavg-iid.toml\?"):
        load("fedavg-iid")
    for path in ("conf/x.toml", "other.toml", "nowhere/x.toml"):
        with pytest.raises(ConfigError, match=f"There is no configuration {path}: .* begins in {tmp_path}."):
            load(path)


def test_a_path_that_cannot_be_opened_is_refused() -> None:
    for path in ("a\0b.toml", "x" * 5000, "~nobody-of-this-name/x.toml", "."):
        with pytest.raises(ConfigError, match="Cannot read the configuration"):
            load(path)
