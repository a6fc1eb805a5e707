"""Two processes that know each other as those of torchrun do.

They are forked off a server that has imported torch and transformers once, which takes longer than what tests do there.
"""

import contextlib
import io
import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed", "transformers.pipelines", "transformers.trainer"])
SECONDS = 300


def _in_one(rank: int, port: int, function: Callable[..., None], arguments: tuple) -> str:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        function(*arguments)
    return output.getvalue()


def in_two_processes(function: Callable[..., None], *arguments) -> tuple[str, str]:
    """Calls a function of a module in both. Returns what each has printed; what one raises is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(2, FORKS) as executor:
        calls = [executor.submit(_in_one, rank, port, function, arguments) for rank in range(2)]
        first, second = (call.result(SECONDS) for call in calls)
    return first, second
