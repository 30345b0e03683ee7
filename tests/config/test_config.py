import dataclasses
import tomllib
from pathlib import Path

import numpy as np
import pytest
from flwr.common.config import fuse_dicts, parse_config_args
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_taskarith.config import settings as configuration
from fl_taskarith.config.fields import kebab, rules, snake
from fl_taskarith.config.settings import Config, from_mapping, load, parse_overrides
from fl_taskarith.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONF_FILES = sorted(path for path in ROOT.glob("conf/**/*.toml") if not {"study", "one-shot"} & set(path.parts))


def pyproject_settings() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


def test_pyproject_and_dataclass_have_the_same_keys_and_defaults() -> None:
    assert pyproject_settings() == Config().to_run_config()


@pytest.mark.parametrize("path", CONF_FILES, ids=lambda path: path.name)
def test_every_conf_file_means_the_same_to_flower_and_to_simulate(path: Path) -> None:
    by_flower = fuse_dicts(pyproject_settings(), parse_config_args([str(path)]))
    assert from_mapping(by_flower) == load(path)


def test_conf_files_hold_the_reference_setting_of_the_study() -> None:
    for name, sharding in (("fedavg-iid", "iid"), ("fedavg-noniid", "classes")):
        config = load(ROOT / "conf" / f"{name}.toml")
        assert (config.dataset, config.num_clients, config.participation, config.local_steps, config.sharding) == (
            "cifar100", 100, 0.1, 4, sharding,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num-client": 5}, '"num-clients"'),
        ({"local_step": 5}, '"local-steps"'),
        ({"zzz": 5}, "known keys"),
        ({"num-clients": 0}, "num-clients = 0"),
        ({"num-clients": "10"}, 'num-clients = "10"'),
        ({"num-clients": True}, "num-clients = true"),
        ({"num-clients": 10.0}, "whole number"),
        ({"participation": 0}, "above 0 up to 1"),
        ({"participation": 1.5}, "participation = 1.5"),
        ({"learning-rate": float("nan")}, "learning-rate = nan"),
        ({"learning-rate": [0.1]}, "learning-rate"),
        ({"nesterov": 1}, "true or false"),
        ({"sharding": "shuffled"}, '"iid", "classes"'),
        ({"dirichlet-alpha": 0.0}, "dirichlet-alpha"),
        ({"ridge-lambda": "big"}, 'or "auto"'),
        ({"ridge-lambda": 0.0}, "ridge-lambda = 0.0"),
        ({"run-name": "a\nb"}, "run-name"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov"),
        ({"local-steps-min": 4}, "local-steps-max"),
        ({"local-steps-min": 8, "local-steps-max": 4}, "min <= max"),
        ({"head": "linear"}, "head-rounds"),
        ({"head-rounds": 500}, "num-rounds"),
        ({"validation-size": 0}, "ridge-lambda"),
        ({"validation-size": 0, "head": "lda", "logit-scale": 1.0}, "lda-shrinkage"),
        ({"head": "lda", "local-loss": "squared"}, "logarithms of probabilities"),
        ({"lda-shrinkage": 0.0}, "lda-shrinkage = 0.0"),
        ({"trainable": "head", "trainable-blocks": 2}, "trainable-blocks"),
        ({"precision": "fp8"}, '"fp32", "tf32", "bf16"'),
        ({"learning-rate": 1e300}, "up to 1e+06"),
        ({"schedule": "plateau"}, "evaluate-every = 1"),
        ({"strategy": "centralized", "engine": "flower"}, "no clients"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_accepted(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(settings)
    assert expected in str(caught.value)


def test_a_whole_number_is_accepted_for_a_real_one() -> None:
    assert from_mapping({"learning-rate": 1}).learning_rate == 1.0
    assert from_mapping({"ridge-lambda": 100}).ridge_lambda == 100.0


def test_numpys_numbers_are_accepted_as_python_ones() -> None:
    config = from_mapping({"learning-rate": np.float32(0.5), "num-rounds": np.int64(7)})
    assert (config.learning_rate, config.num_rounds) == (0.5, 7)
    assert type(config.learning_rate) is float
    assert type(config.num_rounds) is int


def test_overrides_are_toml_scalars_or_plain_words() -> None:
    parsed = parse_overrides(["num-rounds=3", "weights=/a b/c.pth", "nesterov=true", "sharding=iid", "server_lr=0.5"])
    assert parsed == {
        "num-rounds": 3, "weights": "/a b/c.pth", "nesterov": True, "sharding": "iid", "server-lr": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("words", [["num-rounds"], ["=3"], ["seed=1", "seed=2"]])
def test_a_malformed_override_is_an_error(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse_overrides(words)


def test_a_broken_conf_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("num-rounds = = 3")
    for path in (broken, tmp_path / "missing.toml"):
        with pytest.raises(ConfigError, match=path.name):
            load(path)


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfseed = 3\n", b"# a comment\r\nseed = 3\r\n"], ids=["BOM", "CRLF"])
def test_a_settings_file_of_any_editor_is_read(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(content)
    assert load(path).seed == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("num_rounds = 0", "num-rounds = 0"),
        ("num-client = 5", 'did you mean "num-clients"?'),
        ("num-rounds 5", "not valid TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(f"# three\n\n{line}\n")
    with pytest.raises(ConfigError, match=r"settings\.toml.*line 3") as caught:
        load(path)
    assert said in str(caught.value)


def test_a_setting_reads_in_a_plot_and_in_a_paper_as_its_rule_says() -> None:
    assert [rules()[key].label(key, 4) for key in ("local-steps", "density", "strategy", "soft-zero")] == [
        "J = 4", "density 4", "4", "soft-zero = 4",
    ]  # fmt: skip
    assert [rules()[key].formula() for key in ("classes-per-client", "server-beta1", "separation", "seed")] == [
        "N_c", r"\beta_1", r"\Delta_{min}", "",
    ]  # fmt: skip


def test_the_fingerprint_ignores_where_a_run_lives_and_sees_what_decides_its_numbers() -> None:
    base = Config()
    for key in configuration.OPERATIONAL_KEYS:
        name = snake(key)
        other = {"engine": "flower", "data_dir": "/x", "results_dir": "/y", "run_name": "z", "checkpoint_every": 3,
                 "client_timeout": 5.0}  # fmt: skip
        value = other.get(name, not getattr(base, name))
        assert dataclasses.replace(base, **{name: value}).fingerprint() == base.fingerprint(), key
    assert dataclasses.replace(base, seed=1).fingerprint() != base.fingerprint()
    assert dataclasses.replace(base, seed=1).differing_keys(base.to_run_config()) == ["seed"]


def test_a_run_of_a_version_without_some_setting_is_the_run_of_its_default() -> None:
    older = {key: value for key, value in Config(seed=3).to_run_config().items() if key != "clip-norm"}
    assert Config(seed=3).differing_keys(older) == []
    assert Config(seed=3, clip_norm=1.0).differing_keys(older) == ["clip-norm"]


def test_a_new_setting_at_its_default_leaves_every_fingerprint_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Config(seed=3).fingerprint()
    monkeypatch.setattr(configuration, "IDENTITY_KEYS", configuration.IDENTITY_KEYS - {"clip-norm"})
    assert Config(seed=3).fingerprint() == before


scalars = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.none(), st.lists(st.integers(), max_size=2)
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(rules())), scalars, max_size=6))
def test_any_settings_give_a_config_or_an_error_that_names_a_given_key(settings: dict[str, object]) -> None:
    try:
        config = from_mapping(settings)
    except ConfigError as error:
        related = {key for key in rules() if key in str(error)}
        assert related & set(settings), str(error)
    else:
        assert from_mapping(config.to_run_config()) == config


@settings(deadline=None)
@given(st.text(max_size=30))
def test_an_unknown_key_is_always_refused(key: str) -> None:
    if kebab(key) in rules():
        return
    with pytest.raises(ConfigError):
        from_mapping({key: 1})
