"""CPU seconds of starting: the command line, the import of the package, and from the shell to a classified photo.

    python -m benchmarks.startup [--exported FOLDER]

Each line is the least of several runs in processes of their own, one after another; ratios compare lines of one run.
FOLDER: what `python -m ig_captioner.export` made of the shipped checkpoint; its graphs classify a photo without torch.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from ig_captioner import DEFAULT_CHECKPOINT


AUTO = "from transformers import AutoConfig, AutoModelForZeroShotImageClassification, AutoProcessor, AutoImageProcessor"
WEIGHTS = f"from safetensors.torch import load_file; load_file({str(Path(DEFAULT_CHECKPOINT, 'model.safetensors'))!r})"
ONNX = "ig-captioner classify PHOTO --labels cat dog --model FOLDER"
EXAMPLE = "examples/onnx_classify.py FOLDER PHOTO --labels cat dog"
MODEL = f"import ig_captioner; {AUTO}; AutoModelForZeroShotImageClassification.from_pretrained({DEFAULT_CHECKPOINT!r})"


def cpu_seconds(arguments: list[str], runs: int) -> float:
    """Least CPU time, user and system, of `python` with `arguments` in `runs` runs."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(runs):
        before = spent()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times.append(spent() - before)
    return min(times)


def lines(photo: Path, exported: Path | None) -> dict[str, list[str]]:
    """What is measured: a name, and the arguments of `python`."""
    command = ["-m", "ig_captioner.cli"]
    found = {
        "import torch": ["-c", "import torch"],
        "import torch, transformers.models.auto": ["-c", "import torch, transformers.models.auto"],
        "... and read the weights": ["-c", f"import torch, transformers.models.auto; {WEIGHTS}"],
        "import torch, PreTrainedModel": ["-c", "import torch; from transformers import PreTrainedModel"],
        "import torch, the Auto classes": ["-c", f"import torch; {AUTO}"],
        "... and load the model with them": ["-c", MODEL],
        "import ig_captioner": ["-c", "import ig_captioner"],
        "ig-captioner --help": [*command, "--help"],
        "ig-captioner --version": [*command, "--version"],
        "ig-captioner classify PHOTO --labels cat dog": [*command, "classify", str(photo), "--labels", "cat", "dog"],
    }
    if find_spec("shtab"):  # of the extra "cli"
        found["ig-captioner completion bash"] = [*command, "completion", "bash"]
    if exported is not None:
        arguments = [str(photo), "--labels", "cat", "dog"]
        found[ONNX] = [*command, "classify", *arguments, "--model", str(exported)]
        found[EXAMPLE] = [str(Path(__file__).parents[1] / "examples" / "onnx_classify.py"), str(exported), *arguments]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each line (default: %(default)s)")
    parser.add_argument("--exported", type=Path, metavar="FOLDER", help="measure the exported graphs, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder, "photo.png")
        Image.new("RGB", (64, 64), "red").save(photo)
        seconds = {
            name: cpu_seconds(arguments, options.runs) for name, arguments in lines(photo, options.exported).items()
        }
    for name, value in seconds.items():
        print(f"{value:6.2f} s  {name}")
    baseline = seconds["... and read the weights"]
    classify = seconds["ig-captioner classify PHOTO --labels cat dog"]
    ratios = {
        "import ig_captioner / torch and the Auto classes": (
            seconds["import ig_captioner"] / seconds["import torch, the Auto classes"]
        ),
        "classify / torch, transformers.models.auto and reading the weights": classify / baseline,
        "classify / loading the model with the Auto classes": classify / seconds["... and load the model with them"],
    }
    if options.exported is not None:
        ratios["classify with exported graphs / the same"] = seconds[ONNX] / baseline
    for name, value in ratios.items():
        print(f"{value:6.2f}    {name}")


if __name__ == "__main__":
    main()
