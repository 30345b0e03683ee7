"""What each strategy makes of replies: limit cases, hand computations, the papers' formulas, Flower's own classes."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_taskarith.config.fields import STRATEGIES
from fl_taskarith.config.settings import from_mapping, load
from fl_taskarith.engine.round_context import RoundContext
from fl_taskarith.engine.sequential import SequentialGrid, ensure_run_identity
from fl_taskarith.masking.mask import Mask
from fl_taskarith.strategies import strategy_class
from fl_taskarith.strategies.fedavg import FedAvg, Reply
from fl_taskarith.training.schedules import step_coefficient_sum

Vector = dict[str, torch.Tensor]
SHAPES = {"a": (3, 4), "b": (5,)}
CPU = torch.device("cpu")


def drawn(number: int, seed: int = 0) -> list[Vector]:
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(number)]


def made(name: str, **changes: object) -> FedAvg:
    config = from_mapping({"strategy": name, "num_clients": 10, **changes})
    return strategy_class(name)(config, CPU)


def replies(
    vectors: Sequence[Vector], examples: Sequence[float] | None = None, steps: Sequence[float] | None = None
) -> list[Reply]:
    examples, steps = examples or [1.0] * len(vectors), steps or [1.0] * len(vectors)
    return [
        Reply(client, vector, count, coefficients, {"control": {name: -value for name, value in vector.items()}})
        for client, (vector, count, coefficients) in enumerate(zip(vectors, examples, steps, strict=True))
    ]


def flat(vector: Vector) -> np.ndarray:
    return torch.cat([value.flatten() for value in vector.values()]).double().numpy()


def rows(vectors: Sequence[Vector]) -> np.ndarray:
    return np.stack([flat(vector) for vector in vectors])


WEIGHTS = drawn(1, 99)[0]
EXAMPLES = [3.0, 5.0, 2.0, 7.0, 1.0]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("fedprox", {}), ("fedavgm", {"server_momentum": 0.0}), ("fednova", {}), ("fedgma", {"gma_threshold": 0.0}),
     ("fedbn", {})],
)  # fmt: skip
def test_limits_that_are_the_weighted_mean(name: str, changes: dict[str, object]) -> None:
    strategy, mean = made(name, **changes), made("fedavg")
    for seed in (1, 2):  # a second round, for what is kept between rounds
        vectors = drawn(5, seed)
        found = strategy.aggregate(WEIGHTS, replies(vectors, EXAMPLES, [4.0] * 5))
        expected = flat(mean.aggregate(WEIGHTS, replies(vectors, EXAMPLES)))
        np.testing.assert_allclose(expected, np.average(rows(vectors), axis=0, weights=EXAMPLES), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(flat(found), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("trimmed-mean", {"trimmed_share": 0.0}), ("cclip", {"clipping_radius": 1e6}), ("scaffold", {})],
)
def test_limits_that_are_the_mean_over_clients(name: str, changes: dict[str, object]) -> None:
    vectors = drawn(5)
    found = made(name, **changes).aggregate(WEIGHTS, replies(vectors, EXAMPLES))
    np.testing.assert_allclose(flat(found), rows(vectors).mean(0), rtol=1e-5, atol=1e-7)


def test_fednova_under_unequal_steps_is_the_hand_computation() -> None:
    first, second = {"w": torch.tensor([4.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}
    found = made("fednova").aggregate({"w": torch.zeros(2)}, replies([first, second], [1.0, 3.0], [4.0, 1.0]))
    # p = 1/4, 3/4; per step (1, 0) and (0, 2); mean steps 4/4 + 3/4 = 7/4: 7/4 (1/4 · (1, 0) + 3/4 · (0, 2))
    assert torch.allclose(found["w"], torch.tensor([7 / 16, 21 / 8]))


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.5, 40)), min_size=1, max_size=8), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_normalised_mean_is_the_formula(clients: list[tuple[int, float]], seed: int) -> None:
    vectors = drawn(len(clients), seed)
    weights, steps = (np.array(column, dtype=float) for column in zip(*clients, strict=True))
    found = made("fednova").aggregate(WEIGHTS, replies(vectors, weights.tolist(), steps.tolist()))
    p = weights / weights.sum()
    expected = (p * steps).sum() * ((p / steps)[:, None] * rows(vectors)).sum(0)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 12), st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.95]))
@settings(deadline=None)
def test_the_step_coefficients_of_sgd_add_up_to_fednovas_closed_form(steps: int, momentum: float) -> None:
    config = load(overrides={"momentum": momentum})
    expected = (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
    assert step_coefficient_sum(config, steps, 0.1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "changes",
    [{}, {"nesterov": True}, {"dampening": 0.5}, {"momentum": 0.0, "dampening": 0.5},
     {"proximal_mu": 0.5, "strategy": "fedprox"}],
    ids=str,
)  # fmt: skip
def test_the_step_coefficients_are_torchs_path_under_a_constant_gradient(changes: dict[str, object]) -> None:
    config, rate = from_mapping(changes), 0.1
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], rate, config.momentum, config.dampening, nesterov=config.nesterov)
    for _ in range(5):
        weight.grad = 1.0 + config.proximal_mu * weight.detach()
        optimizer.step()
    assert step_coefficient_sum(config, 5, rate) == pytest.approx(-weight.item() / rate, rel=1e-12)


@given(st.integers(1, 9), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_gradient_masked_averaging_is_the_formula(number: int, threshold: float, seed: int) -> None:
    vectors = drawn(number, seed)
    vectors[0]["b"].zero_()
    examples = [float(1 + client) for client in range(number)]
    points = rows(vectors)
    agreement = np.abs(np.sign(points).sum(0)) / number
    mask = np.where(agreement.astype(np.float32) >= np.float32(threshold), 1.0, agreement)
    found = made("fedgma", gma_threshold=threshold).aggregate(WEIGHTS, replies(vectors, examples))
    np.testing.assert_allclose(flat(found), mask * np.average(points, axis=0, weights=examples), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_adaptive_server_steps_are_algorithm_2_of_reddi_et_al(name: str) -> None:
    beta1, beta2, tau = 0.8, 0.95, 0.05
    strategy = made(name, server_beta1=beta1, server_beta2=beta2, server_tau=tau)
    first, second = np.zeros(17), np.full(17, tau**2)
    for seed in range(4):
        vectors = drawn(5, seed)
        delta = np.average(rows(vectors), axis=0, weights=EXAMPLES)
        first = beta1 * first + (1 - beta1) * delta
        adam = beta2 * second + (1 - beta2) * delta**2
        yogi = second - (1 - beta2) * delta**2 * np.sign(second - delta**2)
        second = adam if name == "fedadam" else yogi
        found = strategy.aggregate(WEIGHTS, replies(vectors, EXAMPLES))
        np.testing.assert_allclose(flat(found), first / (np.sqrt(second) + tau), rtol=1e-5, atol=1e-6)


def test_scaffold_moves_its_control_by_the_share_of_clients_sampled() -> None:
    strategy = made("scaffold", num_clients=10)
    first, second = drawn(5, 1), drawn(2, 2)
    strategy.aggregate(WEIGHTS, replies(first, EXAMPLES))
    strategy.aggregate(WEIGHTS, replies(second))
    expected = -rows(first).mean(0) * 5 / 10 - rows(second).mean(0) * 2 / 10
    np.testing.assert_allclose(flat(strategy.recalled("control", WEIGHTS)), expected, rtol=1e-5, atol=1e-7)


def test_clipping_may_start_from_the_last_result_and_choose_its_radius() -> None:
    vectors, later = drawn(5, 1), drawn(5, 2)
    strategy = made("cclip", clipping_start="previous", clipping_iterations=2)
    centre = np.zeros(17)
    for round_vectors in (vectors, later):
        points = rows(round_vectors)
        radius = np.median(np.linalg.norm(points - centre, axis=1))
        for _ in range(2):
            away = points - centre
            centre = centre + (away * np.minimum(1, radius / np.linalg.norm(away, axis=1))[:, None]).mean(0)
        found = strategy.aggregate(WEIGHTS, replies(round_vectors))
        np.testing.assert_allclose(flat(found), centre, rtol=1e-5, atol=1e-6)
    assert made("cclip").state() == {}, "from zero nothing is kept"


def test_fedvarp_is_its_recursion_and_with_everybody_the_mean() -> None:
    """Of five of eight clients a round; those that were never heard count as zero."""
    strategy, stored = made("fedvarp", num_clients=8), np.zeros((8, 17))
    luck = np.random.default_rng(1)
    for seed in range(4):
        clients, vectors = sorted(luck.choice(8, 5, replace=False)), drawn(5, seed)
        asked = [
            dataclasses.replace(reply, client=int(client))
            for client, reply in zip(clients, replies(vectors), strict=True)
        ]
        expected = (rows(vectors) - stored[clients]).mean(0) + stored.mean(0)
        np.testing.assert_allclose(flat(strategy.aggregate(WEIGHTS, asked)), expected, rtol=1e-4, atol=1e-5)
        stored[clients] = rows(vectors)
    everybody = made("fedvarp", num_clients=5)
    for seed in range(3):
        found = everybody.aggregate(WEIGHTS, replies(drawn(5, seed), EXAMPLES))
        np.testing.assert_allclose(flat(found), rows(drawn(5, seed)).mean(0), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 1000), st.integers(1, 6), st.floats(0, 10))
@settings(max_examples=20, deadline=None)
def test_fedexp_steps_by_its_formula_and_never_less_than_the_mean(seed: int, number: int, epsilon: float) -> None:
    vectors = drawn(number, seed)
    mean = rows(vectors).mean(0)
    step = max(1.0, (rows(vectors) ** 2).sum() / (2 * number * ((mean**2).sum() + epsilon)))
    found = made("fedexp", exp_epsilon=epsilon).aggregate(WEIGHTS, replies(vectors, [3.0] * number))
    np.testing.assert_allclose(flat(found), step * mean, rtol=1e-4, atol=1e-5)
    still = [{name: torch.zeros_like(value) for name, value in WEIGHTS.items()}]
    assert not flat(made("fedexp").aggregate(WEIGHTS, replies(still))).any()


OF_IMAGES = sorted(set(STRATEGIES) - {"fed-em"})
SPREADING = {"covariance", "covariance-momentum"}  # into entries that no client moved, unless projected on the mask
COORDINATE_WISE = sorted(set(OF_IMAGES) - {"cclip", "geometric-median", "krum", "fedexp"} - SPREADING)


@pytest.mark.parametrize("name", OF_IMAGES)
def test_under_a_mask_a_strategy_does_what_it_does_to_masked_dense_vectors(name: str) -> None:
    """Sparse = dense ⊙ mask, in every entry that is updated; in the others nothing moves."""
    generator = torch.Generator().manual_seed(5)
    mask = Mask({label: torch.rand(shape, generator=generator) < 0.4 for label, shape in SHAPES.items()})

    def close(whole: Vector, part: Vector) -> bool:
        return all(torch.allclose(value, part[label], rtol=1e-5, atol=1e-7) for label, value in whole.items())

    dense, unmasked, sparse, alone = (made(name) for _ in range(4))
    sparse.context = alone.context = RoundContext(mask=mask)
    for seed in (1, 2):
        vectors = drawn(5, seed)
        masked = [{label: value * mask.tensors[label] for label, value in vector.items()} for vector in vectors]
        entries = replies([mask.gather(each) for each in vectors], EXAMPLES, EXAMPLES)
        whole = dense.aggregate(WEIGHTS, replies(masked, EXAMPLES, EXAMPLES))
        assert close(mask.gather(whole), sparse.aggregate(mask.gather(WEIGHTS), entries))
        spread = name in SPREADING
        assert all(spread or not (value * ~mask.tensors[label]).any() for label, value in whole.items())
        if name in COORDINATE_WISE:  # then the other entries do not matter at all
            whole = unmasked.aggregate(WEIGHTS, replies(vectors, EXAMPLES, EXAMPLES))
            assert close(mask.gather(whole), alone.aggregate(mask.gather(WEIGHTS), entries))


@pytest.mark.parametrize("name", OF_IMAGES)
def test_replies_are_not_kept(name: str) -> None:
    buffer = {label: value.clone() for label, value in WEIGHTS.items()}

    def overwriting() -> Iterator[Reply]:
        for client, vector in enumerate(drawn(4, 3)):
            for label, value in vector.items():
                buffer[label].copy_(value)
            yield dataclasses.replace(replies([buffer])[0], client=client)

    found = made(name).aggregate(WEIGHTS, overwriting())
    expected = made(name).aggregate(WEIGHTS, replies(drawn(4, 3)))
    assert all(torch.equal(value, expected[label]) for label, value in found.items())


@pytest.mark.parametrize("name", OF_IMAGES)
def test_what_a_strategy_keeps_survives_a_checkpoint(name: str) -> None:
    def rounds(strategy: FedAvg, seeds: range) -> Vector:
        for seed in seeds:
            found = strategy.aggregate(WEIGHTS, replies(drawn(5, seed), EXAMPLES))
        return found

    whole, cut, resumed = (made(name, clipping_start="previous") for _ in range(3))
    expected = rounds(whole, range(4))
    rounds(cut, range(2))
    resumed.load_state({label: value.clone() for label, value in sorted(cut.state().items())})
    found = rounds(resumed, range(2, 4))
    assert all(torch.equal(value, found[label]) for label, value in expected.items())
    assert bool(whole.state()) == (
        name in {"fedavgm", "fedadam", "fedyogi", "scaffold", "cclip", "fedvarp", *SPREADING}
    )


# Flower's own classes, on the same replies


def by_flower(strategy: flower.FedAvg, rounds: Sequence[Sequence[Vector]]) -> np.ndarray:
    """The weights after rounds of clients that send θ + τ, as Flower's clients do."""
    ensure_run_identity()
    arrays = ArrayRecord({name: Array(value.numpy()) for name, value in WEIGHTS.items()})
    for number, vectors in enumerate(rounds, start=1):
        grid = SequentialGrid(lambda message, context: message, len(EXAMPLES))
        asked = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        messages = []
        for question, vector, count in zip(asked, vectors, EXAMPLES, strict=True):
            local = ArrayRecord({name: Array(arrays[name].numpy() + value.numpy()) for name, value in vector.items()})
            content = RecordDict({"arrays": local, "metrics": MetricRecord({"num-examples": int(count)})})
            messages.append(Message(content, reply_to=question))
        arrays, _ = strategy.aggregate_train(number, messages)
    return np.concatenate([array.numpy().ravel() for array in arrays.values()])


@pytest.mark.parametrize(
    ("theirs", "name", "changes"),
    [
        (flower.FedAvg, "fedavg", {}),
        (lambda: flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.9), "fedavgm", {"server_lr": 0.5}),
        (flower.FedMedian, "median", {}),
        (lambda: flower.FedTrimmedAvg(beta=0.2), "trimmed-mean", {"trimmed_share": 0.2}),
    ],
    ids=["fedavg", "fedavgm", "median", "trimmed-mean"],
)
def test_flowers_class_gives_the_same_numbers(
    theirs: Callable[[], flower.FedAvg], name: str, changes: dict[str, object]
) -> None:
    rounds = [drawn(5, seed) for seed in range(3)]
    ours, weights = made(name, **changes), flat(WEIGHTS)
    for vectors in rounds:
        weights = weights + ours.config.server_lr * flat(ours.aggregate(WEIGHTS, replies(vectors, EXAMPLES)))
    np.testing.assert_allclose(by_flower(theirs(), rounds), weights, rtol=1e-4, atol=1e-5)


def test_flowers_fedadam_is_not_the_papers() -> None:
    """Flower's corrects for bias, by powers of round + 1, and starts v at 0: so ours does not build on it."""
    vectors = drawn(5, 0)
    delta = np.average(rows(vectors), axis=0, weights=EXAMPLES)
    first, second = 0.1 * delta, 0.01 * delta**2
    theirs = by_flower(flower.FedAdam(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3), [vectors]) - flat(WEIGHTS)
    corrected = math.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    np.testing.assert_allclose(theirs, 0.1 * corrected * first / (np.sqrt(second) + 1e-3), rtol=1e-3, atol=1e-5)
    ours = 0.1 * flat(made("fedadam").aggregate(WEIGHTS, replies(vectors, EXAMPLES)))
    assert np.abs(ours / theirs).max() > 1.1
