"""Interleaved timing, peak memory, and the report that benchmarks write: rows with a ratio inside one run.

A row is `{"name", "value", "unit", "ratio_to", "ratio"}`. Contenders take turns, so that whatever else the machine does
hits all of them; the value is the median over the rounds, and the ratio the median of each round's own ratio.
"""

import ctypes
import gc
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ig_captioner.evaluation.report import cpu_model, git_commit


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Measurement = dict[str, Any]


def row(name: str, value: float, unit: str, ratio_to: str | None = None, ratio: float | None = None) -> Measurement:
    rounded = {"value": float(f"{value:.4g}"), "ratio": None if ratio is None else float(f"{ratio:.4g}")}
    return {"name": name, "value": rounded["value"], "unit": unit, "ratio_to": ratio_to, "ratio": rounded["ratio"]}


def seconds(run: Callable[[], Any]) -> float:
    """Time of one call: on one CPU thread the process's own, which other programs disturb least; else by the clock."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    clock = time.process_time if DEVICE.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def take_turns(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round that does not count."""
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(seconds(run))
    return times


def median_ratio(values: list[float], references: list[float]) -> float:
    return statistics.median(value / reference for value, reference in zip(values, references, strict=True))


def time_rows(
    times: dict[str, list[float]], references: dict[str, str], unit: str, amount: float = 0
) -> list[Measurement]:
    """Rows of `take_turns`: seconds, or with `amount` what was done in them, per second.

    Args:
        references: contender -> the contender that it is compared with.
    """
    values = {name: [amount / t if amount else t for t in each] for name, each in times.items()}
    return [
        row(name, statistics.median(each), unit, reference, median_ratio(each, values[reference]))
        if (reference := references.get(name))
        else row(name, statistics.median(each), unit)
        for name, each in values.items()
    ]


def peak_memory(run: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """MB that `run(*arguments)()` needs at its peak, beyond what stands before.

    Of the host's memory in a process of its own, so `run` must be a function of a module; what it prepares before it
    returns does not count. Of a GPU's, which is counted exactly, in this one.
    """
    if DEVICE.type == "cuda":
        return _peak_memory(run, *arguments)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (run, *arguments))


def _peak_memory(run: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    step = run(*arguments)
    gc.collect()
    with suppress(OSError, AttributeError):  # what glibc has kept of freed memory would hide what the step takes
        ctypes.CDLL(None).malloc_trim(0)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = resident_peak(reset=True)
    step()
    return (resident_peak() - before) / 1e6


def resident_peak(reset: bool = False) -> float:
    """Bytes of memory that this process has held at most. Linux can start anew; elsewhere imports may hide a part."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except OSError:
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return usage if platform.system() == "Darwin" else 1024 * usage


def circumstances(command: str, **more: Any) -> dict[str, Any]:
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")),
        **more,
    }


def write_report(path: Path, rows: list[Measurement], run: dict[str, Any]) -> str:
    """Writes the rows as JSON, and as a Markdown table with the circumstances beside it; returns the Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    lines = ["| what | value | unit | ratio | to |", "|---|---|---|---|---|"]
    for each in rows:
        ratio = "" if each["ratio"] is None else f"{each['ratio']:g}"
        lines.append(f"| {each['name']} | {each['value']:g} | {each['unit']} | {ratio} | {each['ratio_to'] or ''} |")
    lines += ["", *(f"- {name}: {value}" for name, value in run.items())]
    text = "\n".join(lines) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text
