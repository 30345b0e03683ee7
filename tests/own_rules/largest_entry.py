"""A merge rule as the one file that a user puts into `fl_taskarith/merging/rules/`."""

import torch

from fl_taskarith.merging.merge_rules import by_name, merge_rule


@merge_rule("largest-entry", "of every entry the one of largest magnitude")
def largest_entry(task_vectors: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return by_name(task_vectors, lambda name, rows: rows.gather(0, rows.abs().argmax(0, keepdim=True))[0])
