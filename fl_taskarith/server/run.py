"""What a federated and a centralized run share: round 0, evaluation, log, checkpoints, the exported model."""

import dataclasses
import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from statistics import fmean

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.fields import snake
from fl_taskarith.config.rule import AUTO
from fl_taskarith.config.settings import Config
from fl_taskarith.data.datasets import ImageSet
from fl_taskarith.errors import BudgetSpent, ConfigError, Divergence
from fl_taskarith.masking.calibration import Sums
from fl_taskarith.masking.mask import Mask, save_mask
from fl_taskarith.models.backbone import HEAD_PARAMETERS, export_model
from fl_taskarith.models.heads import (
    DiscriminantSolver,
    HeadSolver,
    RidgeSolver,
    RidgeStatistics,
    choose_strength,
    fit_logit_scale,
    nearest_class_mean,
)
from fl_taskarith.server.course import remarks, rounds_since_best, stops_early
from fl_taskarith.server.interruption import asked_to_stop, finishing_rounds, interrupted
from fl_taskarith.server.round_zero_cache import EVALUATIONS, HEAD, MASK, Starts
from fl_taskarith.storage.checkpoint import Checkpoint
from fl_taskarith.storage.correctness import CORRECT, HEAD_CORRECT
from fl_taskarith.storage.run_folder import WAITING, Logbook, Row, best_row, model_file
from fl_taskarith.storage.run_log import UNPRINTED
from fl_taskarith.training.local import Evaluation
from fl_taskarith.training.schedules import learning_rate
from fl_taskarith.workspace.clusters import split_clusters, start_clusters
from fl_taskarith.workspace.global_model import Frozen, GlobalModel, Weights
from fl_taskarith.workspace.make_mask import make_mask, mask_facts, server_sums
from fl_taskarith.workspace.views import pooled, views
from fl_taskarith.workspace.workspace import Workspace

log = logging.getLogger(__name__)

Progress = Callable[[int, int, Row], None]


class Run(ABC):
    """One run over its data and model; `execute` does all of it, or what is left of it.

    A subclass says where the head's statistics come from and how the rounds are trained.
    """

    def __init__(self, config: Config, home: Workspace, logbook: Logbook, progress: Progress | None) -> None:
        self.config = config
        self.home = home
        self.logbook = logbook
        self.progress = progress
        self.deadline: float | None = None  # of time.time; from then on the run ends after its round, saved
        self.starts = Starts()
        self.watch: Callable[[Sums], Sums] | None = None  # wraps what sums a mask's scores, which are then not recalled
        self.model = GlobalModel({})
        self._best: Checkpoint | None = None  # the best model on validation, until a checkpoint is saved with it
        self._correct: list[str] = []  # of the test images, as last evaluated, by group of clients
        self.evaluated = {"val": home.data.validation, "test": home.data.test}

    @abstractmethod
    def ridge_statistics(self, row: Row) -> RidgeStatistics:
        """Return the statistics of all training examples under the current backbone.

        Args:
            row: gets the bytes and seconds, in round 0 also the number of clients.
        """

    @abstractmethod
    def train_rounds(self, first_round: int, last_round: int) -> None:
        """Train rounds `first_round`..`last_round` from `self.model`; call `finish_round` after each."""

    @abstractmethod
    def state(self) -> Checkpoint:
        """Return a checkpoint with what the rounds need beside the global model; its round and model do not matter."""

    @abstractmethod
    def restore(self, checkpoint: Checkpoint) -> None:
        """Take that back from a checkpoint, whose tensors are on the device."""

    def client_sums(self, head: Weights, row: Row) -> Sums:
        """Return what sums the clients' sensitivities, of the weights' shapes (`masking.calibration.Sums`).

        Args:
            head: the weights of the head, [classes, features] and [classes].
            row: gets the clients' bytes and seconds.
        """
        raise NotImplementedError(f"{type(self).__name__} has no clients")

    @abstractmethod
    def distribute(self, row: Row) -> None:
        """Send all clients what is frozen from now on; add the bytes to `row`."""

    def execute(self) -> None:
        """Run round 0 or load the last checkpoint, run the rounds that are left, and export the final model.

        The rounds come in two phases with other tensors to train each: `head-rounds` of the head alone, if any, and
        the rest.
        """
        restored = self.logbook.restored
        if restored is None:
            self._round_zero()
            first_round = 1
        else:
            self._restore(restored)
            first_round = restored.round + 1
        for last_round in (self.config.head_rounds, self.config.num_rounds):
            if first_round <= last_round and not stops_early(self.logbook.rows, self.config):
                with finishing_rounds():
                    self.train_rounds(first_round, last_round)
                first_round = last_round + 1
        self._end()

    def _end(self) -> None:
        """Note in run.json which test images are right, the best round and an early stop; export the models."""
        rows, best = self.logbook.rows, best_row(self.logbook.rows)
        last = rows[-1]["round"]
        if not self._correct and len(self.evaluated["test"]):  # the last round was evaluated before this start
            self._evaluate(dict(rows[-1]))
        if self._correct and all(self._correct):
            self.logbook.note(**{CORRECT: self._correct})
        if best is not None:
            self.logbook.note(best={name: best.get(name) for name in ("round", "val_accuracy", "val_loss")})
        if stops_early(rows, self.config):
            patience = self.config.early_stopping_patience
            cause = (
                f"no better validation accuracy for {rows[-1][WAITING]} rounds (early-stopping-patience = {patience})"
            )
            self.logbook.note(stopped_early={"round": last, "cause": cause})
            log.info("Stopped after round %d of %d: %s.", last, self.config.num_rounds, cause)
        if not self.config.save_model:
            return
        if best is not None and (kept := self.logbook.load_best()) is not None:
            self._export(self._model_in(kept), best, best=True)
        elif best is not None:
            log.warning(
                "The model of round %d, the best on validation, is not exported: its file among the checkpoints is "
                "missing or damaged, or those rounds were run by a version that kept none.", best["round"],
            )  # fmt: skip
        self._export(self.model, rows[-1], best=False)

    def _export(self, whole: GlobalModel, row: Row, *, best: bool) -> None:
        """Write a model, in the weights' shapes or [entries] of each, or one per cluster, with the row of its round."""
        models = split_clusters(self.config, whole)
        for number, model in enumerate(models):
            self.home.place(model)
            measured = {name: repr(row[name]) for name in ("val_accuracy",) if row.get(name) is not None}
            facts = {"dataset": self.config.dataset, "weights": self.config.weights, "round": str(row["round"])}
            path = self.logbook.output(model_file(best, number if len(models) > 1 else None))
            export_model(self.home.model, path, self.home.data.dataset.classes, facts | measured | self.logbook.owner)

    def choose_mask_only(self) -> None:
        """Do what `execute` does until the mask is chosen and saved; the test set is not looked at.

        A rule that scores nothing needs no head, so none is solved or trained for it.

        Raises:
            ConfigError: every client has a mask of its own.
        """
        if self.config.mask_source == "own":
            raise ConfigError('mask-source = "own" chooses no mask that all share: set "server" or "clients".')
        self.evaluated.pop("test")
        if not self.config.scored:
            self.model = GlobalModel({name: self.home.pretrained[name] for name in HEAD_PARAMETERS})
            self._freeze({"downlink_bytes": 0, "train_seconds": 0.0, "overhead_seconds": 0.0})
            return
        self._round_zero()
        if self.config.head_rounds:
            self.train_rounds(1, self.config.head_rounds)

    def complete(self, row: Row) -> None:  # noqa: B027 (nothing to add is the usual case)
        """Add to a round's row what only its end shows."""

    def finish_round(self, row: Row, trained: Weights) -> bool:
        """Take the trained weights over, evaluate where due, write the row, and save a checkpoint where due.

        Args:
            row: of the round; gets the measures.
            trained: in the weights' shapes, or under a mask [entries] of each.

        Returns:
            Whether the run stops early, after this round.
        """
        server_round, config = row["round"], self.config
        self.model = GlobalModel(trained, self.model.frozen)
        if server_round == config.head_rounds:
            self._freeze(row)
        last = server_round == config.num_rounds
        if config.ridge_refresh and server_round and (last or server_round % config.ridge_refresh == 0):
            self._refresh_head(row)
        if last or server_round % config.evaluate_every == 0:
            self._evaluate(row)
        self.complete(row)
        rows = [*self.logbook.rows, row]
        if config.early_stopping_patience and server_round > config.head_rounds:
            row[WAITING] = rounds_since_best(rows, config)
        if config.save_model and "val_accuracy" in row and best_row(rows) is row:
            copy = {name: value.detach().to("cpu", copy=True) for name, value in self.model.trained.items()}
            self._best = Checkpoint(server_round, copy, self.model.frozen.tensors(), {})
        stopped = stops_early(rows, config)
        record_round(
            self.logbook, config, row, self.progress, self._checkpoint, last=last or stopped, deadline=self.deadline
        )
        return stopped

    def _checkpoint(self) -> Checkpoint:
        best, self._best = self._best, None
        return dataclasses.replace(
            self.state(), round=self.logbook.rows[-1]["round"], trained=self.model.trained,
            frozen=self.model.frozen.tensors(), best=best,
        )  # fmt: skip

    def _on_device(self, tensors: Weights) -> Weights:
        return {name: tensor.to(self.home.device) for name, tensor in tensors.items()}

    def _model_in(self, checkpoint: Checkpoint) -> GlobalModel:
        frozen = Frozen.of_tensors(checkpoint.frozen, self.home.shapes, self.home.device)
        # In the model's order, not the file's: sums over tensors are to have the same bits as if never interrupted.
        trained = {name: checkpoint.trained[name] for name in self.home.parameters if name in checkpoint.trained}
        return GlobalModel(self._on_device(trained), frozen)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.model = self._model_in(checkpoint)
        if self.model.frozen.mask is not None:
            self._save_mask(self.model.frozen.mask)
        self.restore(dataclasses.replace(checkpoint, strategy_state=self._on_device(checkpoint.strategy_state)))
        self.distribute({"downlink_bytes": 0})  # a client's files may be gone; the row that counts it is written

    def _round_zero(self) -> None:
        """Solve the head on the frozen backbone, choose the mask, and evaluate."""
        started = time.perf_counter()
        row: Row = {"round": 0, "clients": 0, "uplink_bytes": 0, "downlink_bytes": 0, "train_seconds": 0.0}
        head = {name: self.home.pretrained[name] for name in HEAD_PARAMETERS}
        if self.config.solved:
            head, facts = self.starts.once(self.home, HEAD, row, lambda: self._solve_head(row))
            self.logbook.note(head=facts)
        row["overhead_seconds"] = overhead(time.perf_counter() - started, row["train_seconds"])
        self.finish_round(row, head)

    def _freeze(self, row: Row) -> None:
        """End the head's phase: fix the head where it is not trained on, choose the mask, and send both to clients.

        What was trained so far, the head, becomes frozen; what is trained from now on starts as pretrained.
        """
        head, config = self.model.trained, self.config
        if config.num_rounds == config.head_rounds:
            return
        started, clients_before = time.perf_counter(), row["train_seconds"]
        trained = {name: (self.home.pretrained | head)[name] for name in self.home.trained_names(config.num_rounds)}
        frozen = Frozen({name: value for name, value in head.items() if name not in trained})
        if config.masked and config.mask_source == "own":
            self.logbook.note(mask={"rule": config.mask_rule, "source": "own", "density": config.density})
        elif config.masked:
            by_clients = config.mask_source == "clients"
            sums = self.client_sums(head, row) if by_clients else server_sums(self.home, head)
            if self.watch is None:
                calibration = self.starts.once(self.home, MASK, row, lambda: make_mask(self.home, sums))
            else:
                calibration = make_mask(self.home, self.watch(sums))
            facts = mask_facts(config, calibration)
            log.info(
                "Mask: %(updated)d of %(maskable)d weights (density %(density).4g) are updated, by %(rule)s.", facts
            )
            self.logbook.note(mask=facts)
            self._save_mask(calibration.mask)
            frozen = Frozen(frozen.weights, calibration.mask)
            trained = calibration.mask.gather(trained)
        self.model = GlobalModel(start_clusters(config, trained), frozen)
        self.distribute(row)
        row["overhead_seconds"] += overhead(time.perf_counter() - started, row["train_seconds"] - clients_before)

    def _save_mask(self, mask: Mask) -> None:
        """Write the mask with what run.json says about it."""
        facts = json.dumps(self.logbook.fact("mask"))
        path = self.logbook.output("mask.safetensors")
        save_mask(path, mask, {"model": self.config.model, "facts": facts, **self.logbook.owner})

    def _refresh_head(self, row: Row) -> None:
        """Solve the head again for the backbone as it is, and send it to clients in place of the last one."""
        started, clients_before = time.perf_counter(), row["train_seconds"]
        head, facts = self._solve_head(row)
        self.logbook.note(head=facts)
        self.model = GlobalModel(self.model.trained, Frozen(self.model.frozen.weights | head, self.model.frozen.mask))
        self.distribute(row)
        row["overhead_seconds"] += overhead(time.perf_counter() - started, row["train_seconds"] - clients_before)

    def _solve_head(self, row: Row) -> tuple[Weights, dict[str, object]]:
        """Return the head and facts for run.json; validation chooses its parameter and logit scale if "auto"."""
        statistics = self.ridge_statistics(row)
        self.home.place(self.model)
        validation = pooled(self.config, self.home.data.validation)
        features = self.home.features(validation)
        facts: dict[str, object] = {"kind": self.config.head}
        if self.config.head == "ncm":
            head = nearest_class_mean(statistics)
        else:
            solver: HeadSolver = (RidgeSolver if self.config.head == "ridge" else DiscriminantSolver)(statistics)
            name = snake(solver.setting)
            strength = getattr(self.config, name)
            if strength == AUTO:
                strength = choose_strength(solver, features, validation.labels)
            head, facts[name] = solver.solve(strength), strength
        logit_scale = self.config.logit_scale
        if logit_scale == AUTO:
            logit_scale = fit_logit_scale(head.scores(features), validation.labels)
        scaled = head.scaled(float(logit_scale))
        weights = dict(zip(HEAD_PARAMETERS, (scaled.weight.float().contiguous(), scaled.bias.float()), strict=True))
        return weights, facts | {"logit_scale": logit_scale}

    def _evaluate(self, row: Row) -> None:
        """Write validation and test loss and accuracy of the global model, and ‖θ − θ₀‖, into `row`.

        Where groups of clients see images differently, they are means over the groups; of several cluster models a
        group is measured with the one of least validation loss in it.
        """
        started = time.perf_counter()
        row["task_vector_norm"] = self.home.task_vector_norm(self.model)

        def measure(split: str) -> list[list[Evaluation]]:
            return self._measured(self.evaluated[split])

        measured = {
            split: measure(split)
            if row["round"]
            else self.starts.once(self.home, EVALUATIONS[split], row, partial(measure, split))
            for split in self.evaluated
        }
        by_model = measured["val"]
        best = [min(range(len(by_model)), key=lambda model: by_model[model][group].loss)
                for group in range(len(by_model[0]))]  # fmt: skip
        for split, table in measured.items():
            chosen = [table[model][group] for group, model in enumerate(best)]
            if not chosen[0].examples:
                continue
            loss = fmean(group.loss for group in chosen)
            if not math.isfinite(loss):
                raise Divergence(f"Round {row['round']}: the {split} loss is {loss}. Lower learning-rate.")
            row[f"{split}_loss"], row[f"{split}_accuracy"] = loss, fmean(group.accuracy for group in chosen)
            if split == "test":
                self._correct = [group.correct for group in chosen]
        if not row["round"] and self.config.solved and self._correct and all(self._correct):
            self.logbook.note(**{HEAD_CORRECT: self._correct})
        row["evaluate_seconds"] = time.perf_counter() - started

    def _measured(self, examples: ImageSet) -> list[list[Evaluation]]:
        """Evaluate every model on `examples` as every group of clients sees them: [models][groups]."""
        table = []
        for model in split_clusters(self.config, self.model):
            self.home.place(model)
            seen = views(self.config, examples)
            table.append([self.home.evaluate(images, self.home.compiled_network) for images in seen])
        return table


def scheduled_rate(config: Config, logbook: Logbook, server_round: int) -> float:
    """Return the learning rate of `server_round`, from the schedule and the validation losses logged so far."""
    losses = [row.get("val_loss") for row in logbook.rows if row["round"] < server_round]
    return learning_rate(config, server_round, [loss for loss in losses[1:] if loss is not None])


def solved_logit_scale(logbook: Logbook) -> float:
    """Return the factor between the solved head's own scores and the model's; 1 without such a head."""
    return float(logbook.fact("head").get("logit_scale", 1.0))


def record_round(
    logbook: Logbook,
    config: Config,
    row: Row,
    progress: Progress | None,
    checkpoint: Callable[[], Checkpoint],
    *,
    last: bool,
    deadline: float | None = None,
) -> None:
    """Write a finished round's row, log it, and save its `checkpoint` where due.

    Raises:
        BudgetSpent: it is past `deadline` (of time.time) and more rounds are to come; this one is saved.
        Interrupted: a signal came, likewise.
    """
    logbook.write_round(row)
    if progress is not None:
        progress(row["round"], config.num_rounds, row)
    log.info("%s", describe_round(row, config.num_rounds), extra=None if progress is None else UNPRINTED)
    for remark in remarks(logbook.rows, config) if config.dataset != REGRESSION else ():
        log.warning("%s", remark)
    late = not last and deadline is not None and time.time() >= deadline
    stopping = not last and asked_to_stop()
    if last or late or stopping or row["round"] % config.checkpoint_every == 0:
        logbook.save_checkpoint(checkpoint())
    if stopping:
        raise interrupted(f"Stopped after round {row['round']} of {config.num_rounds}.")
    if late:
        raise BudgetSpent(f"The time is over after round {row['round']} of {config.num_rounds}; it is saved.")


def overhead(wall_seconds: float, client_seconds: float) -> float:
    """Return the seconds of a round in which no client worked; 0 where clients ran side by side for longer."""
    return max(0.0, wall_seconds - client_seconds)


def describe_round(row: Row, num_rounds: int) -> str:
    """Describe a round in a line for the terminal."""
    words = [f"round {row['round']:>3}/{num_rounds}"]
    for column, name, form in (
        ("train_loss", "train loss", "{:.4f}"),
        ("val_accuracy", "val accuracy", "{:.4f}"),
        ("test_loss", "test loss", "{:.4f}"),
        ("test_accuracy", "test accuracy", "{:.4f}"),
        ("matched_distance", "distance to the truth", "{:.4g}"),
        ("cluster_accuracy", "clients in their cluster", "{:.4f}"),
    ):
        if row.get(column) is not None:
            words.append(f"{name} {form.format(row[column])}")
    seconds = sum(row.get(name) or 0.0 for name in ("train_seconds", "overhead_seconds", "evaluate_seconds"))
    return "  ".join([*words, f"{seconds:.1f} s"])
