"""The command `merge` as a function that returns the merged model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_taskarith.config.rule import shown
from fl_taskarith.errors import ConfigError, WeightsError
from fl_taskarith.merging.merge_rules import find_rule
from fl_taskarith.models.exported import ExportedModel, exported_model
from fl_taskarith.one_shot import merge_files
from fl_taskarith.one_shot.benchmark_file import load_one_shot
from fl_taskarith.one_shot.merge_checks import MERGING, check_output
from fl_taskarith.one_shot.merge_files import MergeSettings
from fl_taskarith.one_shot.search_files import check_search, search_files
from fl_taskarith.storage.files import make_folder, require_writable
from fl_taskarith.storage.paths import conf_file
from fl_taskarith.storage.tensor_file import write_sealed


@dataclass(frozen=True, eq=False, repr=False)
class MergedModel:
    """A merged model.

    tensors: all of it, in the names and shapes of the base. metadata: of its file: what the models' files agree on.
    path: its file; None where none was asked for.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    path: Path | None

    @property
    def facts(self) -> dict[str, Any]:
        """How it was merged: method, value of its parameter, scale λ, base, models, steps, seed."""
        facts: dict[str, Any] = json.loads(self.metadata[MERGING])
        return facts

    def model(self) -> ExportedModel:
        """Return (model, transform, classes) as timm has them.

        Raises:
            WeightsError: the models that were merged are no exports of runs, whose files say all that.
        """
        try:
            return exported_model(self.tensors, self.metadata)
        except (KeyError, ValueError, RuntimeError) as error:
            raise WeightsError(
                f"The merged models' files do not say what timm needs to build the model ({error}): take the tensors."
            ) from error

    def __repr__(self) -> str:
        facts = self.facts
        return f"MergedModel({facts['method']}, λ = {facts['scale']:g}, {len(facts['models'])} models)"


def merge(
    models: Sequence[Path | str],
    *,
    base: Path | str | None = None,
    task_vectors: bool = False,
    method: str = "task-arithmetic",
    scale: float | None = None,
    steps: Sequence[float] = (),
    seed: int = 0,
    search: Path | str | None = None,
    data: str = "",
    output: Path | str | None = None,
    overwrite: bool = False,
    **parameters: float,
) -> MergedModel:
    """Merge models into one, θ₀ + λ · direction(τ_1, ..., τ_T), for example `merge(files, base=file, scale=0.4)`.

    Args:
        models: files of fine-tuned models, or their folders.
        base: θ₀, the model that they were fine-tuned from; some methods do without.
        task_vectors: whether the files hold θ - θ₀ already.
        method: a merge rule, or "module:function" of your own.
        scale: λ; None for 1/T under a rule that is a sum (`MergeRule.summed`), 1 under the others.
        steps: local steps of each model, for fednova.
        seed: of what dare drops, and of the tasks of a search.
        search: benchmark file, or its name, whose validation images choose λ and the parameter: a task per model.
        data: the level of heterogeneity of those tasks; "" for the first.
        output: file to write; None for none.
        overwrite: whether another file than an earlier merge may be replaced there.
        parameters: the method's parameter by its name, for example keep or drop.

    Raises:
        FlTaskarithError: what is given cannot be merged; nothing is written.
    """
    if wrong := [value for value in (scale, *steps, *parameters.values()) if not isinstance(value, float | int | None)]:
        raise ConfigError(f"{shown(wrong[0])} is not accepted for scale, steps or a parameter: expected a number.")
    paths = [Path(path) for path in ([models] if isinstance(models, Path | str) else models)]
    start, target = (None if path is None else Path(path) for path in (base, output))
    source, rule = None if search is None else conf_file(search), find_rule(method)
    settings = MergeSettings(rule.name, parameters.get(rule.parameter), scale, tuple(steps), seed)
    merge_files.check_settings(settings, parameters, data, len(paths), start is not None, source is not None)
    if target is not None:
        check_output(target, [path for path in (*paths, start, source) if path is not None], overwrite)
        require_writable(target.parent)
    benchmark = None if source is None else load_one_shot(source)
    if benchmark is not None:
        check_search(benchmark, data, start is not None, len(paths))
    with merge_files.within_memory(paths, start):
        sources = merge_files.open_sources(start, paths, task_vectors)
        print(merge_files.describe_sources(sources))
        if benchmark is not None:
            settings = search_files(sources, settings, benchmark, data)
        print(f"method {rule.name}, λ = {settings.scale_of(len(paths)):g}")
        tensors, metadata = merge_files.whole_model(sources, merge_files.merge(sources, settings), settings)
        if target is not None:
            make_folder(target.parent)
            write_sealed(target, tensors, metadata)
    return MergedModel(tensors, metadata, target)
