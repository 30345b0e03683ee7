"""Groups of clients that see images differently, and the Byzantine clients: the setting of IFCA and robust rules.

Client j belongs to group j mod G. How a client sees an image depends on its group alone.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.settings import Config
from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.merging.attacks import draw_byzantine
from fl_taskarith.seeding import random_generator
from fl_taskarith.workspace.regression_data import mixture_of

View = Callable[[Tensor], Tensor]
"""uint8 [N, C, H, W] to the same shape: how a group sees images."""


def _rotated(quarters: int) -> View:
    return lambda images: torch.rot90(images, quarters, (-2, -1))


def _same(images: Tensor) -> Tensor:
    return images


VIEWS: dict[str, tuple[View, ...]] = {
    "none": (_same,),
    "half-turn": (_same, _rotated(2)),
    "rotations": (_same, _rotated(1), _rotated(2), _rotated(3)),
    "inverted": (_same, lambda images: 255 - images),
}


def views(config: Config, examples: ImageSet) -> list[ImageSet]:
    """Return `examples`, images [n, C, H, W], as each group sees them."""
    return [_seen(examples, view) for view in VIEWS[config.client_groups]]


def group_of(config: Config, partition: int) -> int:
    """Return the group of a client."""
    return partition % len(VIEWS[config.client_groups])


def as_seen_by(config: Config, partition: int, examples: ImageSet) -> ImageSet:
    """Return `examples`, images [n, C, H, W], as a client sees them."""
    return _seen(examples, VIEWS[config.client_groups][group_of(config, partition)])


def _seen(examples: ImageSet, view: View) -> ImageSet:
    return examples if view is _same else ImageSet(view(examples.images), examples.labels)


def as_trained_on(config: Config, partition: int, examples: ImageSet, classes: int) -> ImageSet:
    """Return `examples`, images [n, C, H, W], as a client trains on them.

    A Byzantine client under "random-labels" draws its labels from `classes`, once for all rounds.
    """
    seen = as_seen_by(config, partition, examples)
    if config.attack != "random-labels" or not byzantine_clients(config)[partition]:
        return seen
    drawn = random_generator(config.seed, "byzantine labels", client=partition).integers(0, classes, len(seen))
    return ImageSet(seen.images, torch.from_numpy(drawn).to(seen.labels))


@lru_cache(maxsize=1)
def byzantine_clients(config: Config) -> np.ndarray:
    """Return which clients are Byzantine, bool [K]: ⌊α · size⌋ of every group, or cluster of regression data."""
    if config.dataset == REGRESSION:
        groups = mixture_of(config).assignment.numpy()
    else:
        groups = np.arange(config.num_clients) % len(VIEWS[config.client_groups])
    return draw_byzantine(groups, config.byzantine_fraction, config.seed)


def pooled(config: Config, examples: ImageSet) -> ImageSet:
    """Return `examples`, images [n, C, H, W], as all groups see them, one after the other, for the server."""
    seen = views(config, examples)
    if len(seen) == 1:
        return examples
    return ImageSet(torch.cat([each.images for each in seen]), torch.cat([each.labels for each in seen]))
