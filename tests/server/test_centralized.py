import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from torchvision.transforms import v2

from fl_taskarith import simulate
from fl_taskarith.config.fields import SCHEDULES
from fl_taskarith.config.settings import Config
from fl_taskarith.data.datasets import load_dataset
from fl_taskarith.server.run import scheduled_rate
from fl_taskarith.storage.run_folder import Logbook
from fl_taskarith.training.schedules import learning_rate, plateau_learning_rate
from fl_taskarith.workspace.workspace import Workspace

FEW = {"strategy": "centralized", "train_subset": 160, "num_rounds": 3, "learning_rate": 0.003, "batch_size": 32}


def test_centralized_training_equals_torchs_own_loop(quick_config: Config) -> None:
    """With one full batch per epoch nothing random is left: gradient descent with momentum."""
    settings = FEW | {"batch_size": 160}
    history = simulate(quick_config, **settings)
    weights = safetensors.torch.load_file(history.folder / "model.safetensors")

    home = Workspace(Config(**{**vars(quick_config), **settings}))
    with torch.no_grad():
        for name in ("head.weight", "head.bias"):
            home.parameters[name].copy_(weights[name])
    trained = [parameter for name, parameter in home.parameters.items() if not name.startswith("head.")]
    optimizer = torch.optim.SGD(trained, lr=0.003, momentum=0.9)
    inputs = home.preprocessing.evaluation_inputs(home.data.train.images)
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(home.model(inputs), home.data.train.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [row["train_loss"] for row in history.rows[1:]] == pytest.approx(losses, rel=1e-4)
    for name, parameter in home.parameters.items():
        assert torch.allclose(parameter, weights[name], atol=1e-5), name


def test_its_head_is_the_federations(quick_config: Config) -> None:
    centralized = simulate(quick_config, **FEW)
    federated = simulate(quick_config, train_subset=160, num_rounds=1)
    accuracy = [history.rows[0]["test_accuracy"] for history in (centralized, federated)]
    assert accuracy[0] == accuracy[1]
    assert centralized.rows[0]["test_loss"] == pytest.approx(federated.rows[0]["test_loss"], rel=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_runs_with_warmup(quick_config: Config, schedule: str) -> None:
    rows = simulate(quick_config, **FEW, schedule=schedule, warmup_rounds=2, save_model=False).rows
    assert [row["learning_rate"] for row in rows[1:3]] == pytest.approx([0.0015, 0.003])
    assert rows[3]["learning_rate"] <= 0.003


def test_the_plateau_schedule_waits_and_then_drops() -> None:
    assert plateau_learning_rate(1.0, []) == 1.0
    assert plateau_learning_rate(1.0, [5, 4, 3, 2, 1]) == 1.0
    assert plateau_learning_rate(1.0, [1, 1, 1, 1]) == 1.0, "three rounds without improvement are borne"
    assert plateau_learning_rate(1.0, [1, 1, 1, 1, 1]) == pytest.approx(0.1)
    assert plateau_learning_rate(1.0, [1] * 9) == pytest.approx(0.01)


def test_the_plateau_schedule_looks_past_the_warmup() -> None:
    config = Config(schedule="plateau", warmup_rounds=3, learning_rate=1.0, evaluate_every=1)
    assert learning_rate(config, 2, [9.0]) == pytest.approx(2 / 3)
    assert learning_rate(config, 8, [0.1, 0.1, 0.1, 9.0, 8.0, 7.0, 6.0]) == 1.0


def test_the_exported_model_loads_in_plain_timm_and_gives_the_logged_accuracy(quick_config: Config) -> None:
    history = simulate(
        quick_config, test_subset=0, model="vit_tiny_patch16_224", weights="none", input_size=32, num_rounds=1,
        trainable_blocks=1, learning_rate=1e-4, ridge_lambda=10.0,
    )  # fmt: skip
    path = history.folder / "model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        facts = file.metadata()
    classes, size = json.loads(facts["classes"]), int(facts["input_size"])
    model = timm.create_model(facts["architecture"], num_classes=len(classes), img_size=size).eval()
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)

    test = load_dataset("digits", Path(), False).test
    preprocess = v2.Compose([
        v2.Resize((size, size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(json.loads(facts["mean"]), json.loads(facts["std"])),
    ])  # fmt: skip
    with torch.no_grad():
        logits = model(preprocess(test.images))
    accuracy = (logits.argmax(1) == test.labels).double().mean().item()
    assert accuracy == pytest.approx(history.rows[-1]["test_accuracy"], abs=0.006), (
        "two images of 360: rounding of pixels"
    )
    assert facts["round"] == "1"
    assert facts["dataset"] == "digits"


def test_the_plateau_schedule_does_not_count_the_head_before_training(quick_config: Config) -> None:
    losses = [0.1, 0.9, 0.8, 0.8, 0.8, 0.8]  # of round 0, which is the best here, and of rounds 1 to 5
    logbook = cast(Logbook, SimpleNamespace(rows=[{"round": at, "val_loss": loss} for at, loss in enumerate(losses)]))
    config = dataclasses.replace(quick_config, schedule="plateau", num_rounds=9, learning_rate=1.0)
    assert [scheduled_rate(config, logbook, at) for at in range(1, 7)] == [1.0] * 6
    logbook.rows.append({"round": 6, "val_loss": 0.8})
    assert scheduled_rate(config, logbook, 7) == pytest.approx(0.1), "rounds 3 to 6 are four without improvement"
