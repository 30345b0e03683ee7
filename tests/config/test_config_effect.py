"""Settings that the others leave without an effect: which they are, and who is told."""

import contextlib
import dataclasses
from functools import lru_cache
from pathlib import Path

import pytest
from conftest import numbers
from safetensors.torch import load_file
from small_studies import study_of

from fl_taskarith import simulate
from fl_taskarith.cli.command import main
from fl_taskarith.config.effects import ALWAYS, CONDITIONAL, OFF, explain, idle_reason
from fl_taskarith.config.fields import kebab, rules, snake
from fl_taskarith.config.rule import to_toml
from fl_taskarith.config.settings import Config, from_mapping, from_run_config, load
from fl_taskarith.errors import ConfigError
from fl_taskarith.storage.run_folder import Row
from fl_taskarith.study.study_file import load_studies

# the table


def test_every_key_is_in_the_table_or_always_has_an_effect() -> None:
    assert CONDITIONAL.keys() | ALWAYS == rules().keys()
    assert not CONDITIONAL.keys() & ALWAYS
    assert OFF.keys() <= CONDITIONAL.keys()


def test_reasons_and_remedies_name_keys_and_values_that_there_are() -> None:
    for key, reasons in CONDITIONAL.items():
        for idle in reasons:
            assert set(idle.under) <= rules().keys() - {key}, key
            words = explain(Config(), key, idle)
            assert words.startswith(f"{key} = ")
            assert words.endswith(".")
            assert all(f"{name} = " in words for name in idle.under)


def test_the_defaults_are_quiet_and_their_unused_keys_explained() -> None:
    load()
    (idle,) = CONDITIONAL["gma-threshold"]
    assert explain(Config(), "gma-threshold", idle) == (
        'gma-threshold = 0.4 has no effect under strategy = "fedavg": leave it out, or set strategy = "fedgma".'
    )


# What the table says of a key against what runs do with it: under each setting, all keys that it leaves without an
# effect take other values at once, and no number changes.


SMALL = {
    "train-subset": 100, "validation-size": 40, "test-subset": 40, "calibration-size": 20, "num-clients": 5,
    "classes-per-client": 5, "participation": 0.4, "num-rounds": 2, "local-steps": 2, "batch-size": 8,
    "learning-rate": 0.05, "evaluate-every": 1, "calibration-rounds": 2, "trainable-blocks": 1, "dimension": 4,
}  # fmt: skip
OTHER: dict[str, object] = {
    "train-subset": 90, "test-subset": 30, "validation-size": 30, "calibration-size": 10, "augmentation": "flip",
    "model": "vit_tiny_patch16_224", "weights": "none", "input-size": 32, "trainable-blocks": 2,
    "prefix-cache": "float32", "ridge-lambda": 3.0, "lda-shrinkage": 0.5, "logit-scale": 2.0, "ridge-refresh": 1,
    "density": 0.5,
    "calibration-rounds": 3, "soft-zero": 0.9, "calibration-per-client": 3, "fisher-labels": "true",
    "fisher-score": "logit", "calibration-memory": 0.1, "mask-exclude": "norm.*", "mask-source": "clients",
    "head": "linear", "head-rounds": 1, "trainable": "backbone", "num-clients": 7, "participation": 0.8,
    "sampling": "cyclic", "dropout": 0.5, "client-timeout": 100.0, "on-client-failure": "skip", "sharding": "iid",
    "shard-seed": 3, "classes-per-client": 4, "dirichlet-alpha": 0.3, "server-lr": 0.5, "bank-start": "all-heard",
    "bank-decay": 0.5, "proximal-mu": 1.0, "server-momentum": 0.5, "server-beta1": 0.5, "server-beta2": 0.5,
    "server-tau": 0.1, "gma-threshold": 0.9, "trimmed-share": 0.3, "clipping-radius": 0.1, "clipping-iterations": 3,
    "clipping-start": "previous", "gram-anchor": 1.0, "gram-epsilon": 1.0, "covariance-form": "bounded",
    "covariance-epsilon": 1.0,
    "covariance-shrinkage": 0.5, "covariance-weights": "equal", "covariance-mask": "rows", "merge-rule": "median",
    "merge-parameter": 0.5, "momentum-rounds": 2, "exp-epsilon": 1e-3, "personal-parameters": "*bias",
    "num-clusters": 4, "cluster-rule": "median", "cluster-start-noise": 0.5, "attack": "inner-product",
    "attack-scale": 2.0, "attack-placement": "one-cluster", "dimension": 6, "examples-per-client": 5, "noise": 2.0,
    "cluster-centres": "bernoulli", "cluster-sizes": "equal", "start": "random", "separation": 3.0,
    "farthest-separation": 9.0, "start-radius": 0.5, "tolerance": 0.5, "local-loss": "squared",
    "distillation-weight": 2.0, "distillation-temperature": 2.0, "anchoring-mu": 1.0, "local-steps": 3,
    "batch-size": 5, "weight-decay": 0.1, "clip-norm": 0.1, "learning-rate": 0.01, "momentum": 0.3, "nesterov": True,
    "dampening": 0.5, "schedule": "exponential", "warmup-rounds": 1, "precision": "bf16", "compile": "default",
    "optimizer-kernels": "foreach", "evaluate-every": 2, "clients-at-once": 0, "early-stopping-patience": 1,
}  # fmt: skip
CHANGES: tuple[dict[str, object], ...] = (
    {"mask-rule": "file", "mask-file": "none.safetensors"},
    {"local-steps-min": 1, "local-steps-max": 2},
    *({key: value} for key, value in OTHER.items()),
)
REGRESSION: dict[str, object] = {"dataset": "linear-regression", "trainable-blocks": 0}
DENSE: dict[str, object] = {"mask-rule": "none"}
SCORED: dict[str, object] = {"mask-rule": "least-sensitive"}
SETTINGS: dict[str, tuple[dict[str, object], set[str]]] = {  # and some of the keys without an effect under each
    "centralized": ({"strategy": "centralized", **DENSE}, {"num-clients", "local-steps-max", "shard-seed", "density"}),
    "fedavg, random": ({"mask-rule": "random"}, {"server-momentum", "soft-zero", "attack", "noise", "bank-decay"}),
    "own steps, iid": (
        {"sharding": "iid", "participation": 1.0, "local-steps-max": 2, "local-steps-min": 1, **DENSE},
        {"classes-per-client", "dirichlet-alpha", "sampling", "local-steps", "density"},
    ),
    "saliency": ({"mask-rule": "most-salient"}, {"fisher-labels", "fisher-score", "calibration-per-client"}),
    "threshold, one calibration round": (
        {**SCORED, "sensitivity-threshold": 1e-4, "calibration-rounds": 1}, {"density", "soft-zero"},
    ),
    "linear head": (
        {**DENSE, "trainable": "head", "trainable-blocks": 0, "head": "linear", "momentum": 0.0},
        {"ridge-lambda", "head-rounds", "dampening"},
    ),
    "nearest class mean": ({**DENSE, "head": "ncm"}, {"ridge-lambda", "lda-shrinkage"}),
    "ridge head trained": ({**DENSE, "trainable": "head", "trainable-blocks": 0}, {"head-rounds"}),
    "head rounds alone": ({**SCORED, "head-rounds": 2}, {"density", "soft-zero", "mask-file", "trainable-blocks"}),
    "head rounds alone, dense": (
        {**DENSE, "head-rounds": 2, "trainable": "all"}, {"trainable", "trainable-blocks"},
    ),
    "one local step": ({**DENSE, "local-steps": 1, "clip-norm": 1.0}, {"momentum", "dampening"}),
    "one client a round": ({**DENSE, "participation": 0.1}, {"clients-at-once"}),
    "masks of their own": ({**SCORED, "mask-source": "own"}, {"clients-at-once"}),
    "fedbn": ({**DENSE, "strategy": "fedbn"}, {"clients-at-once", "gram-anchor"}),
    "cluster models": (
        {**DENSE, "strategy": "br-ifca", "cluster-rule": "mean", "num-clusters": 2, "client-groups": "half-turn"},
        {"clients-at-once", "trimmed-share", "tolerance"},
    ),
    "attack on labels": ({**DENSE, "byzantine-fraction": 0.4, "attack": "random-labels"}, {"attack-scale"}),
    "regression, br-ifca": (
        {**REGRESSION, "strategy": "br-ifca"},
        {"momentum", "local-steps", "validation-size", "tolerance", "density", "mask-source", "prefix-cache"},
    ),
    "regression, bernoulli": (
        {**REGRESSION, "strategy": "br-ifca", "cluster-centres": "bernoulli", "start": "random"},
        {"separation", "farthest-separation", "start-radius"},
    ),
    "regression, fed-em": (
        {**REGRESSION, **DENSE, "strategy": "fed-em", "trainable": "all"},
        {"learning-rate", "schedule", "server-lr", "warmup-rounds", "trainable"},
    ),
}  # fmt: skip
QUICKEST = ("centralized", "fedavg, random", "head rounds alone", "regression, br-ifca", "regression, fed-em")


def all_that_is_idle_changed(config: Config) -> tuple[Config, set[str]]:
    """The configuration with every key that has no effect in it at another value, and those keys."""
    changed, keys = config.to_run_config(), set()
    for change in CHANGES:
        if all(any(idle.holds(config) for idle in CONDITIONAL[key]) for key in change):
            with contextlib.suppress(ConfigError):  # contradicts another change
                changed = from_mapping(changed | change).to_run_config()
                keys |= change.keys()
    return from_mapping(changed), keys


@lru_cache
def outcome(config: Config) -> tuple[list[Row], dict[str, bytes]]:
    """All numbers of a run, and the bits of its models by file and tensor."""
    folder = simulate(config).folder
    files = folder.glob("model*.safetensors")
    tensors = {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}
    return numbers(folder), {name: value.numpy().tobytes() for name, value in tensors.items()}


def test_the_changes_are_of_all_keys_that_can_be_changed() -> None:
    left_out = {"device": "there may be one", "sensitivity-threshold": "not beside mask-rule = file"}
    assert CONDITIONAL.keys() - left_out.keys() == {key for change in CHANGES for key in change}


@pytest.mark.parametrize(
    "name", [name if name in QUICKEST else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_keys_without_an_effect_change_no_number(name: str, tmp_path: Path) -> None:
    settings, some = SETTINGS[name]
    settings = SMALL | {"results-dir": str(tmp_path), "draw-curves": False, "threads": 1} | settings
    config = from_mapping(settings)
    changed, keys = all_that_is_idle_changed(config)
    assert some <= keys
    assert outcome(changed) == outcome(config)


# and with what gives it one, a key changes numbers

EFFECTS: list[tuple[dict[str, object], dict[str, object]]] = [
    ({"sharding": "classes"}, {"classes-per-client": 4}),
    ({"mask-rule": "random"}, {"density": 0.5}),
    ({"head": "lda"}, {"lda-shrinkage": 0.5}),
    ({}, {"local-steps": 3}),
    ({}, {"momentum": 0.3}),
    ({}, {"num-clients": 7}),
    ({}, {"calibration-size": 10}),  # no mask is scored, and the training set is another
    ({"participation": 0.4}, {"sampling": "cyclic"}),
    ({"sharding": "dirichlet"}, {"dirichlet-alpha": 0.1}),
    ({"strategy": "fedavgm"}, {"server-momentum": 0.5}),
    ({"strategy": "fedprox"}, {"proximal-mu": 1.0}),
    ({"strategy": "trimmed-mean", "participation": 1.0}, {"trimmed-share": 0.3}),
    ({"strategy": "covariance"}, {"covariance-epsilon": 1.0}),
    ({"strategy": "covariance"}, {"covariance-form": "bounded"}),
    ({"strategy": "covariance"}, {"covariance-shrinkage": 0.5}),
    ({"strategy": "covariance", "num-clients": 7}, {"covariance-weights": "equal"}),
    ({"strategy": "covariance", "mask-rule": "random"}, {"covariance-mask": "rows"}),
    ({"strategy": "merge-rule"}, {"merge-rule": "iso-c"}),
    ({"strategy": "merge-rule", "merge-rule": "ties"}, {"merge-parameter": 0.9}),
    ({"trainable": "backbone", "head-rounds": 1, "head": "linear"}, {"head-rounds": 2}),
    ({**SCORED, "calibration-rounds": 2}, {"soft-zero": 1.0}),
    ({"mask-rule": "most-salient"}, {"calibration-rounds": 1}),
    ({"mask-rule": "random-by-kind"}, {"fisher-labels": "true"}),
    ({**SCORED, "mask-source": "clients"}, {"calibration-per-client": 3}),
    ({**REGRESSION, "strategy": "fed-em"}, {"noise": 2.0}),
]


@pytest.mark.parametrize(
    ("settings", "change"),
    [*EFFECTS[:6], *(pytest.param(*each, marks=pytest.mark.slow) for each in EFFECTS[6:])],
    ids=lambda settings: "-".join(map(str, settings.values())) or "fedavg",
)
def test_a_key_with_an_effect_is_accepted_and_changes_numbers(
    settings: dict[str, object], change: dict[str, object], tmp_path: Path
) -> None:
    here: dict[str, object] = {"results-dir": str(tmp_path), "draw-curves": False, "threads": 1}
    base, changed = (from_mapping(SMALL | DENSE | here | settings | more) for more in ({}, change))
    assert all(idle_reason(changed, key) is None for key in change)
    assert outcome(changed)[0] != outcome(base)[0]


# who gives a key: a command line, a file, Flower's run-config, keyword arguments


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sharding": "iid", "classes-per-client": 5},
         'classes-per-client = 5 has no effect under sharding = "iid": leave it out, or set sharding = "classes".'),
        ({"mask_rule": "none", "density": 0.1}, 'density = 0.1 has no effect under mask-rule = "none"'),
        ({"sensitivity-threshold": 1e-6, "density": 0.2}, "density = 0.2 has no effect under sensitivity-threshold"),
        ({"strategy": "centralized", "participation": 0.2}, 'strategy = "centralized", which has no clients'),
        ({"strategy": "centralized", "local-steps": 8}, "where a round is an epoch"),
        ({"mask-rule": "random", "mask-source": "server"}, "mask-source"),
        ({"calibration-rounds": 1, "soft-zero": 0.0}, "set calibration-rounds above 1"),
        ({"server-beta1": 0.5}, 'set strategy = "fedadam" or "fedyogi"'),
        ({"strategy": "br-ifca", "cluster-rule": "median", "trimmed-share": 0.2}, 'cluster-rule = "median"'),
        ({"attack": "alie"}, "byzantine-fraction = 0.0"),
        ({"byzantine-fraction": 0.1, "attack": "random-labels", "attack-scale": 2.0}, "attack-scale = 2.0"),
        ({"noise": 0.5}, 'dataset = "digits"'),
        ({"dataset": "linear-regression", "strategy": "br-ifca", "model": "vit_glyph"}, "no image model"),
        ({"dataset": "linear-regression", "strategy": "br-ifca", "schedule": "plateau", "evaluate-every": 1},
         "no validation loss to watch"),
        ({"dataset": "linear-regression", "strategy": "fed-em", "device": "cuda"}, "computed on the CPU"),
        ({"local-steps-min": 1, "local-steps-max": 4, "local-steps": 2}, "clients draw their own"),
        ({"local-steps": 1, "momentum": 0.5}, "momentum starts at zero in every round"),
        ({"momentum": 0.0, "dampening": 0.5}, "set momentum above 0"),
        ({"strategy": "fedbn", "clients-at-once": 5}, 'strategy = "fedbn"'),
        ({"bank-decay": 0.9}, 'set task-vector-bank = "float32" or "bfloat16"'),
        ({"participation": 1.0, "sampling": "cyclic"}, "all clients take part in every round"),
        ({"head-rounds": 24, "density": 0.2}, "raise num-rounds above head-rounds"),
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_without_an_effect_is_refused_wherever_it_is_given(
    settings: dict[str, object], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{kebab(key)} = {to_toml(value)}" for key, value in settings.items()]
    path = written(tmp_path, "\n".join(lines))
    with pytest.raises(ConfigError) as by_file:
        load(path)
    assert str(by_file.value).startswith(f"{path}: ")
    assert expected in str(by_file.value)
    with pytest.raises(ConfigError) as by_keyword:
        simulate(**{snake(key): value for key, value in settings.items()})
    assert expected in str(by_keyword.value)
    assert main(["simulate", *(line.replace(" = ", "=") for line in lines)]) == 1
    assert expected in capsys.readouterr().err
    assert (
        from_mapping(settings).to_run_config() == from_mapping(from_mapping(settings).to_run_config()).to_run_config()
    )


def test_what_is_off_may_be_said_anywhere() -> None:
    load(overrides={"strategy": "centralized", "dropout": 0.0, "client-timeout": 0.0, "clients-at-once": 1})
    load(overrides={"dataset": "linear-regression", "strategy": "fed-em", "mask-rule": "none", "calibration-size": 0})
    load(overrides={"trainable": "head", "trainable-blocks": 0, "mask-rule": "none", "proximal-mu": 0.0})
    load(overrides={"momentum": 0.0, "dampening": 0.0, "nesterov": False, "local-steps": 1})


def test_a_strategy_of_ones_own_may_read_any_setting() -> None:
    load(overrides={"strategy": "own_strategy:SignMean", "server-momentum": 0.5, "gma-threshold": 0.2})
    with pytest.raises(ConfigError, match="classes-per-client"):
        load(overrides={"strategy": "own_strategy:SignMean", "sharding": "iid", "classes-per-client": 3})


def test_what_an_override_makes_meaningless_in_a_file_is_left_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "classes-per-client = 5\nnum-clients = 10\nmask-rule = 'random'\ndensity = 0.3")
    assert load(path, {"sharding": "iid"}).sharding == "iid"
    assert load(path, {"strategy": "centralized", "mask-rule": "none"}).strategy == "centralized"
    with pytest.raises(ConfigError, match=r"^classes-per-client = 3 has no effect"):
        load(path, {"sharding": "iid", "classes_per_client": 3})


def test_a_file_is_judged_by_itself_and_by_what_becomes_of_it(tmp_path: Path) -> None:
    path = written(tmp_path, "sharding = 'iid'\nclasses-per-client = 5")
    with pytest.raises(ConfigError, match=r"settings\.toml: classes-per-client = 5 .* sharding = \"iid\""):
        load(path, {"strategy": "centralized"})
    assert load(path, {"sharding": "classes"}).classes_per_client == 5, "now it has an effect"
    with pytest.raises(ConfigError, match=r"^classes-per-client = 2 has no effect"):
        load(path, {"classes-per-client": 2})


def test_a_file_that_an_override_completes_is_judged_too(tmp_path: Path) -> None:
    path = written(tmp_path, "mask-rule = 'file'\ndensity = 0.5\nnum-clients = 'ten'")
    with pytest.raises(ConfigError, match=r"settings\.toml: density = 0\.5 has no effect under mask-rule"):
        load(path, {"mask-file": "mask.safetensors", "num-clients": 10})


def test_of_flowers_run_config_what_is_not_the_default_was_given() -> None:
    defaults = Config().to_run_config()
    assert from_run_config(defaults | {"sharding": "iid"}).classes_per_client == 2
    with pytest.raises(ConfigError, match='classes-per-client = 5 has no effect under sharding = "iid"'):
        from_run_config(defaults | {"sharding": "iid", "classes-per-client": 5})


def test_a_config_is_taken_as_it_is_and_what_is_said_beside_it_is_not(quick_config: Config) -> None:
    config = dataclasses.replace(quick_config, density=0.7)
    with pytest.raises(ConfigError, match=r'^density = 0\.5 has no effect under mask-rule = "none"'):
        simulate(config, density=0.5)
    assert from_mapping(config.to_run_config()) == config


def test_masks_of_clients_beside_the_runs_use_what_the_run_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "fl_taskarith.describe.masks.make_masks", lambda config, *_: asked.append(config.calibration_per_client)
    )
    assert main(["mask", "calibration-per-client=7", "--clients", "2"]) == 0
    assert main(["mask", "calibration-per-client=7"]) == 1
    assert asked == [7]


@pytest.mark.parametrize("word", ["learning-rate=0.1", "seed=3", "num-rounds=9", "results-dir=here"])
def test_a_search_refuses_what_it_decides(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", word]) == 1
    assert f"{word.partition('=')[0]}: the search decides that itself" in capsys.readouterr().err


# studies

STUDY = """
name = "study"
seeds = [0]
[settings]
num-clients = 10
classes-per-client = 5
[[group]]
name = "all"
[[arm]]
name = "masked"
settings = { mask-rule = "random" }
[[arm]]
name = "iid"
settings = { sharding = "iid", mask-rule = "none" }
"""


def test_a_shared_setting_needs_an_effect_in_one_arm(tmp_path: Path) -> None:
    assert len(study_of(STUDY, tmp_path).arms) == 2
    both_iid = STUDY.replace('rule = "random"', 'rule = "random", sharding = "iid"')
    with pytest.raises(ConfigError, match=r"study\.toml: \[settings\], in every arm: classes-per-client = 5 has no"):
        study_of(both_iid, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('rule = "none"', 'rule = "none", density = 0.2', 'arm "all: iid": density = 0.2 has no effect'),
        ('name = "all"', 'name = "all"\nsettings = { density = 0.2 }', 'arm "all: iid": density = 0.2'),
        ("[settings]", "[grid]\ndensity = [0.2, 0.4]\n[settings]", 'arm "all: iid, density = 0.2": density = 0.2'),
        ("[settings]", '[grid]\nmask-rule = ["none"]\n[settings]', '"masked": [grid] takes the place of its mask-rule'),
    ],
)
def test_a_setting_of_an_arm_needs_an_effect_in_it(old: str, new: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        study_of(STUDY.replace(old, new), tmp_path)
    assert expected in str(caught.value)
    assert "study.toml" in str(caught.value)


def test_overrides_of_studies_need_an_effect_in_one_arm_of_one_of_them(tmp_path: Path) -> None:
    paths = [tmp_path / "first.toml", tmp_path / "second.toml"]
    paths[0].write_text(STUDY)
    paths[1].write_text('name = "x"\nseeds = [0]\n[[arm]]\nname = "a"\nsettings = { strategy = "centralized" }\n')
    assert [len(study.arms) for study in load_studies(paths, {"num-clients": 7, "density": 0.3})] == [2, 1]
    with pytest.raises(ConfigError, match="command line, in every arm: num-clients = 7 has no effect"):
        load_studies(paths[1:], {"num-clients": 7})
    with pytest.raises(ConfigError, match="command line: mask-rule has no effect, for every arm has its own"):
        load_studies(paths[:1], {"mask_rule": "none"})
    assert load_studies(paths[:1], {"strategy": "centralized"}), "what this takes from the file's keys is no error"


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("search = { to = 100.0 }\nsettings = { learning-rate = 0.1 }", "beside its learning-rate"),
        ('search = { to = 100.0 }\nsame-rate-as = "b"', 'beside same-rate-as = "b"'),
    ],
)
def test_a_search_that_an_arm_does_not_make_is_refused(own: str, expected: str, tmp_path: Path) -> None:
    search = "[search]\nfrom = 1e-3\nto = 10.0\nrounds = [1, 2]\n"
    with pytest.raises(ConfigError, match=f'arm "a": search has no effect {expected}'):
        study_of(f'name = "x"\nseeds = [0]\n{search}[[arm]]\nname = "a"\n{own}\n[[arm]]\nname = "b"\n', tmp_path)
    with pytest.raises(ConfigError, match=r"\[search\] has no effect, for every arm has a learning-rate"):
        study_of(
            f'name = "x"\nseeds = [0]\n{search}[[arm]]\nname = "a"\nsettings = {{ learning-rate = 1 }}\n', tmp_path
        )
