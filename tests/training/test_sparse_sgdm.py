"""SparseSGDM: torch's SGD on the unmasked entries, and nothing at all on the others."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fl_taskarith.masking.mask import Mask
from fl_taskarith.training.sparse_sgdm import SparseSGDM, in_every_client

SHAPES = {"weight": (7, 5), "bias": (11,), "scalar": ()}

SETTINGS = st.fixed_dictionaries(
    {
        "momentum": st.sampled_from([0.0, 0.5, 0.9]),
        "weight_decay": st.sampled_from([0.0, 1e-3, 0.3]),
        "dampening": st.sampled_from([0.0, 0.4]),
        "nesterov": st.booleans(),
        "foreach": st.sampled_from([None, False, True]),
        "fused": st.sampled_from([None, True]),
    }
).filter(
    lambda chosen: (
        (not chosen["nesterov"] or (chosen["momentum"] > 0 and chosen["dampening"] == 0))
        and not (chosen["foreach"] and chosen["fused"])
    )
)


def parameters(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(seed: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def random_masks(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed + 77)
    return {name: torch.rand(shape, generator=generator) < 0.4 for name, shape in SHAPES.items()}


def step(optimizer: torch.optim.Optimizer, of: dict[str, nn.Parameter], with_gradients: dict[str, Tensor]) -> None:
    for name, parameter in of.items():
        parameter.grad = with_gradients[name].clone()
    optimizer.step()


@given(SETTINGS, st.integers(0, 1000), st.booleans())
@settings(max_examples=60, deadline=None)
def test_under_a_full_mask_it_is_torchs_sgd_to_the_bit(chosen: dict, seed: int, masked: bool) -> None:
    ours, theirs = parameters(seed), parameters(seed)
    full = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()} if masked else None
    sparse = SparseSGDM(ours.items(), 0.1, masks=full, **chosen)
    dense = torch.optim.SGD(theirs.values(), 0.1, **chosen)
    for number in range(12):
        step(sparse, ours, gradients(seed, number))
        step(dense, theirs, gradients(seed, number))
        for name in SHAPES:
            assert torch.equal(ours[name], theirs[name]), name


@given(SETTINGS, st.integers(0, 1000), st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
@settings(max_examples=60, deadline=None)
def test_masked_entries_keep_their_bits_and_poison_nothing(chosen: dict, seed: int, poison: float) -> None:
    """Unmasked entries follow torch's SGD; masked ones do not move, whatever their gradients hold."""
    ours, theirs, masks = parameters(seed), parameters(seed), random_masks(seed)
    start = {name: value.detach().clone() for name, value in ours.items()}
    sparse = SparseSGDM(ours.items(), 0.1, masks=masks, **chosen)
    dense = torch.optim.SGD(theirs.values(), 0.1, **chosen)
    for number in range(6):
        sound = gradients(seed, number)
        step(sparse, ours, {name: value.where(masks[name], poison) for name, value in sound.items()})
        step(dense, theirs, sound)
    for name, mask in masks.items():
        assert torch.equal(ours[name][~mask], start[name][~mask]), name
        assert torch.allclose(ours[name][mask], theirs[name][mask], rtol=1e-5, atol=1e-6), name


def test_against_the_update_written_out() -> None:
    """One entry, three Nesterov steps with weight decay, by hand in Python floats."""
    weight = nn.Parameter(torch.tensor([2.0, 5.0], dtype=torch.float64))
    mask = torch.tensor([True, False])
    optimizer = SparseSGDM([("w", weight)], 0.1, masks={"w": mask}, momentum=0.9, weight_decay=0.01, nesterov=True)
    expected, buffer = 2.0, None
    for gradient in (1.0, -3.0, 0.5):
        weight.grad = torch.tensor([gradient, math.nan], dtype=torch.float64)
        optimizer.step()
        g = gradient + 0.01 * expected
        buffer = g if buffer is None else 0.9 * buffer + g
        expected -= 0.1 * (g + 0.9 * buffer)
    assert weight.tolist() == pytest.approx([expected, 5.0], rel=1e-12)


@given(SETTINGS, st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_a_state_dict_carries_momentum_and_mask(chosen: dict, seed: int) -> None:
    whole, masks = parameters(seed), random_masks(seed)
    optimizer = SparseSGDM(whole.items(), 0.1, masks=masks, **chosen)
    for number in range(3):
        step(optimizer, whole, gradients(seed, number))

    resumed = {name: nn.Parameter(value.detach().clone()) for name, value in whole.items()}
    other = SparseSGDM(resumed.items(), 0.5, masks=random_masks(seed + 1))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors of a state_dict
    for number in range(3, 6):
        step(optimizer, whole, gradients(seed, number))
        step(other, resumed, gradients(seed, number))
    for name in SHAPES:
        assert torch.equal(whole[name], resumed[name]), name


def test_momentum_is_kept_for_unmasked_entries_only() -> None:
    of, masks = parameters(0), random_masks(0)
    optimizer = SparseSGDM(of.items(), 0.1, masks=masks, momentum=0.9)
    step(optimizer, of, gradients(0, 0))
    for name, mask in masks.items():
        kept = optimizer.state[of[name]].get("momentum_buffer")
        assert (0 if kept is None else kept.numel()) == int(mask.sum())


@pytest.mark.parametrize("limit", [0.5, 1e3], ids=["clipped", "within the limit"])
def test_clipping_sees_the_unmasked_entries_only(limit: float) -> None:
    ours, theirs, masks = parameters(1), parameters(1), random_masks(1)
    sparse = SparseSGDM(ours.items(), 0.1, masks=masks, clip_norm=limit)
    dense = torch.optim.SGD(theirs.values(), 0.1)
    huge = {name: value.where(masks[name], 1e20) for name, value in gradients(1, 0).items()}
    step(sparse, ours, huge)
    for name, parameter in theirs.items():
        parameter.grad = gradients(1, 0)[name].where(masks[name], 0.0)
    nn.utils.clip_grad_norm_(theirs.values(), limit)
    dense.step()
    for name in SHAPES:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("clients", [0, 3])
def test_gradients_of_masked_entries_become_zero_and_others_stay(clients: int) -> None:
    """However the parameter's gradient lies in memory."""
    weight, mask = torch.randn(4, 5), torch.rand(4, 5) < 0.5
    if clients:
        together = {"w": nn.Parameter(weight.expand(clients, 4, 5).contiguous())}
        rows = in_every_client(Mask({"w": mask}), together)
        optimizer = SparseSGDM(together.items(), 0.1, indices=rows, clients=clients)
    else:
        together = {"w": nn.Parameter(weight)}
        optimizer = SparseSGDM(together.items(), 0.1, masks={"w": mask})
    gradient = torch.randn(together["w"].shape).mT.contiguous().mT
    together["w"].grad = gradient.where(mask, math.inf)
    optimizer.zero_masked_gradients()
    assert torch.equal(together["w"].grad, gradient.where(mask, 0.0))


@given(SETTINGS, st.integers(0, 1000), st.booleans(), st.sampled_from([0.0, 0.5]))
@settings(max_examples=40, deadline=None)
def test_several_clients_step_as_each_would_and_leave_out_steps_of_their_own(
    chosen: dict, seed: int, masked: bool, clip_norm: float
) -> None:
    clients, steps = 3, 4
    masks = Mask(random_masks(seed) if masked else {name: torch.ones(shape).bool() for name, shape in SHAPES.items()})
    alone = [parameters(seed + client) for client in range(clients)]
    together = {name: nn.Parameter(torch.stack([each[name].detach() for each in alone])) for name in SHAPES}
    rows = in_every_client(masks, together) if masked else None
    ours = SparseSGDM(together.items(), 0.1, indices=rows, clip_norm=clip_norm, clients=clients, **chosen)
    theirs = [SparseSGDM(each.items(), 0.1, masks=masks.tensors, clip_norm=clip_norm, **chosen) for each in alone]
    pattern = torch.rand(steps, clients, generator=torch.Generator().manual_seed(seed)) < 0.6
    for number, takes_part in enumerate(pattern):
        given_now = [gradients(seed + client, number) for client in range(clients)]
        for client in range(clients):
            if takes_part[client]:
                step(theirs[client], alone[client], given_now[client])
            else:
                given_now[client] = {name: torch.full(shape, math.nan) for name, shape in SHAPES.items()}
        ours.takes_part = takes_part
        step(ours, together, {name: torch.stack([each[name] for each in given_now]) for name in SHAPES})
    for name, value in together.items():
        for client in range(clients):
            torch.testing.assert_close(value[client], alone[client][name], rtol=1e-5, atol=1e-6, msg=name)


def test_indices_given_are_the_masks_own() -> None:
    ours, theirs, masks = parameters(2), parameters(2), random_masks(2)
    indices = {name: mask.flatten().nonzero().flatten() for name, mask in masks.items() if mask.any()}
    first = SparseSGDM(ours.items(), 0.1, masks=masks, momentum=0.9)
    second = SparseSGDM(theirs.items(), 0.1, masks=masks, indices=indices, momentum=0.9)
    for number in range(3):
        step(first, ours, gradients(2, number))
        step(second, theirs, gradients(2, number))
    for name in SHAPES:
        assert torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize(
    ("masks", "problem"),
    [({"weight": torch.ones(7, 5)}, r"mask of weight is torch.float32"),
     ({"weight": torch.ones(5, 7, dtype=torch.bool)}, r"mask of weight .*\(5, 7\).*\(7, 5\)"),
     ({}, "weight has no mask")],
)  # fmt: skip
def test_a_wrong_mask_is_an_error_that_names_the_parameter(masks: dict[str, Tensor], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        SparseSGDM([("weight", nn.Parameter(torch.zeros(7, 5)))], 0.1, masks=masks)


def test_no_parameter_can_be_added_without_a_mask() -> None:
    of = parameters(0)
    optimizer = SparseSGDM(of.items(), 0.1, masks=random_masks(0))
    with pytest.raises(ValueError, match="one group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_a_closure_is_evaluated_with_gradients() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = SparseSGDM([("w", weight)], 0.5)

    def closure() -> Tensor:
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 1.0
    assert weight.item() == 0.0
