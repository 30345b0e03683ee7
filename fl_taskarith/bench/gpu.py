"""What one card does with a whole ViT, in a few minutes and unattended: speed, shares of its peak, memory, parity.

A measurement that fails, or no longer fits into the time, is a row with the reason, and the others go on.
"""

import copy
import gc
import logging
import re
import signal
import subprocess
import threading
import time
import tomllib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._dynamo.config as dynamo
from torch import Tensor

from fl_taskarith.bench import harness, run_process, throughput
from fl_taskarith.bench.fisher import Scorer
from fl_taskarith.bench.gpu_table import table
from fl_taskarith.bench.harness import Result, round_settings, seconds_of
from fl_taskarith.bench.round import Bare
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ConfigError, named_error
from fl_taskarith.seeding import random_generator, torch_seed
from fl_taskarith.storage.files import scratch_folder
from fl_taskarith.training.local import set_matrix_products, set_trained, train_locally
from fl_taskarith.training.local_loss import LocalLoss, Outputs
from fl_taskarith.training.sparse_sgdm import sgdm
from fl_taskarith.workspace.machine import choose_device, describe_device, emulated, on_this_machine
from fl_taskarith.workspace.workspace import workspace

Row = dict[str, Any]

RESERVE = 20.0  # seconds of the limit for what comes before the first measurement and after the last
PRODUCTS = ("bf16", "fp16", "tf32", "fp32")
PARITY_STEPS, PARITY_RATE = 20, 1e-2
EAGER, COMPILED = "eager loop", "bare compiled loop"
FULL: dict[str, Any] = {"local_steps": harness.LOCAL_STEPS, "side": throughput.PEAK_SIDE["cuda"], "slot": 6.0,
                        "batches": throughput.EVALUATION_BATCHES}  # fmt: skip
MINIATURE: dict[str, Any] = {
    **{"model": "vit_glyph", "input_sizes": [16, 8], "batch_size": 2, "trainable_blocks": [2, 1], "examples": 4},
    **{"clients": 2, "local_steps": 1, "side": 64, "slot": 0.0, "batches": 1, "device": "cpu"},
    "minutes": 60,
}
"""What the options do not say, and all that differs in a dry run, which no clock cuts: `side` of the matrices whose
product is the peak, `batches` of an evaluation, and seconds (`slot`) in which two works alternate."""
GRAPHS = 64  # that torch may compile of one model: two loops x training, evaluation x sizes x precisions exceed its 8


@dataclass(frozen=True)
class Measurement:
    """One row. It is left out where less than `seconds` are left, which it takes on a large card."""

    size: int
    precision: str
    what: str
    seconds: float
    work: Callable[[], Row]


def bench_gpu(options: Namespace) -> Iterator[Result]:
    """Measure in order of worth until `minutes` are over; yield all rows so far after each.

    The ratio is that of the seconds of a round's steps in the bare compiled loop to those of our round, one client at a
    time, at the first size. Weights and images are random. Operations are those of the matrix products of one image, as
    torch counts them (`throughput.operations_per_image`): about 2 x weights x tokens forward and 4 x backward.

    Raises:
        ConfigError: there is no GPU, and it is no dry run.
    """
    started = time.monotonic()
    chosen = Namespace(**vars(options) | FULL)
    if options.dry_run:
        chosen = Namespace(**vars(chosen) | MINIATURE)
    elif choose_device(options.device).type != "cuda":
        raise ConfigError("bench gpu measures a GPU, and there is none here: give --dry-run to see whether it runs.")
    traced = _traced_alone() if options.dry_run else nullcontext()
    with scratch_folder() as folder, traced, dynamo.patch(recompile_limit=GRAPHS):
        card = Card(chosen, folder, started + 60 * chosen.minutes - RESERVE)
        for each in card.plan():
            card.take(each)
            yield card.result(time.monotonic() - started)


@dataclass
class Loops:
    """Bare loops of one input size and precision, and the operations of an image in training and evaluation.

    `head` is the classifier of all, in the model's shapes; an evaluation is of `evaluated` images.
    """

    size: int
    precision: str
    head: dict[str, Tensor]
    training: Mapping[str, Bare]
    evaluation: Mapping[str, Callable[[], float]]
    evaluated: int
    operations: Mapping[str, float]


@dataclass
class Card:
    """The card under measurement: `rows` grow by one for each measurement; `deadline` is of time.monotonic."""

    options: Namespace
    folder: Path
    deadline: float
    rows: list[Row] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)  # FLOP/s of a large product, by precision
    _loops: Loops | None = None

    def __post_init__(self) -> None:
        self.device = choose_device(self.options.device)
        own = on_this_machine(round_settings(self.options, precision="auto", compile="off")).precision
        self.half = own if self.device.type == "cuda" else "bf16"
        self.steps = self.options.clients * self.options.local_steps
        self.nominal, self.driver = nominal_peaks(describe_device(self.device)), _driver()

    def plan(self) -> Iterator[Measurement]:
        """Yield all measurements, those first that say most: seconds are of a large card, most go to compilation."""
        for precision in PRODUCTS:
            yield Measurement(0, precision, "matrix product", 2, partial(self.product, precision))
        first, *others = self.options.input_sizes
        other = next(each for each in ("fp16", "bf16") if each != self.half)
        yield from self._comparison(first, self.half)
        yield from self._further(first, self.half)
        for size, precision in [*((size, self.half) for size in others), *((size, other) for size in (first, *others))]:
            yield from self._comparison(size, precision)

    def _comparison(self, size: int, precision: str) -> Iterator[Measurement]:
        made = partial(Measurement, size, precision)
        at_once = self.options.clients
        yield made(f"training, {EAGER}", 10, lambda: self.bare(size, precision, EAGER))
        yield made(f"training, {COMPILED}", 45, lambda: self.bare(size, precision, COMPILED))
        yield made("training, ours, 1 at once", 45, lambda: self.federated(size, precision))
        yield made(f"training, ours, {at_once} at once", 45,
                   lambda: self.federated(size, precision, clients_at_once=at_once))  # fmt: skip
        for name in (EAGER, COMPILED):
            yield made(f"evaluation, {name}", 20, partial(self.bare_evaluation, size, precision, name))
        yield made("evaluation, ours", 20, lambda: self.evaluation(size, precision))

    def _further(self, size: int, precision: str) -> Iterator[Measurement]:
        made = partial(Measurement, size, precision)
        yield made(f"parity of {PARITY_STEPS} steps", 15, lambda: self.parity(size, precision))
        yield made("half masked", 20, lambda: self.federated(size, precision, mask_rule="random", density=0.5))
        yield made("SCAFFOLD", 20, lambda: self.federated(size, precision, strategy="scaffold"))
        for blocks in self.options.trainable_blocks:
            cached = {"trainable_blocks": blocks, "prefix_cache": "float16", "augmentation": "flip"}
            yield made(f"last {blocks} blocks on cached tokens", 45, partial(self.federated, size, precision, **cached))
        yield Measurement(size, "fp32", "scoring (Fisher)", 20, lambda: self.scoring(size))

    def take(self, each: Measurement) -> None:
        """Add the row of a measurement: its figures, or why there are none."""
        row: Row = {"input_size": each.size, "precision": each.precision, "what": each.what}
        left = self.deadline - time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with _warnings() as warned:
            try:
                if left < each.seconds:
                    raise TimeoutError(
                        f"left out: it takes {each.seconds:.0f} s or more, {max(left, 0):.0f} s are left"
                    )
                self._refuse_emulated(each)
                with _cut_after(left):
                    row |= each.work()
            except (Exception, SystemExit) as error:  # of memory, of the compiler, of a setting: the next may be well
                row["failed"] = named_error(error)
        row["peak_bytes"] = harness.peak_bytes(self.device)
        row |= {"warnings": warned} if warned else {}
        self.rows.append(row)
        if left >= each.seconds:
            gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def result(self, seconds: float) -> Result:
        """Return all rows so far as a table and as JSON values."""
        ours = self._row(self.options.input_sizes[0], self.half, "training, ours, 1 at once")
        facts: Row = {"card": describe_device(self.device), "driver": self.driver, "cuda": torch.version.cuda}
        if self.device.type == "cuda":
            facts["memory_bytes"] = torch.cuda.get_device_properties(self.device).total_memory
        own = {key: value for key, value in vars(self.options).items() if key not in ("device", *FULL)}
        figures = {**own, **facts, "nominal_flop_per_second": self.nominal, "seconds": seconds, "rows": self.rows}
        name = "dry run" if self.options.dry_run else facts["card"]
        head = f"{facts['card']}, driver {facts['driver']}, torch {torch.__version__}; {seconds:.0f} s in all"
        return Result(ours.get("against_bare"), figures, [head, *table(self.rows)],
                      suffix="-" + re.sub(r"\W+", "-", name.lower()).strip("-"))  # fmt: skip

    def settings(self, size: int, precision: str, **own: object) -> Config:
        """Return those of a run in a folder of its own."""
        clients = self.options.clients
        given: dict[str, object] = {"num_clients": clients, "clients_at_once": 1}
        given["local_steps"] = self.options.local_steps
        given |= {"train_subset": 100 * clients, "validation_size": 100, "calibration_size": 0, "test_subset": 100}
        places = {"data_dir": str(self.folder), "results_dir": str(self.folder / f"run-{len(self.rows)}")}
        return round_settings(self.options, **{**given, **places, "input_size": size, "precision": precision, **own})

    # The measurements

    def product(self, precision: str) -> Row:
        """Measure the peak of large square products."""
        set_matrix_products(precision)
        peak = self.peaks[precision] = throughput.peak_product(self.device, precision, self.options.side)
        return {"flop_per_second": peak, **self._shares(peak, precision, nominal_alone=True)}

    def bare(self, size: int, precision: str, name: str) -> Row:
        """Measure the steps of a round in a bare loop."""
        loops = self.loops(size, precision)
        others = {} if name == EAGER else {EAGER: loops.training[EAGER]}
        return self._speed(loops.training[name], self._images, "training", loops, others)

    def federated(self, size: int, precision: str, **own: Any) -> Row:
        """Measure rounds of a run under these settings, from sampling to the row in rounds.csv."""
        loops, note = self.loops(size, precision), {}
        try:
            config = self.settings(size, precision, **own)
        except ConfigError as error:  # clients at once under a setting that has them one by one
            config = on_this_machine(self.settings(size, "auto", compile="auto", **own))
            note = {"note": f"{config.precision}, compile {config.compile}, for: {error}"}
        setup = seconds_of(lambda: run_process.start(run_process.Start(config)), self.device)
        counted = None if own.get("trainable_blocks") else replace(loops, precision=config.precision)
        row = self._speed(run_process.train_round, self._images, "training", counted, loops.training)
        return {**row, "setup_seconds": setup, "first_loss": run_process.first_loss(), **note}

    def bare_evaluation(self, size: int, precision: str, name: str) -> Row:
        """Measure an evaluation in a bare loop."""
        loops = self.loops(size, precision)
        return self._speed(loops.evaluation[name], loops.evaluated, "evaluation", loops, {})

    def evaluation(self, size: int, precision: str) -> Row:
        """Measure ours, on the network compiled as in a run."""
        loops, home = self.loops(size, precision), workspace(self.settings(size, precision))
        examples = throughput.evaluated_images(home, self.options.batches)
        work = partial(home.evaluate, examples, home.compiled_network)
        return self._speed(work, loops.evaluated, "evaluation", loops, loops.evaluation)

    def parity(self, size: int, precision: str) -> Row:
        """Compare the losses of the same steps: a client's training, compiled as in a run, and the bare loop.

        The loop keeps its own batches.
        """
        loops, home = self.loops(size, precision), workspace(self.settings(size, precision))
        bare, recorded, generator = copy.copy(loops.training[COMPILED]), _Recorded(), random_generator(0, "parity")
        home.load(home.pretrained | loops.head)
        bare.model.load_state_dict(home.model.state_dict())
        names = home.trained_names(1)
        optimizer = sgdm(zip(names, set_trained(home.model, names), strict=True), home.config, PARITY_RATE)
        whole = torch.arange(len(home.data.train), device=self.device)
        train_locally(home.compiled_network, home.data.train, whole, optimizer, home.preprocessing,
                      local_steps=PARITY_STEPS, batch_size=home.config.batch_size, precision=precision,
                      generator=generator, loss=recorded)  # fmt: skip
        generator = random_generator(0, "parity")
        torch_seed(generator)
        bare.draw(PARITY_STEPS, generator)
        losses: list[Tensor] = []
        steps = bare.optimizer(PARITY_RATE)
        for compute in bare.losses():
            losses.append(harness.take_steps([compute], steps))
        ours, theirs = (torch.stack(each).float().tolist() for each in (recorded.values, losses))
        difference = max(abs(one - two) / abs(two) for one, two in zip(ours, theirs, strict=True))
        return {"losses": {"ours": ours, "bare": theirs}, "largest_difference": difference}

    def scoring(self, size: int) -> Row:
        """Measure the sensitivities of all weights, an image each."""
        set_matrix_products("fp32")
        given = {"model": self.options.model, "input_size": size, "device": self.options.device}
        return self._speed(Scorer(Namespace(**given, examples=self.options.examples)).ours, self.options.examples)

    # What they share

    def loops(self, size: int, precision: str) -> Loops:
        """Return the bare loops of this size and precision, which are kept until another is asked for."""
        if self._loops is None or (self._loops.size, self._loops.precision) != (size, precision):
            home = workspace(self.settings(size, precision, compile="off"))
            head, examples = harness.random_head(home), throughput.evaluated_images(home, self.options.batches)
            modes = {EAGER: "off", COMPILED: self.options.compile}
            training = {name: Bare(home, head, self.steps, mode) for name, mode in modes.items()}
            evaluation = {name: partial(throughput.bare_evaluation, loop.network, home, examples, precision)
                          for name, loop in training.items()}  # fmt: skip
            operations = throughput.operations_per_image(home)
            self._loops = Loops(size, precision, head, training, evaluation, len(examples), operations)
        return self._loops

    @property
    def _images(self) -> int:
        images: int = self.steps * self.options.batch_size
        return images

    def _speed(
        self,
        work: Callable[[], object],
        images: int,
        kind: str = "",
        loops: Loops | None = None,
        others: Mapping[str, Callable[[], object]] | None = None,
    ) -> Row:
        """Time the first call of `work`, then some in alternation with `others` that did not fail; `images` a call.

        `first_call_seconds` holds the compilation. It is paid back after so many rounds, against the eager loop.
        """
        first = seconds_of(work, self.device)
        works = {"itself": work} | {name: other for name, other in (others or {}).items() if self._worked(kind, name)}
        seconds, began = {name: [] for name in works}, time.monotonic()  # type: dict[str, list[float]], float
        while True:
            for name, each in works.items():
                seconds[name].append(seconds_of(each, self.device))
            if time.monotonic() - began >= min(self.options.slot, self.deadline - time.monotonic()):
                break
        took = {name: median(each) for name, each in seconds.items()}
        mine, eager, bare = took.pop("itself"), took.get(EAGER), took.get(COMPILED)
        row: Row = {"images_per_second": images / mine, "first_call_seconds": first, "seconds": seconds}
        if kind == "training":
            row |= {"rounds_per_second": 1 / mine, "round_seconds": mine}
        if bare is not None:
            row["against_bare"] = bare / mine
        if eager is not None:
            row["payback"] = max(0.0, first - mine) / (eager - mine) if eager > mine else None
        if loops is not None:
            row |= self._shares(row["images_per_second"] * loops.operations[kind], loops.precision)
        return row

    def _shares(self, rate: float, precision: str, nominal_alone: bool = False) -> Row:
        """Return the shares that `rate`, in FLOP/s, has of the measured peak and of the card's nominal one."""
        peaks = {"nominal": self.nominal.get(precision), "measured": self.peaks.get(precision)}
        return {f"share_of_{name}_peak": rate / peak for name, peak in peaks.items()
                if peak and not (nominal_alone and name == "measured")}  # fmt: skip

    def _worked(self, kind: str, name: str) -> bool:
        assert self._loops is not None
        return "seconds" in self._row(self._loops.size, self._loops.precision, f"{kind}, {name}")

    def _row(self, size: int, precision: str, what: str) -> Row:
        key = (size, precision, what)
        return next((row for row in self.rows if (row["input_size"], row["precision"], row["what"]) == key), {})

    def _refuse_emulated(self, each: Measurement) -> None:
        if self.device.type == "cuda" and each.precision != "fp32":
            for sentence in emulated(round_settings(self.options, precision=each.precision)):
                raise ConfigError(sentence)


@dataclass(frozen=True)
class _Recorded(LocalLoss):
    """The cross-entropy, which notes the value of every step."""

    values: list[Tensor] = field(default_factory=list)

    def __call__(self, outputs: Outputs, labels: Tensor, reference: Tensor | None = None) -> Tensor:
        loss = super().__call__(outputs, labels, reference)
        self.values.append(loss.detach())
        return loss


def nominal_peaks(name: str) -> dict[str, float]:
    """Return the peaks in FLOP/s by precision of the card that torch calls `name`; none of one that is not listed."""
    known = tomllib.loads(Path(__file__).with_name("peaks.toml").read_text(encoding="utf-8"))
    peaks: dict[str, float] = next((peaks for part, peaks in known.items() if re.search(rf"\b{part}\b", name)), {})
    return {precision: 1e12 * peak for precision, peak in peaks.items()}


def _driver() -> str:
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


@contextmanager
def _traced_alone() -> Iterator[None]:
    """Let torch.compile trace what it is given and generate no code, which takes a minute per network on a CPU."""
    compiler = torch.compile
    torch.compile = partial(compiler, backend="eager")
    try:
        yield
    finally:
        torch.compile = compiler


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what is logged as a warning, such as that clients are trained one by one."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("fl_taskarith")
    log.addHandler(handler)
    try:
        yield heard
    finally:
        log.removeHandler(handler)


@contextmanager
def _cut_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after `seconds` in the main thread, on systems with an alarm."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def cut(*_: object) -> None:
        raise TimeoutError("cut at the end of the time that was given")

    handler, timer = signal.signal(signal.SIGALRM, cut), signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
