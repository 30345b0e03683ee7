"""Clients trained together have the task vectors they have alone, to rounding; what cannot go together goes alone."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_backbones  # noqa: F401  (tells timm of its models)
import torch
from conftest import numbers
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_taskarith import simulate
from fl_taskarith.client import cohort as client_together
from fl_taskarith.client import local_work
from fl_taskarith.config.settings import Config, load
from fl_taskarith.data.batches import Preprocessing
from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.engine.grid import RoundSettings
from fl_taskarith.engine.records import to_record, to_tensors
from fl_taskarith.errors import ConfigError, Divergence
from fl_taskarith.masking.mask import Mask
from fl_taskarith.models.backbone import build_model
from fl_taskarith.models.per_client import PerClientNetwork
from fl_taskarith.models.suffix import Backbone
from fl_taskarith.strategies.fedavg import FedAvg
from fl_taskarith.training import local, stacked
from fl_taskarith.training.local import set_trained, train_locally
from fl_taskarith.training.local_loss import LocalLoss
from fl_taskarith.training.sparse_sgdm import SparseSGDM, in_every_client, sgdm
from fl_taskarith.training.stacked import ClientData, train_stacked
from fl_taskarith.workspace import probe
from fl_taskarith.workspace.global_model import Weights
from fl_taskarith.workspace.machine import on_this_machine
from fl_taskarith.workspace.workspace import Workspace

RATE = 0.005  # small: rounding is not to grow from step to step
GLYPHS = Preprocessing(16, (0.5,) * 3, (0.5,) * 3, crop_padding=1, flip=True)


def data_of(seed: int, size: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(0, 10, (size,), generator=generator))


@dataclasses.dataclass(frozen=True)
class Case:
    """Local steps of some clients from the same weights, each on data of its own."""

    clients: int = 3
    steps: int = 3
    batch: int = 7
    density: float | None = None
    loss: str = "cross-entropy"
    precision: str = "fp32"
    model: str = "vit_glyph"
    optimizer: dict[str, object] = dataclasses.field(default_factory=dict)

    def start(self) -> tuple[Backbone, Weights, Mask | None]:
        """The model that clients start from, its trained weights, and their mask."""
        weights = "pretrained" if self.model == "vit_glyph" else "none"
        model = build_model(self.model, 10, 16, weights, download=False, seed=0)
        chance = torch.Generator().manual_seed(3)
        with torch.no_grad():
            model.head.weight.copy_(0.1 * torch.randn(model.head.weight.shape, generator=chance))
            for value in model.parameters():
                if value.ndim == 1:  # norms, scales and biases: other values than ones and zeros
                    value.add_(0.1 * torch.randn(value.shape, generator=chance))
        start = {name: value.detach().clone() for name, value in model.named_parameters() if "head" not in name}
        if self.density is None:
            return model, start, None
        chosen = {name: torch.rand(value.shape, generator=chance) < self.density for name, value in start.items()}
        return model, start, Mask(chosen)

    @property
    def amounts(self) -> dict[str, Any]:
        return {"local_steps": self.steps, "batch_size": self.batch, "precision": self.precision,
                "loss": LocalLoss(self.loss, logit_scale=2.0, weight=0.5, temperature=3.0)}  # fmt: skip

    @property
    def data(self) -> list[ClientData]:
        """Shards of data of their own, or of one data set where there are four clients or more."""
        shared = data_of(8, 9 * self.clients)
        return [
            ClientData(data_of(seed, 9 + seed), torch.arange(9).flip(0), np.random.default_rng([7, seed]))
            if self.clients < 4
            else ClientData(shared, torch.arange(9 * seed, 9 * seed + 9), np.random.default_rng([7, seed]))
            for seed in range(self.clients)
        ]

    def alone(self) -> tuple[list[float], list[Weights]]:
        model, start, mask = self.start()
        losses, ends = [], []
        for client in self.data:
            parameters = set_trained(model, list(start))
            with torch.no_grad():
                for parameter, value in zip(parameters, start.values(), strict=True):
                    parameter.copy_(value)
            optimizer = sgdm(zip(start, parameters, strict=True), load(overrides=self.optimizer), RATE, mask)
            losses.append(
                train_locally(
                    model, client.examples, client.shard, optimizer, GLYPHS, generator=client.generator, **self.amounts
                )
            )
            ends.append({name: value.detach().clone() for name, value in zip(start, parameters, strict=True)})
        return losses, ends

    def together(self, through: Callable[[Any], Any] = lambda network: network) -> tuple[list[float], Weights]:
        model, start, mask = self.start()
        set_trained(model, [])
        network = self.amounts["loss"].network(model)
        prefix = "" if network is model else "network."
        together = through(PerClientNetwork(network, list(start), self.clients, prefix))
        rows = None if mask is None else in_every_client(mask, together.weights)
        settings = load(overrides=self.optimizer)
        optimizer = sgdm(together.weights.items(), settings, RATE, rows=rows, clients=self.clients)
        losses = train_stacked(together, network, self.data, optimizer, GLYPHS, **self.amounts)
        for name, value in model.named_parameters():
            assert name not in start or torch.equal(value, start[name]), "what all start from stays as it is"
        return losses, together.weights

    def compare(self, losses: float, weights: float, through: Callable[[Any], Any] = lambda network: network) -> None:
        """Assert that the losses, and the change of each weight in norm, agree to these relative tolerances."""
        _, start, mask = self.start()
        (expected, ends), (found, own) = self.alone(), self.together(through)
        assert found == pytest.approx(expected, rel=losses)
        for client, end in enumerate(ends):
            for name, value in end.items():
                moved, by_itself = own[name][client] - start[name], value - start[name]
                assert (moved - by_itself).norm() <= weights * by_itself.norm() + 1e-6, f"{name} of {client}"
                if mask is not None:
                    assert torch.equal(own[name][client][~mask.tensors[name]], start[name][~mask.tensors[name]])


@settings(max_examples=8, deadline=None)
@given(
    clients=st.integers(2, 4),
    steps=st.integers(1, 3),
    batch=st.integers(1, 9),
    density=st.sampled_from([None, 0.0, 0.3, 1.0]),
    momentum=st.sampled_from([0.0, 0.9]),
    decay=st.sampled_from([0.0, 0.01]),
    clip=st.sampled_from([0.0, 0.3]),
    loss=st.sampled_from(["cross-entropy", "squared", "not-true-distillation", "feature-anchoring"]),
)
def test_each_client_moves_as_it_does_alone(
    clients: int, steps: int, batch: int, density: float | None, momentum: float, decay: float, clip: float, loss: str
) -> None:
    optimizer: dict[str, object] = {"momentum": momentum, "weight-decay": decay, "clip-norm": clip}
    Case(clients, steps, batch, density, loss, optimizer=optimizer).compare(1e-5, 1e-3)


@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("model", ["tiny_rope_biased", "tiny_registers"])
def test_models_with_layer_scale_registers_and_rotary_positions(model: str, density: float | None) -> None:
    Case(model=model, density=density).compare(1e-5, 1e-3)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp16", 0.005)])
def test_in_half_precision_as_alone_within_its_resolution(precision: str, tolerance: float) -> None:
    case = Case(density=0.3, precision=precision, optimizer={"clip-norm": 0.3})
    case.compare(tolerance, 0.1)
    exact = dataclasses.replace(case, precision="fp32").together()[0]
    assert case.together()[0] != exact, "autocast is on"


def test_each_client_leaves_out_its_own_steps_where_fp16_overflows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (local, stacked):
        monkeypatch.setattr(module, "LOSS_SCALE", 2.0**18)
    case = Case(2, 5, precision="fp16", optimizer={"momentum": 0.9, "weight-decay": 0.01, "nesterov": True})
    case.compare(0.005, 0.1)
    said = [record.getMessage() for record in caplog.records if "steps were left out" in record.getMessage()]
    assert said[: len(said) // 2] == said[len(said) // 2 :], "alone and together"
    assert len(said) == 4
    for module in (local, stacked):
        monkeypatch.setattr(module, "LOSS_SCALE", 2.0**60)
    with pytest.raises(Divergence, match="fp16"):
        case.together()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_network_of_several_clients_moves_them_as_alone(precision: str) -> None:
    tolerance = {"fp32": 1e-5, "bf16": 0.02}[precision]
    Case(precision=precision).compare(tolerance, 100 * tolerance, partial(torch.compile, dynamic=False, fullgraph=True))


def test_batches_of_different_sizes_are_refused() -> None:
    model = build_model("vit_glyph", 10, 16, "pretrained", download=False, seed=0)
    together = PerClientNetwork(model, [name for name, _ in model.named_parameters()], 2)
    clients = [ClientData(data_of(0, 9), torch.arange(size), np.random.default_rng(0)) for size in (5, 9)]
    optimizer = SparseSGDM(together.weights.items(), 0.1, clients=2)
    with pytest.raises(ValueError, match=r"\[5, 9\]"):
        train_stacked(together, model, clients, optimizer, GLYPHS, local_steps=1, batch_size=16)


def test_a_layer_without_a_form_for_several_clients_is_named() -> None:
    model = torch.nn.Sequential(torch.nn.Conv1d(3, 3, 2), torch.nn.Linear(3, 3))
    PerClientNetwork(model, ["1.weight"], 2)
    with pytest.raises(NotImplementedError, match="0, a Conv1d"):
        PerClientNetwork(model, ["0.weight"], 2)


MASKED = {"mask_rule": "least-sensitive", "calibration_rounds": 1, "calibration_size": 20}
TOGETHER: dict[str, dict[str, object]] = {
    "masked, squared loss, bank": MASKED | {"local_loss": "squared", "task_vector_bank": "float32"},
    "a head first, then the last block": MASKED | {"head": "linear", "head_rounds": 1, "trainable_blocks": 1},
    "unequal steps, two groups of as many": {
        "local_steps_min": 1,
        "local_steps_max": 2,
        "batch_size": 8,
        "strategy": "fednova",
        "participation": 1.0,
        "clients_at_once": 0,
    },
    "FedProx, masked": MASKED | {"strategy": "fedprox", "proximal_mu": 3.0, "local_steps": 3},
}
TOGETHER_TOO: dict[str, dict[str, object]] = {
    "feature anchoring, masked": MASKED | {"local_loss": "feature-anchoring", "local_steps": 3},
    "not-true distillation, masked": MASKED | {"local_loss": "not-true-distillation", "local_steps": 3},
    "dense": {},
    "FedProx": {"strategy": "fedprox", "proximal_mu": 3.0, "local_steps": 3},
    "SCAFFOLD": {"strategy": "scaffold", "num_rounds": 3, "participation": 0.9},
    "SCAFFOLD, masked": MASKED | {"strategy": "scaffold", "num_rounds": 3, "participation": 0.9},
    "all at once, shards of two sizes below a batch": {"num_clients": 100, "participation": 0.06, "clients_at_once": 0},
    "clipping, masked": MASKED | {"clip_norm": 0.1},
    "a head alone": {"trainable": "head", "head": "linear"},
    "cached tokens, TF32": {"trainable_blocks": 1, "prefix_cache": "float32", "precision": "tf32"},
    "Gram-anchored, other views": {"strategy": "gram-anchored", "client_groups": "half-turn"},
    "clients at fault, random labels": {"byzantine_fraction": 0.2, "attack": "random-labels", "strategy": "median"},
}
ALONE: dict[str, dict[str, object]] = {
    "FedBN": {"strategy": "fedbn"},
}
ALONE_TOO: dict[str, dict[str, object]] = {
    "own masks": MASKED | {"mask_source": "own"},
}


def two_runs(config: Config, settings: dict[str, object]) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    one = dataclasses.replace(config, **(settings | {"clients_at_once": 1}))
    together = dataclasses.replace(config, **({"clients_at_once": 3} | settings))
    folders: list[Path] = [
        simulate(each, run_name=f"at-once-{each.clients_at_once}").folder for each in (one, together)
    ]
    return numbers(folders[0]), numbers(folders[1])


class PerClientRate(FedAvg):
    """A strategy whose messages differ: every client has a rate of its own."""

    def round_settings(self, server_round: int, partition: int) -> RoundSettings:
        settings = super().round_settings(server_round, partition)
        return dataclasses.replace(settings, learning_rate=settings.learning_rate * (1 + partition))


class PerClientWeights(FedAvg):
    """A strategy that sends weights of its own to each client."""

    def configure_train(self, *given: object, **named: object) -> list[Message]:
        messages = list(super().configure_train(*given, **named))  # type: ignore[arg-type]
        for message in messages:
            tensors = to_tensors(message.content.array_records["arrays"], torch.device("cpu"))
            factor = 1 + 1e-3 * message.metadata.dst_node_id
            message.content["arrays"] = to_record({name: value * factor for name, value in tensors.items()})
        return messages


@pytest.mark.parametrize("strategy", ["PerClientRate", "PerClientWeights"])
def test_clients_that_are_told_different_things_go_alone(
    strategy: str, quick_config: Config, trained: list[int]
) -> None:
    settings = {"num_rounds": 1, "participation": 0.6, "strategy": f"test_stacked_training:{strategy}"}
    alone, together = two_runs(quick_config, settings)
    assert alone == together
    assert not trained


def workspace_of_last() -> Workspace:
    """The workspace of the run before."""
    return created[-1]


created: list[Workspace] = []


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the groups of clients that were trained together."""
    sizes: list[int] = []
    original = client_together.train_stacked
    made = local_work.workspace
    monkeypatch.setattr(local_work, "workspace", lambda config: created.append(made(config)) or created[-1])

    def counting(
        together: object, network: object, clients: list[ClientData], *rest: object, **named: object
    ) -> object:
        sizes.append(len(clients))
        return original(together, network, clients, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(client_together, "train_stacked", counting)
    return sizes


@pytest.mark.parametrize("change", [*TOGETHER, *(pytest.param(name, marks=pytest.mark.slow) for name in TOGETHER_TOO)])
def test_a_run_has_the_rows_of_one_client_after_the_other(
    change: str, quick_config: Config, trained: list[int], tmp_path: Path
) -> None:
    settings = {"num_rounds": 2, "participation": 0.6, "data_dir": str(tmp_path)} | (TOGETHER | TOGETHER_TOO)[change]
    alone, together = two_runs(quick_config, settings)
    assert trained and max(trained) >= 2
    left = [name for name, value in workspace_of_last().model.named_parameters() if value.grad is not None]
    assert not left, "what is not trained has no gradient, and what is has its own elsewhere"
    for first, second in zip(alone, together, strict=True):
        for column, value in first.items():
            if isinstance(value, float) and "accuracy" not in column:
                assert second[column] == pytest.approx(value, rel=2e-3, abs=1e-6), column
            elif "accuracy" in column and value is not None:
                assert second[column] == pytest.approx(value, abs=0.006), column  # two of 360 images
            else:
                assert second[column] == value, column


@pytest.mark.parametrize("change", [*ALONE, *(pytest.param(name, marks=pytest.mark.slow) for name in ALONE_TOO)])
def test_what_cannot_be_trained_together_keeps_its_bits(change: str, quick_config: Config, trained: list[int]) -> None:
    alone, together = two_runs(quick_config, {"num_rounds": 1} | (ALONE | ALONE_TOO)[change])
    assert not trained
    assert alone == together


def test_a_failure_together_is_told_and_clients_go_alone(
    quick_config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(client_together, "train_stacked", out_of_memory)
    alone, together = two_runs(quick_config, {"num_rounds": 2})
    assert alone == together
    assert capsys.readouterr().out.count("one by one: RuntimeError: not enough memory") == 1


@pytest.mark.parametrize(("fitting", "groups"), [(3, [5, 2, 2, 2, 2]), (1, [5, 2])])
def test_as_many_clients_go_together_as_fit_into_memory(
    fitting: int, groups: list[int], quick_config: Config, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Five clients, of whom `fitting` fit: 5 are tried once, in the first of two rounds, and one is left over."""
    original, tried = client_together.train_stacked, list[int]()

    def little_memory(together: PerClientNetwork, *given: Any, **named: Any) -> list[float]:
        tried.append(together.clients)
        losses = original(together, *given, **named)  # the weights have moved when memory runs out
        if together.clients > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    monkeypatch.setattr(client_together, "train_stacked", little_memory)
    rounds = {"num_rounds": 2, "num_clients": 10, "participation": 0.5, "clients_at_once": 0}
    alone, together = two_runs(quick_config, rounds)
    assert tried == groups
    assert capsys.readouterr().out.count("Memory does not suffice for 5 clients at once: 2 go together.") == 1
    for first, second in zip(alone, together, strict=True):
        for column in ("train_loss", "val_loss", "update_norm"):
            assert second.get(column) == (first.get(column) and pytest.approx(first[column], rel=1e-4)), column


def test_auto_is_the_number_that_was_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Recorded as that number: without a measurement 1 where a model fills a core, or clients never go together."""
    speeds, measured = {1: 100.0, 10: 150.0}, list[int]()

    def images_per_second(_: object, work: Callable[[int], None], batch: int, seconds: float) -> float:
        measured.append(batch)
        return speeds[1] if len(measured) % 2 else speeds[10] / 10

    monkeypatch.setattr(probe.Probe, "images_per_second", images_per_second)
    monkeypatch.setattr(probe.Probe, "timed", lambda *_: probe.FULL / 2)
    monkeypatch.setattr(probe, "_fastest", {})
    assert Config().clients_at_once == 1 and on_this_machine(Config()).clients_at_once == 1
    automatic = Config(clients_at_once="auto", data_dir=str(tmp_path / "data"))
    for process in range(2):
        assert on_this_machine(automatic) == on_this_machine(dataclasses.replace(automatic, clients_at_once=10))
        monkeypatch.setattr(probe, "_fastest", {})  # as in a process of its own
        speeds[10] = 50.0 if process else speeds[10]
    assert measured == [16, 16], "once per machine: a run that goes on trains as it began"
    (tmp_path / "data" / probe.FASTEST).write_text("{")
    speeds[10] = 150.0
    assert on_this_machine(automatic).clients_at_once == 10 and len(measured) == 4, "a damaged file is measured anew"
    measured[:] = measured[:2]
    assert on_this_machine(dataclasses.replace(automatic, engine="flower")).clients_at_once == 1
    assert on_this_machine(dataclasses.replace(automatic, participation=0.01)).clients_at_once == 1
    assert len(measured) == 2
    speeds[10] = 105.0  # within the noise of a measurement
    assert on_this_machine(dataclasses.replace(automatic, batch_size=8)).clients_at_once == 1
    monkeypatch.setattr(probe.Probe, "timed", lambda *_: 2 * probe.FULL)
    assert on_this_machine(dataclasses.replace(automatic, batch_size=9)).clients_at_once == 1
    assert len(measured) == 4


def test_auto_tries_fewer_where_memory_does_not_suffice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original, tried = probe.Probe.trainer, list[int]()

    def trainer(of: probe.Probe, clients: int) -> Callable[[int], None]:
        tried.append(clients)
        if clients > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(of, clients)

    monkeypatch.setattr(probe.Probe, "trainer", trainer)
    monkeypatch.setattr(probe, "_fastest", {})
    monkeypatch.setattr(probe, "SECONDS", 1e-3)
    monkeypatch.setattr(probe, "FULL", math.inf)
    monkeypatch.setattr(probe, "GAIN", 0.0)
    assert on_this_machine(Config(clients_at_once="auto", data_dir=str(tmp_path))).clients_at_once == 2
    assert tried == [10, 5, 2]


def test_only_the_sequential_engine_takes_clients_together() -> None:
    for other in ({"engine": "flower"}, {"client_timeout": 9.0}):
        with pytest.raises(ConfigError, match="clients-at-once"):
            Config(clients_at_once=2, **other)
