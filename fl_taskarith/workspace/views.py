"""Groups of clients whose images differ, and the Byzantine ones among clients: what IFCA and robust rules are about.

Client j belongs to group j mod G. What a client sees of an image depends on its group alone.
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


def _inverted(images: Tensor) -> Tensor:
    return 255 - images


VIEWS: dict[str, tuple[View, ...]] = {
    "none": (_same,),
    "half-turn": (_same, _rotated(2)),
    "rotations": (_same, _rotated(1), _rotated(2), _rotated(3)),
    "inverted": (_same, _inverted),
}


def views(config: Config, examples: ImageSet) -> list[ImageSet]:
    """`examples` as each group sees them."""
    if config.client_groups == "none":
        return [examples]
    return [ImageSet(view(examples.images), examples.labels) for view in VIEWS[config.client_groups]]


def group_of(config: Config, partition: int) -> int:
    """The group of a client."""
    return partition % len(VIEWS[config.client_groups])


def as_seen_by(config: Config, partition: int, examples: ImageSet) -> ImageSet:
    """`examples` of a client's shard as the client sees them."""
    if config.client_groups == "none":
        return examples
    return ImageSet(VIEWS[config.client_groups][group_of(config, partition)](examples.images), examples.labels)


def as_trained_on(config: Config, partition: int, examples: ImageSet, classes: int) -> ImageSet:
    """The same in local training: a Byzantine client under "random-labels" draws its labels, once for all rounds."""
    seen = as_seen_by(config, partition, examples)
    if config.attack != "random-labels" or not byzantine_clients(config)[partition]:
        return seen
    drawn = random_generator(config.seed, "byzantine labels", client=partition).integers(0, classes, len(seen))
    return ImageSet(seen.images, torch.from_numpy(drawn).to(seen.labels))


@lru_cache(maxsize=1)
def byzantine_clients(config: Config) -> np.ndarray:
    """Which clients are Byzantine, bool [K]: ⌊α · size⌋ of every group, or of every cluster of regression data."""
    if config.dataset == REGRESSION:
        groups = mixture_of(config).assignment.numpy()
    else:
        groups = np.arange(config.num_clients) % len(VIEWS[config.client_groups])
    return draw_byzantine(groups, config.byzantine_fraction, config.seed)


def pooled(config: Config, examples: ImageSet) -> ImageSet:
    """`examples` as all groups see them, for choices of the server that are to suit every client."""
    seen = views(config, examples)
    if len(seen) == 1:
        return examples
    return ImageSet(torch.cat([each.images for each in seen]), torch.cat([each.labels for each in seen]))
