"""Merging T fine-tuned models at once: one round of federated averaging, with the remedies of both fields.

θ = θ₀ + λ · direction(τ_1, ..., τ_T). A rule takes a sequence of task vectors and looks tensors up one name at a time,
so a task vector may read itself from a file: memory is T tensors of one name and one direction. As in Tao et al. (arXiv
2411.18607) task arithmetic, FedGMA and CCLIP are sums, and so are DARE and Breadcrumbs here: without a search they are
taken at λ = 1/T, all other rules at λ = 1.

To add a rule, put a file with a function under `@merge_rule` into `merging/rules/`, or name one as "module:function".
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fl_taskarith.errors import ConfigError, imported, own_code
from fl_taskarith.merging.aggregate import checked_direction
from fl_taskarith.merging.robust import TaskVectors, names_of, stacked

Direction = dict[str, Tensor]

SCALES = tuple(round(0.05 * step, 2) for step in range(1, 41))  # λ searched: 0.05, 0.10, ..., 2.0


@dataclass(frozen=True)
class MergeRule:
    """A row of the table of merge rules.

    Attributes:
        name: on the command line and in files.
        function: from task vectors, and from those of its own parameter, `steps` (‖a‖₁ or local steps of each model)
            and `seed` that its signature has, to the direction.
        about: what it does, in a line. source: the paper.
        parameter: its hyper-parameter's name, "" if it has none. meaning: that one's, in a line.
        values: those searched, or a function that gives them for the task vectors.
        scaled: whether λ is searched; otherwise it is 1.
        summed: whether it is a plain sum of (treated) task vectors, whose λ is 1/T without a search.
        needs_base: False if moving all models by the same vector moves the merged one by it too, so that θ₀ cancels.
        streams: whether the direction follows from sums over the task vectors, which need not be at hand all at once.
        matrices: whether it merges each matrix as a whole. Under a mask the entries outside are then zeros that go in,
            and what comes out there is dropped; other rules see the updated entries alone.
    """

    name: str
    function: Callable[..., Direction]
    about: str
    source: str = ""
    parameter: str = ""
    meaning: str = ""
    values: Sequence[float] | Callable[[TaskVectors], Sequence[float]] = ()
    scaled: bool = True
    summed: bool = False
    needs_base: bool = True
    streams: bool = False
    matrices: bool = False

    def __call__(self, task_vectors: TaskVectors, *arguments: object, **named: object) -> Direction:
        """Return the direction, each tensor in the shape that the task vectors have it."""
        return self.function(task_vectors, *arguments, **named)

    def takes(self, argument: str) -> bool:
        """Return whether the function has this argument."""
        return argument in inspect.signature(self.function).parameters

    def direction(self, task_vectors: TaskVectors, value: float | None, steps: Sequence[float], seed: int) -> Direction:
        """Return the direction at `value` of the parameter, if there is one, in the shapes of the task vectors.

        Raises:
            ValueError: an argument is out of range, or the task vectors do not match.
            ConfigError: a rule of one's own raised, or returned something else.
        """
        given = {self.parameter: value, "steps": steps, "seed": seed}
        taken = {name: each for name, each in given.items() if self.takes(name)}
        if ":" not in self.name:
            return self.function(task_vectors, **taken)
        with own_code("merge-rule", self.name):
            direction = self.function(task_vectors, **taken)
        return checked_direction(direction, task_vectors[0], f'merge-rule = "{self.name}"')

    def searched(self, task_vectors: TaskVectors) -> list[float | None]:
        """Return the values of the parameter to try; [None] without a parameter. Tensors of any shapes."""
        values = self.values(task_vectors) if callable(self.values) else self.values
        return list(values) if self.parameter else [None]

    def row(self) -> str:
        """Return its row of the table in this folder's README.md."""
        options = [f"`--{self.parameter}`"] if self.parameter else []
        options += [f"`--{name}`" for name in ("steps", "seed") if self.takes(name)]
        cells = (f"`{self.name}`", self.about, self.source, ", ".join(options), "yes" if self.streams else "",
                 "whole matrices, projected" if self.matrices else "its entries")  # fmt: skip
        return f"| {' | '.join(cells)} |"

    def default_scale(self, number: int) -> float:
        """Return the λ taken where none is given: 1/T for the rules that are `summed`, 1 for the others."""
        return 1 / number if self.summed else 1.0


def merge_rule(name: str, about: str, **facts: object) -> Callable[[Callable[..., Direction]], MergeRule]:
    """Return a decorator that makes a function from task vectors to a direction a `MergeRule` with these attributes."""
    return lambda function: MergeRule(name, function, about, **facts)  # type: ignore[arg-type]


@cache
def merge_rules() -> dict[str, MergeRule]:
    """Return every rule in the files of `merging/rules/` by its name, in the order of files and lines."""
    folder = importlib.import_module("fl_taskarith.merging.rules")  # whose files import this one
    names = [f"{folder.__name__}.{each.name}" for each in pkgutil.iter_modules(folder.__path__)]
    modules = [importlib.import_module(name) for name in names]
    return {rule.name: rule for module in modules for rule in vars(module).values() if isinstance(rule, MergeRule)}


def find_rule(name: str) -> MergeRule:
    """Return the rule of this name, or the function that "module:function" names; undecorated, it takes no parameter.

    Raises:
        ConfigError: there is none.
    """
    if name in merge_rules():
        return merge_rules()[name]
    rule = imported("merge-rule", name) if ":" in name else None
    if isinstance(rule, MergeRule):
        return dataclasses.replace(rule, name=name)
    if callable(rule):
        return MergeRule(name, rule, (rule.__doc__ or "a function of your own").partition("\n")[0])
    raise ConfigError(
        f'"{name}" is no merge rule: expected one of {", ".join(merge_rules())}, or "module:function" of your own.'
    )


def by_name(task_vectors: TaskVectors, combine: Callable[[str, Tensor], Tensor]) -> Direction:
    """Return `combine(name, rows)` for the rows [T, ...] that the task vectors have under each name.

    Raises:
        ValueError: no task vectors, or they differ in names or shapes.
    """
    return {name: combine(name, stacked(task_vectors, name)) for name in names_of(task_vectors)}


def scaled_weights(weights: Mapping[str, Tensor], direction: Mapping[str, Tensor], scale: float) -> Direction:
    """Return θ₀ + λ · direction, computed in the direction's dtype and returned in θ₀'s, in the same shapes."""
    return {
        name: torch.add(weights[name].to(value), value, alpha=scale).to(weights[name])
        for name, value in direction.items()
    }
