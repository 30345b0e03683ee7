"""Which tensors of a model are matrices that act on inputs, for rules that merge matrices as a whole."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fl_taskarith.merging.merge_rules import Direction, by_name
from fl_taskarith.merging.robust import TaskVectors

LOOKED_UP = ("embedding", "pos_embed", "embed_tokens", "wte", "wpe", "relative_position_bias_table")
"""What the names of tables hold whose rows are looked up: in timm's models, BERT, Llama, GPT-2 and Swin."""
FUSED = ("qkv.weight", "in_proj_weight")  # queries, keys and values in one matrix, in three equal parts


def matrix_shape(name: str, shape: Sequence[int]) -> tuple[int, int] | None:
    """Return (out, in) of a linear layer's weight, or of a convolution's [out, channels, height, width] as a matrix.

    None for everything else: biases, norms, tokens, and tables of embeddings, which no input is multiplied with.
    """
    if len(shape) == 2 and not any(part in name for part in LOOKED_UP) and name != "shared.weight":  # T5's
        return shape[0], shape[1]
    if len(shape) == 4 and min(shape[2:]) > 1:
        return shape[0], shape[1] * shape[2] * shape[3]
    return None


def matrix_shapes(tensors: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """Return `matrix_shape` of each of these shapes that is a matrix's, by name."""
    return {name: found for name, shape in tensors.items() if (found := matrix_shape(name, shape)) is not None}


def by_matrix(
    task_vectors: TaskVectors, combine: Callable[[Tensor], Tensor], *, split_fused: bool = False
) -> Direction:
    """Return `combine(rows)` for every matrix, [T, out, in] to [out, in], and the mean of every other tensor.

    Args:
        split_fused: whether queries, keys and values that are fused in one matrix are three of their own.

    Raises:
        ValueError: no task vectors, or they differ in names or shapes.
    """

    def combined(name: str, rows: Tensor) -> Tensor:
        shape = matrix_shape(name, rows.shape[1:])
        if shape is None:
            return rows.mean(0)
        matrices = rows.reshape(len(rows), *shape)
        if split_fused and name.endswith(FUSED) and shape[0] % 3 == 0:
            return torch.cat([combine(part) for part in matrices.tensor_split(3, dim=1)]).reshape(rows.shape[1:])
        return combine(matrices).reshape(rows.shape[1:])

    return by_name(task_vectors, combined)
