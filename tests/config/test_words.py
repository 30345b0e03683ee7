"""Words of the command line and of Flower's run-config, names from elsewhere, and the reader of TOML files."""

import tomllib
from pathlib import Path

import pytest
from flwr.common.config import fuse_dicts, parse_config_args

from fl_taskarith.config.fields import rules
from fl_taskarith.config.hints import hint, other_names
from fl_taskarith.config.rule import Rule
from fl_taskarith.config.settings import Config, from_run_config, load, parse_overrides
from fl_taskarith.config.toml import read_table, read_toml
from fl_taskarith.errors import ConfigError


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("run-name=123", "123"),
        ("run-name=2024-01-01", "2024-01-01"),
        ("run-name=1e5", "1e5"),
        ("run-name=true", "true"),
        ("run-name='a'", "a"),
        ("run-name=", ""),
        ('strategy="fedavg"', "fedavg"),
        ("strategy=FedAvg", "fedavg"),
        ("strategy=Trimmed_Mean", "trimmed-mean"),
        ("strategy=own_strategy:SignMean", "own_strategy:SignMean"),
        ("learning-rate=.001", 0.001),
        ("learning-rate=1.", 1.0),
        ("learning-rate=+1E-3", 0.001),
        ("learning-rate=auto", "auto"),
        ('learning-rate="0.5"', 0.5),
        ("nesterov=True", True),
        ("nesterov=FALSE", False),
        ("num-rounds=10.0", 10),
        ("num-rounds=1e2", 100),
        ("num-rounds=007", 7),
        ("num_rounds= 7 ", 7),
        ("seed=9007199254740992", 2**53),
    ],
)
def test_a_word_is_typed_by_its_key_and_not_by_its_looks(word: str, value: object) -> None:
    ((key, read),) = parse_overrides([word]).items()
    assert read == value and type(read) is type(value)
    assert rules()[key].check(key, read) == value


@pytest.mark.parametrize(
    "word",
    ["num-rounds=10.5", "num-rounds=true", "nesterov=2", "learning-rate=0,1", "learning-rate=1/3", "learning-rate=nan",
     "seed=9007199254740993", "seed=" + "9" * 5000, "learning-rate=true", "run-name=a\tb"],
)  # fmt: skip
def test_a_word_that_means_nothing_for_its_key_is_refused_as_it_was_typed(word: str) -> None:
    key, _, text = word.partition("=")
    with pytest.raises(ConfigError, match=f"{key} = ") as caught:
        load(None, parse_overrides([word]))
    assert len(str(caught.value)) < 300
    assert text[:60] in str(caught.value) or not text.isprintable() or text[:4] in str(caught.value)


def test_settings_in_place_of_a_path_are_told_how_they_are_given() -> None:
    with pytest.raises(ConfigError, match=r"\{'seed': 1\} is no path of a settings file: settings are given by name"):
        load({"seed": 1})  # type: ignore[arg-type]


def by_flower(words: str) -> Config:
    document = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    return from_run_config(fuse_dicts(document["tool"]["flwr"]["app"]["config"], parse_config_args([words])))


def test_flowers_types_by_looks_are_read_by_the_key() -> None:
    config = by_flower("run-name=123 num-rounds=10.0 seed='7' nesterov='True' learning-rate='.5' density=1")
    assert (config.run_name, config.num_rounds, config.seed, config.nesterov) == ("123", 10, 7, True)
    assert (config.learning_rate, config.density) == (0.5, 1.0)
    for words in ("run-name=1.10", "run-name=true", "num-rounds=10.5", "nesterov=1"):  # which might mean two things
        with pytest.raises(ConfigError, match=words.partition("=")[0]):
            by_flower(words)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lr", "learning-rate"), ("K", "num-clients"), ("C", "participation"), ("J", "local-steps"),
        ("Nc", "classes-per-client"), ("fraction-fit", "participation"), ("sparsity", "density = 1 - sparsity"),
        ("local-epochs", "local-steps"), ("epochs", "num-rounds"), ("bs", "batch-size"), ("wd", "weight-decay"),
        ("rounds", "num-rounds"), ("clients", "num-clients"), ("alpha", "dirichlet-alpha"), ("gpu", "device"),
        ("LR", "learning-rate"), ("α", "dirichlet-alpha"), ("num-client", "num-clients"), ("momentun", "momentum"),
        ("clients-per-round", "participation"), ("β₁", "server-beta1"), ("qqq", "known keys: dataset"),
    ],
)  # fmt: skip
def test_a_name_from_elsewhere_leads_to_the_setting(name: str, expected: str) -> None:
    assert expected in hint(name)
    with pytest.raises(ConfigError, match="is not a setting"):
        parsed = parse_overrides([f"{name}=1"])
        load(None, parsed)


def test_the_table_of_other_names_names_each_once_and_no_setting() -> None:
    document = read_toml(Path(__file__).parents[2] / "fl_taskarith" / "config" / "other_names.toml")
    same = [name for names in document["same"].values() for name in names]
    other = [name for each in document["other"] for name in each["names"]]
    assert document["same"].keys() <= rules().keys()
    assert len({*same, *other}) == len(same) + len(other)
    assert not {*same, *other} & rules().keys()
    assert all(name in other_names() for name in (*same, *other))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("seed = 1\n".encode("utf-16"), "UTF-16"),
        ("seed = 1\n".encode("utf-16-le"), "UTF-16"),
        ("seed = 1\n".encode("utf-32"), "UTF-16 or UTF-32"),
        (b"seed = 1\n# caf\xe9\n", "not in UTF-8 in line 2 (byte 0xe9)"),
        (b"x = " + b"[" * 5000, "nested too deeply"),
        (b"[" + b".".join([b"a"] * 5000) + b"]", "nested more than"),
        (b"x = " + b"[" * 40 + b"]" * 40, "nested more than"),
        (b"[[arm]]\nname = 'a'\n", "is a study file, not a settings file: give it to fl-taskarith study"),
        (b"[tasks]\n", "is a one-shot benchmark, not a settings file: give it to fl-taskarith one-shot"),
        (b"[tool.flwr.app.config]\nseed = 1\n", "at the top, without the line [tool.flwr.app.config]"),
    ],
)
def test_a_file_that_is_no_settings_file_is_told_as_what_it_is(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "it.toml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "it.toml")
    assert expected in str(caught.value) and "it.toml" in str(caught.value)


def test_a_table_is_checked_key_by_key() -> None:
    kinds = {"n": Rule(int, "", 1, 3), "words": [Rule(str, "", 1, 5)], "table": dict, "tables": [dict]}
    sound = {"n": 2, "words": ["a"], "table": {}, "tables": [{}]}
    assert read_table(sound, kinds, "here") == sound
    for wrong, expected in (
        (
            {"n": 10**400},
            "... is not accepted: expected a whole number from 1 up to 3",
        ),
        ({"n": float("nan")}, "here: n = nan is not accepted"),
        ({"words": ["a", ""]}, 'here: words, number 2 = "" is not accepted: expected a string of 1 to 5 characters'),
        ({"words": "a"}, 'here: words = "a": expected a list, each of it a string'),
        ({"table": [1]}, "here: table = [1]: expected a table"),
        ({"tables": [1]}, "here: tables, number 1 = 1: expected a table"),
        ({"m\x1b": 1}, "here: 'm\\x1b' is not a key; known keys: n"),
        ({}, "here: n is missing; expected a whole number"),
    ):
        with pytest.raises(ConfigError) as caught:
            read_table(wrong, kinds, "here", ("n",) if not wrong else ())
        assert expected in str(caught.value)
