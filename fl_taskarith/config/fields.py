"""Every setting: its heading, name, default, rule, symbol and words, in one place."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from fl_taskarith.config.choices import ATTACKS, CLUSTER_RULES, IMAGE_DATASETS, MERGE_RULES, REGRESSION
from fl_taskarith.config.rule import AUTO, Rule, key
from fl_taskarith.errors import ConfigError
from fl_taskarith.masking import rules as mask_rules

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")  # torch.compile's
STRATEGIES = tuple(  # a file each; listed and not imported, for they need Flower and settings do not
    sorted(path.stem.replace("_", "-") for path in Path(__file__).parents[1].joinpath("strategies").glob("[a-z]*.py"))
)
STRATEGY_NAMES = {
    "fedavg": "FedAvg", "fedprox": "FedProx", "fednova": "FedNova", "scaffold": "SCAFFOLD", "fedgma": "FedGMA",
    "fedavgm": "FedAvgM", "fedadam": "FedAdam", "fedyogi": "FedYogi", "fedbn": "FedBN", "cclip": "CCLIP",
    "krum": "Krum", "trimmed-mean": "trimmed mean", "geometric-median": "geometric median",
    "gram-anchored": "Gram-anchored averaging", "covariance": "covariance aggregation",
    "covariance-momentum": "covariance aggregation with momentum", "merge-rule": "merge rule",
    "ghbm": "GHBM", "local-ghbm": "LocalGHBM", "fedhbm": "FedHBM", "fedcm": "FedCM", "fedvarp": "FedVARP",
    "fedexp": "FedExP",
}  # fmt: skip
SCHEDULES = ("constant", "cosine", "step", "exponential", "plateau")
SENSITIVITY_RULES = tuple(name for name, rule in mask_rules.RULES.items() if rule.scores is None)
DATA_FREE_RULES = tuple(name for name, rule in mask_rules.RULES.items() if rule.scores is not None)
MASK_RULES = (*SENSITIVITY_RULES, *DATA_FREE_RULES)


HEADINGS = {  # with an example of each
    "data": "dataset=cifar100 train-subset=20000",
    "model": "model=vit_small_patch14_dinov2 input-size=98 trainable-blocks=2",
    "mask": "mask-rule=most-sensitive density=0.05",
    "federation": "num-clients=100 participation=0.1 classes-per-client=1",
    "algorithm": "strategy=fedprox proximal-mu=0.1",
    "training": "local-steps=8 learning-rate=0.1 schedule=constant",
    "machine": "device=cuda clients-at-once=0",
    "output": "run-name=mine results-dir=~/results",
    "regression clusters": "dataset=linear-regression strategy=fed-em num-clusters=5",
}
DATA, MODEL, MASK, FEDERATION, ALGORITHM, TRAINING, MACHINE, OUTPUT, CLUSTERS = (partial(key, h) for h in HEADINGS)


@dataclass(frozen=True)
class Settings:
    """Every setting of a run with its rule, unchecked (see `Config`): its default, what it accepts, what it means.

    The defaults are the quick start; pyproject.toml repeats them for Flower. Tables list settings in this order.
    """

    dataset: str = DATA(
        "digits",
        (*IMAGE_DATASETS, REGRESSION),
        "data set (synthetic: for benchmarks and tests)",
        importable=True,
        words="{}",
    )
    data_dir: str = DATA("~/.cache/fl-taskarith", None, "folder that holds (or receives) the data set")
    download: bool = DATA(True, None, "download data and weights that are missing")
    train_subset: int = DATA(0, "[0, inf)", "training images used, stratified; 0 = all that remain")
    test_subset: int = DATA(0, "[0, inf)", "test images used, stratified; 0 = all")
    validation_size: int = DATA(180, "[0, inf)", "images carved from training for choices")
    calibration_size: int = DATA(100, "[0, inf)", "images carved from training for masks")
    augmentation: str = DATA("auto", "auto | none | flip | crop | crop-flip", "in training; auto = the data set's own")
    model: str = MODEL(
        "vit_glyph",
        None,
        'any timm VisionTransformer or Eva (DINOv3, EUPE) by name, or "module:name" that registers one',
        words="{}",
        importable=True,
    )
    weights: str = MODEL("pretrained", None, 'a .safetensors or .pth file, "pretrained" (timm), or "none" (random)')
    input_size: int = MODEL(16, "[1, 4096]", "side of the model's square input in pixels")
    trainable: str = MODEL("backbone", "backbone | head | all", "what clients train")
    trainable_blocks: int = MODEL(0, "[0, inf)", "train only the last n blocks (and the final norm); 0 = all")
    prefix_cache: str = MODEL(
        "off", "off | float16 | float32", "with trainable-blocks: keep the frozen blocks' tokens of every image"
    )
    head: str = MODEL(
        "ridge",
        "ridge | lda | ncm | linear",
        "classifier: solved (ridge, lda, or ncm, the nearest class mean) or linear, which is trained",
        names={"lda": "LDA", "ncm": "nearest-class-mean"},
    )
    head_rounds: int = MODEL(0, "[0, inf)", "first rounds that train the head alone")
    ridge_lambda: float | str = MODEL(AUTO, "(0, 1e6]", "ridge penalty; auto = chosen on validation")
    lda_shrinkage: float | str = MODEL(
        AUTO, "(0, 1]", "of LDA's covariance towards a multiple of the identity; auto = chosen on validation"
    )
    logit_scale: float | str = MODEL(AUTO, "(0, 1e6]", "factor on a solved head's scores; auto = chosen on validation")
    ridge_refresh: int = MODEL(
        0, "[0, inf)", "rounds after which a solved head is solved again from all clients' current features; 0 = never"
    )
    mask_rule: str = MASK(
        "least-sensitive",
        ("none", *MASK_RULES, "file"),
        "which backbone weights are updated; none = all of them",
        importable=True,
        words="{}",
        names={"none": "dense"},
    )
    density: float = MASK(0.1, "(0, 1]", "share of maskable weights that are updated", symbol="d", words="density {}")
    sensitivity_threshold: float = MASK(
        0.0, "[0, 1e6]", "largest (most-sensitive, most-salient: smallest) score updated, in place of density; 0 = off"
    )
    calibration_rounds: int = MASK(4, "[1, 1000]", "rounds of scoring and dropping down to the density", symbol="R")
    soft_zero: float = MASK(0.1, "[0, 1]", "factor on dropped weights while later rounds score; 1 = no damping")
    mask_source: str = MASK(
        "server",
        "server | clients | own",
        "who scores: server (calibration split), clients (summed), or each client for a mask of its own",
    )
    calibration_per_client: int = MASK(0, "[0, inf)", "examples that each client scores; 0 = its whole shard")
    fisher_labels: str = MASK("sampled", "sampled | true | expected", "labels of the Fisher information")
    fisher_score: str = MASK("log-prob", "log-prob | logit", "what the Fisher information differentiates")
    calibration_memory: float = MASK(2.0, "(0, 1024]", "GiB for per-example gradients")
    mask_exclude: str = MASK("", None, "parameters left as pretrained: comma-separated names or patterns with *")
    mask_file: str = MASK("", None, 'mask.safetensors to use under mask-rule = "file"')
    strategy: str = ALGORITHM(
        "fedavg",
        (*STRATEGIES, "centralized"),
        "aggregation algorithm, or no clients at all",
        words="{}",
        names=STRATEGY_NAMES,
        importable=True,
    )
    num_clients: int = FEDERATION(50, "[1, 1e6]", "clients", symbol="K")
    participation: float = FEDERATION(0.2, "(0, 1]", "share of clients sampled per round", symbol="C")
    sampling: str = FEDERATION(
        "random", "random | cyclic", "of each round's clients: at random, or cyclic, in one random order that repeats"
    )
    dropout: float = FEDERATION(0.0, "[0, 0.99]", "chance that a sampled client leaves a round; at least one stays")
    client_timeout: float = FEDERATION(0.0, "[0, 1e6]", "seconds that a client may work on a message; 0 = no limit")
    on_client_failure: str = FEDERATION(
        "stop",
        "stop | skip",
        "where a client raises, is late or sends what cannot be used: end the run, or go on without it",
    )
    sharding: str = FEDERATION("classes", "iid | classes | dirichlet", "how clients divide the data")
    classes_per_client: int = FEDERATION(2, "[1, inf)", "classes per client under sharding = classes", symbol="Nc")
    dirichlet_alpha: float = FEDERATION(
        1.0,
        "(0, 1e6]",
        "concentration under sharding = dirichlet: class shares ~ Dir(α p), p those of all data",
        symbol="α",
    )
    num_rounds: int = FEDERATION(24, "[1, inf)", "communication rounds; epochs under strategy = centralized")
    server_lr: float = ALGORITHM(1.0, "(0, 1e6]", "step of the server along the aggregated task vector")
    task_vector_bank: str = ALGORITHM(
        "off",
        "off | float32 | bfloat16",
        "average over every client's newest task vector, kept in this type, and not this round's alone",
    )
    bank_start: str = ALGORITHM(
        "at-once",
        "at-once | all-heard",
        "task-vector-bank: the server moves from the first round, or only once every client has reported",
    )
    bank_decay: float = ALGORITHM(1.0, "[0, 1]", "task-vector-bank: factor on a weight per round of its age")
    proximal_mu: float = ALGORITHM(0.0, "[0, 1e6]", "FedProx: (μ/2)‖θ − θ_t‖² in the local loss", symbol="μ")
    server_momentum: float = ALGORITHM(
        0.9, "[0, 1]", "fedavgm, covariance-momentum: momentum of the server; ghbm, local-ghbm, fedhbm, fedcm: β"
    )
    momentum_rounds: int = ALGORITHM(
        0, "[0, 1000]", "ghbm: rounds that its momentum spans; 0 = until all clients have come by", symbol="τ"
    )
    exp_epsilon: float = ALGORITHM(0.0, "[0, 1e6]", "fedexp: added to the squared norm of the mean", symbol="ε")
    server_beta1: float = ALGORITHM(0.9, "[0, 1]", "fedadam, fedyogi: decay of the mean update", symbol="β₁")
    server_beta2: float = ALGORITHM(0.99, "[0, 1]", "fedadam, fedyogi: decay of the mean squared update", symbol="β₂")
    server_tau: float = ALGORITHM(1e-3, "(0, 1e6]", "fedadam, fedyogi: adaptivity, added to the root", symbol="τ")
    gma_threshold: float = ALGORITHM(
        0.4, "[0, 1]", "fedgma: agreement on a sign from which an entry is not damped", symbol="ρ"
    )
    trimmed_share: float = ALGORITHM(
        0.1, "[0, 0.49]", "trimmed-mean: share of values dropped at each end; krum: of attackers", symbol="β"
    )
    clipping_radius: float | str = ALGORITHM(
        AUTO, "(0, 1e6]", "cclip: radius; auto = the median distance of the round's replies", symbol="ρ"
    )
    clipping_iterations: int = ALGORITHM(1, "[1, 1000]", "cclip: iterations per round")
    clipping_start: str = ALGORITHM("zero", "zero | previous", "cclip: where each round's iterations start")
    gram_anchor: float = ALGORITHM(0.0, "[0, 1e6]", "gram-anchored: weight of clients not in the round", symbol="γ")
    gram_epsilon: float = ALGORITHM(
        0.0, "[0, 1e6]", "gram-anchored: added to the divisor, as a share of a layer's mean one", symbol="ε"
    )
    covariance_form: str = ALGORITHM(
        "least-squares",
        "least-squares | bounded",
        "covariance: least squares, added up as replies come, or bounded by the sum of the updates' norms",
    )
    covariance_epsilon: float = ALGORITHM(
        1e-3, "(0, 1e6]", "covariance: added to the diagonal, as a share of its mean", symbol="ε"
    )
    covariance_shrinkage: float = ALGORITHM(
        0.0, "[0, 1]", "covariance: shrinkage of each Gram matrix to the identity's multiple; 1 = the mean", symbol="s"
    )
    covariance_weights: str = ALGORITHM("examples", "examples | equal", "covariance: weights of the clients")
    covariance_mask: str = ALGORITHM(
        "projected",
        "projected | rows",
        "covariance under a mask: solved and projected, or solved for the entries of each row",
    )
    merge_rule: str = ALGORITHM(
        "task-arithmetic",
        MERGE_RULES,
        "merge-rule: how the server merges a round's task vectors",
        importable=True,
        words="{}",
    )
    merge_parameter: float | str = ALGORITHM(
        AUTO, "[0, 1e6]", "merge-rule: its parameter (fl-taskarith merge --help); auto = the middle of those searched"
    )
    personal_parameters: str = ALGORITHM(
        "*norm*, *.ls1.*, *.ls2.*", None, "fedbn: what stays with each client: comma-separated names or patterns with *"
    )
    client_groups: str = FEDERATION(
        "none",
        "none | half-turn | rotations | inverted",
        "how groups of clients see images: turned by 180°; by 0, 90, 180, 270°; grey levels inverted",
    )
    cluster_start_noise: float = CLUSTERS(
        0.1, "[0, 1]", "br-ifca on images: noise on each cluster's first model, relative to its weights"
    )
    num_clusters: int = CLUSTERS(3, "[1, 1000]", "fed-em, br-ifca: clusters", symbol="K")
    cluster_rule: str = CLUSTERS("trimmed-mean", CLUSTER_RULES, "br-ifca: aggregation within a cluster")
    byzantine_fraction: float = ALGORITHM(0.0, "[0, 0.5]", "share of Byzantine clients in every cluster", symbol="α")
    attack: str = ALGORITHM("sign-flip", ATTACKS, "what Byzantine clients do")
    attack_scale: float = ALGORITHM(10.0, "[0, 1e6]", "factor of sign-flip and inner-product")
    attack_placement: str = CLUSTERS(
        "spread", "spread | one-cluster", "regression data: attackers report to their own cluster, or all to the first"
    )
    dimension: int = CLUSTERS(10, "[1, 100000]", "inputs of the regression", symbol="d")
    examples_per_client: int = CLUSTERS(10, "[1, 1e6]", "points of each client", symbol="n")
    noise: float = CLUSTERS(0.5, "(0, 1e6]", "standard deviation of the outputs' noise", symbol="σ")
    cluster_centres: str = CLUSTERS(
        "equidistant", "equidistant | bernoulli", "true parameters: at equal distances, or drawn from {0, 1}^d"
    )
    cluster_sizes: str = CLUSTERS("random", "random | equal", "clients draw their cluster, or are dealt out in turn")
    separation: float = CLUSTERS(1.0, "(0, 1e6]", "equidistant: distance between true parameters", symbol="Δ_min")
    farthest_separation: float = CLUSTERS(0.0, "[0, 1e6]", "of the last from the others; 0 = Δ_min", symbol="Δ_max")
    start: str = CLUSTERS("ball", "ball | random", "first estimates: in a ball around each truth, or random")
    start_radius: float = CLUSTERS(0.25, "[0, 1e6]", "radius of that ball, in units of Δ_min")
    tolerance: float = CLUSTERS(1e-06, "[0, 1e6]", "fed-em: stop when no estimate moves by more")
    clients_at_once: int | str = MACHINE(
        1,
        "[0, inf)",
        "sequential engine: clients computed together; 0 = all, auto = as measured; numbers agree to rounding",
        auto=True,
    )
    local_loss: str = TRAINING(
        "cross-entropy",
        "cross-entropy | squared | not-true-distillation | feature-anchoring",
        "squared: ½‖ridge scores − one-hot label‖², bounded targets; the last two: the cross-entropy and a second term",
    )
    distillation_weight: float = TRAINING(
        1.0,
        "[0, 1e6]",
        "not-true-distillation: β in β τ² KL, from the model at the round's start, over the classes but the label",
        symbol="β",
    )
    distillation_temperature: float = TRAINING(
        1.0, "(0, 1e6]", "not-true-distillation: temperature of both models' scores", symbol="τ"
    )
    anchoring_mu: float = TRAINING(
        0.01, "[0, 1e6]", "feature-anchoring: μ in (μ/2)‖h − h₀‖², h₀ the pretrained features", symbol="μ"
    )
    local_steps: int = TRAINING(4, "[1, inf)", "SGDM steps per client and round", symbol="J")
    local_steps_min: int = TRAINING(0, "[0, inf)", "with local-steps-max: clients draw their own J; 0 = off")
    local_steps_max: int = TRAINING(0, "[0, inf)", "see local-steps-min")
    batch_size: int = TRAINING(16, "[1, inf)", "examples per local step")
    learning_rate: float | str = TRAINING(
        AUTO,
        "[0, 1e6]",
        "peak learning rate of the clients; auto = one that validation chose before for such a run, where one is known",
        symbol="η",
        words="lr {}",
    )
    momentum: float = TRAINING(0.9, "[0, 1]", "SGDM momentum; a client's starts at zero in every round")
    weight_decay: float = TRAINING(0.0, "[0, 1e6]", "L2 penalty", words="weight decay {}")
    dampening: float = TRAINING(0.0, "[0, 1]", "SGDM dampening")
    nesterov: bool = TRAINING(False, None, "Nesterov momentum")
    clip_norm: float = TRAINING(0.0, "[0, 1e6]", "largest 2-norm of the updated weights' gradient; 0 = off")
    schedule: str = TRAINING("cosine", SCHEDULES, "of the learning rate over rounds", words="{}")
    warmup_rounds: int = TRAINING(0, "[0, inf)", "rounds of linear warm-up")
    early_stopping_patience: int = TRAINING(
        0,
        "[0, inf)",
        "rounds without a better validation accuracy (at equal accuracy: loss) after which the run stops; 0 = never. "
        "Runs that stop at different rounds are not compared at equal work",
        words="patience {}",
    )
    engine: str = MACHINE("sequential", "sequential | flower", "in this process, or on Flower's SuperNodes")
    device: str = MACHINE("auto", None, "auto, cpu, cuda, cuda:1, ...")
    threads: int = MACHINE(1, "[0, 1024]", "CPU threads of torch, best 1 for tiny models; 0 = all cores it may use")
    precision: str = MACHINE(
        "auto",
        "auto | fp32 | tf32 | bf16 | fp16",
        "arithmetic of forward and backward; auto = bf16 on a GPU that has it (fp16 on an older one), fp32 on a CPU",
    )
    compile: str = MACHINE(
        "auto",
        (AUTO, "off", *COMPILE_MODES),
        "torch.compile of training and evaluation, by its modes; auto = default on a GPU that has bf16, else off",
    )
    optimizer_kernels: str = MACHINE(
        "auto", "auto | foreach | fused", "of SGDM; auto = as torch chooses on a GPU, fused on a CPU"
    )
    evaluate_every: int = OUTPUT(2, "[1, inf)", "rounds between evaluations; the last round always is")
    checkpoint_every: int = OUTPUT(20, "[1, inf)", "rounds between checkpoints")
    save_model: bool = OUTPUT(
        True,
        None,
        "export the last model as model.safetensors and the one of the best round on validation as "
        "model-best.safetensors, each as large as the whole model",
    )
    draw_curves: bool = OUTPUT(True, None, "draw curves.png and curves.pdf at the end")
    tensorboard: bool = OUTPUT(False, None, "also log the rows to TensorBoard, in the run's folder")
    wandb: bool = OUTPUT(False, None, "also log the rows to Weights & Biases")
    resume: bool = OUTPUT(True, None, "continue an unfinished run of the same configuration")
    results_dir: str = OUTPUT("", None, "where results go; empty = results/ of the installed checkout")
    run_name: str = OUTPUT("", None, "folder of the run; empty = named after its settings")
    seed: int = FEDERATION(0, f"[0, {2**53}]", "of the run: sampling, batches, augmentation, random masks and weights")
    shard_seed: int = FEDERATION(0, f"[0, {2**53}]", "of the assignment of data to clients")

    @property
    def solved(self) -> bool:
        """Whether the head is solved in closed form, from sums of the clients."""
        return self.head != "linear"

    @property
    def head_words(self) -> str:
        """What a text calls the head: "ridge head"."""
        return f"{rules()['head'].names.get(self.head, self.head)} head"

    @property
    def masked(self) -> bool:
        """Whether only a part of the weights is updated."""
        return self.mask_rule != "none"

    @property
    def scored(self) -> bool | None:
        """Whether the mask comes from sensitivities, and so needs data; None if one's own rule cannot be imported."""
        if self.mask_rule in mask_rules.NO_RULES:
            return False
        try:
            return mask_rules.mask_rule(self.mask_rule).scores is None
        except ConfigError:
            return None

    @property
    def fisher(self) -> bool | None:
        """Whether those sensitivities are the diagonal of the Fisher information; None as of `scored`."""
        return self.scored and not mask_rules.mask_rule(self.mask_rule).salient

    def require_own_rule(self) -> None:
        """Raise ConfigError if the mask rule is one's own and cannot be imported: what is to run needs it."""
        if ":" in self.mask_rule:
            mask_rules.mask_rule(self.mask_rule)

    @property
    def peak_rate(self) -> float:
        """`learning_rate` as a number.

        Raises:
            ValueError: it is still "auto" (`learning_rates.with_known_rate` comes first).
        """
        return float(self.learning_rate)

    @property
    def at_once(self) -> int:
        """`clients_at_once` as a number.

        Raises:
            ValueError: it is still "auto" (`machine.on_this_machine` comes first).
        """
        return int(self.clients_at_once)

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
    """Return the rule of every key, by its kebab-case name, in order."""
    return {kebab(field.name): field.metadata["rule"] for field in dataclasses.fields(Settings)}


def rules_by_heading() -> dict[str, dict[str, Rule]]:
    """Return the same rules under their headings, in the order of a reference."""
    return {heading: {key: rule for key, rule in rules().items() if rule.heading == heading} for heading in HEADINGS}


ATTACK_KEYS = frozenset({"byzantine-fraction", "attack", "attack-scale"})
ALGORITHM_KEYS = frozenset(rules_by_heading()["algorithm"]) - ATTACK_KEYS
"""What the server does with honest clients' task vectors."""
