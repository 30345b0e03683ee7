"""Settings that are each fine and contradict one another."""

from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.fields import Settings
from fl_taskarith.config.rule import AUTO

BANKED = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedbn")  # whose rounds start from the mean


def contradictions(config: Settings) -> list[tuple[bool, str]]:
    """Whether each contradiction holds, and what to say then."""
    low, high = config.local_steps_min, config.local_steps_max
    return [
        (config.nesterov and (config.momentum == 0 or config.dampening != 0),
         "nesterov = true needs momentum above 0 and dampening = 0."),
        ((low == 0) != (high == 0) or low > high,
         f"local-steps-min = {low} and local-steps-max = {high}: set both, with 1 <= min <= max, or leave both 0."),
        (config.trainable == "head" and config.trainable_blocks > 0,
         'trainable-blocks has no meaning under trainable = "head": leave it 0.'),
        (config.prefix_cache != "off" and not (config.trainable_blocks or config.trainable == "head"),
         f'prefix-cache = "{config.prefix_cache}" keeps what frozen blocks compute: set trainable-blocks.'),
        (config.prefix_cache != "off" and "crop" in config.augmentation,
         f'prefix-cache = "{config.prefix_cache}" keeps images as they are and flipped, and augmentation = '
         f'"{config.augmentation}" crops: set augmentation to "flip" or "none".'),
        (config.head == "linear" and config.trainable == "backbone" and config.head_rounds == 0,
         'head = "linear" starts at zero and trainable = "backbone" would freeze it there, so nothing could be learnt: '
         'set head-rounds, or trainable = "all", or head = "ridge".'),
        (config.head_rounds > config.num_rounds,
         f"head-rounds = {config.head_rounds} exceeds num-rounds = {config.num_rounds}."),
        (config.warmup_rounds > config.num_rounds,
         f"warmup-rounds = {config.warmup_rounds} exceeds num-rounds = {config.num_rounds}."),
        (config.head == "ridge" and config.validation_size == 0 and AUTO in (config.ridge_lambda, config.logit_scale),
         "validation-size = 0 leaves nothing to choose the ridge head on: set ridge-lambda and logit-scale."),
        (config.ridge_refresh > 0 and not (config.head == "ridge" and config.trainable == "backbone"
                                           and config.head_rounds == 0 and config.strategy != "br-ifca"),
         'ridge-refresh solves the head of one model anew, and it is frozen in between: it needs head = "ridge", '
         'trainable = "backbone", head-rounds = 0 and not strategy = "br-ifca".'),
        (config.ridge_refresh > 0 and config.strategy == "fedbn",
         'ridge-refresh solves one head, and strategy = "fedbn" gives every client features of its own: set it to 0.'),
        (config.schedule == "plateau" and (config.validation_size == 0 or config.evaluate_every != 1),
         'schedule = "plateau" watches the validation loss of every round: it needs validation-size above 0 and '
         "evaluate-every = 1."),
        (config.masked and config.trainable != "backbone",
         f'mask-rule = "{config.mask_rule}" masks the backbone and keeps the head frozen: it needs trainable = '
         f'"backbone", not "{config.trainable}", or set mask-rule = "none".'),
        (bool(config.mask_exclude) and not config.masked,
         'mask-exclude leaves parameters out of a mask, and mask-rule = "none" has none: choose a rule.'),
        (config.sensitivity_threshold > 0 and not config.scored,
         f'sensitivity-threshold needs a rule that scores sensitivity, not mask-rule = "{config.mask_rule}".'),
        (config.scored and config.mask_source == "server" and config.calibration_size == 0,
         f'mask-rule = "{config.mask_rule}" with mask-source = "server" scores the calibration split: set '
         "calibration-size above 0."),
        (config.scored and config.mask_source != "server" and config.strategy == "centralized",
         'strategy = "centralized" has no clients to score: set mask-source = "server".'),
        (config.mask_source == "own" and (not config.scored or config.strategy in ("scaffold", "fedbn", "br-ifca")),
         f'mask-source = "own" gives each client a mask by its own scores: it needs mask-rule = "least-sensitive" or '
         f'"most-sensitive", and a strategy whose clients share all they train, not "{config.strategy}".'),
        ((config.mask_rule == "file") != bool(config.mask_file),
         f'mask-rule = "{config.mask_rule}" and mask-file = "{config.mask_file}": a mask file is named and used under '
         'mask-rule = "file" only.'),
        (config.proximal_mu > 0 and config.strategy in ("fedavg", "centralized"),
         f'proximal-mu = {config.proximal_mu:g} under strategy = "{config.strategy}": set strategy = "fedprox", whose '
         "term it is, or leave it 0."),
        (config.strategy == "scaffold" and config.clip_norm > 0,
         'strategy = "scaffold" takes the mean gradient from the way a client went, which clipping hides: set '
         "clip-norm = 0."),
        (config.strategy == "scaffold" and config.learning_rate == 0,
         'strategy = "scaffold" divides the way a client went by its steps\' size: set learning-rate above 0.'),
        (config.task_vector_bank != "off" and config.strategy not in BANKED,
         f'task-vector-bank replaces the mean of a round, which strategy = "{config.strategy}" does not take: use '
         f"{', '.join(BANKED)}."),
        *_of_clusters(config),
        (config.strategy == "centralized" and config.engine == "flower",
         'strategy = "centralized" has no clients to run on SuperNodes: leave engine = "sequential".'),
    ]  # fmt: skip


def _of_clusters(config: Settings) -> list[tuple[bool, str]]:
    """The same of clusters, groups and attackers."""
    return [
        (config.dataset == REGRESSION and config.strategy not in ("fed-em", "br-ifca"),
         f'dataset = "{REGRESSION}" needs strategy = "fed-em" or "br-ifca", not "{config.strategy}".'),
        (config.strategy == "fed-em" and config.dataset != REGRESSION,
         f'strategy = "fed-em" needs dataset = "{REGRESSION}", not "{config.dataset}".'),
        (config.strategy == "br-ifca" and config.dataset != REGRESSION
         and (config.head_rounds > 0 or config.validation_size == 0),
         'strategy = "br-ifca" on images trains K models from the first round and picks among them on validation: set '
         "head-rounds = 0 and validation-size above 0."),
        (config.client_groups != "none" and (config.strategy == "centralized" or config.prefix_cache != "off"
                                             or config.dataset == REGRESSION),
         f'client-groups = "{config.client_groups}" changes the images of clients: it needs clients, images, and '
         'prefix-cache = "off".'),
        (config.dataset == REGRESSION and config.cluster_centres == "equidistant"
         and config.num_clusters > config.dimension,
         f"num-clusters = {config.num_clusters} true parameters at equal distances need dimension at least as large, "
         f"not {config.dimension}."),
        (0 < config.farthest_separation < config.separation,
         f"farthest-separation = {config.farthest_separation:g} is below separation = {config.separation:g}: set it to "
         "0 or above."),
        (config.start == "random" and config.cluster_centres != "bernoulli",
         'start = "random" draws first estimates like the true parameters, and equidistant ones are not drawn: set '
         'cluster-centres = "bernoulli".'),
        (config.clients_at_once != 1 and config.engine == "flower",
         f"clients-at-once = {config.clients_at_once} computes clients together in one process: it needs "
         'engine = "sequential", or set it to 1.'),
        (config.clients_at_once != 1 and config.client_timeout > 0,
         f"client-timeout = {config.client_timeout:g} is a limit for one client's work, and clients-at-once = "
         f"{config.clients_at_once} has them work together: set the one to 0, or the other to 1."),
        (config.clients_at_once != 1 and config.on_client_failure == "skip",
         f"clients-at-once = {config.clients_at_once} fails as a whole where one of them does: set it to 1, or "
         'on-client-failure = "stop".'),
        (config.byzantine_fraction > 0 and config.strategy in ("fed-em", "centralized"),
         f'byzantine-fraction needs a strategy that takes task vectors from clients, not "{config.strategy}".'),
        (config.byzantine_fraction > 0 and config.dataset != REGRESSION
         and (config.attack == "scaled-model" or config.attack_placement != "spread"),
         f'attack = "{config.attack}" with attack-placement = "{config.attack_placement}": the scaled model and the '
         f'attack on one cluster are for dataset = "{REGRESSION}".'),
    ]  # fmt: skip
