"""What a study is: arms, seeds, a reference, and how the learning rate is chosen. Checked before anything runs."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from fl_taskarith.config import settings as configuration
from fl_taskarith.config.choices import REGRESSION
from fl_taskarith.config.rule import Scalar
from fl_taskarith.config.settings import Config
from fl_taskarith.errors import ConfigError
from fl_taskarith.server.learning_rates import with_known_rate
from fl_taskarith.storage.folder_choice import run_name
from fl_taskarith.study.search import Also, Search, refuse_too_many
from fl_taskarith.workspace.machine import on_this_machine

MOST_PRIMARY = 8  # contrasts that are judged as one family
UNSAVED: dict[str, Scalar] = {"save-model": False, "draw-curves": False}  # a study has many runs and its own figures


@dataclass(frozen=True)
class Arm:
    """One row of the study's tables: settings that are run once per seed.

    Attributes:
        group: the table it stands in; "" where a study has one table.
        name: as the study file gives it; "" for an arm that a grid alone describes.
        variant: the grid's part of the label, for example "local-steps = 4"; "" without a grid.
        settings: kebab-case run settings, without those that the runner sets.
        search: of its learning rate, where the arm has one of its own; None for the study's.
        same_rate_as: the arm whose learning rate this one takes; "" for its own.
        own: those of the settings that its group, the arm itself and the grid give; the others are the study's.
    """

    group: str
    name: str
    variant: str
    settings: Mapping[str, Scalar]
    same_rate_as: str = ""
    search: Search | None = None
    own: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name and the variant."""
        return ", ".join(word for word in (self.name, self.variant) if word)

    @property
    def title(self) -> str:
        """The label and the group, which tell it from every other arm of the study."""
        return f"{self.group}: {self.label}" if self.group else self.label


class Contrast(NamedTuple):
    """A difference that is named before the study runs: `arm` minus `against`."""

    arm: Arm
    against: Arm


@dataclass(frozen=True)
class Study:
    """A study file.

    Attributes:
        source: the file and the overrides, as the command that repeats the study names them.
        shard_seeds: each is combined with every seed; none where a seed is also that of the shards.
        reference: the arm that others are compared with; "" for none. references: of a group, where it has its own.
        shared: the [settings] table with the overrides.
        primary: (arm, against, group) of the contrasts that one family of tests is made of, as the file names them.
        arms: in the order of the tables.
    """

    title: str
    name: str
    source: str
    seeds: tuple[int, ...]
    reference: str
    references: Mapping[str, str]
    shared: Mapping[str, Scalar]
    search: Search | None
    arms: tuple[Arm, ...]
    shard_seeds: tuple[int, ...] = ()
    primary: tuple[tuple[str, str, str], ...] = ()

    def __post_init__(self) -> None:
        _check_titles(self.arms)
        self._check_contrasts()
        if self.search is not None and not any(self.searched(arm) for arm in self.arms):
            raise ConfigError("[search] has no effect, for every arm has a learning-rate: leave it out.")
        searches = [search for arm in self.arms if not arm.same_rate_as and (search := self.searched(arm)) is not None]
        refuse_too_many(len(self.arms) * len(self.run_seeds) + sum(search.trials for search in searches))
        for arm in self.arms:
            self._check_rate(arm)
            self.reference_of(arm)
            for seed, rate, rounds, also in self._corners(arm):
                try:
                    self.config(arm, rate, rounds, seed, Path("/"), also)
                except ConfigError as error:
                    raise ConfigError(
                        f'arm "{arm.title}"{f", searched with num-rounds = {rounds}" if rounds else ""}: {error}'
                    ) from None

    @property
    def run_seeds(self) -> list[tuple[int, int]]:
        """(seed, shard seed) of each run of an arm, by shard seed."""
        if not self.shard_seeds:
            return [(seed, seed) for seed in self.seeds]
        return [(seed, shards) for shards in self.shard_seeds for seed in self.seeds]

    @property
    def groups(self) -> list[str]:
        """The groups in order of appearance."""
        return list(dict.fromkeys(arm.group for arm in self.arms))

    @property
    def in_turn(self) -> list[Arm]:
        """The arms in the order they are run: each in all of its groups before the next, so that a part is a table."""
        places = {label: place for place, label in enumerate(dict.fromkeys(arm.label for arm in self.arms))}
        return sorted(self.arms, key=lambda arm: places[arm.label])

    @property
    def varied(self) -> list[str]:
        """The settings in which arms differ, in the order of the configuration's keys."""
        values = [configuration.Config().to_run_config() | dict(arm.settings) for arm in self.arms]
        searched = {key for arm in self.arms if (search := self.searched(arm)) is not None for key, _ in search.also}
        return [key for key in values[0] if key in searched or len({repr(each[key]) for each in values}) > 1]

    def rate_arm(self, arm: Arm) -> Arm:
        """Return the arm whose learning rate `arm` runs at: itself, or the one that same-rate-as names."""
        return self._find(arm.same_rate_as, arm, "same-rate-as") if arm.same_rate_as else arm

    def reference_of(self, arm: Arm) -> Arm | None:
        """Return the arm that `arm` is compared with: in its own group and variant where there is one of that name."""
        name = self.references.get(arm.group, self.reference)
        return self._find(name, arm, "reference") if name else None

    @cached_property
    def contrasts(self) -> tuple[Contrast, ...]:
        """The primary contrasts."""
        found = []
        for name, other, group in self.primary:
            arm = self._find(name, Arm(group, "", "", {}), "[[primary]] arm")
            found.append(Contrast(arm, self._find(other, arm, "[[primary]] against")))
        return tuple(found)

    def searched(self, arm: Arm) -> Search | None:
        """Return the search for the rate of `arm` (or of the arm it follows); None if the settings give the rate."""
        source = self.rate_arm(arm)
        if "learning-rate" in source.settings or self.search is None:
            return None
        return source.search or self.search

    def config(
        self,
        arm: Arm,
        rate: float | None,
        rounds: int | None,
        seed: int,
        runs: Path,
        also: Also = (),
        shard_seed: int | None = None,
    ) -> Config:
        """Return the run of `arm` with `seed` in the folder `runs`; equal settings have equal names in any study.

        Args:
            rate: learning rate; None for that of the settings, or the first candidate of a search.
            rounds: communication rounds of a search; None for those of the settings.
            also: values of the other settings that were searched.
            shard_seed: None for `seed`.
        """
        if rate is None and (search := self.searched(arm)) is not None:
            rate, also = search.points[0]
        seeds: dict[str, Scalar] = {"seed": seed, "shard-seed": seed if shard_seed is None else shard_seed}
        settings: dict[str, Scalar] = dict(arm.settings) | dict(also) | seeds | UNSAVED
        if rate is not None:
            settings["learning-rate"] = rate
        if rounds is not None:
            settings["num-rounds"] = rounds
        config, _ = with_known_rate(on_this_machine(configuration.from_mapping(settings)))
        name = f"{run_name(config)}-lr{config.peak_rate:g}-r{config.num_rounds}"
        return replace(config, run_name=name.replace("+", ""), results_dir=str(runs))

    def _check_contrasts(self) -> None:
        pairs = [(contrast.arm.title, contrast.against.title) for contrast in self.contrasts]
        for arm, against in pairs:
            if arm == against:
                raise ConfigError(f'[[primary]] compares "{arm}" with itself: name another arm in against.')
        if len({frozenset(pair) for pair in pairs}) < len(pairs):
            raise ConfigError("[[primary]] names one contrast twice: leave one out.")
        if len(pairs) > MOST_PRIMARY:
            raise ConfigError(
                f"{len(pairs)} [[primary]] contrasts: expected at most {MOST_PRIMARY}, for each makes the others "
                "harder to tell. What is left out stands in the tables all the same, as exploratory."
            )

    def _corners(self, arm: Arm) -> list[tuple[int, float | None, int | None, Also]]:
        """Return (seed, rate, rounds, also) of runs that show whether every run of `arm` has a valid configuration."""
        search = self.searched(arm)
        if search is None:
            return [(seed, None, None, ()) for seed in self.seeds]
        ends = [(rate, also) for rate, also in search.points if rate in (search.rates[0], search.rates[-1])]
        trials = [(search.seeds[0], rate, rounds, also) for rate, also in ends for rounds in search.rounds]
        return [*((seed, rate, None, also) for seed in self.seeds for rate, also in ends), *trials]

    def _check_rate(self, arm: Arm) -> None:
        same, own_rate = f'same-rate-as = "{arm.same_rate_as}"', "learning-rate" in arm.settings
        given = same if arm.same_rate_as else "its learning-rate"
        search = self.searched(arm)
        searched = search is not None
        twice = [key for key, _ in search.also if key in arm.settings] if search is not None else []
        problems = [
            (bool(twice),
             f"{', '.join(twice)} is searched by [search.also] and set: leave one out, or give the arm "
             "search = { also = {} }."),
            (arm.search is not None and bool(arm.same_rate_as or own_rate),
             f"search has no effect beside {given}: leave one of them out."),
            (bool(arm.same_rate_as) and own_rate, "give same-rate-as or learning-rate, not both."),
            (bool(arm.same_rate_as) and bool(self.rate_arm(arm).same_rate_as),
             f"{same} names an arm that takes its own rate from elsewhere: name an arm with a rate of its own."),
            (searched and arm.settings.get("dataset") == REGRESSION,
             f'dataset = "{REGRESSION}" has no validation accuracy to search by.'),
            (searched and arm.settings.get("validation-size") == 0,
             "[search] chooses on validation: set validation-size above 0."),
            (searched and arm.settings.get("on-client-failure") == "skip",
             'on-client-failure = "skip" would let [search] score only the clients that did not diverge: leave it at '
             '"stop".'),
        ]  # fmt: skip
        for problem, message in problems:
            if problem:
                raise ConfigError(f'arm "{arm.title}": {message}')

    @cached_property
    def _by_place(self) -> Mapping[tuple[str, ...], Sequence[Arm]]:
        """Arms by what they may be called, alone, with their group, and with their group and variant."""
        arms: dict[tuple[str, ...], list[Arm]] = defaultdict(list)
        for arm in self.arms:
            for name in {arm.name, arm.label, arm.title}:
                for place in ((name, arm.group, arm.variant), (name, arm.group), (name,)):
                    arms[place].append(arm)
        return arms

    def _find(self, name: str, arm: Arm, key: str) -> Arm:
        """Return the arm called `name` nearest to `arm`: in its group and variant, else in its group, else anywhere.

        Raises:
            ConfigError: none, or several equally near; names `key`.
        """
        for place in ((name, arm.group, arm.variant), (name, arm.group), (name,)):
            near = self._by_place.get(place, [])
            if len(near) == 1:
                return near[0]
            if near:
                titles = ", ".join(f'"{other.title}"' for other in near[:10]) + (", ..." if len(near) > 10 else "")
                whose = f' for arm "{arm.title}"' if arm.label else ""
                raise ConfigError(f'{key} = "{name}" could be any of {titles}{whose}: give a full name.')
        labels = list(dict.fromkeys(other.label for other in self.arms))
        known = ", ".join(f'"{label}"' for label in labels[:20]) + (", ..." if len(labels) > 20 else "")
        raise ConfigError(f'{key} = "{name}" is no arm of this study; arms: {known}.')


def _check_titles(arms: tuple[Arm, ...]) -> None:
    if not arms:
        raise ConfigError("a study needs at least one [[arm]], or a [grid].")
    seen: set[str] = set()
    for arm in arms:
        if not re.search(r"\w", arm.label):
            raise ConfigError(f'arm name = "{arm.name}": expected letters or digits in it.')
        if arm.title in seen:
            raise ConfigError(f'arm "{arm.title}" is there twice: rename one.')
        seen.add(arm.title)
