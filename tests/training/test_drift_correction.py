"""FedProx's and SCAFFOLD's terms in a client's gradients, and what SCAFFOLD's control variates come to."""

import pytest
import torch
from torch import Tensor, nn

from fl_taskarith.config.settings import load
from fl_taskarith.training.corrections import control_change, control_shift, correct_gradients
from fl_taskarith.training.schedules import step_coefficient_sum
from fl_taskarith.training.sparse_sgdm import SparseSGDM, sgdm

Vector = dict[str, Tensor]


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in (("a", (3, 2)), ("b", (4,)))}


def loss_of(weights: dict[str, nn.Parameter]) -> Tensor:
    return sum(value.pow(4).sum() + (value * torch.arange(value.numel()).view_as(value)).sum()
               for value in weights.values())  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
def test_the_terms_are_those_of_the_loss_written_out(masked: bool) -> None:
    """Against autograd on F(θ) + (μ/2)‖θ − θ_t‖² + ⟨θ, shift⟩, and with NaN where nothing may look."""
    mu, generator = 0.3, torch.Generator().manual_seed(1)
    ours, plain = parameters(), parameters()
    start = {name: value.detach().clone() for name, value in plain.items()}
    shift = {name: torch.randn(value.shape, generator=generator) for name, value in start.items()}
    masks = {name: torch.rand(value.shape, generator=generator) < 0.5 for name, value in start.items()}
    indices = {name: mask.flatten().nonzero().flatten() for name, mask in masks.items()} if masked else None

    def entries(tensors: Vector) -> Vector:
        return tensors if indices is None else {name: tensors[name].flatten()[at] for name, at in indices.items()}

    optimizer = SparseSGDM(ours.items(), 0.01, masks=masks if masked else None, momentum=0.9)
    correct_gradients(optimizer, ours, indices, start=entries(start), proximal_mu=mu, shift=entries(shift))
    reference = SparseSGDM(plain.items(), 0.01, masks=masks if masked else None, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(ours).backward()
        if masked:
            for name, value in ours.items():
                value.grad[~masks[name]] = torch.nan
        optimizer.step()
        reference.zero_grad()
        pull = sum((value - start[name]).square().sum() for name, value in plain.items())
        tilt = sum((value * shift[name]).sum() for name, value in plain.items())
        (loss_of(plain) + mu / 2 * pull + tilt).backward()
        reference.step()
    for name, value in ours.items():
        assert torch.allclose(value, plain[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, start[name])


@pytest.mark.parametrize(
    "changes", [{"momentum": 0.0}, {}, {"nesterov": True}, {"weight_decay": 0.1}], ids=lambda changes: str(changes)
)
def test_the_new_control_is_the_clients_own_mean_gradient(changes: dict[str, object]) -> None:
    """Option II: whatever c and c_k were, c_k⁺ is the mean of the gradients on the way, weighted as the steps are."""
    config, rate, steps = load(overrides=changes), 0.05, 4
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    start, control, own = weight.detach().clone(), torch.tensor([0.3, -0.1]), torch.tensor([-0.2, 0.5])
    optimizer = sgdm([("w", weight)], config, rate)
    shift = control_shift({"w": control}, {"w": own})
    correct_gradients(optimizer, {"w": weight}, None, start={"w": start}, shift=shift)
    gradients = []
    for step in range(steps):
        gradients.append(torch.tensor([1.0 + step, 2.0 - step]) + config.weight_decay * weight.detach())
        weight.grad = torch.tensor([1.0 + step, 2.0 - step])
        optimizer.step()
    coefficients = step_coefficient_sum(config, steps, rate)
    change = control_change({"w": control}, {"w": weight.detach() - start}, rate * coefficients)
    # a_j: how far the weights go for one unit of the gradient of step j
    single = [step_coefficient_sum(config, steps - step, rate) for step in range(steps)] + [0.0]
    a = torch.tensor([single[step] - single[step + 1] for step in range(steps)])
    expected = (a[:, None] * torch.stack(gradients)).sum(0) / a.sum()
    assert torch.allclose(own + change["w"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mu", [0.0, 0.5, 7.0])
@pytest.mark.parametrize("settings", [{"momentum": 0.0}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True},
                                      {"momentum": 0.5, "dampening": 0.3}])  # fmt: skip
def test_a_step_counts_by_how_far_its_gradient_moves_the_weights(settings: dict[str, float], mu: float) -> None:
    """Against the optimizer, given a gradient of 1 in one step at a time. At μ = 7 the pull overshoots the start."""
    rate, steps = 0.3, 5
    config = load(overrides={"strategy": "fedprox", "proximal_mu": mu, "schedule": "constant", **settings})

    def moved(pushed: int) -> float:
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = sgdm([("w", weight)], config, rate)
        for step in range(steps):
            weight.grad = float(step == pushed) + mu * weight.detach()
            optimizer.step()
        return float(weight) / rate

    expected = sum(abs(moved(step)) for step in range(steps))
    assert step_coefficient_sum(config, steps, rate) == pytest.approx(expected, rel=1e-12)


def test_a_client_without_a_control_has_a_zero_one() -> None:
    assert torch.equal(control_shift({"w": torch.ones(2)}, {})["w"], torch.ones(2))


def test_scaffold_finds_the_optimum_that_averaging_misses() -> None:
    """Two clients with quadratics of unequal curvature: many local steps bias FedAvg, not SCAFFOLD."""
    curvatures, centres = (1.0, 10.0), (0.0, 1.0)
    optimum = sum(c * x for c, x in zip(curvatures, centres, strict=True)) / sum(curvatures)
    config, rate, steps = load(overrides={"momentum": 0.0}), 0.05, 10

    def end(with_control: bool) -> float:
        point, control, own = torch.zeros(1), torch.zeros(1), [torch.zeros(1), torch.zeros(1)]
        for _ in range(300):
            moves, changes = [], []
            for client in (0, 1):
                weight = nn.Parameter(point.clone())
                optimizer = sgdm([("w", weight)], config, rate)
                if with_control:
                    correct_gradients(optimizer, {"w": weight}, None, start={"w": point},
                                      shift=control_shift({"w": control}, {"w": own[client]}))  # fmt: skip
                for _ in range(steps):
                    weight.grad = curvatures[client] * (weight.detach() - centres[client])
                    optimizer.step()
                moves.append(weight.detach() - point)
                changes.append(control_change({"w": control}, {"w": moves[-1]}, rate * steps)["w"])
                own[client] = own[client] + changes[-1]
            point = point + sum(moves) / 2
            control = control + sum(changes) / 2
        return point.item()

    assert end(with_control=True) == pytest.approx(optimum, abs=1e-4)
    assert abs(end(with_control=False) - optimum) > 0.05
