"""Shows which client owns how many examples of each class: printed, as CSV, and as a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

from fl_taskarith.config.settings import Config
from fl_taskarith.data.class_assignment import describe_spread, least_spread
from fl_taskarith.data.sharding import make_shards
from fl_taskarith.errors import ConfigError
from fl_taskarith.figures.plots import STYLE, save_figure
from fl_taskarith.figures.setting_words import sharding_words
from fl_taskarith.storage.csv_text import csv_text
from fl_taskarith.storage.files import make_folder, require_new, write_atomically
from fl_taskarith.storage.folder_choice import sharding_name
from fl_taskarith.storage.paths import resolve, results_root
from fl_taskarith.storage.run_log import RUN_LOG, recorded
from fl_taskarith.workspace.workspace import load_data

PRINTED_CLIENTS = 20
PRINTED_CLASSES = 12  # wider tables do not fit a terminal: then the largest classes of each client are named
LARGEST_CLASSES = 5
TICKED_CLASSES = 20  # up to here every class has its name on the axis


def show_shards(config: Config, output: Path | None = None, overwrite: bool = False) -> Path:
    """Print the histogram of the shards that a run of `config` uses; write histogram.csv, .png and .pdf.

    Args:
        output: folder to write to; by default shards/DATASET-SHARDING-kK-sSEED in the results, replacing what is there.
        overwrite: whether files of these names in `output` may be replaced.

    Returns:
        The folder.

    Raises:
        ConfigError: the shards are arithmetically impossible, there are no clients, or `output` has such files.
        DataError: the data set is not to be had.
        CheckpointError: a file cannot be written.
    """
    if config.strategy == "centralized":
        raise ConfigError('strategy = "centralized" has no clients, and so no shards.')
    if output is not None:
        require_new([output / f"histogram.{ending}" for ending in ("csv", "png", "pdf")], overwrite)
    counts, classes = class_histogram(config)
    name = f"{config.dataset.rpartition(':')[2]}-{sharding_name(config)}-k{config.num_clients}-s{config.shard_seed}"
    folder = output or results_root(config.results_dir) / "shards" / name
    make_folder(folder)
    words = sharding_words(config.to_run_config())
    title = f"{config.dataset}, {words}, K = {config.num_clients}, shard seed {config.shard_seed}"
    with recorded(folder / RUN_LOG):
        print(title, *describe_histogram(counts, classes), sep="\n")
        if config.sharding == "classes" and (spread := int(np.ptp(counts.sum(1)))) > 1:
            of_class = counts.sum(0)[counts.any(0)]
            least = least_spread(of_class, config.num_clients, config.classes_per_client)
            print(f"examples per client: {describe_spread(spread, least)}")
        lines = [{"client": client, "examples": sum(row), **dict(zip(classes, row, strict=True))}
                 for client, row in enumerate(counts.tolist())]  # fmt: skip
        write_atomically(folder / "histogram.csv", csv_text(lines))
        for path in (folder / "histogram.csv", *plot_histogram(counts, classes, title, folder / "histogram")):
            print(path)
    return folder


def class_histogram(config: Config) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the examples of each class that each client owns, int64 [K, classes], and the names of the classes.

    Raises:
        DataError: the data set is not to be had.
        ConfigError: the shards are arithmetically impossible.
    """
    sizes = (config.calibration_size, config.validation_size, config.train_subset, config.test_subset)
    data = load_data(config.dataset, resolve(config.data_dir, "data-dir"), config.download, sizes, torch.device("cpu"))
    labels = data.train.labels.numpy()
    shards = make_shards(
        labels,
        config.num_clients,
        config.sharding,
        config.classes_per_client,
        config.shard_seed,
        config.dirichlet_alpha,
    )
    classes = data.dataset.classes
    return np.stack([np.bincount(labels[shard], minlength=len(classes)) for shard in shards]), classes


def describe_histogram(counts: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Return sizes, classes per client, owners per class and distance from the whole; then a line per client.

    Args:
        counts: examples of each class that each client owns, int64 [K, classes].
        classes: the names of the classes.
    """
    sizes, present = counts.sum(1), counts > 0
    shares, whole = counts / sizes[:, None], counts.sum(0) / counts.sum()
    distance = np.abs(shares - whole).sum(1).mean() / 2
    lines = [
        f"examples per client {sizes.min()} to {sizes.max()}, classes per client {_range(present.sum(1))}, "
        f"owners per class {_range(present.sum(0))}",
        f"mean total variation distance of a client's class shares from those of all data: {distance:.3f} "
        "(0 = the same, 1 = nothing in common)",
    ]
    if len(classes) <= PRINTED_CLASSES:
        width = max(5, *(len(name) + 1 for name in classes))
        lines.append("client  examples" + "".join(f"{name:>{width}}" for name in classes))
        cells = ["".join(f"{count or '.':>{width}}" for count in row) for row in counts[:PRINTED_CLIENTS]]
    else:
        lines.append(f"client  examples  classes: the {LARGEST_CLASSES} largest")
        cells = [f"  {_largest(row, classes)}" for row in counts[:PRINTED_CLIENTS]]
    lines += [f"{client:>6}  {sizes[client]:>8}{cell}" for client, cell in enumerate(cells)]
    left = len(counts) - len(cells)
    return [*lines, f"... and {left} more clients"] if left else lines


def plot_histogram(counts: np.ndarray, classes: Sequence[str], title: str, output: Path) -> list[Path]:
    """Draw clients × classes, darker for more examples and white for none; writes output.png and output.pdf.

    Args:
        counts: examples of each class that each client owns, int64 [K, classes].
        classes: the names of the classes.

    Raises:
        CheckpointError: a file cannot be written.
    """
    shown = np.ma.masked_equal(counts, 0)
    height = min(8.0, max(2.4, 0.075 * len(counts) + 1.0))
    with pyplot.rc_context(cast(Any, STYLE | {"axes.grid": False})):
        figure, axes = pyplot.subplots(figsize=(min(7.2, 2.0 + 0.23 * len(classes)), height), layout="constrained")
        # one hue from light to dark: told apart by every eye, and in grey print
        image = axes.imshow(shown, cmap="Blues", vmin=-0.15 * counts.max(), aspect="auto", interpolation="nearest")
        axes.set_xlabel("class")
        axes.set_ylabel("client")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(classes) <= TICKED_CLASSES:
            long = max(map(len, classes)) > 2
            axes.set_xticks(range(len(classes)), classes, rotation=90 if long else 0)
        bar = figure.colorbar(image, ax=axes, label="examples", boundaries=None)
        bar.ax.set_ylim(0, counts.max())
        axes.set_title(title, fontsize=9, wrap=True)
        return save_figure(figure, output)


def _range(values: np.ndarray) -> str:
    return f"{values.min()} to {values.max()} (mean {values.mean():.1f})"


def _largest(row: np.ndarray, classes: Sequence[str]) -> str:
    order = [label for label in np.argsort(-row, kind="stable")[:LARGEST_CLASSES] if row[label]]
    return f"{int((row > 0).sum())}: " + ", ".join(f"{classes[label]} {row[label]}" for label in order)
