import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import real_data_folder
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from fl_taskarith.data.class_assignment import least_spread
from fl_taskarith.data.datasets import load_dataset
from fl_taskarith.data.sharding import make_shards
from fl_taskarith.data.shards import Shards
from fl_taskarith.data.splits import apportion, split_training_set, stratified_sample
from fl_taskarith.errors import ConfigError, DataError
from fl_taskarith.seeding import random_generator

CIFAR_LABELS = np.repeat(np.arange(100), 450)


def digits_labels() -> np.ndarray:
    return load_dataset("digits", Path(), False).train.labels.numpy()


# data sets and splits


def test_digits_are_the_real_ones_and_the_test_set_is_apart() -> None:
    digits = load_dataset("digits", Path(), False)
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.train.images.shape == (1437, 3, 8, 8)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.max() == 255
    assert torch.bincount(digits.test.labels).tolist() == pytest.approx([36] * 10, abs=1)
    everything = torch.cat([digits.train.images, digits.test.images]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797


def test_cifar100_loads_in_torchvisions_layout(cifar100_folder: Path) -> None:
    from torchvision.datasets import CIFAR100

    data = load_dataset("cifar100", cifar100_folder, False)
    original = CIFAR100(str(cifar100_folder), train=True)
    assert data.train.images.shape == (len(original), 3, 32, 32)
    assert len(data.classes) == 100
    assert np.array_equal(data.train.images[2].permute(1, 2, 0).numpy(), original.data[2])
    assert data.train.labels.tolist() == original.targets
    if real_data_folder() is not None:
        assert (len(data.train), len(data.test)) == (50_000, 10_000)


def test_cifar100_offline_and_absent_says_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cifar-100-python") as caught:
        load_dataset("cifar100", tmp_path, False)
    assert str(tmp_path) in str(caught.value)
    assert "download" in str(caught.value)


@given(
    st.integers(0, 300).filter(lambda size: size == 0 or size >= 10), st.integers(10, 300), st.integers(10, 300),
    st.integers(0, 5),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_splits_are_disjoint_stratified_and_of_the_asked_size(
    calibration: int, validation: int, subset: int, seed: int
) -> None:
    labels = digits_labels()
    splits = split_training_set(labels, calibration, validation, subset, seed)
    parts = [splits.calibration, splits.validation, splits.train]
    assert [len(part) for part in parts] == [calibration, validation, subset]
    assert len(np.unique(np.concatenate(parts))) == calibration + validation + subset
    for part in parts:
        counts = np.bincount(labels[part], minlength=10)
        expected = len(part) * np.bincount(labels) / len(labels)
        assert np.abs(counts - expected).max() < 2


def test_without_a_subset_all_that_remains_is_training_data() -> None:
    splits = split_training_set(digits_labels(), 100, 180, 0, 0)
    assert len(splits.train) == 1437 - 280


@pytest.mark.parametrize(("sizes", "key"), [((5, 20, 0), "calibration-size"), ((20, 2000, 0), "validation-size"),
                                            ((20, 20, 1400), "train-subset")])  # fmt: skip
def test_an_impossible_split_names_its_key(sizes: tuple[int, int, int], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        split_training_set(digits_labels(), *sizes, 0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.floats(0, 1), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_apportionment_meets_the_total_and_the_bounds(upper: list[int], share: float, low: int) -> None:
    highest = np.array(upper)
    lowest = np.minimum(low, highest)
    total = int(lowest.sum() + share * (highest - lowest).sum())
    quotas = apportion(total, highest.astype(float), lowest, highest)
    assert quotas.sum() == total
    assert (quotas >= lowest).all()
    assert (quotas <= highest).all()


def test_a_stratified_sample_is_a_function_of_its_seed() -> None:
    labels = digits_labels()
    assert np.array_equal(stratified_sample(labels, 50, 1), stratified_sample(labels, 50, 1))
    assert not np.array_equal(stratified_sample(labels, 50, 1), stratified_sample(labels, 50, 2))


# shards


def check_shards(labels: np.ndarray, shards: list[np.ndarray], classes_per_client: int) -> None:
    owned = np.sort(np.concatenate(shards))
    assert np.array_equal(owned, np.arange(len(labels))), "every example is owned exactly once"
    for shard in shards:
        assert len(np.unique(labels[shard])) == classes_per_client


@pytest.mark.parametrize("classes_per_client", [1, 5, 10, 50])
@pytest.mark.parametrize("per_class", [450, 440, 200])
def test_cifar100_shards_have_exactly_nc_classes_and_equal_sizes(classes_per_client: int, per_class: int) -> None:
    labels = np.repeat(np.arange(100), per_class)
    shards = make_shards(labels, 100, "classes", classes_per_client, seed=3)
    check_shards(labels, shards, classes_per_client)
    assert {len(shard) for shard in shards} == {per_class}
    if classes_per_client == 1:
        assert sorted(labels[shard[0]] for shard in shards) == list(range(100))


def test_a_class_is_divided_almost_evenly_among_its_owners() -> None:
    labels = np.repeat(np.arange(100), 440)
    shards = make_shards(labels, 100, "classes", 50, seed=0)
    parts = [np.bincount(labels[shard], minlength=100) for shard in shards]
    assert {int(count) for part in parts for count in part[part > 0]} <= {8, 9}


@pytest.mark.parametrize(
    ("num_clients", "classes_per_client", "spread"), [(50, 1, 3), (50, 2, 1), (50, 5, 1), (10, 5, 1), (10, 2, 1)]
)
def test_digits_shards_differ_as_little_as_the_class_counts_allow(
    num_clients: int, classes_per_client: int, spread: int
) -> None:
    labels = digits_labels()
    shards = make_shards(labels, num_clients, "classes", classes_per_client, seed=0)
    check_shards(labels, shards, classes_per_client)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= spread


def brute_force_spread(counts: list[int], owned: np.ndarray) -> int:
    """The least max - min of row sums over all divisions of the classes among their owners, by exhaustion."""
    rows = [tuple([0] * owned.shape[0])]
    for column, count in enumerate(counts):
        owners = np.flatnonzero(owned[:, column])
        divisions = [()]
        for position in range(len(owners)):
            last = position == len(owners) - 1
            divisions = [
                (*division, part)
                for division in divisions
                for part in ([count - sum(division)] if last else range(1, count))
                if part >= 1 and sum(division) + part <= count
            ]
        rows = list(
            {
                tuple(row[k] + (division[list(owners).index(k)] if k in owners else 0) for k in range(owned.shape[0]))
                for row in rows
                for division in divisions
            }
        )
    return min(max(row) - min(row) for row in rows)


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_spread_of_sizes_is_the_least_possible_for_the_assignment(seed: int) -> None:
    generator = np.random.default_rng(seed)
    counts = generator.integers(3, 8, size=3)
    labels = np.repeat(np.arange(3), counts)
    num_clients, classes_per_client = int(generator.integers(2, 4)), 2
    shards = make_shards(labels, num_clients, "classes", classes_per_client, seed)
    check_shards(labels, shards, classes_per_client)
    owned = np.array([np.bincount(labels[shard], minlength=3) > 0 for shard in shards])
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) == brute_force_spread(counts.tolist(), owned)


def spread(shards: list[np.ndarray]) -> int:
    return max(map(len, shards)) - min(map(len, shards))


def best_possible_spread(counts: list[int], num_clients: int, classes_per_client: int) -> int:
    """Over all assignments of classes to clients, with the sizes of each found by a linear program of its own."""
    rows = list(itertools.combinations(range(len(counts)), classes_per_client))
    found = []
    for chosen in itertools.combinations_with_replacement(rows, num_clients):
        edges = [(client, label) for client, row in enumerate(chosen) for label in row]
        of_class = np.array([[label == column for _, label in edges] for column in range(len(counts))], dtype=float)
        if (of_class.sum(1) == 0).any() or (of_class.sum(1) > counts).any():
            continue
        of_client = np.array([[client == row for client, _ in edges] for row in range(num_clients)], dtype=float)
        within = np.block([[of_client, np.zeros((num_clients, 1)), -np.ones((num_clients, 1))],
                           [-of_client, np.ones((num_clients, 1)), np.zeros((num_clients, 1))]])  # fmt: skip
        result = milp(
            np.concatenate([np.zeros(len(edges)), [-1, 1]]),
            integrality=np.ones(len(edges) + 2),
            bounds=Bounds(np.concatenate([np.ones(len(edges)), [0, 0]]), np.inf),
            constraints=[LinearConstraint(within, -np.inf, 0), LinearConstraint(np.pad(of_class, ((0, 0), (0, 2))),
                                                                                counts, counts)],
        )  # fmt: skip
        found.append(round(result.fun))
    return min(found)


@pytest.mark.parametrize(
    ("counts", "num_clients", "classes_per_client"),
    [
        ([10, 10, 10, 10], 3, 2),  # two components: one client alone, two with three classes
        ([9, 9, 9, 9, 9], 3, 2),  # one chain
        ([9, 9, 9, 9, 9], 2, 3),
        ([10, 10], 3, 1),
        ([13, 11, 12, 10], 2, 2),  # pairs of whole classes
        ([14, 3, 9, 7], 3, 2),
        ([8, 13, 8], 6, 1),  # in proportion 2, 3 and 1 owners, but 2 of each differ less
        ([5, 23, 8], 4, 1),
        ([2, 3, 2, 4], 4, 2),
    ],
)
def test_the_spread_is_the_least_of_all_assignments(
    counts: list[int], num_clients: int, classes_per_client: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    shards = make_shards(labels, num_clients, "classes", classes_per_client, seed=0)
    check_shards(labels, shards, classes_per_client)
    best = best_possible_spread(counts, num_clients, classes_per_client)
    assert least_spread(np.bincount(labels), num_clients, classes_per_client) <= best
    assert spread(shards) == best


@given(st.lists(st.integers(1, 12), min_size=2, max_size=4), st.integers(2, 3), st.integers(1, 2), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_no_assignment_goes_below_the_least_spread(
    counts: list[int], num_clients: int, classes_per_client: int, seed: int
) -> None:
    slots = num_clients * classes_per_client
    assume(len(counts) <= slots <= np.minimum(counts, num_clients).sum() and classes_per_client <= len(counts))
    labels = np.repeat(np.arange(len(counts)), counts)
    found = spread(make_shards(labels, num_clients, "classes", classes_per_client, seed))
    bound = least_spread(np.bincount(labels), num_clients, classes_per_client)
    assert bound <= best_possible_spread(counts, num_clients, classes_per_client) <= found
    if classes_per_client == 1:
        assert found == bound


@pytest.mark.parametrize(
    ("num_clients", "classes_per_client", "smallest", "largest"),
    [(37, 3, 1250, 1500), (60, 2, 750, 1000), (70, 2, 666, 750), (50, 3, 1000, 1000), (60, 3, 833, 834)],
)
def test_cifar100_shards_are_as_equal_as_can_be_where_classes_hardly_overlap(
    num_clients: int, classes_per_client: int, smallest: int, largest: int
) -> None:
    labels = np.repeat(np.arange(100), 500)
    shards = make_shards(labels, num_clients, "classes", classes_per_client, seed=1)
    check_shards(labels, shards, classes_per_client)
    assert (min(map(len, shards)), max(map(len, shards))) == (smallest, largest)
    assert largest - smallest <= max(1, least_spread(np.bincount(labels), num_clients, classes_per_client))


def test_classes_of_almost_equal_size_reach_the_least_spread_too() -> None:
    counts = np.array([498] * 20 + [497] * 80)  # CIFAR-100 without its calibration and validation splits
    shards = make_shards(np.repeat(np.arange(100), counts), 37, "classes", 3, seed=0)
    assert (min(map(len, shards)), max(map(len, shards))) == (1243, 1491)
    assert least_spread(counts, 37, 3) == 248


@given(st.integers(2, 12), st.integers(2, 30), st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_equal_classes_reach_the_least_spread(classes: int, num_clients: int, more: int) -> None:
    classes_per_client = min(classes, -(-classes // num_clients) + more)
    labels = np.repeat(np.arange(classes), 60)
    shards = make_shards(labels, num_clients, "classes", classes_per_client, seed=0)
    assert spread(shards) <= max(1, least_spread(np.bincount(labels), num_clients, classes_per_client))


@pytest.mark.parametrize(
    ("num_clients", "classes_per_client", "digest"),
    [(100, 5, "da7d09c10684c11a"), (50, 2, "48e85e211df3b4b3"), (99, 2, "21966386897f985b")],
)
def test_shards_that_were_equal_stay_as_they_were(num_clients: int, classes_per_client: int, digest: str) -> None:
    shards = make_shards(CIFAR_LABELS, num_clients, "classes", classes_per_client, seed=0)
    assert hashlib.sha256(np.concatenate(shards).astype("<i8").tobytes()).hexdigest()[:16] == digest


@given(st.integers(1, 60), st.integers(1, 10), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_any_feasible_request_is_met_and_any_other_refused(
    num_clients: int, classes_per_client: int, seed: int
) -> None:
    labels = np.repeat(np.arange(10), np.random.default_rng(seed).integers(15, 40, size=10))
    if num_clients * classes_per_client < 10:
        with pytest.raises(ConfigError, match=r"K x Nc"):
            make_shards(labels, num_clients, "classes", classes_per_client, seed)
        return
    if np.minimum(np.bincount(labels), num_clients).sum() >= num_clients * classes_per_client:
        check_shards(labels, make_shards(labels, num_clients, "classes", classes_per_client, seed), classes_per_client)


@given(st.integers(1, 300), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_iid_shards_partition_the_data_in_equal_sizes(num_clients: int, seed: int) -> None:
    shards = make_shards(CIFAR_LABELS[:1000], num_clients, "iid", 1, seed)
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(1000))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize(
    ("num_clients", "classes_per_client", "reason"),
    [(7, 1, "7 x 1 = 7 < 10"), (5, 11, "only 10 classes"), (2000, 1, "exceeds the 1437")],
)
def test_an_infeasible_sharding_says_which_arithmetic_fails(
    num_clients: int, classes_per_client: int, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_shards(digits_labels(), num_clients, "classes", classes_per_client, 0)


def test_shards_depend_on_the_shard_seed_alone() -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [shard.tolist() for shard in make_shards(CIFAR_LABELS, 100, "classes", 5, seed)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


# randomness, and what lies on the device


def test_streams_of_randomness_are_apart_by_every_coordinate() -> None:
    coordinates = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    drawn = {random_generator(*each).integers(2**62) for each in coordinates}
    assert len(drawn) == len(coordinates)
    assert random_generator(5, "x", 2, 3).integers(2**62) == random_generator(5, "x", 2, 3).integers(2**62)


def test_shards_on_the_device_are_those_that_were_made() -> None:
    made = make_shards(np.repeat(np.arange(4), 5), 7, "iid", 1, seed=3)
    shards = Shards(made, torch.device("cpu"))
    assert len(shards) == 7
    assert [shard.tolist() for shard in shards] == [shard.tolist() for shard in made]
    with pytest.raises(IndexError):
        shards[7]


def test_synthetic_images_are_cifar100_in_shape_and_told_apart_by_colour() -> None:
    first, second = (load_dataset("synthetic", Path(), download=False) for _ in range(2))
    assert torch.equal(first.train.images, second.train.images)
    assert (first.train.images.shape, first.train.images.dtype) == ((10_000, 3, 32, 32), torch.uint8)
    assert first.test.labels.bincount().tolist() == [10] * 100 and len(first.classes) == 100
    colours = {split: getattr(first, split).images.float().mean((2, 3)) for split in ("train", "test")}
    nearest = torch.cdist(colours["test"], colours["train"][:100]).argmin(1)
    assert (nearest == first.test.labels).float().mean() > 0.9
