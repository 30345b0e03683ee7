"""Every setting: its heading, name, default, rule, symbol and words, in one place."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fl_taskarith.config.choices import ATTACKS, CLUSTER_RULES, REGRESSION
from fl_taskarith.config.rule import AUTO, LARGEST, Rule, auto_number, choice, key

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")  # torch.compile's
STRATEGIES = tuple(  # a file each; listed and not imported, for they need Flower and settings do not
    sorted(path.stem.replace("_", "-") for path in Path(__file__).parents[1].joinpath("strategies").glob("[a-z]*.py"))
)
STRATEGY_NAMES = {
    "fedavg": "FedAvg", "fedprox": "FedProx", "fednova": "FedNova", "scaffold": "SCAFFOLD", "fedgma": "FedGMA",
    "fedavgm": "FedAvgM", "fedadam": "FedAdam", "fedyogi": "FedYogi", "fedbn": "FedBN", "cclip": "CCLIP",
    "krum": "Krum", "trimmed-mean": "trimmed mean", "geometric-median": "geometric median",
    "gram-anchored": "Gram-anchored averaging",
}  # fmt: skip
SCHEDULES = ("constant", "cosine", "step", "exponential", "plateau")
SENSITIVITY_RULES = ("least-sensitive", "most-sensitive")
DATA_FREE_RULES = ("lowest-magnitude", "highest-magnitude", "random")
MASK_RULES = (*SENSITIVITY_RULES, *DATA_FREE_RULES)


@dataclass(frozen=True)
class DataSettings:
    """Which images there are, and how they are split."""

    dataset: str = choice(
        "digits",
        "data set (synthetic: for benchmarks and tests)",
        "digits",
        "cifar100",
        "synthetic",
        REGRESSION,
        words="{}",
    )
    data_dir: str = key("~/.cache/fl-taskarith", "folder that holds (or receives) the data set")
    download: bool = key(True, "download data and weights that are missing")
    train_subset: int = key(0, "training images used, stratified; 0 = all that remain", low=0)
    test_subset: int = key(0, "test images used, stratified; 0 = all", low=0)
    validation_size: int = key(180, "images carved from training for choices", low=0)
    calibration_size: int = key(100, "images carved from training for masks", low=0)
    augmentation: str = choice(
        "auto", "of training batches; auto = the data set's own", "auto", "none", "flip", "crop", "crop-flip"
    )


@dataclass(frozen=True)
class ModelSettings:
    """Which network is trained, and which part of it."""

    model: str = key("vit_glyph", "any timm VisionTransformer by name", words="{}")
    weights: str = key("pretrained", 'path of a .safetensors or .pth file, "pretrained" (timm), or "none" (random)')
    input_size: int = key(16, "side of the model's square input in pixels", low=1, high=4096)
    trainable: str = choice("backbone", "what clients train", "backbone", "head", "all")
    trainable_blocks: int = key(0, "train only the last n blocks (and the final norm); 0 = all", low=0)
    prefix_cache: str = choice(
        "off", "with trainable-blocks: keep the frozen blocks' tokens of every image", "off", "float16", "float32"
    )
    head: str = choice("ridge", "classifier: ridge (closed form) or linear (trained)", "ridge", "linear")
    head_rounds: int = key(0, "first rounds that train the head alone", low=0)
    ridge_lambda: float | str = auto_number("ridge penalty; auto = chosen on validation")
    logit_scale: float | str = auto_number("factor on ridge scores; auto = by validation cross-entropy")
    ridge_refresh: int = key(
        0, "rounds after which the ridge head is solved again from all clients' current features; 0 = never", low=0
    )


@dataclass(frozen=True)
class MaskSettings:
    """Which weights of the backbone are updated."""

    mask_rule: str = choice(
        "least-sensitive",
        "which backbone weights are updated; none = all of them",
        "none",
        *MASK_RULES,
        "file",
        words="{}",
        names={"none": "dense"},
    )
    density: float = key(
        0.1,
        "share of maskable weights that are updated",
        low=0,
        high=1,
        exclusive_low=True,
        symbol="d",
        words="density {}",
    )
    sensitivity_threshold: float = key(
        0.0, "largest (most-sensitive: smallest) sensitivity updated, in place of density; 0 = off", low=0, high=LARGEST
    )
    calibration_rounds: int = key(4, "rounds of scoring and dropping down to the density", low=1, high=1000, symbol="R")
    soft_zero: float = key(0.1, "factor on dropped weights while later rounds score; 1 = no damping", low=0, high=1)
    mask_source: str = choice(
        "server",
        "who scores: server (calibration split), clients (summed), or each client for a mask of its own",
        "server",
        "clients",
        "own",
    )
    calibration_per_client: int = key(0, "examples that each client scores; 0 = its whole shard", low=0)
    fisher_labels: str = choice("sampled", "labels of the Fisher information", "sampled", "true", "expected")
    fisher_score: str = choice("log-prob", "what the Fisher information differentiates", "log-prob", "logit")
    calibration_memory: float = key(2.0, "GiB for per-example gradients", low=0, high=1024, exclusive_low=True)
    mask_exclude: str = key("", "backbone parameters left as pretrained: comma-separated names or patterns with *")
    mask_file: str = key("", 'mask.safetensors to use under mask-rule = "file"')


@dataclass(frozen=True)
class FederationSettings:
    """Which clients there are, what data each has, and which of them take part in a round."""

    num_clients: int = key(50, "clients", low=1, high=1_000_000, symbol="K")
    participation: float = key(0.2, "share of clients sampled per round", low=0, high=1, exclusive_low=True, symbol="C")
    sampling: str = choice(
        "random",
        "of each round's clients: at random, or cyclic, in one random order that repeats",
        "random",
        "cyclic",
    )
    sharding: str = choice("classes", "how clients divide the data", "iid", "classes", "dirichlet")
    classes_per_client: int = key(2, "classes per client under sharding = classes", low=1, symbol="Nc")
    dirichlet_alpha: float = key(
        1.0,
        "concentration under sharding = dirichlet: class shares ~ Dir(α p), p those of all data",
        low=0,
        high=LARGEST,
        exclusive_low=True,
        symbol="α",
    )
    client_groups: str = choice(
        "none",
        "how groups of clients see images: turned by 180°; by 0, 90, 180, 270°; grey levels inverted",
        "none",
        "half-turn",
        "rotations",
        "inverted",
    )
    num_rounds: int = key(24, "communication rounds; epochs under strategy = centralized", low=1)
    dropout: float = key(
        0.0, "chance of each sampled client to drop out of a round; at least one stays", low=0, high=0.99
    )
    client_timeout: float = key(0.0, "seconds that a client may work on a message; 0 = no limit", low=0, high=LARGEST)
    on_client_failure: str = choice(
        "stop",
        "where a client raises, is late or sends what cannot be used: end the run, or go on without it",
        "stop",
        "skip",
    )
    seed: int = key(0, "of the federation: sampling, batches, augmentation", low=0, high=2**53)
    shard_seed: int = key(0, "of the assignment of data to clients", low=0, high=2**53)


@dataclass(frozen=True)
class AlgorithmSettings:
    """How the server aggregates, and what single strategies, attacks and the task-vector bank take."""

    strategy: str = choice(
        "fedavg",
        "aggregation algorithm, or no clients at all",
        *STRATEGIES,
        "centralized",
        importable=True,
        words="{}",
        names=STRATEGY_NAMES,
    )
    server_lr: float = key(
        1.0, "step of the server along the aggregated task vector", low=0, high=LARGEST, exclusive_low=True
    )
    task_vector_bank: str = choice(
        "off",
        "average over every client's newest task vector, kept in this type, and not this round's alone",
        "off",
        "float32",
        "bfloat16",
    )
    bank_start: str = choice(
        "at-once",
        "task-vector-bank: the server moves from the first round, or only once every client has reported",
        "at-once",
        "all-heard",
    )
    bank_decay: float = key(1.0, "task-vector-bank: factor per round on what is not new", low=0, high=1)
    proximal_mu: float = key(0.0, "FedProx: (μ/2)‖θ − θ_t‖² in the local loss", low=0, high=LARGEST, symbol="μ")
    server_momentum: float = key(0.9, "fedavgm: momentum of the server", low=0, high=1)
    server_beta1: float = key(0.9, "fedadam, fedyogi: decay of the mean update", low=0, high=1, symbol="β₁")
    server_beta2: float = key(0.99, "fedadam, fedyogi: decay of the mean squared update", low=0, high=1, symbol="β₂")
    server_tau: float = key(
        1e-3,
        "fedadam, fedyogi: adaptivity, added to the root",
        low=0,
        high=LARGEST,
        exclusive_low=True,
        symbol="τ",
    )
    gma_threshold: float = key(
        0.4, "fedgma: agreement on a sign from which an entry is not damped", low=0, high=1, symbol="ρ"
    )
    trimmed_share: float = key(
        0.1, "trimmed-mean: share of values dropped at each end; krum: of attackers", low=0, high=0.49, symbol="β"
    )
    clipping_radius: float | str = auto_number(
        "cclip: radius; auto = the median distance of the round's replies", symbol="ρ"
    )
    clipping_iterations: int = key(1, "cclip: iterations per round", low=1, high=1000)
    clipping_start: str = choice("zero", "cclip: where each round's iterations start", "zero", "previous")
    gram_anchor: float = key(
        0.0, "gram-anchored: weight of the clients that are not in the round", low=0, high=LARGEST, symbol="γ"
    )
    gram_epsilon: float = key(
        0.0,
        "gram-anchored: as a share of the mean factor over a layer's updated entries",
        low=0,
        high=LARGEST,
        symbol="ε",
    )
    personal_parameters: str = key(
        "*norm*, *.ls1.*, *.ls2.*", "fedbn: what stays with each client: comma-separated names or patterns with *"
    )
    byzantine_fraction: float = key(0.0, "share of Byzantine clients in every cluster", low=0, high=0.5, symbol="α")
    attack: str = choice("sign-flip", "what Byzantine clients do", *ATTACKS)
    attack_scale: float = key(10.0, "factor of sign-flip and inner-product", low=0, high=LARGEST)


@dataclass(frozen=True)
class TrainingSettings:
    """What a client does in a round."""

    local_steps: int = key(4, "SGDM steps per client and round", low=1, symbol="J")
    local_steps_min: int = key(0, "with local-steps-max: clients draw their own J; 0 = off", low=0)
    local_steps_max: int = key(0, "see local-steps-min", low=0)
    batch_size: int = key(16, "examples per local step", low=1)
    learning_rate: float | str = auto_number(
        "peak learning rate of the clients; auto = one that validation chose before for such a run, where one is known",
        exclusive_low=False,
        symbol="η",
        words="lr {}",
    )
    schedule: str = choice("cosine", "of the learning rate over rounds", *SCHEDULES, words="{}")
    warmup_rounds: int = key(0, "rounds of linear warm-up", low=0)
    momentum: float = key(0.9, "SGDM momentum; a client's starts at zero in every round", low=0, high=1)
    weight_decay: float = key(0.0, "L2 penalty", low=0, high=LARGEST, words="weight decay {}")
    dampening: float = key(0.0, "SGDM dampening", low=0, high=1)
    nesterov: bool = key(False, "Nesterov momentum")
    clip_norm: float = key(0.0, "largest 2-norm of the updated weights' gradient; 0 = off", low=0, high=LARGEST)
    local_loss: str = choice(
        "cross-entropy", "squared: ½‖ridge scores − one-hot label‖², bounded targets", "cross-entropy", "squared"
    )


@dataclass(frozen=True)
class MachineSettings:
    """What computes it, and in which arithmetic."""

    engine: str = choice("sequential", "in this process, or on Flower's SuperNodes", "sequential", "flower")
    clients_at_once: int = key(
        1, "sequential engine: clients computed together; 0 = all; numbers agree to rounding", low=0
    )
    device: str = key("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int = key(
        1, "CPU threads of torch, best 1 for tiny models; 0 = every core this process may use", low=0, high=1024
    )
    precision: str = choice(
        AUTO,
        "arithmetic of forward and backward; auto = bf16 on a GPU that has it (fp16 on an older one), fp32 on a CPU",
        AUTO,
        "fp32",
        "tf32",
        "bf16",
        "fp16",
    )
    compile: str = choice(
        AUTO,
        "torch.compile of training and evaluation, by its modes; auto = default on a GPU that has bf16, else off",
        AUTO,
        "off",
        *COMPILE_MODES,
    )
    optimizer_kernels: str = choice(
        "auto", "of SGDM; auto = as torch chooses on a GPU, fused on a CPU", "auto", "foreach", "fused"
    )


@dataclass(frozen=True)
class OutputSettings:
    """What is measured and saved, and where."""

    evaluate_every: int = key(2, "rounds between evaluations; the last round always is", low=1)
    checkpoint_every: int = key(20, "rounds between checkpoints", low=1)
    save_model: bool = key(True, "export the final model as model.safetensors")
    draw_curves: bool = key(True, "draw curves.png and curves.pdf at the end")
    tensorboard: bool = key(False, "also log the rows to TensorBoard, in the run's folder")
    wandb: bool = key(False, "also log the rows to Weights & Biases")
    resume: bool = key(True, "continue an unfinished run of the same configuration")
    results_dir: str = key("", "where results go; empty = results/ of the installed checkout")
    run_name: str = key("", "folder of the run; empty = named after its settings")


@dataclass(frozen=True)
class ClusterSettings:
    """Federated EM and Byzantine-robust IFCA, and the regression data made for them."""

    num_clusters: int = key(3, "fed-em, br-ifca: clusters", low=1, high=1000, symbol="K")
    cluster_rule: str = choice("trimmed-mean", "br-ifca: aggregation within a cluster", *CLUSTER_RULES)
    cluster_start_noise: float = key(
        0.1, "br-ifca on images: noise on each cluster's first model, relative to its weights", low=0, high=1
    )
    attack_placement: str = choice(
        "spread", "regression data: attackers report to their own cluster, or all to the first", "spread", "one-cluster"
    )
    dimension: int = key(10, "inputs of the regression", low=1, high=100_000, symbol="d")
    examples_per_client: int = key(10, "points of each client", low=1, high=1_000_000, symbol="n")
    noise: float = key(
        0.5, "standard deviation of the outputs' noise", low=0, high=LARGEST, exclusive_low=True, symbol="σ"
    )
    cluster_centres: str = choice(
        "equidistant", "true parameters: at equal distances, or drawn from {0, 1}^d", "equidistant", "bernoulli"
    )
    cluster_sizes: str = choice("random", "clients draw their cluster, or are dealt out in turn", "random", "equal")
    separation: float = key(
        1.0,
        "equidistant: distance between true parameters",
        low=0,
        high=LARGEST,
        exclusive_low=True,
        symbol="Δ_min",
    )
    farthest_separation: float = key(
        0.0, "distance of the last from the others; 0 = Δ_min", low=0, high=LARGEST, symbol="Δ_max"
    )
    start: str = choice("ball", "first estimates: in a ball around each truth, or random", "ball", "random")
    start_radius: float = key(0.25, "radius of that ball, in units of Δ_min", low=0, high=LARGEST)
    tolerance: float = key(1e-6, "fed-em: stop when no estimate moves by more", low=0, high=LARGEST)


HEADINGS = {
    "data": DataSettings,
    "model": ModelSettings,
    "mask": MaskSettings,
    "federation": FederationSettings,
    "algorithm": AlgorithmSettings,
    "training": TrainingSettings,
    "machine": MachineSettings,
    "output": OutputSettings,
    "regression clusters": ClusterSettings,
}


@dataclass(frozen=True)
class Settings(
    ClusterSettings,
    OutputSettings,
    MachineSettings,
    TrainingSettings,
    AlgorithmSettings,
    FederationSettings,
    MaskSettings,
    ModelSettings,
    DataSettings,  # whose fields come first: a dataclass takes those of its bases from the last to the first
):
    """Every setting of a run with its rule, unchecked (see `Config`).

    The defaults are the quick start; pyproject.toml repeats them for Flower.
    """

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


def snake(key: str) -> str:
    """`num-clients` to `num_clients`."""
    return key.replace("-", "_")


def kebab(name: str) -> str:
    """`num_clients` to `num-clients`."""
    return name.replace("_", "-")


@cache
def rules() -> dict[str, Rule]:
    """Return the rule of every key, by its kebab-case name, heading by heading."""
    return {
        kebab(field.name): dataclasses.replace(field.metadata["rule"], heading=heading)
        for heading, part in HEADINGS.items()
        for field in dataclasses.fields(part)
    }
