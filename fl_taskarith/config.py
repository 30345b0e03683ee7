"""One frozen, checked configuration. Everything a run does follows from it.

TOML files and Flower's run-config spell the keys in kebab-case (`num-clients`), Python in snake_case (`num_clients`).
Flower carries flat scalars only and checks no types, so every check is here, before any data is touched.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_taskarith.config_clusters import ATTACKS, CLUSTER_RULES, REGRESSION
from fl_taskarith.config_contradictions import contradictions
from fl_taskarith.config_effect import explain, idle_reason, refuse_idle
from fl_taskarith.config_rule import AUTO, LARGEST, Rule, Scalar, shown
from fl_taskarith.config_rule import auto_number as _auto_number
from fl_taskarith.config_rule import choice as _choice
from fl_taskarith.config_rule import key as _key
from fl_taskarith.errors import ConfigError

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")  # torch.compile's
STRATEGIES = tuple(  # a file each; listed and not imported, for they need Flower and settings do not
    sorted(path.stem.replace("_", "-") for path in Path(__file__).with_name("strategies").glob("[a-z]*.py"))
)
SCHEDULES = ("constant", "cosine", "step", "exponential", "plateau")
SENSITIVITY_RULES = ("least-sensitive", "most-sensitive")
DATA_FREE_RULES = ("lowest-magnitude", "highest-magnitude", "random")
MASK_RULES = (*SENSITIVITY_RULES, *DATA_FREE_RULES)


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The defaults are the quick start; pyproject.toml repeats them for Flower."""

    # data
    dataset: str = _choice(
        "digits", "data set (synthetic: for benchmarks and tests)", "digits", "cifar100", "synthetic", REGRESSION
    )
    data_dir: str = _key("~/.cache/fl-taskarith", "folder that holds (or receives) the data set")
    download: bool = _key(True, "download data and weights that are missing")
    train_subset: int = _key(0, "training images used, stratified; 0 = all that remain", low=0)
    test_subset: int = _key(0, "test images used, stratified; 0 = all", low=0)
    validation_size: int = _key(180, "images carved from training for choices", low=0)
    calibration_size: int = _key(100, "images carved from training for masks", low=0)
    augmentation: str = _choice(
        "auto", "of training batches; auto = the data set's own", "auto", "none", "flip", "crop", "crop-flip"
    )
    # model
    model: str = _key("vit_glyph", "any timm VisionTransformer by name")
    weights: str = _key("pretrained", 'path of a .safetensors or .pth file, "pretrained" (timm), or "none" (random)')
    input_size: int = _key(16, "side of the model's square input in pixels", low=1, high=4096)
    trainable: str = _choice("backbone", "what clients train", "backbone", "head", "all")
    trainable_blocks: int = _key(0, "train only the last n blocks (and the final norm); 0 = all", low=0)
    prefix_cache: str = _choice(
        "off", "with trainable-blocks: keep the frozen blocks' tokens of every image", "off", "float16", "float32"
    )
    head: str = _choice("ridge", "classifier: ridge (closed form) or linear (trained)", "ridge", "linear")
    head_rounds: int = _key(0, "first rounds that train the head alone", low=0)
    ridge_lambda: float | str = _auto_number("ridge penalty; auto = chosen on validation")
    logit_scale: float | str = _auto_number("factor on ridge scores; auto = by validation cross-entropy")
    ridge_refresh: int = _key(
        0, "rounds after which the ridge head is solved anew from all clients' current features; 0 = never", low=0
    )
    # mask
    mask_rule: str = _choice(
        "least-sensitive", "which backbone weights are updated; none = all of them", "none", *MASK_RULES, "file"
    )
    density: float = _key(0.1, "share of maskable weights that are updated", low=0, high=1, exclusive_low=True)
    sensitivity_threshold: float = _key(
        0.0, "largest (most-sensitive: smallest) sensitivity updated, in place of density; 0 = off", low=0, high=LARGEST
    )
    calibration_rounds: int = _key(4, "rounds of scoring and dropping, R, down to the density", low=1, high=1000)
    soft_zero: float = _key(0.1, "factor on dropped weights while later rounds score; 1 = no damping", low=0, high=1)
    mask_source: str = _choice(
        "server",
        "who scores: server (calibration split), clients (summed), or each client for a mask of its own",
        "server",
        "clients",
        "own",
    )
    calibration_per_client: int = _key(0, "examples that each client scores; 0 = its whole shard", low=0)
    fisher_labels: str = _choice("sampled", "labels of the Fisher information", "sampled", "true", "expected")
    fisher_score: str = _choice("log-prob", "what it differentiates", "log-prob", "logit")
    calibration_memory: float = _key(2.0, "GiB for per-example gradients", low=0, high=1024, exclusive_low=True)
    mask_exclude: str = _key("", "backbone parameters left as pretrained: comma-separated names or patterns with *")
    mask_file: str = _key("", 'mask.safetensors to use under mask-rule = "file"')
    # federation
    strategy: str = _choice(
        "fedavg", "aggregation algorithm, or no clients at all", *STRATEGIES, "centralized", importable=True
    )
    num_clients: int = _key(50, "clients, K", low=1, high=1_000_000)
    participation: float = _key(0.2, "share of clients sampled per round, C", low=0, high=1, exclusive_low=True)
    sampling: str = _choice(
        "random", "of each round's clients: drawn anew, or in turns of one random order", "random", "cyclic"
    )
    dropout: float = _key(
        0.0, "chance of each sampled client to drop out of a round; at least one stays", low=0, high=0.99
    )
    client_timeout: float = _key(0.0, "seconds that a client may work on a message; 0 = no limit", low=0, high=LARGEST)
    on_client_failure: str = _choice(
        "stop", "where one raises, is late or sends what cannot be used: end the run, or go on", "stop", "skip"
    )
    sharding: str = _choice("classes", "how clients divide the data", "iid", "classes", "dirichlet")
    classes_per_client: int = _key(2, "classes per client, Nc, under sharding = classes", low=1)
    dirichlet_alpha: float = _key(
        1.0,
        "concentration α under sharding = dirichlet: class shares ~ Dir(α p), p those of all data",
        low=0,
        high=LARGEST,
        exclusive_low=True,
    )
    num_rounds: int = _key(24, "communication rounds; epochs under strategy = centralized", low=1)
    server_lr: float = _key(
        1.0, "step of the server along the aggregated task vector", low=0, high=LARGEST, exclusive_low=True
    )
    task_vector_bank: str = _choice(
        "off",
        "average over every client's newest task vector, kept in this type, and not this round's alone",
        "off",
        "float32",
        "bfloat16",
    )
    bank_start: str = _choice(
        "at-once",
        "task-vector-bank: the server moves from the first round, or stays until every client was heard",
        "at-once",
        "all-heard",
    )
    bank_decay: float = _key(1.0, "task-vector-bank: factor per round on what is not new", low=0, high=1)
    # of single strategies
    proximal_mu: float = _key(0.0, "FedProx: μ of (μ/2)‖θ − θ_t‖² in the local loss", low=0, high=LARGEST)
    server_momentum: float = _key(0.9, "fedavgm: momentum of the server", low=0, high=1)
    server_beta1: float = _key(0.9, "fedadam, fedyogi: decay β₁ of the mean update", low=0, high=1)
    server_beta2: float = _key(0.99, "fedadam, fedyogi: decay β₂ of the mean squared update", low=0, high=1)
    server_tau: float = _key(
        1e-3, "fedadam, fedyogi: adaptivity τ, added to the root", low=0, high=LARGEST, exclusive_low=True
    )
    gma_threshold: float = _key(0.4, "fedgma: agreement on a sign, ρ, from which an entry is not damped", low=0, high=1)
    trimmed_share: float = _key(
        0.1, "trimmed-mean: share β of values dropped at each end; krum: of attackers", low=0, high=0.49
    )
    clipping_radius: float | str = _auto_number("cclip: radius ρ; auto = the median distance of the round's replies")
    clipping_iterations: int = _key(1, "cclip: iterations per round", low=1, high=1000)
    clipping_start: str = _choice("zero", "cclip: where each round's iterations start", "zero", "previous")
    gram_anchor: float = _key(
        0.0, "gram-anchored: γ, weight of the clients that are not in the round", low=0, high=LARGEST
    )
    gram_epsilon: float = _key(
        0.0, "gram-anchored: ε, as a share of the mean factor over a layer's updated entries", low=0, high=LARGEST
    )
    personal_parameters: str = _key(
        "*norm*, *.ls1.*, *.ls2.*", "fedbn: what stays with each client: comma-separated names or patterns with *"
    )
    # groups and clusters of clients
    client_groups: str = _choice(
        "none",
        "how groups of clients see images: turned by 180°; by 0, 90, 180, 270°; grey levels inverted",
        "none",
        "half-turn",
        "rotations",
        "inverted",
    )
    cluster_start_noise: float = _key(
        0.1, "br-ifca on images: noise on each cluster's first model, relative to its weights", low=0, high=1
    )
    num_clusters: int = _key(3, "fed-em, br-ifca: clusters, K", low=1, high=1000)
    cluster_rule: str = _choice("trimmed-mean", "br-ifca: aggregation within a cluster", *CLUSTER_RULES)
    byzantine_fraction: float = _key(0.0, "share α of Byzantine clients in every cluster", low=0, high=0.5)
    attack: str = _choice("sign-flip", "what Byzantine clients do", *ATTACKS)
    attack_scale: float = _key(10.0, "factor of sign-flip and inner-product", low=0, high=LARGEST)
    attack_placement: str = _choice(
        "spread", "regression data: attackers report to their own cluster, or all to the first", "spread", "one-cluster"
    )
    # regression data
    dimension: int = _key(10, "inputs of the regression, d", low=1, high=100_000)
    examples_per_client: int = _key(10, "points of each client, n", low=1, high=1_000_000)
    noise: float = _key(0.5, "standard deviation of the outputs' noise, σ", low=0, high=LARGEST, exclusive_low=True)
    cluster_centres: str = _choice(
        "equidistant", "true parameters: at equal distances, or drawn from {0, 1}^d", "equidistant", "bernoulli"
    )
    cluster_sizes: str = _choice("random", "clients draw their cluster, or are dealt out in turn", "random", "equal")
    separation: float = _key(
        1.0, "equidistant: distance between true parameters, Δ_min", low=0, high=LARGEST, exclusive_low=True
    )
    farthest_separation: float = _key(0.0, "distance Δ_max of the last from the others; 0 = Δ_min", low=0, high=LARGEST)
    start: str = _choice("ball", "first estimates: in a ball around each truth, or drawn anew", "ball", "random")
    start_radius: float = _key(0.25, "radius of that ball, in units of Δ_min", low=0, high=LARGEST)
    tolerance: float = _key(1e-6, "fed-em: stop when no estimate moves by more", low=0, high=LARGEST)
    clients_at_once: int = _key(
        1, "sequential engine: clients computed together; 0 = all; numbers agree to rounding", low=0
    )
    # local training
    local_loss: str = _choice(
        "cross-entropy", "squared: ½‖ridge scores − one-hot label‖², bounded targets", "cross-entropy", "squared"
    )
    local_steps: int = _key(4, "SGDM steps per client and round, J", low=1)
    local_steps_min: int = _key(0, "with local-steps-max: clients draw their own J; 0 = off", low=0)
    local_steps_max: int = _key(0, "see local-steps-min", low=0)
    batch_size: int = _key(16, "examples per local step", low=1)
    learning_rate: float | str = _auto_number(
        "peak learning rate of the clients; auto = one that validation chose before for such a run, where one is known",
        exclusive_low=False,
    )
    momentum: float = _key(0.9, "SGDM momentum; a client's starts at zero in every round", low=0, high=1)
    weight_decay: float = _key(0.0, "L2 penalty", low=0, high=LARGEST)
    dampening: float = _key(0.0, "SGDM dampening", low=0, high=1)
    nesterov: bool = _key(False, "Nesterov momentum")
    clip_norm: float = _key(0.0, "largest 2-norm of the updated weights' gradient; 0 = off", low=0, high=LARGEST)
    schedule: str = _choice("cosine", "of the learning rate over rounds", *SCHEDULES)
    warmup_rounds: int = _key(0, "rounds of linear warm-up", low=0)
    # running
    engine: str = _choice("sequential", "in this process, or on Flower's SuperNodes", "sequential", "flower")
    device: str = _key("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int = _key(
        1, "CPU threads of torch, best 1 for tiny models; 0 = every core this process may use", low=0, high=1024
    )
    precision: str = _choice(
        AUTO,
        "arithmetic of forward and backward; auto = bf16 on a GPU that has it (fp16 on an older one), fp32 on a CPU",
        AUTO,
        "fp32",
        "tf32",
        "bf16",
        "fp16",
    )
    compile: str = _choice(
        AUTO,
        "torch.compile of training and evaluation, by its modes; auto = default on a GPU that has bf16, else off",
        AUTO,
        "off",
        "default",
        "reduce-overhead",
        "max-autotune",
    )
    optimizer_kernels: str = _choice(
        "auto", "of SGDM; auto = as torch chooses on a GPU, fused on a CPU", "auto", "foreach", "fused"
    )
    evaluate_every: int = _key(2, "rounds between evaluations; the last round always is", low=1)
    checkpoint_every: int = _key(20, "rounds between checkpoints", low=1)
    save_model: bool = _key(True, "export the final model as model.safetensors")
    draw_curves: bool = _key(True, "draw curves.png and curves.pdf at the end")
    tensorboard: bool = _key(False, "also log the rows to TensorBoard, in the run's folder")
    wandb: bool = _key(False, "also log the rows to Weights & Biases")
    resume: bool = _key(True, "continue an unfinished run of the same configuration")
    results_dir: str = _key("", "where results go; empty = results/ of the installed checkout")
    run_name: str = _key("", "folder of the run; empty = named after its settings")
    seed: int = _key(0, "of the federation: sampling, batches, augmentation", low=0, high=2**53)
    shard_seed: int = _key(0, "of the assignment of data to clients", low=0, high=2**53)

    def __post_init__(self) -> None:
        for key, rule in rules().items():
            name = snake(key)
            object.__setattr__(self, name, rule.check(key, getattr(self, name)))
        for contradiction, message in contradictions(self):
            if contradiction:
                raise ConfigError(message)

    @property
    def masked(self) -> bool:
        """Whether only a part of the weights is updated."""
        return self.mask_rule != "none"

    @property
    def scored(self) -> bool:
        """Whether the mask comes from sensitivities, and so needs data."""
        return self.mask_rule in SENSITIVITY_RULES

    @property
    def peak_rate(self) -> float:
        """`learning_rate` as a number.

        Raises:
            ValueError: it is still "auto" (`learning_rates.with_known_rate` comes first).
        """
        return float(self.learning_rate)

    @property
    def sampled_clients(self) -> int:
        """Clients per round: C·K rounded half up, at least one."""
        return max(1, math.floor(self.participation * self.num_clients + 0.5))

    def to_run_config(self) -> dict[str, Scalar]:
        """All settings as Flower's flat kebab-case mapping."""
        return {kebab(name): value for name, value in dataclasses.asdict(self).items()}

    def fingerprint(self) -> str:
        """Eight hexadecimal digits of the settings that decide the numbers (`IDENTITY_KEYS`), the defaults left out.

        So a run keeps its name when a later version of this package has more settings. A folder's run.json holds them
        all, and `differing_keys` finds what a name does not tell.
        """
        decisive = {key: value for key, value in self.to_run_config().items() if key in IDENTITY_KEYS}
        identity = {key: value for key, value in decisive.items() if _settled(key, value) != RECORDED_DEFAULTS[key]}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]

    def differing_keys(self, other: Mapping[str, Scalar]) -> list[str]:
        """Keys of `IDENTITY_KEYS`, but for `SWITCHABLE_KEYS`, on which the run-config mapping `other` disagrees.

        A key that `other` lacks counts as its default: what a version without that setting did.
        """
        mine = self.to_run_config()
        compared = IDENTITY_KEYS - SWITCHABLE_KEYS
        return [
            key
            for key in mine
            if key in compared and _settled(key, other.get(key, RECORDED_DEFAULTS[key])) != _settled(key, mine[key])
        ]

    def extends(self, other: Mapping[str, Scalar], done: int) -> bool:
        """Whether a run of the settings `other`, `done` rounds of which are there, can go on exactly as one of these.

        The settings differ in `num-rounds` at most, and no round so far depended on how many there were to be.
        """
        before = int(other.get("num-rounds", RECORDED_DEFAULTS["num-rounds"]))
        same_length = before == self.num_rounds
        return (
            not set(self.differing_keys(other)) - {"num-rounds"}
            and done <= self.num_rounds
            and (same_length or (
                done < self.num_rounds
                and self.schedule in LENGTH_FREE_SCHEDULES
                and self.dataset != REGRESSION
                and min(before, self.num_rounds) > self.head_rounds
                # The head was solved anew after the last round, whatever its number.
                and not (self.ridge_refresh and done == before and done % self.ridge_refresh)
            ))
        )  # fmt: skip


def snake(key: str) -> str:
    """`num-clients` to `num_clients`."""
    return key.replace("-", "_")


def kebab(name: str) -> str:
    """`num_clients` to `num-clients`."""
    return name.replace("_", "-")


def rules() -> dict[str, Rule]:
    """The rule of every key, by its kebab-case name, in order."""
    return {kebab(field.name): field.metadata["rule"] for field in dataclasses.fields(Config)}


# Where a run lives, how often it saves and which engine carries it do not change a number; every other key does.
OPERATIONAL_KEYS = frozenset(
    {"data-dir", "download", "results-dir", "run-name", "resume"}
    | {"client-timeout"}
    | {"engine", "checkpoint-every", "save-model", "draw-curves", "tensorboard", "wandb"}
)
IDENTITY_KEYS = frozenset(rules()) - OPERATIONAL_KEYS
# An interrupted run may go on with another value of these; they decide single rows, or rounding, and not the course.
SWITCHABLE_KEYS = frozenset({"on-client-failure", "evaluate-every", "device"})
LENGTH_FREE_SCHEDULES = ("constant", "plateau")  # whose rates do not depend on the number of rounds
CHOSEN_KEYS = frozenset({"seed", "shard-seed", "learning-rate"})  # of a single run, not of an arm of a study
# What a setting that a record or a name lacks was: today's defaults, and what they were before "auto" was one.
RECORDED_DEFAULTS: dict[str, Any] = {kebab(field.name): field.default for field in dataclasses.fields(Config)} | {
    "learning-rate": 1.0,
    "precision": "fp32",
    "compile": "off",
}


def _settled(key: str, value: Scalar) -> Scalar:
    """`value`, or for "auto" what it stands for where nothing has been resolved: what a version without it did."""
    return RECORDED_DEFAULTS[key] if value == AUTO else value


def from_mapping(settings: Mapping[str, object]) -> Config:
    """Build a Config from kebab- or snake-case keys.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a wrong type or value, a contradiction.
    """
    known = rules()
    named: dict[str, Any] = {}
    for key, value in _by_kebab_key(settings).items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f'did you mean "{nearest[0]}"?' if nearest else "known keys: " + ", ".join(known)
            raise ConfigError(f"{shown(key)} is not a setting; {hint}")
        named[snake(key)] = value
    return Config(**named)


def _by_kebab_key(settings: Mapping[str, object]) -> dict[str, object]:
    """Raises ConfigError where a key is no string, or given in both spellings."""
    named: dict[str, object] = {}
    for key, value in settings.items():
        if not isinstance(key, str):
            raise ConfigError(f"{shown(key)} is not a setting: keys are strings.")
        if kebab(key) in named:
            raise ConfigError(f"{shown(kebab(key))} is given twice.")
        named[kebab(key)] = value
    return named


def load(
    path: Path | str | None = None, overrides: Mapping[str, object] | None = None, used: Iterable[str] = ()
) -> Config:
    """Defaults, then the TOML file at `path`, then `overrides` (kebab- or snake-case keys).

    Args:
        path: of a settings file, or the folder of a run, whose settings are then taken but for its name.
        used: kebab-case keys that the caller itself has a use for, whether or not a run has.

    Raises:
        ConfigError: the file cannot be read, what `from_mapping` raises, or a key that was given has no effect: an
            override by the final settings, one of the file by these and by the file alone. What an override leaves
            the file's keys without an effect is no error.
    """
    in_file = _by_kebab_key(_read(path)) if path is not None else {}
    recorded = path is not None and Path(path).expanduser().is_dir()  # all keys, whether they have an effect or not
    given = _by_kebab_key(overrides or {})
    config = from_mapping(in_file | given)
    refuse_idle(config, given.keys() - set(used))
    found = {} if recorded else idle_by_itself(config, in_file, in_file.keys() - given.keys() - set(used))
    if found:
        raise ConfigError(f"{path}: {' '.join(found.values())}")
    return config


def from_run_config(settings: Mapping[str, object]) -> Config:
    """`from_mapping` of Flower's run-config, which holds pyproject.toml's defaults and what was given in their place.

    Raises:
        ConfigError: as `from_mapping`, or a key that is not at its default has no effect.
    """
    config = from_mapping(settings)
    defaults = Config().to_run_config()
    refuse_idle(config, [key for key, value in config.to_run_config().items() if value != defaults[key]])
    return config


def idle_by_itself(config: Config, settings: Mapping[str, object], keys: Iterable[str]) -> dict[str, str]:
    """Those of `keys` that have no effect in `config`, and had none by `settings` over the defaults; why, in words.

    Settings that others were to complete may contradict one another by themselves.
    """
    alone = object.__new__(Config)
    for key, rule in rules().items():
        value = RECORDED_DEFAULTS[key]
        with contextlib.suppress(ConfigError):  # an override has taken the place of what is not accepted
            value = rule.check(key, settings.get(key, value))
        object.__setattr__(alone, snake(key), value)
    found = ((key, idle_reason(alone, key)) for key in sorted(keys) if idle_reason(config, key) is not None)
    return {key: explain(alone, key, idle) for key, idle in found if idle is not None}


def _read(path: Path | str) -> dict[str, object]:
    try:
        if Path(path).expanduser().is_dir():
            record = json.loads((Path(path).expanduser() / "run.json").read_text(encoding="utf-8"))["config"]
            return {key: value for key, value in dict(record).items() if key != "run-name"}
        return tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        named = str(path) if str(path).isprintable() else ascii(str(path))
        raise ConfigError(f"Cannot read the configuration {named}: {error}.") from error


def parse_overrides(arguments: Iterable[str]) -> dict[str, object]:
    """Command-line `key=value` words; the value is a TOML scalar, or else taken as a string."""
    overrides: dict[str, object] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"{shown(argument)} is not of the form key=value (for example num-rounds=10).")
        value: object = text
        with contextlib.suppress(ValueError, RecursionError):
            parsed = tomllib.loads(f"value = {text}")
            value = parsed["value"] if len(parsed) == 1 else text
        if kebab(key) in overrides:
            raise ConfigError(f"{shown(kebab(key))} is given twice on the command line.")
        overrides[kebab(key)] = value
    return overrides
