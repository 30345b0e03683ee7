"""Whole runs under each strategy: registration, limit cases, interruption, engines, traffic."""

import csv
import dataclasses
import importlib
import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

import own_strategy
import pytest
import timm
import torch
from conftest import final_weights, numbers, power_cut, same_bits

from fl_taskarith import simulate
from fl_taskarith.config.fields import STRATEGIES
from fl_taskarith.config.settings import Config, from_mapping, load
from fl_taskarith.engine.records import payload_bytes, to_record
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.strategies import strategy_class
from fl_taskarith.strategies.fedavg import FedAvg
from fl_taskarith.strategies.fedbn import personal_patterns
from fl_taskarith.strategies.local_ghbm import LocalGHBM
from fl_taskarith.workspace.workspace import workspace

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted((CONF / "strategies").glob("*.toml"))
NORMS = ("norm", ".ls1.", ".ls2.")

# settings under which each strategy does something of its own in three rounds of two of ten clients
OWN = {
    "fedprox": {"proximal_mu": 1.0},
    "fedadam": {"server_lr": 0.01},
    "fedyogi": {"server_lr": 0.01},
    "fednova": {"local_steps_min": 1, "local_steps_max": 4},
    "median": {"participation": 0.3},
    "trimmed-mean": {"participation": 0.3, "trimmed_share": 0.34},
    "geometric-median": {"participation": 0.3},
    "krum": {"participation": 0.4},
    "cclip": {"clipping_start": "previous"},
    "merge-rule": {"merge_rule": "wudi"},
    "br-ifca": {"num_clusters": 1, "cluster_rule": "median", "participation": 0.3},
}


ON_IMAGES = sorted(set(STRATEGIES) - {"fed-em"})  # which has tests of its own


# registration


def test_every_file_is_a_choice_and_every_choice_a_strategy() -> None:
    assert set(STRATEGIES) == {
        "fedavg", "fedprox", "scaffold", "fedavgm", "fedadam", "fedyogi", "fednova", "fedgma", "median",
        "trimmed-mean", "geometric-median", "krum", "cclip", "fedbn", "gram-anchored", "br-ifca", "fed-em",
        "covariance", "covariance-momentum", "merge-rule", "ghbm", "local-ghbm", "fedhbm", "fedcm", "fedvarp", "fedexp",
    }  # fmt: skip
    classes = {strategy_class(name) for name in STRATEGIES}
    assert len(classes) == len(STRATEGIES)
    assert all(issubclass(each, FedAvg) for each in classes)


def test_a_strategy_of_ones_own_is_one_small_file(quick_config: Config) -> None:
    history = simulate(quick_config, strategy="own_strategy:SignMean", server_lr=1e-4)
    assert "signmean" in history.folder.name
    moved = final_weights(history.folder)["blocks.0.mlp.fc1.weight"]
    home = workspace(dataclasses.replace(quick_config, strategy="own_strategy:SignMean", server_lr=1e-4))
    assert 0 < (moved - home.pretrained["blocks.0.mlp.fc1.weight"]).abs().max() <= 3.01e-4, "three rounds of signs"
    assert {row.get("client_cosine") for row in history.rows} == {None}, "it does not say that it is a plain sum"


@pytest.mark.parametrize(
    ("name", "problem"),
    [("fedsomething", "own"), ("own_strategy:Missing", "has no attribute"), ("no_such_module:A", "No module named"),
     ("own_strategy:NoStrategy", "no strategy"), ("own_strategy:", "own"), ("../own:A", "own")],
)  # fmt: skip
def test_a_strategy_that_is_none_is_named(quick_config: Config, name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        simulate(quick_config, strategy=name)


@pytest.mark.parametrize("parent", ["LocalGHBM", "FedHBM", "Scaffold", "FedBN"])
def test_a_strategy_whose_clients_part_would_be_left_out_is_refused(
    quick_config: Config, parent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_taskarith.server.launch.workspace", None)  # before data are read
    with pytest.raises(ConfigError, match=f"derives from {parent}, whose clients do their part"):
        simulate(quick_config, strategy=f"own_strategy:{parent}Again")


def test_a_file_here_is_held_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ModuleType("fl_taskarith.strategies.my_rule", None)
    monkeypatch.setitem(sys.modules, found.__name__, found)
    with pytest.raises(ConfigError, match="0 subclasses of FedAvg: expected one"):
        strategy_class("my-rule")
    found.A = type("A", (LocalGHBM,), {"__module__": found.__name__})  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="derives from LocalGHBM"):
        strategy_class("my-rule")


@pytest.mark.parametrize(
    ("mistake", "told"),
    [("twice", "iterated over its replies twice"), ("reads one", "before it had read every reply"),
     ("reads none", "before it had read every reply"), ("other names", r"54 tensors that are not trained: x\."),
     ("scalar", r"returned torch.float32 \[\] for .*: expected floating-point numbers \[\d"),
     ("whole numbers", "returned torch.int64"), ("none", "returned a NoneType: expected a dictionary"),
     ("list", "returned a list"), ("raises", r"raised KeyError: 'heads' \(.*own_strategy.py, line \d+\)"),
     ("keeps a number", r'keep\("rounds", ...\) has n')],
)  # fmt: skip
def test_a_mistake_in_a_strategy_of_ones_own_is_told_as_its_own(
    quick_config: Config, mistake: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_strategy.Mistaken, "mistake", mistake)
    with pytest.raises(ConfigError, match=told):
        simulate(quick_config, strategy="own_strategy:Mistaken", num_rounds=1)


@pytest.mark.parametrize(
    ("rule", "told"),
    [("mistaken", r'merge-rule = "own_merge_rule:mistaken" returned torch.float32 \[\]'),
     ("raising", r'merge-rule = "own_merge_rule:raising" raised TypeError: .*other')],
)  # fmt: skip
def test_a_mistake_in_a_merge_rule_of_ones_own_is_told_as_its_own(quick_config: Config, rule: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        simulate(quick_config, strategy="merge-rule", merge_rule=f"own_merge_rule:{rule}", num_rounds=1)


def test_a_strategy_of_ones_own_gets_a_copy_of_the_weights_and_may_return_doubles(quick_config: Config) -> None:
    plain = simulate(quick_config, num_rounds=2).folder
    own = simulate(quick_config, num_rounds=2, strategy="own_strategy:InPlace").folder
    assert same_bits(final_weights(own), final_weights(plain))


@pytest.mark.parametrize("through", [False, True])
def test_a_run_knows_whether_what_a_module_of_ones_own_imports_has_changed(
    quick_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    through: bool,
) -> None:
    file = tmp_path / "edited.py"
    file.write_text("""
from fl_taskarith.strategies.fedavg import FedAvg

import edited_beside.scale


class Mine(FedAvg):
    def aggregate(self, weights, replies):
        scale = edited_beside.scale.SCALE
        return {name: scale * value for name, value in super().aggregate(weights, replies).items()}
""")
    beside = tmp_path / "edited_beside"
    beside.mkdir()
    (beside / "__init__.py").write_text("")
    if through:
        (beside / "scale.py").write_text("from .through import SCALE")
        file = beside / "through.py"
    else:
        file = beside / "scale.py"
    file.write_text("SCALE = 1.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {"strategy": "edited:Mine", "num_rounds": 2, "schedule": "constant"}
    first = simulate(quick_config, **settings)
    assert simulate(quick_config, **settings).folder == first.folder
    file.write_text("SCALE = 0.0")
    for name in [name for name in sys.modules if name.startswith("edited")]:  # as in another process
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with pytest.raises(CheckpointError, match="The module that strategy names, or what it loads, has changed"):
        simulate(quick_config, **{**settings, "num_rounds": 3})
    second = simulate(quick_config, **settings)
    assert second.folder != first.folder
    assert second.rows[-1]["update_norm"] == 0 < first.rows[-1]["update_norm"]
    assert f"The module that strategy names has changed since the run in {first.folder}." in caplog.text


def test_a_model_of_ones_own_is_imported_by_its_module(quick_config: Config) -> None:
    settings = {"model": "own_model:vit_own", "weights": "none", "mask_rule": "none", "num_rounds": 1}
    history = simulate(quick_config, **settings)
    assert history.folder.joinpath("model.safetensors").exists()
    with pytest.raises(ConfigError, match='One that a module of yours registers with timm is model = "module:name"'):
        simulate(quick_config, **{**settings, "model": "vit_unknown"})


@pytest.mark.parametrize(("rule", "parameter"), [("ties", 5.0), ("ties", 0.0), ("dare", 1.0), ("cclip", 0.0)])
def test_a_parameter_that_the_merge_rule_refuses_is_named_before_the_first_round(
    quick_config: Config, rule: str, parameter: float
) -> None:
    with pytest.raises(ConfigError, match=f"merge-parameter = {parameter}: "):
        strategy_class("merge-rule")(
            dataclasses.replace(quick_config, strategy="merge-rule", merge_rule=rule, merge_parameter=parameter),
            torch.device("cpu"),
        )


def test_centred_clipping_of_clients_that_did_not_move_leaves_the_weights(quick_config: Config) -> None:
    settings = {"strategy": "merge-rule", "merge_rule": "cclip", "learning_rate": 0.0, "num_rounds": 1}
    assert simulate(quick_config, **settings).rows[-1]["task_vector_norm"] == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"proximal-mu": 0.1}, 'strategy = "fedprox"'), ({"strategy": "scaffold", "clip-norm": 1.0}, "clip-norm = 0"),
     ({"trimmed-share": 0.5}, "trimmed-share"), ({"gma-threshold": 1.1}, "gma-threshold"),
     ({"clipping-radius": 0.0}, "clipping-radius"), ({"server-tau": 0.0}, "server-tau")],
)  # fmt: skip
def test_settings_of_a_strategy_are_checked(settings: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        from_mapping(settings)


def test_there_is_a_conf_file_for_each_strategy() -> None:
    assert {path.stem for path in FILES} == set(ON_IMAGES) - {"fedavg"}
    for path in FILES:
        assert load(path).strategy == path.stem


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_conf_file_of_a_strategy_runs(path: Path, cifar100_folder: Path, tmp_path: Path) -> None:
    history = simulate(
        path, data_dir=str(cifar100_folder), download=False, model="vit_glyph", input_size=16, num_rounds=2,
        train_subset=1200, validation_size=100, calibration_size=100, test_subset=100, results_dir=str(tmp_path),
        threads=1, learning_rate=1e-3,
    )  # fmt: skip
    assert history.rows[-1]["task_vector_norm"] > 0


# limit cases in whole runs


def same_numbers(first: Path, second: Path) -> bool:
    return numbers(first) == numbers(second) and same_bits(final_weights(first), final_weights(second))


def test_fedprox_without_its_term_is_fedavg_and_with_it_stays_nearer(quick_config: Config) -> None:
    fedavg = simulate(quick_config, run_name="fedavg")
    assert same_numbers(fedavg.folder, simulate(quick_config, strategy="fedprox", run_name="zero").folder)
    near = simulate(quick_config, strategy="fedprox", proximal_mu=100.0, run_name="near")
    assert near.rows[-1]["task_vector_norm"] < 0.8 * fedavg.rows[-1]["task_vector_norm"]


def test_scaffold_with_one_client_is_sgd(quick_config: Config) -> None:
    """Its variate and the server's are then the same, so nothing is corrected: FedAvg of one, which is SGD.

    To float rounding: FedAvg weighs the one task vector by its examples and divides by them.
    """
    config = dataclasses.replace(quick_config, num_clients=1, sharding="iid", momentum=0.0, participation=1.0)
    fedavg, scaffold = (
        final_weights(simulate(config, strategy=name, run_name=name).folder) for name in ("fedavg", "scaffold")
    )
    assert all(torch.allclose(value, scaffold[name], rtol=1e-4, atol=1e-6) for name, value in fedavg.items())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_with_equal_steps_is_fedavg(quick_config: Config, momentum: float) -> None:
    fedavg, fednova, unequal = (
        final_weights(simulate(quick_config, momentum=momentum, run_name=name, **settings).folder)
        for name, settings in {
            "fedavg": {},
            "fednova": {"strategy": "fednova"},
            "unequal": {"strategy": "fednova", "local_steps_min": 1, "local_steps_max": 4},
        }.items()
    )
    assert all(torch.allclose(value, fednova[name], rtol=1e-4, atol=1e-6) for name, value in fedavg.items())
    assert not all(torch.allclose(value, unequal[name], rtol=1e-4, atol=1e-6) for name, value in fedavg.items())


@pytest.mark.parametrize("settings", [{"strategy": "fedprox", "proximal_mu": 5.0}, {"strategy": "scaffold"}], ids=str)
def test_under_a_full_mask_clients_do_what_they_do_without(quick_config: Config, settings: dict[str, object]) -> None:
    dense = simulate(quick_config, run_name="dense", **settings)
    full = simulate(quick_config, run_name="full", mask_rule="random", density=1.0, **settings)
    assert same_bits(final_weights(dense.folder), final_weights(full.folder))


# interruption, engines, traffic


QUICKLY_RESUMED = ("scaffold",)  # tensors of the server's, and states of clients


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICKLY_RESUMED else pytest.mark.slow)
     for name in sorted(set(ON_IMAGES) - {"fedavg"})],
)  # fmt: skip
def test_a_resumed_run_has_the_same_bits(quick_config: Config, name: str) -> None:
    config = dataclasses.replace(quick_config, strategy=name, checkpoint_every=2, num_rounds=4, **OWN.get(name, {}))
    whole = simulate(config, run_name="whole")
    with power_cut(3):  # one round past the checkpoint, whose client states must not be used
        simulate(config, run_name="cut")
    resumed = simulate(config, run_name="cut")
    assert same_numbers(whole.folder, resumed.folder)
    if name == "fedbn":
        assert (whole.folder / "clients.csv").read_bytes() == (resumed.folder / "clients.csv").read_bytes()
    fedavg = simulate(config, strategy="fedavg", proximal_mu=0.0, run_name="fedavg")
    assert not same_bits(final_weights(whole.folder), final_weights(fedavg.folder)), "it must differ to be tested"


RAY = {"num_clients": 4, "classes_per_client": 5, "participation": 0.5, "num_rounds": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_IMAGES)
def test_both_engines_give_the_same_bits(quick_config: Config, name: str) -> None:
    """SCAFFOLD under a mask stands for all: it sends two records each way and keeps files at the clients."""
    settings = {**RAY, "strategy": name, "mask_rule": "random", **OWN.get(name, {})}
    in_process = simulate(quick_config, run_name="sequential", **settings)
    on_ray = simulate(quick_config, run_name="ray", engine="flower", **settings)
    assert same_numbers(in_process.folder, on_ray.folder)


def test_scaffold_sends_twice_as_much_both_ways(quick_config: Config) -> None:
    config = dataclasses.replace(quick_config, mask_rule="random")
    fedavg, scaffold = (simulate(config, strategy=name, run_name=name) for name in ("fedavg", "scaffold"))
    for plain, doubled in zip(fedavg.rows[1:], scaffold.rows[1:], strict=True):
        assert doubled["uplink_bytes"] == 2 * plain["uplink_bytes"]
        assert doubled["downlink_bytes"] == 2 * plain["downlink_bytes"]


def test_fedbns_normalisation_stays_with_each_client(quick_config: Config) -> None:
    history = simulate(quick_config, strategy="fedbn", participation=0.5)
    home = workspace(dataclasses.replace(quick_config, strategy="fedbn", participation=0.5))
    weights = final_weights(history.folder)
    personal = {name for name in home.trained_names(1) if any(part in name for part in NORMS)}
    assert len(personal) > 5
    for name in home.trained_names(1):
        assert torch.equal(weights[name], home.pretrained[name]) == (name in personal), name
    shared = {name: weights[name] for name in home.trained_names(1) if name not in personal}
    assert all(row["uplink_bytes"] == 5 * payload_bytes(to_record(shared)) for row in history.rows[1:])

    with open(history.folder / "clients.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["client"]) for row in rows] == list(range(10))
    assert {row["num_classes"] for row in rows} == {"2"}
    assert all(0 < int(row["test_examples"]) < 360 for row in rows)
    differs = {int(row["client"]) for row in rows if row["own_test_accuracy"] != row["global_test_accuracy"]}
    states = {int(path.name) for path in (history.folder / "client-states").iterdir() if path.is_dir()}
    assert differs <= states, "a client that was never sampled has no parameters of its own"
    means = json.loads((history.folder / "run.json").read_text())["clients"]
    assert means["own_test_accuracy"] == pytest.approx(sum(float(row["own_test_accuracy"]) for row in rows) / 10)


def test_fedbn_must_share_something(quick_config: Config) -> None:
    with pytest.raises(ConfigError, match="leaves nothing to share"):
        simulate(quick_config, strategy="fedbn", personal_parameters="*")


def test_a_pattern_of_personal_parameters_that_fits_nothing_is_refused(quick_config: Config) -> None:
    with pytest.raises(ConfigError, match=r'personal-parameters: "\*nomr\*" fits no trained parameter'):
        simulate(quick_config, strategy="fedbn", personal_parameters="*norm*, *nomr*")


def test_layer_scale_is_personal_by_whatever_name() -> None:
    """timm's DINOv2 calls it ls1.gamma, its DINOv3, an Eva model, gamma_1."""
    config = Config(strategy="fedbn")
    for name in ("vit_small_patch14_dinov2", "vit_small_patch16_dinov3"):
        model = timm.create_model(name, img_size=32 if name.endswith("v3") else 28)
        scales = [each for each, _ in model.named_parameters() if "gamma" in each]
        assert len(scales) == 24
        assert all(any(fnmatchcase(each, pattern) for pattern in personal_patterns(config)) for each in scales)
        assert not any(fnmatchcase("blocks.0.mlp.fc1.weight", pattern) for pattern in personal_patterns(config))


def test_strategies_go_through_the_head_rounds(quick_config: Config) -> None:
    """What is trained changes after them, and with it the names of what strategies and clients keep."""
    settings = {"head": "linear", "head_rounds": 2, "num_rounds": 4}
    for name in ("scaffold", "fedadam", "fedbn"):
        rows = simulate(quick_config, strategy=name, run_name=name, **settings, **OWN.get(name, {})).rows
        assert rows[-1]["task_vector_norm"] > 0
