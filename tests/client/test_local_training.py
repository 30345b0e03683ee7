"""From which weights a client starts its local steps."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fl_taskarith import simulate
from fl_taskarith.client import local_training
from fl_taskarith.client.local_work import Work
from fl_taskarith.config.settings import Config
from fl_taskarith.masking.mask import Mask
from fl_taskarith.storage.client_files import OWN
from fl_taskarith.workspace.global_model import Frozen, GlobalModel, Weights
from fl_taskarith.workspace.workspace import workspace


@pytest.mark.parametrize("masked", [False, True])
def test_a_tensor_that_is_not_sent_is_the_clients_own_else_the_pretrained_one(
    masked: bool, quick_config: Config
) -> None:
    home = workspace(dataclasses.replace(quick_config, strategy="fedbn"))
    names = home.trained_names(1)
    mask = Mask({name: home.pretrained[name] > 0 for name in names}) if masked else None
    start = home.pretrained if mask is None else mask.gather(home.pretrained)
    shared = {name: start[name] + 1 for name in names[2:]}
    work = cast(Work, SimpleNamespace(home=home, frozen=Frozen(mask=mask), current=SimpleNamespace(number=1)))
    found = local_training.all_trained(work, shared, {OWN + names[0]: start[names[0]] - 1})
    assert list(found) == names
    for place, name in enumerate(names):
        change = (-1, 0)[place] if place < 2 else 1
        assert torch.equal(found[name], start[name] + change), name


def test_a_client_of_cluster_models_trains_the_one_of_least_loss(
    quick_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, ranks = local_training._train, list[int]()

    def ranked(work: Work, shared: Weights) -> Any:
        def loss(weights: Weights) -> float:
            work.home.place(GlobalModel(weights, work.frozen))
            return work.home.evaluate(work.shard).loss

        sent = work.received["arrays"]
        losses = [loss({name: value[cluster] for name, value in sent.items()}) for cluster in range(2)]
        ranks.append(sorted(losses).index(loss(shared)))
        return train(work, shared)

    monkeypatch.setattr(local_training, "_train", ranked)
    simulate(quick_config, strategy="br-ifca", cluster_rule="mean", num_clusters=2, num_rounds=1, participation=1.0,
             client_groups="half-turn")  # fmt: skip
    assert ranks == [0] * quick_config.num_clients


def test_in_head_rounds_a_client_has_no_mask_of_its_own_yet(quick_config: Config) -> None:
    settings = {"head": "linear", "head_rounds": 2, "mask_rule": "least-sensitive", "calibration_rounds": 1}
    own = simulate(quick_config, run_name="own", mask_source="own", **settings)
    alone = simulate(quick_config, run_name="server", **settings)
    for row, other in zip(own.rows[1:3], alone.rows[1:3], strict=True):
        assert row["uplink_bytes"] == other["uplink_bytes"] and row["train_loss"] == other["train_loss"]
    assert own.rows[3]["uplink_bytes"] != alone.rows[3]["uplink_bytes"], "from then on it sends the entries of its own"
