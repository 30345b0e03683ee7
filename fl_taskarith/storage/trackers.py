"""Rows of a run to TensorBoard and Weights & Biases, where settings ask for it. rounds.csv stays the source of truth.

Whatever a tracker holds follows from the rows: a resumed run hands over those it restored, so that a point that was
lost, or logged after the last checkpoint and then computed again, is there once.
"""

import importlib
import secrets
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ConfigError
from fl_taskarith.storage.files import write_atomically

PROJECT = "fl-taskarith"
MODULES = {  # setting: module to import, and what installs it
    "tensorboard": (
        "torch.utils.tensorboard",
        'pip install tensorboard (in the checkout: pip install -e ".[tracking]")',
    ),
    "wandb": ("wandb", "pip install wandb"),
}


class TensorBoard:
    """Scalars against the round, in the folder `tensorboard` of the run."""

    def __init__(self, folder: Path) -> None:
        target = folder / "tensorboard"
        for events in target.glob("events.out.tfevents.*"):  # from before: the restored rows are written again
            events.unlink()
        self._writer = _import("tensorboard").SummaryWriter(str(target))

    def log(self, row: dict[str, Any]) -> None:
        """Add a point per measured column."""
        for name, value in _measured(row).items():
            self._writer.add_scalar(name, value, row["round"])
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """One W&B run per run folder, continued under the id in its file `wandb-id`; the step is the round.

    W&B cannot take a step back, so a step that it already has is not sent again: it would be the same numbers.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        wandb = _import("wandb")
        kept = folder / "wandb-id"
        if not kept.exists():
            write_atomically(kept, secrets.token_hex(8) + "\n")
        try:
            identity = {"name": folder.name, "id": kept.read_text(encoding="utf-8").strip(), "dir": str(folder)}
            self._run = wandb.init(project=PROJECT, resume="allow", config=config.to_run_config(), **identity)
        except Exception as error:  # no login, no connection, ...
            raise ConfigError(
                f"wandb = true, and Weights & Biases did not start ({error}): run wandb login, set WANDB_MODE=offline "
                "in the environment, or set wandb = false."
            ) from error
        self._first_step = self._run.starting_step

    def log(self, row: dict[str, Any]) -> None:
        """Send a row as a step."""
        if row["round"] >= self._first_step:
            self._run.log(_measured(row), step=row["round"])

    def close(self, failed: bool) -> None:
        """Upload what is left."""
        self._run.finish(exit_code=int(failed))


Tracker = TensorBoard | WeightsAndBiases
"""Receives every row once, in order, under the names of the columns of rounds.csv; `close` says that none follows."""


def require_trackers(config: Config) -> None:
    """Fail before any work if a tracker that is asked for is not installed.

    Raises:
        ConfigError: names the setting and the command that installs what it needs.
    """
    for setting, (_, command) in MODULES.items():
        if getattr(config, setting):
            try:
                _import(setting)
            except ImportError as error:
                raise ConfigError(f"{setting} = true needs a package that is missing ({error}): {command}.") from error


def open_trackers(config: Config, folder: Path, rows: Sequence[dict[str, Any]]) -> list[Tracker]:
    """Return the trackers that `config` asks for, each with `rows`, those of rounds.csv so far."""
    trackers: list[Tracker] = [TensorBoard(folder)] if config.tensorboard else []
    trackers += [WeightsAndBiases(folder, config)] if config.wandb else []
    for tracker in trackers:
        for row in rows:
            tracker.log(row)
    return trackers


def _import(setting: str) -> ModuleType:
    return importlib.import_module(MODULES[setting][0])


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "round" and value is not None}
