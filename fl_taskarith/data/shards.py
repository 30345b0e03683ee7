"""The shards of all clients on the device, in two tensors however many clients there are."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Shards(Sequence[Tensor]):
    """Positions into the training examples per client, int64 [n] each, as views of one tensor."""

    def __init__(self, shards: Sequence[np.ndarray], device: torch.device) -> None:
        self._positions = torch.from_numpy(np.concatenate(shards)).to(device)
        self._ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, client: int) -> Tensor:  # type: ignore[override]
        end = self._ends[client]  # IndexError beyond the last client ends an iteration
        return self._positions[self._ends[client - 1] if client else 0 : end]
