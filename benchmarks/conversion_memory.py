"""Measures how much memory converting a big_vision checkpoint takes, as a multiple of the checkpoint's size.

    python -m benchmarks.conversion_memory

Generates a CapPa of random weights in upstream's form (500 MB unless `--encoder_layers` says otherwise), converts it in
a process of its own, and prints that process's peak of resident memory (VmHWM, which counts the mapped pages of files,
too) less what it was once everything had been imported, over the file's size. Linux only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from conversion.export_big_vision import export
from ig_captioner import IGCaptionerConfig, IGCaptionerForConditionalGeneration


CONVERT = """
import sys
from pathlib import Path

from conversion.convert_big_vision import convert


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


before = peak()
convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3])
print(before, peak())
"""


def generate(path: Path, encoder_layers: int, leaves: str, scan: bool) -> None:
    """Writes `path` (.npz), its `leaves` float32 or bfloat16: the sizes of CapPa B/16, but for depth and vocabulary."""
    config = IGCaptionerConfig(
        vision_config={"num_hidden_layers": encoder_layers},
        text_config={
            "fusion": "cross_attention",
            "vocab_size": 16000,
            "mask_token_id": 16000,
            "norm_bias": False,
            "mlp_bias": False,
            "attention_bias": False,
            "head_bias": True,
            "decoder_start_token_id": 0,
        },
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = IGCaptionerForConditionalGeneration.from_config(config, dtype=getattr(torch, leaves))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        model.save_pretrained(folder)
        export(folder, path, scan=scan)


def measure(checkpoint: Path, dtype: str) -> tuple[int, int]:
    """Peak of resident memory in bytes, before and after a conversion to `dtype`."""
    output = str(checkpoint.parent / "converted")
    command = [sys.executable, "-c", CONVERT, str(checkpoint), output, dtype]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    before, after = (1024 * int(number) for number in printed.split())
    return before, after


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder_layers", type=int, default=6, help="28 MB each in float32 (default: 6)")
    parser.add_argument("--leaves", choices=("float32", "bfloat16"), default="float32", help="of the checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the converted weights")
    parser.add_argument("--scan", action="store_true", help="one leaf for all layers of a tower")
    parser.add_argument("--work_dir", type=Path, help="a folder with room for three times the checkpoint")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        checkpoint = Path(folder) / "checkpoint.npz"
        generate(checkpoint, options.encoder_layers, options.leaves, options.scan)
        size = checkpoint.stat().st_size
        before, after = measure(checkpoint, options.dtype)
    layout = "scan" if options.scan else "loop"
    print(f"checkpoint: {size / 1e6:.0f} MB, {options.leaves}, {layout} layout, to {options.dtype}")
    print(f"resident memory: {before / 1e6:.0f} MB after the imports, {after / 1e6:.0f} MB at the peak")
    print(f"peak less imports, over the checkpoint's size: {(after - before) / size:.2f}")


if __name__ == "__main__":
    main()
