"""What one process keeps between messages: the data on the device, the shards, and one model.

To load them takes seconds and a client's work may take milliseconds, so each process loads them once. All its virtual
clients, and the server when it shares the process, use the same workspace.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fl_taskarith.config.settings import Config
from fl_taskarith.data.batches import Preprocessing
from fl_taskarith.data.datasets import SPLIT_SEED, Dataset, ImageSet, load_dataset
from fl_taskarith.data.prefix_cache import CachedInputs, cache_key, content_of, near, open_or_make
from fl_taskarith.data.sharding import make_shards
from fl_taskarith.data.shards import Shards
from fl_taskarith.data.splits import Splits, split_training_set, stratified_sample
from fl_taskarith.errors import ConfigError
from fl_taskarith.masking.calibration import damped
from fl_taskarith.masking.mask import Mask
from fl_taskarith.masking.rules import mask_rule
from fl_taskarith.masking.sensitivity import saliency_sums, sensitivity_sums
from fl_taskarith.merging.aggregate import task_vector_norm
from fl_taskarith.models.backbone import HEAD_PARAMETERS, build_model, pretrained_settings, trained_parameters
from fl_taskarith.models.class_token_block import ClassTokenBlock
from fl_taskarith.models.compilation import Network, compiled, release, shared_model
from fl_taskarith.models.per_client import PerClientNetwork
from fl_taskarith.models.suffix import Suffix, prefix_parameters, prefix_tokens
from fl_taskarith.storage.paths import resolve
from fl_taskarith.training.local import Evaluation, Inputs, autocast, evaluate, extract_features, set_matrix_products
from fl_taskarith.training.local_loss import ANCHORED, NOT_TRUE, LocalLoss
from fl_taskarith.workspace.client_states import ClientStates
from fl_taskarith.workspace.global_model import Frozen, GlobalModel, Weights
from fl_taskarith.workspace.machine import available_threads, choose_device, on_this_machine

EVALUATION_BATCH = {"cpu": 64, "cuda": 256}  # images at a time: what a CPU's cache holds; many for a GPU


@dataclass(frozen=True)
class Data:
    """The splits of one data set on one device."""

    dataset: Dataset
    train: ImageSet
    validation: ImageSet
    calibration: ImageSet
    test: ImageSet

    @cached_property
    def sha256(self) -> str:
        """The first 16 hexadecimal digits of a checksum of all images and labels."""
        splits = {"train": self.train, "validation": self.validation, "calibration": self.calibration,
                  "test": self.test}  # fmt: skip
        return cache_key(
            {f"{name} {kind}": getattr(split, kind) for name, split in splits.items() for kind in ("images", "labels")}
        )


class Workspace:
    """Data, shards and model of one configuration, on its device. Use `workspace(config)` to share one per process.

    Attributes:
        device: where everything lies.
        model: holds whatever weights were loaded last; `place` or `load` before use.
        parameters, shapes: of the model, by name, in its order.
        pretrained: a copy of the parameters that training may change (`federated_names`), as they started; read-only.
        network: the part of the model that runs: all of it, or what follows the frozen blocks under a prefix cache.
        compiled_network: `network` for training and evaluation, compiled where `compile` says so.
        client_states: what clients keep between rounds.
        fitting: so many clients at once fit into the device's memory, as far as is known.
        data: the images and labels; under a prefix cache the images of its splits are positions in the cache.
        preprocessing: from those images, or positions, to the network's inputs.
    """

    def __init__(self, config: Config) -> None:
        self.config = config = on_this_machine(config)
        self.device = choose_device(config.device)
        self.fitting = config.num_clients
        self.client_states = ClientStates(self.device, behind=config.engine == "sequential")
        self._together: dict[tuple[str, tuple[str, ...], int], PerClientNetwork] = {}
        torch.set_num_threads(config.threads or available_threads())
        set_matrix_products(config.precision)
        data = load_data(
            config.dataset,
            resolve(config.data_dir, "data-dir"),
            config.download,
            (config.calibration_size, config.validation_size, config.train_subset, config.test_subset),
            self.device,
        )
        weights = config.weights
        if weights not in ("pretrained", "none"):
            weights = str(resolve(weights, "weights"))
        model = build_model(
            config.model,
            num_classes=len(data.dataset.classes),
            input_size=config.input_size,
            weights=weights,
            download=config.download,
            seed=config.seed,
        ).to(self.device)
        if config.compile != "off":
            model = shared_model((config.model, config.input_size, len(data.dataset.classes), self.device), model)
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        self.pretrained = {name: self.parameters[name].detach().clone() for name in self.federated_names()}
        self.data = data
        self._caches: list[Path] = []  # files of tokens in use
        self.network: Network = model
        self.preprocessing: Inputs = self._preprocessing(data)
        if config.prefix_cache != "off":
            self._use_prefix_cache(data)
        self.compiled_network: Network = self.network
        if config.compile != "off":
            key = (type(self.network), self.first_block)
            self.compiled_network = compiled(lambda: self.network, key, config.compile, self.device)

    @cached_property
    def shards(self) -> Sequence[Tensor]:
        """Positions into `data.train` per client, int64 [n] each."""
        config, labels = self.config, self.data.train.labels.cpu().numpy()
        settings = (config.sharding, config.classes_per_client, config.shard_seed, config.dirichlet_alpha)
        return Shards(make_shards(labels, config.num_clients, *settings), self.device)

    def trained_names(self, server_round: int) -> list[str]:
        """Return the names of the parameters trained in `server_round`: the head alone in the first `head-rounds`.

        Under a mask these are the maskable ones, of which the mask selects entries.

        Raises:
            ConfigError: a pattern of mask-exclude or personal-parameters matches no parameter, or all are excluded.
        """
        if server_round <= self.config.head_rounds:
            return trained_parameters(self.model, "head", 0)
        names = trained_parameters(self.model, self.config.trainable, self.config.trainable_blocks)
        if self.config.strategy == "fedbn" and self.config.personal_parameters != Config.personal_parameters:
            _patterns("personal-parameters", self.config.personal_parameters, names)
        if not self.config.masked:
            return names
        patterns = _patterns("mask-exclude", self.config.mask_exclude, names)
        left = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if not left:
            raise ConfigError(f'mask-exclude = "{self.config.mask_exclude}" leaves no parameter to update.')
        return left

    def federated_names(self) -> list[str]:
        """Return the names of the parameters that can differ from the pretrained ones: those that travel to clients.

        The head is among them even when frozen, for it is solved or trained in the federation.
        """
        names = set(self.trained_names(self.config.num_rounds)) | set(HEAD_PARAMETERS)
        return [name for name in self.parameters if name in names]

    @torch.no_grad()
    def load(self, tensors: Weights) -> None:
        """Copy tensors into the model's parameters of the same names and shapes."""
        for name, value in tensors.items():
            self.parameters[name].copy_(value)

    @contextmanager
    def pretrained_weights(self) -> Iterator[None]:
        """Hold θ₀ in the model, in its own shapes, until the context ends."""
        current = {name: self.parameters[name].detach().clone() for name in self.pretrained}
        self.load(self.pretrained)
        try:
            yield
        finally:
            self.load(current)

    def local_loss(self, logit_scale: float) -> LocalLoss:
        """Return what clients minimise under a ridge head of this scale."""
        config = self.config
        weights = {NOT_TRUE: config.distillation_weight, ANCHORED: config.anchoring_mu}
        held = self.pretrained_weights if config.local_loss == ANCHORED else nullcontext
        weight, temperature = weights.get(config.local_loss, 0.0), config.distillation_temperature
        return LocalLoss(config.local_loss, logit_scale, weight, temperature, held)

    def together(self, names: Sequence[str], clients: int, loss: LocalLoss) -> PerClientNetwork:
        """Return what computes the loss's outputs with weights [clients, ...] by name, each the model's own now.

        It is the same one for the same arguments, compiled where `compile` says so. The last two are kept, for a round
        of so many clients and the rest; compiled ones all.
        """
        network = loss.network(self.network)
        prefix = "" if network is self.network else "network."
        key = (prefix, tuple(names), clients)
        if key not in self._together:

            def make() -> PerClientNetwork:
                return PerClientNetwork(network, names, clients, prefix)

            for oldest in [*self._together][:-1]:
                del self._together[oldest]
            kind = (type(self.network), self.first_block, key)
            mode = self.config.compile
            self._together[key] = make() if mode == "off" else compiled(make, kind, mode, self.device)
        self._together[key].start_from(network)
        return self._together[key]

    def let_fit(self, clients: int) -> None:
        """Train at most so many clients at once from now on; free the memory that more of them took."""
        self.fitting = clients
        self._together.clear()
        release(clients)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def place(self, model: GlobalModel) -> None:
        """Load the global model, in the shapes of `GlobalModel`: pretrained, then frozen, then trained tensors."""
        trained, frozen = model.trained, model.frozen
        self.load(self.pretrained | frozen.weights | (trained if frozen.mask is None else {}))
        if frozen.mask is not None:
            frozen.mask.scatter_(self.parameters, trained)

    def task_vector_norm(self, model: GlobalModel) -> float:
        """Return ‖θ − θ₀‖₂ of the backbone, the distance of `model`, in its shapes, from the pretrained one."""
        start = self.pretrained if model.frozen.mask is None else model.frozen.mask.gather(self.pretrained)
        backbone = {name: value for name, value in model.trained.items() if name not in HEAD_PARAMETERS}
        return task_vector_norm({name: value - start[name] for name, value in backbone.items()})

    @property
    def evaluation_batch(self) -> int:
        """The number of images in a batch of evaluation."""
        return EVALUATION_BATCH[self.device.type]

    @property
    def first_block(self) -> int:
        """The index of the first block of `network`."""
        config, depth = self.config, len(self.model.blocks)
        if config.prefix_cache == "off":
            return 0
        return depth if config.trainable == "head" else depth - config.trainable_blocks

    def maskable(self) -> Weights:
        """Return the pretrained tensors, in their shapes, whose entries a mask may choose: never the head."""
        return {name: self.pretrained[name] for name in self.trained_names(self.config.num_rounds)}

    def sensitivity_sums(
        self, head: Weights, alive: Mask, examples: ImageSet, generator: np.random.Generator
    ) -> Weights:
        """Return Σ over `examples` of squared per-example gradients of the pretrained model under `head`.

        Entries that are not `alive` are damped. Float32, in the shapes of the maskable tensors; see
        `masking.sensitivity`. Under a rule that ranks by saliency, it is their number times that.
        """
        self.place(GlobalModel({}, Frozen(head)))
        weights = damped(self.maskable(), alive, self.config.soft_zero)
        scored = self.network, weights, examples.images, examples.labels, self.preprocessing.evaluation_inputs
        if mask_rule(self.config.mask_rule).salient:
            return saliency_sums(*scored, self.config.calibration_memory)
        return sensitivity_sums(
            *scored,
            labels=self.config.fisher_labels,
            score=self.config.fisher_score,
            generator=generator,
            memory=self.config.calibration_memory,
        )

    def features(self, examples: ImageSet) -> Tensor:
        """Return the inputs of the head for `examples` under the model's current weights: float32 [n, width]."""
        batch, precision = self.evaluation_batch, self.config.precision
        return extract_features(self.network, examples, self.preprocessing, batch_size=batch, precision=precision)

    def evaluate(self, examples: ImageSet, network: Network | None = None) -> Evaluation:
        """Return loss and accuracy on images [n, C, H, W] of `network`, by default the uncompiled one."""
        batch, precision = self.evaluation_batch, self.config.precision
        network = self.network if network is None else network  # a compiled module has no truth value
        return evaluate(network, examples, self.preprocessing, batch_size=batch, precision=precision)

    @cached_property
    def pretrained_sha256(self) -> str:
        """The first 16 hexadecimal digits of a checksum of all weights as they started, from whatever file."""
        return cache_key({**self.model.state_dict(), **self.pretrained})

    @cached_property
    def inputs_sha256(self) -> str:
        """Such a checksum of all splits' images and labels, and of the tokens of a prefix cache."""
        return cache_key({"data": self.data.sha256, **{path.stem: content_of(path) for path in self._caches}})

    @cached_property
    def shards_sha256(self) -> str:
        """Such a checksum of all clients' shards."""
        return cache_key({str(client): shard for client, shard in enumerate(self.shards)})

    def _use_prefix_cache(self, data: Data) -> None:
        """Let `network` be the trained blocks alone, on the tokens of the frozen ones."""
        config, preprocessing = self.config, self._preprocessing(data)
        if preprocessing.crop_padding:
            raise ConfigError(
                f'prefix-cache = "{config.prefix_cache}" keeps images as they are and flipped, and {config.dataset} is '
                'cropped at random by default: set augmentation = "flip" or "none".'
            )
        first = self.first_block
        splits = (data.train, data.validation, data.calibration, data.test)
        images = torch.cat([split.images for split in splits])
        parts: dict[str, Tensor | str] = {
            **prefix_parameters(self.model, first),
            "images": images,
            "settings": repr((config.model, config.input_size, first, config.precision, preprocessing)),
            "dtype": config.prefix_cache,
        }
        if first and isinstance(self.model.blocks[first - 1], ClassTokenBlock):
            parts["tokens"] = "class"  # an older file holds all of them

        def cache_of(pictures: Tensor, flipped: bool) -> tuple[Path, Tensor]:
            def compute(part: Tensor) -> Tensor:
                with autocast(self.device, config.precision):
                    part = part.flip(-1) if flipped else part
                    return prefix_tokens(self.model, preprocessing.evaluation_inputs(part), first)

            folder = resolve(config.data_dir, "data-dir") / "prefix-cache"
            key = cache_key({**parts, "flipped": str(flipped)})
            return folder / f"{key}.npy", open_or_make(folder, key, pictures, compute, config.prefix_cache)

        caches = [cache_of(images, False), *([cache_of(data.train.images, True)] if preprocessing.flip else [])]
        self._caches = [path for path, _ in caches]
        tokens, *flips = near(dict(caches), self.device)
        self.preprocessing = CachedInputs(tokens, flips[0] if flips else None, self.device)
        self.network = Suffix(self.model, first)
        positions = torch.arange(len(images), device=self.device).split([len(split) for split in splits])
        cached = (ImageSet(where, split.labels) for where, split in zip(positions, splits, strict=True))
        self.data = Data(data.dataset, *cached)

    def _preprocessing(self, data: Data) -> Preprocessing:
        cfg = pretrained_settings(self.model)
        chosen = self.config.augmentation
        augmentation = data.dataset.augmentation if chosen == "auto" else chosen
        if "crop" in augmentation and not data.dataset.crop_padding:
            raise ConfigError(f'augmentation = "{chosen}" crops nothing of {self.config.dataset}, of crop_padding = 0: '
                              'set augmentation = "flip" or "none", or the padding in the data set.')  # fmt: skip
        return Preprocessing(
            input_size=self.config.input_size,
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
            crop_padding=data.dataset.crop_padding if "crop" in augmentation else 0,
            flip="flip" in augmentation,
        )


def workspace(config: Config) -> Workspace:
    """Return the process's workspace of `config`, which computes in its precision; it replaces any other one."""
    config = _here(config)
    set_matrix_products(config.precision)
    return _workspace(config)


_here = lru_cache(maxsize=4)(on_this_machine)  # it takes as long as a client's step on a small model


@lru_cache(maxsize=1)
def _workspace(config: Config) -> Workspace:
    return Workspace(config)


@lru_cache(maxsize=1)
def load_data(
    name: str, data_dir: Path, download: bool, sizes: tuple[int, int, int, int], device: torch.device
) -> Data:
    """Return the splits of a data set on `device`.

    Args:
        sizes: calibration-size, validation-size, train-subset, test-subset.
    """
    calibration_size, validation_size, train_subset, test_subset = sizes
    dataset = load_dataset(name, data_dir, download)
    splits: Splits = split_training_set(
        dataset.train.labels.numpy(), calibration_size, validation_size, train_subset, SPLIT_SEED
    )
    test = dataset.test
    if test_subset:
        if not len(dataset.classes) <= test_subset <= len(test):
            raise ConfigError(
                f"test-subset = {test_subset}: expected 0 (all {len(test)}) or a number from "
                f"{len(dataset.classes)} (one per class) up to {len(test)}."
            )
        test = test.take(torch.from_numpy(stratified_sample(test.labels.numpy(), test_subset, SPLIT_SEED)))
    parts = (dataset.train.take(torch.from_numpy(indices)) for indices in
             (splits.train, splits.validation, splits.calibration))  # fmt: skip
    return Data(dataset, *(part.to(device) for part in (*parts, test)))


def _patterns(key: str, text: str, names: Sequence[str]) -> list[str]:
    """Return the comma-separated patterns of a setting, each of which fits one of `names` at least."""
    patterns = [pattern.strip() for pattern in text.split(",") if pattern.strip()]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f'{key}: "{pattern}" fits no trained parameter; they are {", ".join(names)}.')
    return patterns
