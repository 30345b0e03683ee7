"""A run from its configuration to its results folder."""

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid
from tqdm import tqdm

from fl_taskarith.client.cohort import train_together
from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.settings import Config
from fl_taskarith.data.class_assignment import describe_spread, least_spread
from fl_taskarith.data.datasets import image_source
from fl_taskarith.engine.grid import PartitionGrid
from fl_taskarith.engine.sequential import ClientCallable, SequentialGrid
from fl_taskarith.engine.supernodes import SuperNodeGrid
from fl_taskarith.errors import FlTaskarithError
from fl_taskarith.merging.merge_rules import find_rule
from fl_taskarith.server.centralized import CentralizedRun
from fl_taskarith.server.course import verdict
from fl_taskarith.server.federated import FederatedRun
from fl_taskarith.server.history import History
from fl_taskarith.server.interruption import stop_if_asked
from fl_taskarith.server.learning_rates import KnownRate, with_known_rate
from fl_taskarith.server.regression_run import MixtureRun, describe_mixture
from fl_taskarith.server.round_zero_cache import Starts
from fl_taskarith.server.run import Progress, Run
from fl_taskarith.server.speed import Speed, device_line, speed_of, work_of
from fl_taskarith.storage.checkpoint import Checkpoint
from fl_taskarith.storage.folder_choice import require_folder
from fl_taskarith.storage.own_modules import OWN_MODULES, own_modules
from fl_taskarith.storage.progress import duration, in_notebook
from fl_taskarith.storage.run_folder import PRETRAINED, Logbook
from fl_taskarith.storage.run_log import RUN_LOG, RunLog, lasting_output
from fl_taskarith.storage.trackers import require_trackers
from fl_taskarith.strategies import strategy_class
from fl_taskarith.workspace.machine import available_threads, describe_device, emulated, on_this_machine
from fl_taskarith.workspace.make_mask import eligible
from fl_taskarith.workspace.workspace import Workspace, workspace

log = logging.getLogger("fl_taskarith")

GLANCE, MEASUREMENT = 0.2, 20.0  # seconds for which the speed of every run, and of a long one, is measured
LONG = 60.0  # seconds of work from which a run is long


def run_federation(
    config: Config,
    client_app: ClientCallable,
    grid: Grid | None = None,
    progress: Progress | None = None,
    deadline: float | None = None,
    starts: Starts | None = None,
) -> History:
    """Run or continue what `config` describes, and draw its curves.

    Args:
        client_app: the Flower ClientApp; called in this process by the sequential engine.
        grid: Flower's own Grid, needed by engine = "flower" only.
        progress: called with (round, last round, row) after each round.
        deadline: time (of time.time) from which the run stops after its round, with a checkpoint.
        starts: results of round 0 of the caller's earlier runs; None to compute all of it.

    Raises:
        FlTaskarithError: with the cause, in the user's terms; the results so far stay in the folder.
    """
    show_log()
    with lasting_output(), RunLog() as printed:
        require_trackers(config)
        require_own(config)
        config, speed, known = _resolved(config)
        require_folder(config)
        seconds = _measured_duration(config, speed) if starts is None else 0.0
        # Every process of the run, Ray's actors among them, computes with the same number of threads, stated here.
        shared = dataclasses.replace(config, threads=config.threads or available_threads())
        torch.set_num_threads(shared.threads)
        home = workspace(shared) if shared.dataset != REGRESSION else None
        # Among the facts are the shards: an infeasible request fails here, before a folder is made.
        facts = describe(home) if home is not None else describe_mixture(shared)
        with Logbook(config) as logbook:
            printed.open(logbook.folder / RUN_LOG)
            log.info("Results: %s", logbook.folder)
            _announce_duration(config.num_rounds, logbook.restored, seconds)
            if shards := facts.get("shards"):
                log.info("Shards: %s", _describe_shards(shards))
            if known is not None:
                logbook.note(learning_rate_source=known.describe())
            logbook.note_start(threads=shared.threads, **facts, **_own_facts(shared, home))
            if home is not None:
                run = make_run(shared, home, logbook, progress, client_app, grid)
                run.deadline = deadline
                run.starts = starts or run.starts
                run.execute()
            else:
                engine = _choose_engine(shared, client_app, grid)
                mixture = MixtureRun(shared, logbook, progress, engine, strategy_class(shared.strategy))
                mixture.deadline = deadline
                mixture.execute()
            if config.draw_curves:
                draw_curves(logbook.folder)
        log.info("Finished: %s", logbook.rounds_csv)
        for line in verdict(logbook.rows, config, logbook.folder):
            log.info("%s", line)
    stop_if_asked("Stopped after the last round: the run is finished.")
    return History(logbook.folder, logbook.rows)


def require_own(config: Config) -> None:
    """Check that what settings name as "module:name" can be imported and is what it should be.

    Raises:
        ConfigError: one is not.
    """
    config.require_own_rule()
    if config.strategy != "centralized":
        strategy_class(config.strategy)
    if config.dataset != REGRESSION:
        image_source(config.dataset)
    if config.strategy == "merge-rule":
        find_rule(config.merge_rule)


def _own_facts(config: Config, home: Workspace | None) -> dict[str, dict[str, str]]:
    """Return checksums of the user's own modules, and of the examples of a data set of theirs, where there are any."""
    own = own_modules(config)
    if home is not None and "dataset" in own:
        own["examples"] = home.data.sha256
    return {OWN_MODULES: own} if own else {}


def _resolved(config: Config) -> tuple[Config, Speed | None, KnownRate | None]:
    """Resolve "auto" for the machine and the rate; return the configuration, its speed, and the source of such a rate.

    Log the device and its speed, and what this machine emulates.
    """
    here = on_this_machine(config)
    speed = speed_of(here, GLANCE)  # before the rate: of a model that does not exist no rate is known
    here, known = with_known_rate(here)
    log.info("%s", device_line(here, speed))
    for sentence in emulated(here):
        log.warning("%s", sentence)
    if known is not None:
        log.info("%s", known.describe())
    return here, speed, known


def _measured_duration(config: Config, speed: Speed | None) -> float:
    """Return the seconds of all rounds of a run; 0 where they are not measured. A long run is measured well."""
    work = work_of(config)
    if work is None or speed is None or work.seconds(speed) <= LONG:
        return 0.0 if work is None or speed is None else work.seconds(speed)
    measured = speed_of(config, MEASUREMENT)
    return 0.0 if measured is None else work.seconds(measured)


def _announce_duration(rounds: int, restored: Checkpoint | None, seconds: float) -> None:
    """Log how long a long run takes, or any in a notebook, of which what is left where it goes on."""
    left = rounds - (0 if restored is None else restored.round)
    if seconds * left / rounds > (0 if in_notebook() else LONG):
        which = f"All {rounds} rounds" if left == rounds else f"The {left} rounds that are left"
        log.info("%s take about %s here.", which, duration(seconds * left / rounds))


def make_run(
    config: Config,
    home: Workspace,
    logbook: Logbook,
    progress: Progress | None,
    client_app: ClientCallable,
    grid: Grid | None = None,
) -> Run:
    """Return the run of `config` over its data and model: federated on its engine, or centralized."""
    if config.strategy == "centralized":
        return CentralizedRun(config, home, logbook, progress)
    return FederatedRun(config, home, logbook, progress, _choose_engine(config, client_app, grid))


def describe(home: Workspace) -> dict[str, dict[str, int] | str]:
    """Return facts about a run for run.json: device, numbers of parameters, examples and shard sizes.

    Raises:
        ConfigError: shards or a mask as asked for cannot be.
    """
    if home.config.masked and home.config.num_rounds > home.config.head_rounds:
        eligible(home)
    trained = home.trained_names(home.config.num_rounds)
    facts: dict[str, dict[str, int] | str] = {
        "device": describe_device(home.device),
        PRETRAINED: home.pretrained_sha256,
        "parameters": {
            "total": sum(parameter.numel() for parameter in home.parameters.values()),
            "trained": sum(home.parameters[name].numel() for name in trained),
        },
        "data": {split: len(getattr(home.data, split)) for split in ("train", "validation", "calibration", "test")},
    }
    if home.config.strategy != "centralized":
        sizes = [len(shard) for shard in home.shards]
        shards = {"clients": len(sizes), "smallest": min(sizes), "largest": max(sizes)}
        if home.config.sharding == "classes" and shards["largest"] > shards["smallest"] + 1:
            counts = home.data.train.labels.unique(return_counts=True)[1].cpu().numpy()
            shards["least_spread"] = least_spread(counts, len(sizes), home.config.classes_per_client)
        facts["shards"] = shards
    return facts


def _describe_shards(shards: Any) -> str:
    """Describe the shard sizes, and whether they could be closer where they differ by more than 1."""
    words = "{clients} clients with {smallest} to {largest} examples each".format(**shards)
    if "least_spread" not in shards:
        return words
    return f"{words}; {describe_spread(shards['largest'] - shards['smallest'], shards['least_spread'])}"


def show_log() -> None:
    """Send our log to standard output, where `flwr run --stream` and notebooks show it; once per process.

    Flower's log then shows an error of ours as one line.
    """
    if not log.handlers:
        log.addHandler(_Printer())
        log.setLevel(logging.INFO)
        log.propagate = False
        logging.getLogger("flwr").addFilter(_OneLine())


class _OneLine(logging.Filter):
    """A filter that puts an error of ours in place of its traceback, which says nothing about what to do."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, FlTaskarithError):
            record.msg, record.args, record.exc_info = "%s: %s", (type(error).__name__, error), None
        return True


class _Printer(logging.Handler):
    """A handler that prints to whatever standard output is at the time: Flower and notebooks replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "unprinted", False):
            tqdm.write(self.format(record))
            sys.stdout.flush()


def _choose_engine(config: Config, client_app: ClientCallable, grid: Grid | None) -> PartitionGrid:
    if config.engine == "sequential":
        together = train_together if config.dataset != REGRESSION and config.at_once != 1 else None
        return SequentialGrid(client_app, config.num_clients, together, config.at_once)
    if grid is None:
        raise ValueError('engine = "flower" needs the Grid of a Flower run')
    return SuperNodeGrid(grid, config)


def draw_curves(folder: Path) -> None:
    """Draw curves.png and curves.pdf in a run's folder."""
    from fl_taskarith.figures.plots import course_figure, save_figure
    from fl_taskarith.figures.run_groups import read_run

    save_figure(course_figure(read_run(folder)), folder / "curves")
