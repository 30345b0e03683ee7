"""What a process keeps between messages measures what it says."""

import dataclasses

import pytest

from fl_taskarith.config.settings import Config
from fl_taskarith.workspace.global_model import GlobalModel
from fl_taskarith.workspace.workspace import workspace


def test_the_norm_of_the_task_vector_is_that_of_the_backbone(quick_config: Config) -> None:
    home = workspace(dataclasses.replace(quick_config, head="linear", trainable="all"))
    weights = {name: home.pretrained[name].clone() for name in home.trained_names(1)}
    assert "head.weight" in weights
    weights["head.weight"] += 5.0
    assert home.task_vector_norm(GlobalModel(weights)) == 0.0
    weights["norm.bias"] += 3.0
    assert home.task_vector_norm(GlobalModel(weights)) == pytest.approx(3.0 * len(weights["norm.bias"]) ** 0.5)
