"""Settings that the others leave without an effect: whoever gives one asks for something that does not happen.

What counts as given is for the caller to say. A configuration holds every key, and most are at their defaults.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.fields import Settings
from fl_taskarith.config.rule import Scalar, shown
from fl_taskarith.errors import ConfigError


@dataclass(frozen=True)
class Idle:
    """One reason for which a key has no effect.

    Attributes:
        holds: whether it applies to a configuration.
        under: the keys whose values are the reason.
        because: what that means, after the values; empty where they say it themselves.
        instead: what gives the key an effect.
    """

    holds: Callable[[Settings], bool]
    under: tuple[str, ...]
    instead: str
    because: str = ""


def idle_reason(config: Settings, key: str) -> Idle | None:
    """Why `key` has no effect in `config`; None if it has one, or its value asks for nothing (`OFF`)."""
    if key in OFF and _value(config, key) == OFF[key]:
        return None
    return next((idle for idle in CONDITIONAL.get(key, ()) if idle.holds(config)), None)


def explain(config: Settings, key: str, idle: Idle) -> str:
    """The reason in words: key, what leaves it without an effect, what to do."""
    under = " and ".join(f"{name} = {shown(_value(config, name))}" for name in idle.under)
    return (
        f"{key} = {shown(_value(config, key))} has no effect under {under}{idle.because}: leave it out, or "
        f"{idle.instead}."
    )


def refuse_idle(config: Settings, given: Iterable[str]) -> None:
    """Raise ConfigError if a key of `given`, in kebab-case, has no effect in `config`; it explains every such key."""
    found = [(key, idle) for key in sorted(given) if (idle := idle_reason(config, key)) is not None]
    if found:
        raise ConfigError(" ".join(explain(config, *each) for each in found))


def _value(config: Settings, key: str) -> Scalar:
    value: Scalar = getattr(config, key.replace("-", "_"))
    return value


def _needs(key: str, *values: str) -> Idle:
    """The key has an effect under these values of `key` alone.

    A strategy of the user's own, "module:Class", may read any setting.
    """
    attribute = key.replace("-", "_")

    def holds(config: Settings) -> bool:
        value = getattr(config, attribute)
        return value not in values and not (key == "strategy" and ":" in value)

    return Idle(holds, (key,), f"set {key} = {' or '.join(map(shown, values))}")


def _keeps_norms_at_clients(config: Settings) -> bool:
    """FedBN surely trains parameters that are each client's own, which clients computed together cannot have."""
    return (
        config.strategy == "fedbn"
        and "*norm*" in config.personal_parameters
        and config.trainable != "head"
        and not config.head_rounds
        and not config.mask_exclude
    )


def _takes_one_step(config: Settings) -> bool:
    alone = config.local_steps == 1 and config.local_steps_max == 0
    return alone and config.strategy != "centralized" and not config.nesterov


NO_CLIENTS = Idle(
    lambda config: config.strategy == "centralized",
    ("strategy",),
    "choose a strategy with clients",
    ", which has no clients",
)
NO_IMAGES = Idle(
    lambda config: config.dataset == REGRESSION,
    ("dataset",),
    "choose a data set of images",
    ", where no image model is trained",
)
NO_RATE = Idle(
    lambda config: config.strategy == "fed-em",
    ("strategy",),
    "choose another strategy",
    ", which solves for the estimates and takes no steps",
)
HEAD_ALONE = Idle(
    lambda config: config.head_rounds == config.num_rounds,
    ("head-rounds", "num-rounds"),
    "raise num-rounds above head-rounds",
    ", where the head alone is ever trained",
)
HEAD_ALONE_UNCACHED = Idle(
    lambda config: HEAD_ALONE.holds(config) and config.prefix_cache == "off" and config.trainable != "head",
    HEAD_ALONE.under,
    HEAD_ALONE.instead,
    HEAD_ALONE.because,
)
HEAD_ANYWAY = Idle(
    lambda config: config.trainable == "head",
    ("trainable",),
    'set trainable = "backbone" or "all"',
    ", where every round trains the head alone",
)
NOT_RIDGE = _needs("head", "ridge")
NOT_SCORED = _needs("mask-rule", "least-sensitive", "most-sensitive")
NOT_RANKED = Idle(
    lambda config: config.mask_rule in ("none", "file"),
    ("mask-rule",),
    "choose a rule that keeps a share of the weights",
)
THRESHOLD = Idle(
    lambda config: config.sensitivity_threshold > 0,
    ("sensitivity-threshold",),
    "set sensitivity-threshold = 0",
    ", which decides what is updated",
)
ONE_CALIBRATION_ROUND = Idle(
    lambda config: config.calibration_rounds == 1,
    ("calibration-rounds",),
    "set calibration-rounds above 1",
    ", where nothing is dropped before the only scores are taken",
)
EVERYBODY = Idle(
    lambda config: config.sampled_clients == config.num_clients and ":" not in config.strategy,
    ("participation", "num-clients"),
    "lower participation",
    ", where all clients take part in every round",
)
OWN_STEPS = Idle(
    lambda config: config.local_steps_max > 0,
    ("local-steps-min", "local-steps-max"),
    "set both of those to 0",
    ", from which clients draw their own",
)
EPOCHS = Idle(
    NO_CLIENTS.holds,
    ("strategy",),
    "choose a strategy with clients",
    ", where a round is an epoch",
)
ONE_STEP = Idle(
    _takes_one_step,
    ("local-steps",),
    "take more of them",
    ", for a client's momentum starts at zero in every round",
)
NO_MOMENTUM = Idle(lambda config: config.momentum == 0, ("momentum",), "set momentum above 0")
NO_BANK = _needs("task-vector-bank", "float32", "bfloat16")
NOBODY_ATTACKS = Idle(
    lambda config: config.byzantine_fraction == 0, ("byzantine-fraction",), "set byzantine-fraction above 0"
)
NOTHING_TO_WATCH = Idle(
    lambda config: config.dataset == REGRESSION and config.schedule == "plateau",
    ("dataset",),
    "choose another schedule",
    ", which has no validation loss to watch",
)
ON_THE_CPU = Idle(
    lambda config: config.dataset == REGRESSION and config.device not in ("auto", "cpu"),
    ("dataset",),
    'set it to "cpu"',
    ", which is computed on the CPU",
)
EVERY_ROUND = Idle(
    NO_IMAGES.holds, ("dataset",), "choose a data set of images", ", which is evaluated after every round"
)

# of clients-at-once, where clients are trained one by one whatever it says
ONE_BY_ONE = (
    Idle(
        lambda config: config.strategy == "br-ifca" and config.dataset != REGRESSION,
        ("strategy", "dataset"),
        "choose another strategy",
        ", where each client trains the cluster's model that it picked",
    ),
    Idle(
        lambda config: config.dataset != REGRESSION and config.precision in ("bf16", "fp16"),
        ("precision",),
        'set precision = "fp32" or "tf32"',
        ", which clients together cannot compute in",
    ),
    Idle(
        lambda config: config.dataset != REGRESSION and config.compile not in ("off", "auto"),
        ("compile",),
        'set compile = "off"',
        ", which compiles the training of one client",
    ),
    Idle(
        lambda config: config.dataset != REGRESSION and config.clip_norm > 0,
        ("clip-norm",),
        "set clip-norm = 0",
        ", which looks at one client's gradient",
    ),
    Idle(
        lambda config: config.mask_source == "own" and config.scored and not config.head_rounds,
        ("mask-source",),
        'set mask-source = "server" or "clients"',
        ", which gives each client a mask of its own",
    ),
    Idle(
        _keeps_norms_at_clients,
        ("strategy",),
        "choose another strategy",
        ", which gives each client parameters of its own",
    ),
    Idle(
        lambda config: config.dataset != REGRESSION and config.sampled_clients == 1,
        ("participation", "num-clients"),
        "raise participation",
        ", where a round has one client",
    ),
)

IMAGES = (NO_IMAGES,)
CLIENTS = (NO_CLIENTS,)
SHARDS = (NO_CLIENTS, NO_IMAGES)
MASK = (NO_IMAGES, HEAD_ALONE)
SCORES = (*MASK, NOT_SCORED)
REGRESSION_DATA = (_needs("dataset", REGRESSION),)
CCLIP = (_needs("strategy", "cclip"),)
ADAPTIVE = (_needs("strategy", "fedadam", "fedyogi"),)
GRAM = (_needs("strategy", "gram-anchored"),)
EQUIDISTANT = (*REGRESSION_DATA, _needs("cluster-centres", "equidistant"))

CONDITIONAL: Mapping[str, tuple[Idle, ...]] = {
    # data; the splits are carved from the training set, so their sizes matter where nothing looks at them, too
    **dict.fromkeys(("train-subset", "test-subset", "validation-size", "calibration-size", "augmentation"), IMAGES),
    # model
    **dict.fromkeys(("model", "weights", "input-size", "prefix-cache", "head", "ridge-refresh"), IMAGES),
    "trainable": (NO_IMAGES, HEAD_ALONE_UNCACHED),
    "trainable-blocks": (NO_IMAGES, HEAD_ALONE_UNCACHED),
    "head-rounds": (NO_IMAGES, HEAD_ANYWAY),
    **dict.fromkeys(("ridge-lambda", "logit-scale"), (NO_IMAGES, NOT_RIDGE)),
    # mask
    **dict.fromkeys(("mask-rule", "mask-exclude", "mask-file"), MASK),
    "density": (*MASK, NOT_RANKED, THRESHOLD),
    **dict.fromkeys(("sensitivity-threshold", "calibration-rounds", "mask-source", "calibration-memory"), SCORES),
    "soft-zero": (*SCORES, ONE_CALIBRATION_ROUND),
    "calibration-per-client": (*SCORES, _needs("mask-source", "clients", "own")),
    **dict.fromkeys(("fisher-labels", "fisher-score"), SCORES),
    # federation
    **dict.fromkeys(("num-clients", "participation", "dropout", "client-timeout", "on-client-failure"), CLIENTS),
    "sampling": (NO_CLIENTS, EVERYBODY),
    **dict.fromkeys(("sharding", "shard-seed"), SHARDS),
    "classes-per-client": (*SHARDS, _needs("sharding", "classes")),
    "dirichlet-alpha": (*SHARDS, _needs("sharding", "dirichlet")),
    "server-lr": (NO_CLIENTS, NO_RATE),
    **dict.fromkeys(("bank-start", "bank-decay"), (NO_BANK,)),
    # of single strategies; μ is the clients', under any
    "proximal-mu": SHARDS,
    "server-momentum": (_needs("strategy", "fedavgm"),),
    **dict.fromkeys(("server-beta1", "server-beta2", "server-tau"), ADAPTIVE),
    "gma-threshold": (_needs("strategy", "fedgma"),),
    "trimmed-share": (
        _needs("strategy", "trimmed-mean", "krum", "br-ifca"),
        Idle(
            lambda config: config.strategy == "br-ifca" and config.cluster_rule not in ("trimmed-mean", "krum"),
            ("strategy", "cluster-rule"),
            'set cluster-rule = "trimmed-mean" or "krum"',
        ),
    ),
    **dict.fromkeys(("clipping-radius", "clipping-iterations", "clipping-start"), CCLIP),
    **dict.fromkeys(("gram-anchor", "gram-epsilon"), GRAM),
    "personal-parameters": (_needs("strategy", "fedbn"),),
    # groups and clusters of clients
    "num-clusters": (_needs("strategy", "fed-em", "br-ifca"),),
    "cluster-rule": (_needs("strategy", "br-ifca"),),
    "cluster-start-noise": (_needs("strategy", "br-ifca"), NO_IMAGES),
    "attack": (NOBODY_ATTACKS,),
    # the other attacks turn to sign-flip where a round has no honest client
    "attack-scale": (NOBODY_ATTACKS, _needs("attack", "sign-flip", "inner-product", "alie")),
    "attack-placement": (NOBODY_ATTACKS,),
    # regression data
    **dict.fromkeys(
        ("dimension", "examples-per-client", "noise", "cluster-centres", "cluster-sizes", "start"), REGRESSION_DATA
    ),
    **dict.fromkeys(("separation", "farthest-separation"), EQUIDISTANT),
    "start-radius": (*REGRESSION_DATA, _needs("start", "ball")),
    "tolerance": (_needs("strategy", "fed-em"),),
    "clients-at-once": (NO_CLIENTS, *ONE_BY_ONE),
    # local training
    "local-loss": IMAGES,
    "local-steps": (EPOCHS, NO_IMAGES, OWN_STEPS),
    **dict.fromkeys(("local-steps-min", "local-steps-max"), (EPOCHS, NO_IMAGES)),
    **dict.fromkeys(("batch-size", "weight-decay", "nesterov", "clip-norm"), IMAGES),
    "learning-rate": (NO_RATE,),
    "momentum": (NO_IMAGES, ONE_STEP),
    "dampening": (NO_IMAGES, NO_MOMENTUM, ONE_STEP),
    "schedule": (NO_RATE, NOTHING_TO_WATCH),
    "warmup-rounds": (NO_RATE,),
    # running
    "device": (ON_THE_CPU,),
    **dict.fromkeys(("precision", "compile", "optimizer-kernels"), IMAGES),
    "evaluate-every": (EVERY_ROUND,),
}
"""The reasons for which each key may have no effect; a key that is not here is among `ALWAYS`."""

ALWAYS = frozenset(
    {"dataset", "strategy", "num-rounds", "seed", "engine", "threads"}
    # where things lie, what may be fetched, what is kept: said once for whatever a run turns out to need
    | {"data-dir", "download", "checkpoint-every", "save-model", "draw-curves", "tensorboard", "wandb"}
    | {"resume", "results-dir", "run-name"}
    # contradictions wherever they would have no effect (`contradictions`)
    | {"task-vector-bank", "client-groups", "byzantine-fraction"}
)
"""Keys that have an effect in every configuration that is accepted."""

OFF: Mapping[str, Scalar] = {
    **dict.fromkeys(("train-subset", "test-subset", "validation-size", "calibration-size"), 0),
    **dict.fromkeys(("trainable-blocks", "head-rounds", "ridge-refresh", "calibration-per-client", "warmup-rounds"), 0),
    **dict.fromkeys(("local-steps-min", "local-steps-max"), 0),
    **dict.fromkeys(("sensitivity-threshold", "dropout", "client-timeout", "proximal-mu", "farthest-separation"), 0.0),
    **dict.fromkeys(("momentum", "weight-decay", "dampening", "clip-norm"), 0.0),
    **dict.fromkeys(("augmentation", "mask-rule"), "none"),
    **dict.fromkeys(("prefix-cache", "compile"), "off"),
    **dict.fromkeys(("mask-exclude", "mask-file"), ""),
    "clients-at-once": 1,
    "nesterov": False,
}
"""Values that ask for nothing, so that nothing is left undone where the key has no effect."""
