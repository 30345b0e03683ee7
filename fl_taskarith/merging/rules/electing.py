"""Rules that take every entry from the task vectors that win it."""

from torch import Tensor

from fl_taskarith.merging.merge_rules import Direction, by_name, merge_rule
from fl_taskarith.merging.robust import TaskVectors


@merge_rule("magmax", "the entry of largest magnitude", source="Marczak et al., ECCV 2024")
def magmax(task_vectors: TaskVectors) -> Direction:
    """Return the entry of largest magnitude, the first of equals, in the shapes of the task vectors."""
    return by_name(task_vectors, lambda name, rows: rows.gather(0, rows.abs().argmax(0, keepdim=True))[0])


@merge_rule("emr", "the sign of the sum with the largest magnitude that agrees", source="Huang et al., NeurIPS 2024")
def emr(task_vectors: TaskVectors) -> Direction:
    """Return EMR-Merging's unified task vector, in the shapes of the task vectors; its masks per task are left out."""

    def unified(name: str, rows: Tensor) -> Tensor:
        sign = rows.sum(0).sign()
        return sign * (rows * sign).amax(0).clamp(min=0)

    return by_name(task_vectors, unified)
