"""State of a run beside its weights: into a checkpoint and back, and what its processes agree on."""

import dataclasses
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ig_captioner.data.fingerprints import Fingerprint

from .checkpoint import CheckpointError, load_state, step_of
from .data import TrainingData
from .metrics import MetricsLog
from .mixtures import Position, StreamState
from .optim import MovingAverage
from .sharding import gathered, shard_optimizer_state


@dataclasses.dataclass
class RunProgress:
    """Progress of a run; part of each checkpoint."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    """Samples that this process has skipped, by reason; in a checkpoint, those of all processes."""
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0


def agree(seconds: float, stop: bool, accelerator: Accelerator) -> tuple[float, bool]:
    """Process 0's clock, and whether any process is to stop; the same on every process."""
    if accelerator.num_processes == 1:
        return seconds, stop
    values = [seconds if accelerator.is_main_process else 0.0, float(stop)]
    total = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device)).tolist()
    return total[0], bool(total[1])


def all_finite(loss: Tensor, grad_norm: Tensor | float, accelerator: Accelerator) -> bool:
    """Returns whether loss and gradient norm are finite on every process."""
    total = loss.detach().float() + torch.as_tensor(grad_norm, device=loss.device).float()
    return bool(torch.isfinite(accelerator.reduce(total)))


@contextmanager
def catch_sigterm() -> Iterator[Any]:
    """Yields a function that says whether SIGTERM has come; the signal itself no longer ends the process."""
    received: list[int] = []
    try:
        previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:  # not in the main thread, where Python cannot set handlers
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)


# Into a checkpoint


def random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def collect_state(
    optimizers: list[Any],
    average: MovingAverage | None,
    progress: RunProgress,
    data: TrainingData,
    log: MetricsLog,
    settings: dict[str, Any],
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Everything but the weights. Called on every process; sharded tensors come out only on the main one.

    Cached data have no state: `samples` says what is next.

    Args:
        settings: of the run: their `values`, and the `changes` that were made when it was resumed.
    """
    own = [
        {"random": random_states(), "log": log.state_dict(), "skipped": dict(progress.skipped), "streams": data.states}
    ]
    processes = gather_object(own)
    furthest: dict[int, StreamState] = {}
    for number, state in ((number, state) for process in processes for number, state in process["streams"].items()):
        if number not in furthest or state.draws > furthest[number].draws:
            furthest[number] = state
    return {
        "optimizers": gathered([optimizer.state_dict() for optimizer in optimizers], accelerator.is_main_process),
        "average": gathered(average.state_dict(), accelerator.is_main_process) if average else None,
        "progress": {
            **dataclasses.asdict(progress),
            "skipped": dict(sum((Counter(process["skipped"]) for process in processes), Counter())),
        },
        "random_states": [process["random"] for process in processes],
        "log": [process["log"] for process in processes],
        "settings": settings,
        "shards": {name: [list(shard) for shard in shards] for name, shards in data.shards.items()},
        "streams": data.streams,
        "stream_states": {  # plain lists: what is read back is plain as well
            number: [state.draws, [list(position) for position in state.positions]]
            for number, state in furthest.items()
        },
    }


# And back


class SavedRun:
    """The state of a run that is resumed; without a checkpoint, of one that begins."""

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint
        self.state: dict[str, Any] = load_state(checkpoint) if checkpoint else {}
        if checkpoint and self.step != step_of(checkpoint):  # the newest by name would not be the newest
            raise CheckpointError(
                f"{checkpoint} holds step {self.step}: give it back the name that it was written under"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings when the checkpoint was written; empty without one."""
        return self.state["settings"]["values"] if self.state else {}

    @property
    def changes(self) -> list[dict[str, Any]]:
        """Changes of settings that the run has gone through before."""
        return self.state["settings"]["changes"] if self.state else []

    @property
    def step(self) -> int:
        return self.state["progress"]["step"] if self.state else 0

    @property
    def samples(self) -> int:
        return self.state["progress"]["samples"] if self.state else 0

    @property
    def shards(self) -> dict[str, list[Fingerprint]]:
        """Fingerprints of each source's shards."""
        return {
            name: [Fingerprint(*shard) for shard in shards] for name, shards in self.state.get("shards", {}).items()
        }

    @property
    def streams(self) -> int:
        """Number of streams of the data; 0 without a checkpoint, or for cached sources."""
        return self.state.get("streams", 0)

    @property
    def stream_states(self) -> dict[int, StreamState]:
        return {
            number: StreamState(draws, [Position(*position) for position in positions])
            for number, (draws, positions) in self.state.get("stream_states", {}).items()
        }

    def restore(
        self,
        optimizers: list[Any],
        average: MovingAverage | None,
        progress: RunProgress,
        log: MetricsLog,
        accelerator: Accelerator,
        reseeded: bool = False,
    ) -> None:
        """Puts back what `collect_state` collected; with more processes than before, the new ones start afresh.

        Learning rates, weight decay and the like stay as they are in the optimisers: they are settings, not state.

        Args:
            reseeded: whether the run has a new seed, so that the saved random states are not wanted.
        """
        if not self.state:
            return
        for optimizer, saved in zip(optimizers, self.state["optimizers"], strict=True):
            load_optimizer_state(optimizer, saved)
        if average and self.state["average"] is not None:
            average.load_state_dict(self.state["average"])
        for name, value in self.state["progress"].items():
            setattr(progress, name, value)
        progress.skipped = Counter(self.state["progress"]["skipped"] if accelerator.is_main_process else {})
        log.load_state_dict(self.state["log"])
        if accelerator.process_index < len(self.state["random_states"]) and not reseeded:
            states = self.state["random_states"][accelerator.process_index]
            torch.set_rng_state(states["cpu"])
            if "cuda" in states and torch.cuda.is_available():
                torch.cuda.set_rng_state(states["cuda"])


def load_optimizer_state(optimizer: Any, saved: dict[str, Any]) -> None:
    """Loads what an optimiser has accumulated, and keeps the settings of its groups."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(shard_optimizer_state(saved, optimizer))
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
