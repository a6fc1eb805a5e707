"""The web demo under load: what the largest requests inside its limits take, and what a short one waits beside them.

    python -m benchmarks.demo_load [--visitors 20] --output FILE.json

Starts `ig-captioner demo` with the shipped checkpoint in a process of its own. First one visitor at a time makes each
of the largest requests; then all visitors make them at once, while one more asks for seven labels, again and again.
Memory is the server's peak of resident memory (Linux), less what it holds after one small request.
"""

import argparse
import io
import json
import shlex
import statistics
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from ig_captioner.demo.inputs import MAX_ALL_CHARACTERS, MAX_CHARACTERS, MAX_LABELS, MAX_PIXELS

from .measure import circumstances


SECONDS = 600  # for one answer
LABELS = ["cat", "dog", "horse", "woman", "cup of coffee", "rocket", "motorcycle"]  # of a short request


class Visitor:
    """One browser session, which speaks Gradio's protocol."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.session = uuid.uuid4().hex
        config = httpx.get(f"{url}config").json()
        self.functions = {dep["api_name"]: dep["id"] for dep in config["dependencies"] if dep["api_name"]}

    def call(self, name: str, *data: Any) -> float:
        """Seconds until the answer. Raises RuntimeError if it is an error."""
        start = time.perf_counter()
        job = {"data": data, "fn_index": self.functions[name], "session_hash": self.session}
        httpx.post(f"{self.url}gradio_api/queue/join", json=job, timeout=SECONDS).raise_for_status()
        parameters = {"session_hash": self.session}
        answer = httpx.get(f"{self.url}gradio_api/queue/data", params=parameters, timeout=SECONDS).text
        if '"success":true' not in answer:
            raise RuntimeError(f"{name}: {answer[-500:]}")
        return time.perf_counter() - start

    def choose(self, photo: bytes) -> float:
        """Uploads a photo and has it read."""
        answer = httpx.post(f"{self.url}gradio_api/upload", files={"files": ("photo.jpg", photo)}, timeout=SECONDS)
        return self.call("read", {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}})

    def classify(self, labels: list[str], templates: list[str]) -> float:
        return self.call("classify", None, "\n".join(labels), "\n".join(templates), 1.0, None)


def jpeg(width: int, height: int) -> bytes:
    """A photo-like file: smooth noise, so that a large one stays below the limit of bytes."""
    small = np.random.default_rng(0).integers(0, 256, (height // 64 + 1, width // 64 + 1, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def largest_requests() -> dict[str, tuple[list[str], list[str]]]:
    """Labels and sentences at the limits, of different kinds."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))

    def words(number: int, length: int) -> list[str]:
        return ["x" + "".join(rng.choice(letters, length - 2)) + "x" for _ in range(number)]

    each = MAX_ALL_CHARACTERS // MAX_LABELS
    long = MAX_ALL_CHARACTERS // MAX_CHARACTERS
    return {
        "many labels": (words(MAX_LABELS, each), ["{}"]),
        "long labels": (words(long, MAX_CHARACTERS), ["{}"]),
        "long sentence": (words(long // 2, 500), ["a" * 480 + "{}"]),
        "label three times": (words(MAX_LABELS // 4, each), ["{} {} {}"]),
        "many sentences": (words(62, 50), [f"{'b' * 40}{number} {{}}" for number in range(16)]),
    }


def memory(pid: int, name: str) -> float:
    """MB from /proc: `VmRSS` now, `VmHWM` the peak."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) / 1e3


def start_server() -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-m", "ig_captioner.cli", "demo"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in server.stdout or ():
        if "http://" in line:
            return server, "http" + line.partition("http")[2].split()[0]
    raise RuntimeError(f"the server ended with {server.wait()}")


def measure(url: str, pid: int, visitors: int) -> list[dict[str, Any]]:
    requests = largest_requests()
    photo = jpeg(640, 480)
    side = int(MAX_PIXELS**0.5)
    first = Visitor(url)
    first.choose(photo)
    first.classify(LABELS, ["a photo of a {}."])
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    held = memory(pid, "VmRSS")
    rows = [{"request": "largest photo", "seconds": first.choose(jpeg(side, side))}]
    rows += [{"request": name, "seconds": first.classify(*request)} for name, request in requests.items()]
    one_at_a_time = memory(pid, "VmHWM") - held

    def visit(request: tuple[list[str], list[str]]) -> None:
        visitor = Visitor(url)
        visitor.choose(photo)
        visitor.classify(*request)

    kinds = list(requests.values())
    threads = [threading.Thread(target=visit, args=(kinds[i % len(kinds)],)) for i in range(visitors)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    waits = []
    while any(thread.is_alive() for thread in threads):
        waits.append(first.classify(LABELS, ["a photo of a {}."]))
        time.sleep(0.2)
    rows.append({"request": f"{visitors} visitors at once, all of the above", "seconds": time.perf_counter() - start})
    short = {"request": f"{len(LABELS)} labels meanwhile, {len(waits)} times", "seconds": statistics.median(waits)}
    rows.append({**short, "longest_seconds": max(waits)})
    rows.append({"request": "peak memory beside the model, one at a time", "megabytes": one_at_a_time})
    rows.append({"request": "peak memory beside the model, all at once", "megabytes": memory(pid, "VmHWM") - held})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    server, url = start_server()
    try:
        rows = measure(url, server.pid, options.visitors)
    finally:
        server.terminate()
        server.wait(30)
    run = circumstances(shlex.join(["python", "-m", "benchmarks.demo_load", *arguments]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"run": run, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
