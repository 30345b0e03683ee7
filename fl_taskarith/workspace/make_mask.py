"""The mask of a run: from a file, from the weights alone, or from sensitivities scored by the server or the clients."""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ConfigError, kind_of, own_code
from fl_taskarith.masking.anatomy import KINDS, density_by_kind, key_biases, of_kinds, redrawn_by_kind
from fl_taskarith.masking.calibration import Calibration, Sums, calibrate
from fl_taskarith.masking.mask import Mask, load_mask
from fl_taskarith.masking.rules import NO_RULES, Scores, mask_rule
from fl_taskarith.seeding import random_generator
from fl_taskarith.storage.paths import resolve
from fl_taskarith.workspace.global_model import Weights
from fl_taskarith.workspace.views import as_seen_by, pooled
from fl_taskarith.workspace.workspace import Workspace


def server_sums(home: Workspace, head: Weights) -> Sums:
    """Return sensitivities under `head`, full tensors in their shapes, of the calibration split on the server."""

    def sums(calibration_round: int, alive: Mask) -> tuple[Weights, int]:
        generator = random_generator(home.config.seed, "fisher labels", calibration_round)
        examples = pooled(home.config, home.data.calibration)
        return home.sensitivity_sums(head, alive, examples, generator), len(examples)

    return sums


def shard_sums(home: Workspace, head: Weights, partition: int) -> Sums:
    """Return sensitivities under `head`, full tensors in their shapes, of one client's shard.

    With `calibration-per-client` they are of that many examples of it, drawn for each calibration round.
    """

    def sums(calibration_round: int, alive: Mask) -> tuple[Weights, int]:
        generator = random_generator(home.config.seed, "client sensitivity", calibration_round, partition)
        shard = home.shards[partition]
        if home.config.calibration_per_client:
            chosen = generator.permutation(len(shard))[: home.config.calibration_per_client]
            shard = shard[torch.from_numpy(chosen).to(shard.device)]
        examples = as_seen_by(home.config, partition, home.data.train.take(shard))
        return home.sensitivity_sums(head, alive, examples, generator), len(shard)

    return sums


def eligible(home: Workspace) -> Mask:
    """Return the entries that the configuration's rule may choose, in the shapes of the maskable tensors.

    Raises:
        ConfigError: they are fewer than the density says, or the rule names a kind that there is not.
    """
    config, maskable = home.config, Mask.full(home.maskable())
    kinds = () if config.mask_rule in NO_RULES else mask_rule(config.mask_rule).kinds
    if not kinds:
        return maskable
    if unknown := [str(kind) for kind in kinds if kind not in KINDS]:
        raise ConfigError(
            f'mask-rule = "{config.mask_rule}" chooses from {", ".join(unknown)}, which is no kind of tensor: expected '
            f"kinds among {', '.join(KINDS)}."
        )
    chosen = of_kinds(maskable, kinds)
    if not config.sensitivity_threshold and round(config.density * maskable.size) > chosen.updated:
        raise ConfigError(
            f'density = {config.density:g} is more than mask-rule = "{config.mask_rule}" can choose: the largest is '
            f"{math.floor(chosen.density * 1e4) / 1e4:g}, the share of {', '.join(kinds)} in this model."
        )
    return chosen


def make_mask(home: Workspace, sums: Sums) -> Calibration:
    """Choose the mask that the configuration asks for; `sums` is used by rules that score sensitivity only.

    Raises:
        ConfigError: no weight satisfies the request, a mask file is for another model, or a rule of one's own raises or
            returns other than a score of every entry; or as of `eligible`.
        CheckpointError: a mask file cannot be read.
        WeightsError: a sensitivity is NaN or infinite.
    """
    config, maskable = home.config, eligible(home)
    if config.mask_rule == "file":
        return _from_file(config, maskable, home)
    name, rule, threshold = config.mask_rule, mask_rule(config.mask_rule), config.sensitivity_threshold
    if rule.scores is not None:
        scores = _scores(home, rule.scores)
        return calibrate(lambda *_: (scores, 1), maskable, name, density=config.density, threshold=None, rounds=1)
    calibration = calibrate(
        sums,
        maskable,
        name,
        density=None if threshold else config.density,
        threshold=threshold or None,
        rounds=config.calibration_rounds,
    )
    if not rule.redrawn_by_kind:
        return calibration
    drawn = redrawn_by_kind(calibration.mask, random_generator(config.seed, "random mask"))
    return dataclasses.replace(calibration, mask=drawn)


def mask_facts(config: Config, calibration: Calibration) -> dict[str, object]:
    """Return what run.json and the mask's file say about it (JSON values)."""
    mask = calibration.mask
    facts: dict[str, object] = {
        "rule": config.mask_rule,
        "density": mask.density,
        "updated": mask.updated,
        "maskable": mask.size,
        "densities": list(calibration.densities),
        "density_by_kind": {kind: part.density for kind, part in density_by_kind(mask).items()},
    }
    if config.scored:
        facts |= {
            "source": config.mask_source,
            "sensitivity_threshold": calibration.threshold,
            "key_biases": key_biases(mask),
            "calibration_rounds": config.calibration_rounds,
            "soft_zero": config.soft_zero,
        }
    if config.fisher:
        facts |= {"fisher_labels": config.fisher_labels, "fisher_score": config.fisher_score}
    return facts


def _scores(home: Workspace, function: Scores) -> Weights:
    """Return the scores, finite int64 or floating, that the rule's `function` gives the maskable tensors, as shaped.

    It gets copies, so that whatever it does to them leaves the pretrained weights as they are.

    Raises:
        ConfigError: it is one's own and raises, or returns anything else.
    """
    config, weights = home.config, home.maskable()
    rule, copies = f'mask-rule = "{config.mask_rule}"', {name: value.clone() for name, value in weights.items()}
    with own_code("mask-rule", config.mask_rule):
        scores = function(copies, random_generator(config.seed, "random mask"))
    if not isinstance(scores, Mapping):
        raise ConfigError(f"{rule} returned {kind_of(scores)}: expected a dictionary with a tensor of scores per name.")
    if wrong := sorted(map(str, weights.keys() ^ scores.keys())):
        raise ConfigError(
            f"{rule} returned scores of other tensors than it was given: {len(wrong)} names are missing or unknown, "
            f"for example {', '.join(wrong[:3])}. Expected a tensor of scores for each weight's name, and no other."
        )
    return {name: _checked(rule, name, scores[name], value) for name, value in weights.items()}


def _checked(rule: str, name: str, score: object, weight: Tensor) -> Tensor:
    """Return the scores of a tensor, in its shape, on its device, of a type that can be negated and ranked."""
    real = isinstance(score, Tensor) and score.dtype != torch.bool and not score.is_complex()
    if not isinstance(score, Tensor) or not real or score.shape != weight.shape:
        raise ConfigError(
            f"{rule} returned {kind_of(score)} as the scores of {name}: expected a tensor of real numbers in the "
            f"weight's shape, {list(weight.shape)}."
        )
    score = score.detach().to(weight.device)
    if score.dtype != torch.float64:
        score = score.float() if score.is_floating_point() else score.long()
    if not score.isfinite().all():
        raise ConfigError(f"{rule} returned a NaN or infinite score of {name}: expected finite numbers.")
    return score


def _from_file(config: Config, maskable: Mask, home: Workspace) -> Calibration:
    mask, _ = load_mask(resolve(config.mask_file, "mask-file"))
    if wrong := maskable.differing(mask):
        raise ConfigError(
            f'mask-file = "{config.mask_file}" masks other tensors than those trained here: {len(wrong)} differ, '
            f"for example {', '.join(wrong[:3])}. Use the model, trainable-blocks and mask-exclude it was made with."
        )
    if not mask.updated:
        raise ConfigError(f'mask-file = "{config.mask_file}" updates no weight at all.')
    return Calibration(mask.to(home.device), 0.0, (mask.density,))
