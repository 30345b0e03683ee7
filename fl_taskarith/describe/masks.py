"""Makes the mask that a run would use, without the run; and describes masks in files, side by side."""

import dataclasses
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_taskarith.client.app import app as client_app
from fl_taskarith.config.fields import SENSITIVITY_RULES
from fl_taskarith.config.settings import Config
from fl_taskarith.describe.mask_plots import plot_anatomy
from fl_taskarith.describe.mask_report import anatomy_table, overlap_table, read_mask, summarise
from fl_taskarith.describe.sensitivity_plot import describe_sensitivity, plot_sensitivity, scores_by_kind, zero_lines
from fl_taskarith.errors import ConfigError
from fl_taskarith.masking.calibration import Sums
from fl_taskarith.masking.mask import Mask, between_pairs, chance_overlap, jaccard_matrix
from fl_taskarith.server.launch import describe, make_run, show_log
from fl_taskarith.server.learning_rates import with_known_rate
from fl_taskarith.storage.files import (
    make_folder,
    remove_leftovers,
    require_new,
    require_writable,
    scratch_folder,
    write_atomically,
)
from fl_taskarith.storage.paths import resolve, results_root
from fl_taskarith.storage.run_folder import Logbook
from fl_taskarith.storage.run_log import RUN_LOG, recorded
from fl_taskarith.workspace.global_model import Weights
from fl_taskarith.workspace.machine import available_threads, on_this_machine
from fl_taskarith.workspace.make_mask import make_mask, shard_sums
from fl_taskarith.workspace.workspace import Workspace, workspace

MASK, SUMMARY = "mask.safetensors", "summary.json"

log = logging.getLogger(__name__)


def make_masks(config: Config, output: Path | None = None, clients: int = 0, overwrite: bool = False) -> Path:
    """Calibrate the mask of `config` as a run does, print it, and write it with its summary and figures.

    The run's own code does it in a scratch folder, so the mask is the run's, bit for bit; the sequential engine stands
    in for Flower's, whose numbers are the same.

    Args:
        output: the folder to write mask.safetensors, summary.json and figures to: anatomy and, for rules that score
            sensitivity, sensitivity; default masks/NAME in the results root, whose files are replaced.
        clients: also one mask for each of the first so many clients, scored on its own shard alone under the same head.
        overwrite: whether files of these names in `output` may be replaced; the settings' own mask-file never is.

    Returns:
        The folder.

    Raises:
        ConfigError: the configuration has no mask, or no masks of clients; or a file would be lost.
        FlTaskarithError: whatever ends a run.
    """
    _check(config, clients)
    config = on_this_machine(config)
    if config.head_rounds:  # the head alone is trained first
        config, _ = with_known_rate(config)
    if output is not None:
        require_new(
            [output / name for name in (MASK, SUMMARY, *_figures("anatomy"), *_figures("sensitivity"))], overwrite
        )
    folder = output or results_root(config.results_dir) / "masks" / _mask_name(config)
    if config.mask_file and _is_one_file(folder / MASK, resolve(config.mask_file, "mask-file")):
        raise ConfigError(f"{folder / MASK} is the mask-file itself, and would be overwritten: give another --output.")
    require_writable(folder)
    show_log()
    started, first_scores = time.perf_counter(), _FirstScores()
    with scratch_folder() as scratch, ExitStack() as printed:
        alone = _alone(config, scratch)
        home = workspace(alone)
        facts = describe(home)  # among them the shards: an infeasible request fails here, before a folder is made
        make_folder(folder)
        remove_leftovers(folder)
        printed.enter_context(recorded(folder / RUN_LOG))
        with Logbook(alone) as logbook:
            run = make_run(alone, home, logbook, lambda *_: None, client_app)
            run.watch = first_scores.watch
            run.choose_mask_only()
            write_atomically(folder / MASK, (logbook.folder / MASK).read_bytes())
        described = read_mask(folder / MASK)
        summary = summarise(described) | facts | {"seconds": time.perf_counter() - started}
        print(anatomy_table(described))
        figures = plot_anatomy(described, folder / "anatomy")
        if kinds := scores_by_kind(first_scores.scores, described):
            figures += plot_sensitivity(kinds, described, folder / "sensitivity", config.sensitivity_threshold)
            summary["sensitivity_by_kind"] = describe_sensitivity(kinds)
            print("", *zero_lines(kinds), sep="\n")
        if clients:
            summary["clients"] = _of_clients(home, run.model.frozen.weights, described.mask.to(home.device), clients)
        _write_summary(folder, summary | {"config": config.to_run_config()})
        for path in (folder / MASK, folder / SUMMARY, *figures):
            print(path.resolve())
    return folder


def compare_masks(files: Sequence[Path], output: Path | None = None, overwrite: bool = False) -> None:
    """Print what is in mask files and, of several, how much each two overlap; with `output`, write it and figures.

    Raises:
        CheckpointError: a file is no mask, or the output cannot be written.
        ConfigError: the masks are of different models; or a file that is to be written to `output` is there already,
            and not `overwrite`.
    """
    figures = [f"anatomy-{number}" if len(files) > 1 else "anatomy" for number in range(1, len(files) + 1)]
    if output is not None:
        require_new([output / name for name in (SUMMARY, *(each for name in figures for each in _figures(name)))],
                    overwrite)  # fmt: skip
    masks = [read_mask(path) for path in files]
    for path, described in zip(files[1:], masks[1:], strict=True):
        _check_comparable(files[0], masks[0].mask, path, described.mask)
    print("\n\n".join(f"{path}\n{anatomy_table(described)}" for path, described in zip(files, masks, strict=True)))
    summary: dict[str, Any] = {
        "masks": [{"file": str(path), **summarise(described)} for path, described in zip(files, masks, strict=True)]
    }
    if len(masks) > 1:
        densities = [described.mask.density for described in masks]
        summary["jaccard"] = jaccard_matrix([described.mask for described in masks])
        summary["by_chance"] = [[chance_overlap(one, other) for other in densities] for one in densities]
        print("\n" + overlap_table([str(path) for path in files], summary["jaccard"], summary["by_chance"]))
    if output is not None:
        make_folder(output)
        _write_summary(output, summary)
        for name, described in zip(figures, masks, strict=True):
            for path in plot_anatomy(described, output / name):
                print(path.resolve())


def _alone(config: Config, results: Path) -> Config:
    """Return the settings of the run that makes the mask in the folder `results`, in this process."""
    return dataclasses.replace(
        config,
        engine="sequential",
        threads=config.threads or available_threads(),
        results_dir=str(results),
        run_name="mask",
        save_model=False,
        tensorboard=False,
        wandb=False,
    )


class _FirstScores:
    """Keeps the mean scores of the first calibration round, those of the pretrained model, by tensor in its shape."""

    def __init__(self) -> None:
        self.scores: dict[str, Tensor] = {}

    def watch(self, sums: Sums) -> Sums:
        """Return `sums` that are kept when they are asked for the first round."""

        def watched(calibration_round: int, alive: Mask) -> tuple[Mapping[str, Tensor], int]:
            summed, examples = sums(calibration_round, alive)
            if calibration_round == 1:
                self.scores = {name: value.cpu() / examples for name, value in summed.items()}
            return summed, examples

        return watched


def _of_clients(home: Workspace, head: Weights, mask: Mask, clients: int) -> dict[str, Any]:
    """Make masks of the first clients from their own shards; report their overlap with one another and with `mask`."""
    started = time.perf_counter()
    masks = []
    for partition in range(clients):
        masks.append(make_mask(home, shard_sums(home, head, partition)).mask)
        log.info("Client %d: overlap with the mask above %.4f", partition, masks[-1].jaccard(mask))
    densities = [own.density for own in masks]
    overlaps = [own.jaccard(mask) for own in masks]
    matrix = jaccard_matrix(masks)
    report: dict[str, Any] = {
        "number": clients,
        "densities": densities,
        "with_mask": {**_spread(overlaps), "each": overlaps},
        "with_mask_by_chance": _spread([chance_overlap(own, mask.density) for own in densities])["mean"],
        "pairwise": None,
        "seconds": time.perf_counter() - started,
    }
    print(f"\nJaccard overlap of {clients} clients' own masks".ljust(47) + "     mean      min      max  by chance")
    _print_spread("with the mask above", _spread(overlaps), report["with_mask_by_chance"])
    if clients > 1:
        pairs = _spread(between_pairs(matrix))
        chance = _spread(between_pairs([[chance_overlap(one, other) for other in densities] for one in densities]))
        report["pairwise"] = {**pairs, "by_chance": chance["mean"], "matrix": matrix}
        _print_spread("with one another", pairs, chance["mean"])
    return report


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


def _print_spread(name: str, spread: Mapping[str, float], by_chance: float) -> None:
    print(f"{name:46}{spread['mean']:9.4f}{spread['min']:9.4f}{spread['max']:9.4f}{by_chance:11.4f}")


def _check(config: Config, clients: int) -> None:
    config.require_own_rule()
    problems = [
        (not config.masked, 'mask-rule = "none" updates every weight, so there is no mask: choose another mask-rule.'),
        (config.head_rounds == config.num_rounds,
         f"head-rounds = {config.head_rounds} leaves no rounds under a mask: raise num-rounds above it."),
        (clients > 0 and not config.scored,
         f'--clients scores sensitivities on shards, which mask-rule = "{config.mask_rule}" does not: set mask-rule to '
         f"{' or '.join(SENSITIVITY_RULES)}, or leave --clients out."),
        (clients > 0 and config.strategy == "centralized",
         'strategy = "centralized" has no clients: choose another strategy, or leave --clients out.'),
        (clients > config.num_clients,
         f"--clients {clients} exceeds num-clients = {config.num_clients}: lower it, or raise num-clients."),
    ]  # fmt: skip
    for problem, message in problems:
        if problem:
            raise ConfigError(message)


def _check_comparable(path: Path, mask: Mask, other_path: Path, other: Mask) -> None:
    if wrong := mask.differing(other):
        raise ConfigError(
            f"{path} and {other_path} mask different models and cannot be compared: {len(wrong)} tensors differ, for "
            f"example {', '.join(wrong[:3])}. Compare masks of one model, trainable-blocks and mask-exclude."
        )


def _mask_name(config: Config) -> str:
    """Return model, rule, density or threshold, calibration rounds, and the fingerprint of all decisive settings."""
    threshold = config.sensitivity_threshold
    words = [config.model, config.mask_rule]
    if config.mask_rule != "file":
        words.append(f"t{threshold:g}" if threshold else f"{config.density:g}")
    if config.scored:
        words.append(f"r{config.calibration_rounds}")
    return re.sub(r"[^A-Za-z0-9._-]", "_", "-".join([*words, config.fingerprint()]))


def _figures(name: str) -> list[str]:
    return [f"{name}.png", f"{name}.pdf"]


def _is_one_file(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)


def _write_summary(folder: Path, summary: dict[str, Any]) -> None:
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
