"""Pictures of an evaluation. Each function returns False, and draws nothing, where matplotlib is missing."""

from pathlib import Path

from torch import Tensor

from .calibration import Bins


def _panels(number: int, height: float):
    """A figure of `number` panels side by side, 5 inches wide each, and the panels; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(5 * number, height), layout="constrained")
    return figure, figure.subplots(1, number, squeeze=False)[0]


def draw_confusion(path: Path, confusions: dict[str, list[list[int]]], class_names: list[str]) -> bool:
    """The counts [C, C] of each row, true classes downwards."""
    drawing = _panels(len(confusions), height=5.5)
    if drawing is None:
        return False
    figure, panels = drawing
    for axes, (name, counts) in zip(panels, confusions.items(), strict=True):
        axes.imshow(counts, cmap="viridis", interpolation="nearest")
        axes.set(title=name, xlabel="predicted", ylabel="true")
        if len(class_names) <= 40:
            axes.set_xticks(range(len(class_names)), class_names, rotation=90, fontsize=7)
            axes.set_yticks(range(len(class_names)), class_names, fontsize=7)
    figure.savefig(path, dpi=120)
    return True


def draw_reliability(path: Path, pictures: dict[str, Bins]) -> bool:
    """Share of right answers over mean score, bin by bin, above how many answers each bin has."""
    drawing = _panels(len(pictures), height=5)
    if drawing is None:
        return False
    figure, panels = drawing
    for axes, (title, bins) in zip(panels, pictures.items(), strict=True):
        images = bins.images.tolist()
        width = 1 / len(bins.images)
        counts = axes.twinx()
        left = [index * width for index in range(len(images))]
        counts.bar(left, images, width, align="edge", color="0.85", edgecolor="white")
        counts.set(ylabel="images (grey bars)", ylim=(0, 2.5 * max(images)))
        axes.set_zorder(counts.get_zorder() + 1)  # lines above the bars
        axes.patch.set_visible(False)
        axes.plot([0, 1], [0, 1], color="0.4", linestyle=":", label="perfect")
        some = bins.images > 0
        axes.plot(bins.score[some], bins.right[some], marker="o", markersize=4, label="measured")
        axes.set(title=title, xlabel="mean score of the best label", ylabel="share that is right")
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
    return True


def draw_coverage(path: Path, curves: dict[str, tuple[Tensor, Tensor]]) -> bool:
    """Share of right answers over the share of images that are answered, a line for each way to abstain."""
    drawing = _panels(1, height=4)
    if drawing is None:
        return False
    figure, (axes,) = drawing
    for name, (coverage, right) in curves.items():
        shown = coverage >= 0.01  # of less, the share is noise
        axes.plot(coverage[shown], right[shown], label=name)
    axes.set(xlabel="share of images answered", ylabel="share of answers that is right", xlim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
