"""Batches shared among processes: they take turns at them, and all of them get all results.

    torchrun --nproc_per_node 2 -m ig_captioner.cli evaluate retrieval --data DATA --output DIR

Every process reads all samples and computes every N-th batch. A batch is the same whoever computes it, and so is the
result for any number of processes.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
from torch import distributed


T = TypeVar("T")
R = TypeVar("R")

_is_sharing = False


@contextmanager
def sharing() -> Iterator[None]:
    """Inside, `map_batches` shares its work among the processes that torchrun has started; they must all get there."""
    global _is_sharing
    # clusters may set WORLD_SIZE for jobs that start their processes by themselves: then there is no RANK
    if _is_sharing or "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # torchrun ends the others when one process fails: nobody waits that long for a dead one
    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    _is_sharing = True
    try:
        yield
    finally:
        _is_sharing = False
        distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """Number of this process, and how many share the work."""
    return (distributed.get_rank(), distributed.get_world_size()) if _is_sharing else (0, 1)


def is_first() -> bool:
    """Tells whether this is the process that writes and prints."""
    return place()[0] == 0


def map_batches(function: Callable[[list[T]], R], items: Iterable[T], batch_size: int) -> list[R]:
    """`function(batch)` of every batch of items, in order; the last batch may be smaller.

    Raises:
        ValueError: for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"a batch holds at least one item, got batch_size {batch_size}")
    (own, processes) = place()
    iterator = iter(items)
    results: list[R] = []
    batches = 0
    while batch := list(islice(iterator, batch_size)):
        if batches % processes == own:
            results.append(function(batch))
        batches += 1
    if processes == 1:
        return results
    of_process: list[list[R]] = [[]] * processes
    distributed.all_gather_object(of_process, results)
    return [of_process[number % processes][number // processes] for number in range(batches)]
