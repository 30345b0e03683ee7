"""Evaluates a trained model on the test split: accuracy by class, confusion matrix, quality of its features."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib import pyplot
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.fields import kebab, rules, snake
from fl_taskarith.config.settings import Config, load
from fl_taskarith.errors import CheckpointError, ConfigError
from fl_taskarith.figures.plots import STYLE, save_figure
from fl_taskarith.models.backbone import HEAD_PARAMETERS, registered_name
from fl_taskarith.models.exported import exported_facts
from fl_taskarith.models.heads import RidgeSolver, RidgeStatistics, choose_strength
from fl_taskarith.models.weights import read_tensors
from fl_taskarith.storage.checkpoint import load_best, load_latest_checkpoint
from fl_taskarith.storage.csv_text import csv_text
from fl_taskarith.storage.files import make_folder, require_new, write_atomically
from fl_taskarith.storage.run_folder import best_row, model_file
from fl_taskarith.workspace.clusters import split_clusters
from fl_taskarith.workspace.global_model import Frozen, GlobalModel
from fl_taskarith.workspace.workspace import Workspace, workspace

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the k-NN classifier of DINO (Caron et al., ICCV 2021)
USED = (
    "data",
    "model",
    "machine",
)  # headings of the settings that an evaluation looks at, but for these, which it sets
FIXED: Mapping[str, Any] = {"prefix_cache": "off", "compile": "off"}
FILES = ("evaluation.json", "by-class.csv", "confusion.csv", "confusion.png", "confusion.pdf")
NUMBERED_CLASSES = 20  # up to here every cell of the figure has its number, and every class its name
QUERIES = 1024  # test examples that are compared with all training examples at once


@dataclass(frozen=True)
class Assessment:
    """What a model does on the test split.

    Attributes:
        confusion: [classes, classes], examples of each true class (rows) by predicted class.
        loss: mean cross-entropy in nats.
        knn, ridge: accuracies in [0, 1] of a k-NN classifier and of a ridge head on the model's features; None where
            they were not asked for.
    """

    confusion: Tensor
    loss: float
    knn: float | None = None
    ridge: float | None = None

    @property
    def accuracy(self) -> float:
        """The share of test examples that are classified rightly."""
        return int(self.confusion.diagonal().sum()) / int(self.confusion.sum())


def evaluate_run(
    source: Path,
    settings: Mapping[str, object] | None = None,
    output: Path | None = None,
    features: bool = True,
    overwrite: bool = False,
    best: bool = False,
) -> Path:
    """Evaluate the exported model of a run or, of an unfinished one, its last checkpoint; print and write what it does.

    Args:
        source: a run's folder, or a model.safetensors in one; any other file of weights in timm's layout needs the
            settings that say its model, input size and data set.
        settings: replace those of the run, for example {"test-subset": 1000}.
        output: folder to write to; by default `evaluation`, or `evaluation-best`, in the run's folder or beside the
            file.
        features: whether to measure k-NN and ridge accuracy, which need features of the whole training split.
        overwrite: whether files of these names in `output` may be replaced.
        best: whether to evaluate the run's best model on validation in place of the last one.

    Returns:
        The folder.

    Raises:
        ConfigError: the run has no single model of images, or the settings contradict.
        CheckpointError: the folder holds neither an exported model nor a checkpoint.
        WeightsError: a file does not fit the model.
    """
    if not source.exists():
        raise CheckpointError(f"There is no {source}: expected the folder of a run, or a file of weights.")
    if best and not source.is_dir():
        raise ConfigError(f"--best chooses between the models of a run: name its folder in place of {source}.")
    _refuse_idle(settings or {})
    folder = source if source.is_dir() else source.parent
    of_run = (folder / "run.json").exists()
    if source.is_dir() and not of_run:
        raise CheckpointError(f"{source} is no folder of a run: it has no run.json.")
    config = load(folder if of_run else None, settings)
    if config.dataset == REGRESSION:
        raise ConfigError("A run on regression data has no accuracy: fl-taskarith plot shows its distances.")
    of_best = best or source.name == model_file(best=True)
    target = output or folder / f"evaluation{'-best' if of_best else ''}"
    if output is not None:
        require_new([target / name for name in FILES], overwrite)
    export = source / model_file(best) if source.is_dir() else source
    if export.exists():  # it has all weights, so none are loaded or fetched that it replaces
        with contextlib.suppress(SafetensorError):  # of a .pth file, or a damaged one, which is told when it is read
            _check_model(export, exported_facts(export), config)
        config = replace(config, weights="none")
    else:
        _check_model(source, load(folder).to_run_config(), config)
    home = workspace(replace(config, **FIXED))
    origin = _load(home, export, source, best)
    found = assess(home, features)
    make_folder(target)
    _write(found, home, origin, target)
    for line in describe(found, home.data.dataset.classes, origin):
        print(line)
    return target


def assess(home: Workspace, features: bool) -> Assessment:
    """Measure the model that `home` holds, whose head's features are [n, width], on the test split."""
    head = home.model.get_parameter(HEAD_PARAMETERS[0]), home.model.get_parameter(HEAD_PARAMETERS[1])
    test = home.data.test
    with torch.no_grad():
        of_test = home.features(test)
        scores = functional.linear(of_test, *head)
        number = len(home.data.dataset.classes)
        cells = torch.bincount(test.labels * number + scores.argmax(1), minlength=number**2)
        confusion = cells.view(number, number).cpu()
        loss = functional.cross_entropy(scores, test.labels).item()
        if not features:
            return Assessment(confusion, loss)
        train, validation = home.data.train, home.data.validation
        of_train = home.features(train)
        knn = (nearest_classes(of_train, train.labels, of_test, number) == test.labels).double().mean().item()
        solver = RidgeSolver(RidgeStatistics.of(of_train, train.labels, number))
        chosen = choose_strength(solver, home.features(validation), validation.labels) if len(validation) else 1.0
        ridge = (solver.solve(chosen).scores(of_test).argmax(1) == test.labels).double().mean().item()
    return Assessment(confusion, loss, knn, ridge)


def nearest_classes(train: Tensor, labels: Tensor, queries: Tensor, classes: int) -> Tensor:
    """Return the class of each query by the votes of its nearest training examples, int64 [m].

    The k nearest by cosine vote with weight exp(cosine / 0.07), k = 20 or all if there are fewer (Caron et al., ICCV
    2021, whose evaluation of DINO does so).

    Args:
        train, labels: features [n, d] and classes int64 [n]. queries: features [m, d].
    """
    train, queries = functional.normalize(train, dim=1), functional.normalize(queries, dim=1)
    chosen = []
    for part in queries.split(QUERIES):
        cosines, nearest = (part @ train.T).topk(min(NEIGHBOURS, len(train)), dim=1)
        votes = torch.zeros(len(part), classes, device=train.device, dtype=train.dtype)
        votes.scatter_add_(1, labels[nearest], (cosines / TEMPERATURE).exp())
        chosen.append(votes.argmax(1))
    return torch.cat(chosen)


def describe(found: Assessment, classes: tuple[str, ...], origin: str) -> list[str]:
    """Return what is printed: accuracies, the classes that are told apart worst, and what they are taken for."""
    lines = [f"{origin}: test accuracy {100 * found.accuracy:.2f} %, cross-entropy {found.loss:.4f}"]
    if found.knn is not None and found.ridge is not None:
        lines.append(f"its features: k-NN {100 * found.knn:.2f} %, ridge head {100 * found.ridge:.2f} %")
    by_class = _by_class(found, classes)
    for row in sorted(by_class, key=lambda row: cast(float, row["accuracy"]))[:5]:
        mistaken = f", most often taken for {row['most_mistaken_for']}" if row["most_mistaken_for"] else ""
        lines.append(f"  {row['class']}: {100 * cast(float, row['accuracy']):.1f} % of {row['examples']}{mistaken}")
    return lines


def _refuse_idle(settings: Mapping[str, object]) -> None:
    known = {key: rules()[key] for key in map(kebab, settings) if key in rules()}
    if idle := sorted(key for key, rule in known.items() if rule.heading not in USED or snake(key) in FIXED):
        raise ConfigError(f"{', '.join(idle)}: no effect on an evaluation, leave out.")


def _check_model(source: Path, own: Mapping[str, object], config: Config) -> None:
    """Check `model` and `input-size` against what a file or a run says of its own, before anything is built."""
    named = registered_name(str(own.get("architecture", own.get("model", config.model))))
    architecture = named.partition(".")[0]
    size = str(own.get("input_size", own.get("input-size", config.input_size)))
    if (registered_name(config.model).partition(".")[0], str(config.input_size)) != (architecture, size):
        raise ConfigError(
            f"{source} holds a {architecture} at input-size = {size}, not {config.model} at {config.input_size}: give "
            f"model={architecture} input-size={size}, or leave both out for a run, which knows its own."
        )


def _load(home: Workspace, export: Path, source: Path, best: bool) -> str:
    """Load the weights in `export`, or else the checkpoint in `source`, into `home`; return what they are, in words."""
    if export.exists():
        tensors = read_tensors(export)
        wrong = [name for name, shape in home.shapes.items() if name not in tensors or tensors[name].shape != shape]
        if wrong:
            raise ConfigError(
                f"{export} does not fit {home.config.model} at input-size = {home.config.input_size} with "
                f"{len(home.data.dataset.classes)} classes: {', '.join(wrong[:3])} ({len(wrong)} tensors) differ. Give "
                "model, input-size and dataset as they were."
            )
        home.load({name: tensors[name] for name in home.shapes})
        return str(export)
    checkpoint = load_latest_checkpoint(source / "checkpoints")
    if checkpoint is not None and best:
        row = best_row(checkpoint.notes["rows"])
        checkpoint = None if row is None else load_best(source / "checkpoints", row["round"])
    if checkpoint is None:
        raise CheckpointError(
            f"{source} holds neither {model_file(best)} nor a checkpoint {'of it' if best else ''}: it ran with "
            f"save-model = false{', without validation images, or under a version that kept none' if best else ''}."
        )
    frozen = Frozen.of_tensors(checkpoint.frozen, home.shapes, home.device)
    trained = {name: value.to(home.device) for name, value in checkpoint.trained.items()}
    models = split_clusters(home.config, GlobalModel(trained, frozen))
    if len(models) > 1:
        raise ConfigError(
            f"The run has {len(models)} models, one per cluster: evaluate each model.safetensors of its own."
        )
    home.place(models[0])
    return f"{source}, round {checkpoint.round}"


def _by_class(found: Assessment, classes: tuple[str, ...]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for label, counts in enumerate(found.confusion.tolist()):
        number = sum(counts)
        wrong = [0 if other == label else each for other, each in enumerate(counts)]
        rows.append(
            {
                "class": classes[label],
                "examples": number,
                "accuracy": counts[label] / number if number else None,
                "most_mistaken_for": classes[wrong.index(max(wrong))] if any(wrong) else "",
            }
        )
    return [row for row in rows if row["examples"]]


def _write(found: Assessment, home: Workspace, origin: str, folder: Path) -> None:
    classes = home.data.dataset.classes
    facts: dict[str, Any] = {
        "model": origin, "dataset": home.config.dataset, "examples": int(found.confusion.sum()),
        "test_accuracy": found.accuracy, "test_loss": found.loss, "knn_accuracy": found.knn,
        "ridge_accuracy": found.ridge, "k": NEIGHBOURS,
    }  # fmt: skip
    write_atomically(folder / "evaluation.json", json.dumps(facts, indent=2) + "\n")
    write_atomically(folder / "by-class.csv", csv_text(_by_class(found, classes)))
    table = [{"true class": name} | dict(zip(classes, row, strict=True))
             for name, row in zip(classes, found.confusion.tolist(), strict=True)]  # fmt: skip
    write_atomically(folder / "confusion.csv", csv_text(table))
    _plot_confusion(found.confusion, classes, folder / "confusion")


def _plot_confusion(confusion: Tensor, classes: tuple[str, ...], output: Path) -> None:
    """Draw the share of each true class by predicted class, from `confusion` [classes, classes]."""
    shares = 100 * confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    few = len(classes) <= NUMBERED_CLASSES
    side = 1.6 + 0.36 * len(classes) if few else 6.0
    with pyplot.rc_context(cast(Any, STYLE | {"axes.grid": False})):
        figure, axes = pyplot.subplots(figsize=(side + 0.8, side), layout="constrained")
        image = axes.imshow(shares.numpy(), vmin=0, vmax=100, cmap="cividis")
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        if few:
            axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
            axes.set_yticks(range(len(classes)), classes)
            for row, column in shares.nonzero().tolist():
                share = shares[row, column].item()
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7,
                          color="w" if share < 50 else "k")  # fmt: skip
        figure.colorbar(image, ax=axes, label="share of the true class (%)")
        save_figure(figure, output)
