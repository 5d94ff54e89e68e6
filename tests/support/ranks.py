"""What ranks read of a dataset for training, each with a loader that stops and another one that goes on."""

from collections.abc import Callable
from itertools import islice
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader


def read_in_two_ranks(
    opened: Callable[..., Any], plain: Callable[[Any], list[Any]], workers: int, **options: Any
) -> list[Any]:
    """All rows that two ranks read. A loader that takes up where another stood after two batches reads the same rest.

    Args:
        opened: opens the dataset for `rank` and `world_size`, with `options`.
        plain: makes batches rows that can be compared.
        workers: of each loader.
        options: see `opened`.
    """
    union = []
    for rank in range(2):
        loaders: list[Any] = []
        for _ in range(2):
            data = opened(rank=rank, world_size=2, **options)
            loaders.append(StatefulDataLoader(data, batch_size=4, num_workers=workers))
        batches = iter(loaders[0])
        union += plain(list(islice(batches, 2)))
        loaders[1].load_state_dict(loaders[0].state_dict())
        rest = plain(list(batches))
        assert plain(loaders[1]) == rest
        union += rest
    return union
