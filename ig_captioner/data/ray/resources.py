"""Who gets which CPUs: scoring actors stay, so that tasks that read need a CPU beside them, or all wait for ever.

Ray counts logical CPUs, which are reserved, not used up: a fraction of one still runs on a whole one.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


Resources = Mapping[str, float]
"""What a node of the cluster has, such as {"CPU": 16.0, "GPU": 1.0}."""

# Shares of an actor and of a task that reads, the first that fit are taken. They are never equal: Ray makes one step of
# steps that ask for the same, and would decode in the actors.
SHARES = ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25))
READERS = (0.75, 0.5, 0.25)  # beside actors whose share was chosen
TOLERANCE = 1e-6


class Shares(NamedTuple):
    """Logical CPUs that are reserved for an actor, and for a task that reads and decodes."""

    actor: float
    reader: float


def share_cpus(
    nodes: Sequence[Resources], concurrency: int, num_cpus: float | None = None, num_gpus: float = 0.0
) -> Shares:
    """Chooses what actors and readers reserve, so that reading always finds a CPU.

    Args:
        nodes: of the cluster.
        concurrency: number of actors.
        num_cpus: of an actor, if that was chosen.
        num_gpus: of an actor.

    Raises:
        ValueError: with the arithmetic, if that cannot be.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, got {concurrency}")
    candidates = SHARES if num_cpus is None else [(num_cpus, reader) for reader in READERS if reader != num_cpus]
    for actor, reader in candidates:
        if fits(nodes, concurrency, actor, num_gpus, reader):
            return Shares(actor, reader)
    actor, reader = candidates[-1]
    raise ValueError(_arithmetic(nodes, concurrency, actor, num_gpus, reader))


def fits(nodes: Sequence[Resources], concurrency: int, actor: float, num_gpus: float, reader: float) -> bool:
    """Whether all actors find a place, and a reader another, wherever Ray puts the actors."""
    slots = [_slots(node, actor, num_gpus) for node in nodes]
    if concurrency > sum(slots):
        return False
    a_slot_stays_free = concurrency < sum(slots) and actor + TOLERANCE >= reader
    beside_actors = max(node.get("CPU", 0.0) - slot * actor for node, slot in zip(nodes, slots, strict=True))
    return a_slot_stays_free or beside_actors + TOLERANCE >= reader


def _slots(node: Resources, actor: float, num_gpus: float) -> int:
    """How many actors a node has room for; as many as there can be if they reserve nothing."""
    asked = {"CPU": actor, "GPU": num_gpus}
    room = [int(node.get(name, 0.0) / each + TOLERANCE) for name, each in asked.items() if each]
    return min(room, default=10**6)


def _arithmetic(nodes: Sequence[Resources], concurrency: int, actor: float, num_gpus: float, reader: float) -> str:
    """Says what was asked for and what there is."""
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    room = sum(_slots(node, actor, num_gpus) for node in nodes)
    gpu = f" and {num_gpus:g} GPU" if num_gpus else ""
    there = f"{cpus:g} logical CPUs" + (f" and {gpus:g} GPUs" if num_gpus or gpus else "")
    return (
        f"{concurrency} actors x {actor:g} CPU{gpu}, and {reader:g} CPU to read and decode, are "
        f"{concurrency * actor + reader:g} CPUs" + (f" and {concurrency * num_gpus:g} GPUs" if num_gpus else "") + ": "
        f"the cluster has {there} on {len(nodes)} node{'s' * (len(nodes) != 1)}, room for {room} such actors and none "
        "to spare for reading. Take fewer actors (--concurrency), reserve less for each (--num-cpus), or add nodes"
    )
