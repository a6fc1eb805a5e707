"""A picture of a run's log: losses, information gain per token, and held-out accuracy. Needs matplotlib.

python -m training.curves runs/tiny/log.jsonl curves.png
"""

import sys
from pathlib import Path
from typing import Any

from .metrics import read_rows


def draw_curves(log: Path, picture: Path) -> bool:
    """Draws what the log has; False, and no picture, without matplotlib or without rows."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = read_rows(log)
    metrics = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "evaluation" in row]
    if not metrics:
        return False
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, gains, accuracy = figure.subplots(1, 3)
    for name, label in (("captioning_loss", "CE(T|I)"), ("unconditional_loss", "CE(T)")):
        draw(losses, {label: [(row["step"], row.get(name)) for row in metrics]})
    sources = sorted({name for row in metrics for name in row["sources"]})
    draw(gains, {"all": [(row["step"], row.get("information_gain")) for row in metrics]})
    for source in sources if len(sources) > 1 else []:
        points = [(row["step"], row["sources"].get(source, {}).get("information_gain")) for row in metrics]
        draw(gains, {source: points}, linewidth=0.8)
    for source in sorted({name for row in evaluations for name in row["evaluation"]}):
        points = [(row["step"], row["evaluation"].get(source, {}).get("top1_prior_weight_1")) for row in evaluations]
        draw(accuracy, {source: points}, marker=".")
    titles = ("loss, nats per token", "information gain, nats per token", "held-out top-1 by information gain")
    for axis, title in zip((losses, gains, accuracy), titles, strict=True):
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(frameon=False)
    figure.savefig(picture, dpi=120)
    return True


def draw(axis: Any, curves: dict[str, list[tuple[int, float | None]]], **style: Any) -> None:
    """Lines through the points that have a value."""
    for label, points in curves.items():
        known = [(step, value) for step, value in points if value is not None]
        axis.plot([step for step, _ in known], [value for _, value in known], label=label, **style)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m training.curves LOG.jsonl PICTURE.png")
    if not draw_curves(Path(sys.argv[1]), Path(sys.argv[2])):
        raise SystemExit(f"no rows in {sys.argv[1]}, or no matplotlib")
