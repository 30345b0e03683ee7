"""Every setting: its name, its default, what it may hold and what it means, in one place."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from fl_taskarith.config.choices import ATTACKS, CLUSTER_RULES, IMAGE_DATASETS, REGRESSION
from fl_taskarith.config.rule import AUTO, LARGEST, Rule
from fl_taskarith.config.rule import auto_number as _auto_number
from fl_taskarith.config.rule import choice as _choice
from fl_taskarith.config.rule import key as _key

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")  # torch.compile's
STRATEGIES = tuple(  # a file each; listed and not imported, for they need Flower and settings do not
    sorted(path.stem.replace("_", "-") for path in Path(__file__).parents[1].joinpath("strategies").glob("[a-z]*.py"))
)
SCHEDULES = ("constant", "cosine", "step", "exponential", "plateau")
SENSITIVITY_RULES = ("least-sensitive", "most-sensitive")
DATA_FREE_RULES = ("lowest-magnitude", "highest-magnitude", "random")
MASK_RULES = (*SENSITIVITY_RULES, *DATA_FREE_RULES)


@dataclass(frozen=True)
class Settings:
    """Every setting of a run with its rule, unchecked (see `Config`).

    The defaults are the quick start; pyproject.toml repeats them for Flower.
    """

    # data
    dataset: str = _choice(
        "digits", "data set (synthetic: for benchmarks and tests)", *IMAGE_DATASETS, REGRESSION, importable=True
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


def rules() -> dict[str, Rule]:
    """The rule of every key, by its kebab-case name, in order."""
    return {kebab(field.name): field.metadata["rule"] for field in dataclasses.fields(Settings)}
