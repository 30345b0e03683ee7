"""What is counted where faults are tried: trials, how they ended, and those in which something was lost."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Trials of one fault.

    Attributes:
        fault: what was done.
        outcomes: how many trials ended in which way, by a word or two.
        lost: a line for each trial in which something was lost, silently wrong, or a traceback.
    """

    fault: str
    outcomes: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    @property
    def trials(self) -> int:
        return sum(self.outcomes.values())

    def note(self, outcome: str) -> None:
        """A trial that ended as it should."""
        self.outcomes[outcome] += 1

    def lose(self, what: str) -> None:
        """A trial that did not."""
        self.outcomes["lost"] += 1
        self.lost.append(what)

    def settle(self, outcome: str, differences: list[str], trial: str) -> None:
        """A trial after which nothing may differ from a run without the fault."""
        if differences:
            self.lose(f"{trial}: {', '.join(differences)}")
        else:
            self.note(outcome)
