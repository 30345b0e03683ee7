"""A whole federation in one process: the function a notebook cell calls, and what `fl-taskarith simulate` runs."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm.auto import tqdm

from fl_taskarith.client.app import app as client_app
from fl_taskarith.config import settings as configuration
from fl_taskarith.config.effects import refuse_idle
from fl_taskarith.config.fields import kebab
from fl_taskarith.config.rule import shown
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ConfigError
from fl_taskarith.server.history import History
from fl_taskarith.server.launch import run_federation, show_log
from fl_taskarith.server.learning_rates import with_known_rate
from fl_taskarith.server.round_zero_cache import Starts
from fl_taskarith.server.run import Progress, describe_round
from fl_taskarith.storage.folder_choice import finished_run
from fl_taskarith.storage.paths import conf_file
from fl_taskarith.storage.progress import is_watched
from fl_taskarith.storage.run_folder import Row
from fl_taskarith.workspace.machine import available_threads, choose_device, on_this_machine

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

log = logging.getLogger("fl_taskarith")


def simulate(
    conf: Path | str | Config | None = None,
    *,
    if_finished: Literal["load", "new", "error"] = "load",
    deadline: float | None = None,
    starts: Starts | None = None,
    **overrides: object,
) -> History:
    """Run the app that `flwr run .` runs, in this process, with a progress bar.

    For example `simulate("fedavg-noniid", classes_per_client=5)`. The same call goes on with a run that was cut. With
    engine = "flower" the clients run in Ray actors that Flower starts, as many SuperNodes as clients.

    Args:
        conf: a TOML file of settings or its name below conf/, or a Config, or None for the defaults (the quick start).
        if_finished: what to do where a run of these settings is finished: "load" returns it, "new" runs it again in
            another folder, as resume = False does, and "error" raises a ConfigError.
        deadline: time (of time.time) from which the run stops after its round, with a checkpoint.
        starts: results of round 0 of the caller's earlier runs, so that runs of one search do not compute them again.
        overrides: settings by their Python names.

    Raises:
        BudgetSpent: at the deadline; the same call continues the run.
        FlTaskarithError: anything the user can mend; the run's folder keeps what was done.
    """
    if if_finished not in (choices := ("load", "new", "error")):
        raise ConfigError(f"if_finished = {shown(if_finished)} is not accepted: expected one of {', '.join(choices)}.")
    if deadline is not None and not (isinstance(deadline, (int, float)) and deadline == deadline):
        raise ConfigError(f"deadline = {shown(deadline)} is not accepted: expected a time of time.time(), in seconds.")
    if isinstance(conf, Config):
        given = {kebab(key): value for key, value in overrides.items()}
        config = configuration.from_mapping(conf.to_run_config() | given)
        refuse_idle(config, given)
    else:
        config = configuration.load(conf_file(conf) if isinstance(conf, str | Path) else conf, overrides)
    if config.resume and if_finished != "new" and (folder := _finished(config)) is not None:
        if if_finished == "error":
            raise ConfigError(f'A run of these settings is finished: {folder}. Load it, or set if_finished to "new".')
        show_log()
        log.info("Loaded, for it is finished: %s. With resume = false it runs again, in another folder.", folder)
        return History.load(folder)
    with _ProgressBar() as bar:
        if config.engine == "sequential":
            return run_federation(config, client_app, progress=bar.show, deadline=deadline, starts=starts)
        return _run_on_ray(config, bar.show, deadline, starts)


def _finished(config: Config) -> Path | None:
    """Return the folder of the finished run of these settings; None without one, or where they cannot run at all."""
    try:
        return finished_run(with_known_rate(on_this_machine(config))[0])
    except ConfigError:  # of which the run itself says more
        return None


def _run_on_ray(config: Config, progress: Progress, deadline: float | None, starts: Starts | None) -> History:
    """The same on Flower's simulation engine, in one actor that has all cores: clients take turns."""
    histories: list[History] = []

    def work(grid: "Grid") -> None:
        histories.append(run_federation(config, client_app, grid, progress, deadline, starts))

    cores = available_threads()
    on_gpu = choose_device(config.device).type == "cuda"
    on_ray(work, client_app, config.num_clients, cores, {"num_cpus": cores, "num_gpus": 1.0 if on_gpu else 0.0})
    return histories[0]


def on_ray(
    work: Callable[["Grid"], None], app: "ClientApp", clients: int, cores: int, client_resources: Mapping[str, float]
) -> None:
    """Call `work` as the ServerApp of a Flower simulation; what it raises is raised here.

    Args:
        clients: virtual clients, each of which runs `app`.
        cores: that Ray may use.
        client_resources: num_cpus and num_gpus of an actor, which runs one client at a time.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        work(grid)

    run_simulation(
        server_app,
        app,
        num_supernodes=clients,
        backend_config={"init_args": {"num_cpus": cores}, "client_resources": {**client_resources}},
    )


class _ProgressBar:
    """tqdm on a terminal or in a notebook; a line per round anywhere else."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None
        self._shown = is_watched()

    def __enter__(self) -> "_ProgressBar":
        return self

    def show(self, server_round: int, num_rounds: int, row: Row) -> None:
        if not self._shown:
            print(describe_round(row, num_rounds), flush=True)
            return
        if self._bar is None:
            self._bar = tqdm(total=num_rounds, initial=server_round, unit="round")
        self._bar.n = server_round
        measured = {name: f"{row[name]:.4f}" for name in ("train_loss", "val_accuracy", "test_accuracy")
                    if row.get(name) is not None}  # fmt: skip
        if "test_accuracy" in measured:
            self._bar.set_postfix(measured, refresh=False)
        self._bar.refresh()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
