"""Learning rates that validation chose before: what `learning-rate = "auto"` stands for.

`learning_rates.toml` holds them, each with the file of the search that chose it. Between its cells the rate is that of
the nearest one with a smaller rate: more skewed data, more weights, more blocks. What no cell covers is refused.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.fields import STRATEGIES, snake
from fl_taskarith.config.rule import AUTO
from fl_taskarith.config.settings import Config
from fl_taskarith.config.toml import read_toml
from fl_taskarith.data.datasets import image_source, training_images
from fl_taskarith.errors import ConfigError
from fl_taskarith.storage.paths import shipped_file

IID = "iid"
FEDAVG_LIKE = frozenset(STRATEGIES) - {"fed-em"}  # whose clients take FedAvg's steps
SUMMING = (
    "covariance",
    "covariance-momentum",
    "merge-rule",
    "fedexp",
)  # whose step is up to the sum of the clients' own
REMEMBERING = ("fedavgm", "covariance-momentum", "ghbm", "local-ghbm", "fedhbm", "fedcm")  # by server-momentum
ADAPTIVE = ("fedadam", "fedyogi")  # whose server takes steps of server-lr in every entry
ADAPTIVE_STEP = 0.01  # the largest server-lr of theirs that was tried and did not collapse
CLIENTS, MOMENTUM = 10, 0.9  # of the runs that the table is from
LOCAL_STEPS = {4: 1.0, 8: 0.316, 16: 0.1}  # J up to: factor on the rate of J = 4


@dataclass(frozen=True)
class Cell:
    """A row of learning_rates.toml.

    Attributes:
        dataset, model: what was trained on; the model may hold *.
        rule, density: the mask; "none" has density 1.
        rates: by the number of classes that a client holds, "iid" for all of them.
        source: the file, in the project's repository, of the search that chose them on validation.
        batch_size, examples: of the local steps, and per client.
        blocks: the last so many were trained; 0 for all.
        trainable, head, loss, strategy: settings of those names; "clients" stands for every strategy that has clients,
            and "ridge" for every solved head.
    """

    dataset: str
    model: str
    rule: str
    density: float
    rates: Mapping[str, float]
    source: str
    batch_size: int
    examples: int
    blocks: int = 0
    trainable: str = "backbone"
    head: str = "ridge"
    loss: str = "cross-entropy"
    strategy: str = "clients"

    def covers(self, config: Config) -> bool:
        """Whether runs of `config` can be trained at the rates of this cell: those of all weights do for any mask."""
        blocks = config.trainable_blocks if config.trainable != "head" else 0
        own = config.mask_rule if _has_density(config) else "file"
        return (
            self.dataset == config.dataset
            and fnmatch.fnmatchcase(config.model, self.model)
            and self.trainable == config.trainable
            and self.head == ("ridge" if config.solved else config.head)
            # A second term of the loss and its gradient are zero at first: the rates are the cross-entropy's.
            and (self.loss == "squared") == (config.local_loss == "squared")
            and self.strategy == ("centralized" if config.strategy == "centralized" else "clients")
            and (self.rule == "none" or (self.rule == own and self.density >= config.density))
            and (not self.blocks or 0 < blocks <= self.blocks)
        )


@dataclass(frozen=True)
class KnownRate:
    """A rate and where it is from: `cell`, at `classes` per client, times `factor`; `head` is that of the run."""

    cell: Cell = field(repr=False)
    classes: str
    factor: float
    head: str = "ridge"

    @property
    def rate(self) -> float:
        """The rate, rounded to three digits."""
        return float(f"{self.cell.rates[self.classes] * self.factor:.3g}")

    def describe(self) -> str:
        """Return a line for the log."""
        cell = self.cell
        mask = "all weights" if cell.rule == "none" else f"{cell.rule}, density {cell.density:g}"
        what = {"head": "the head alone", "all": f"{mask}, and the head"}.get(cell.trainable, mask)
        data = (
            "centralized" if cell.strategy == "centralized" else IID if self.classes == IID else f"Nc = {self.classes}"
        )
        blocks = f"last {cell.blocks} blocks, " if cell.blocks else ""
        lowered = f", times {self.factor:.3g} for J, the batch, the clients, their examples or the server's step"
        return (
            f"learning-rate = {self.rate:g}: validation chose {cell.rates[self.classes]:g} for {what}, {blocks}{data} "
            f"({cell.source}){lowered if self.factor < 1 else ''}"
            f"{'' if self.head == cell.head else f', under a {cell.head} head'}"
        )


def with_known_rate(config: Config) -> tuple[Config, KnownRate | None]:
    """Replace a learning rate of "auto" by a number; return the configuration, and where such a rate is from.

    Raises:
        ConfigError: no rate is known for it; says how to have validation choose one.
    """
    if config.learning_rate != AUTO:
        return config, None
    if config.strategy == "fed-em":  # takes no steps
        return dataclasses.replace(config, learning_rate=1.0), None
    if config.strategy in ADAPTIVE and config.server_lr > ADAPTIVE_STEP:
        raise ConfigError(
            f'server-lr = {config.server_lr:g} is the size of every step that strategy = "{config.strategy}" takes, '
            f"whatever the learning rate of the clients, and no larger one than {ADAPTIVE_STEP:g} is known not to "
            f"collapse: set server-lr = {ADAPTIVE_STEP:g} or less, or give learning-rate = NUMBER."
        )
    known = known_rate(config)
    if known is None:
        raise ConfigError(
            f'learning-rate = "auto": no rate is known for {_words(config)}. Have validation choose one, with the same '
            "settings: fl-taskarith search [CONF.toml] key=value ..., or give learning-rate = NUMBER."
        )
    return dataclasses.replace(config, learning_rate=known.rate), known


def search_from(config: Config) -> float:
    """Return the lowest rate of a search of four decades: two decades below a known one, else by the mask."""
    known = known_rate(config)
    if known is not None:
        return float(10.0 ** (math.floor(math.log10(known.rate)) - 2))
    return 1e-6 if config.mask_rule == "none" else 1e-4


def known_rate(config: Config) -> KnownRate | None:
    """Return the rate of the cell that is nearest to `config` among those that cover it; None without one."""
    if (
        config.dataset == REGRESSION
        or config.weights == "none"
        or config.strategy not in (*FEDAVG_LIKE, "centralized")
        or config.task_vector_bank != "off"
        or config.head_rounds
    ):
        return None
    held = classes_held(config)
    fitting = [
        (cell, max(below, key=_count))
        for cell in table()
        if cell.covers(config) and (below := [name for name in cell.rates if _count(name) <= held])
    ]
    if not fitting:
        return None
    cell, classes = min(fitting, key=lambda pair: (pair[0].density, pair[0].blocks or math.inf, -_count(pair[1])))
    known = KnownRate(cell, classes, _factor(config, cell), config.head)
    return known if known.rate else None


def classes_held(config: Config) -> float:
    """Return the classes per client; infinite where data are not divided by class.

    Under Dirichlet shares q ~ Dir(α p) over c classes of equal size: (α + 1) / (α / c + 1), the inverse of E Σ q².
    """
    if config.strategy == "centralized" or config.sharding == IID:
        return math.inf
    number = image_source(config.dataset).classes
    if config.sharding == "classes":
        return math.inf if config.classes_per_client == number else config.classes_per_client
    return (config.dirichlet_alpha + 1) / (config.dirichlet_alpha / number + 1)


@lru_cache
def table() -> tuple[Cell, ...]:
    """Read all cells of learning_rates.toml."""
    return tuple(
        Cell(**{snake(key): value for key, value in (group | row).items() if key != "cell"})
        for group in read_toml(shipped_file("server/learning_rates.toml"))["group"]
        for row in group["cell"]
    )


def _has_density(config: Config) -> bool:
    """Whether `density` says what share of the weights the mask updates, and its rule which ones."""
    return not config.sensitivity_threshold and config.mask_source != "own"


def _count(classes: str) -> float:
    return math.inf if classes == IID else int(classes)


def _factor(config: Config, cell: Cell) -> float:
    """Return a factor, at most 1, on the cell's rate for what makes a step larger or noisier than in its runs."""
    factor = min(1.0, config.batch_size / cell.batch_size) * min(1.0, (1 - config.momentum) / (1 - MOMENTUM))
    if config.strategy == "centralized":
        return factor
    steps = max(config.local_steps, config.local_steps_max)
    factor *= next((value for most, value in LOCAL_STEPS.items() if steps <= most), 0.1 * 16 / steps)
    shard = training_images(config) / config.num_clients  # a smaller one is gone through more often in a round
    factor *= min(1.0, shard / cell.examples)
    averaged = 1 if config.strategy == "krum" else config.sampled_clients  # krum follows one client
    factor *= min(1.0, averaged / CLIENTS)
    if config.strategy in ADAPTIVE:
        return factor
    if config.strategy in SUMMING:
        factor /= config.sampled_clients
    memory = 1 - config.server_momentum if config.strategy in REMEMBERING else 1.0
    return factor * min(1.0, memory / config.server_lr)


def _words(config: Config) -> str:
    """Name the settings that decide a rate."""
    mask = config.mask_rule if config.mask_rule == "none" else f"{config.mask_rule} at density {config.density:g}"
    return (
        f"{config.dataset}, {config.model}, trainable = {config.trainable}, head = {config.head}, mask-rule = {mask}, "
        f"strategy = {config.strategy}"
    )
