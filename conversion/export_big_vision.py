"""Writes a model as a big_vision checkpoint: the reverse of `convert_big_vision`, bit for bit.

    python -m conversion.export_big_vision --model FOLDER_OR_REPO --output checkpoint.npz

Beside the `.npz` goes a `.json` with upstream's model arguments, which `convert_big_vision --config` reads.
"""

import argparse
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from ig_captioner import IGCaptionerConfig, IGCaptionerForConditionalGeneration
from ig_captioner.checkpoint import load_model
from ig_captioner.configuration_ig_captioner import as_height_width

from .config_big_vision import PAD, export_plan, infer_model, sincos_text_positions
from .key_map_big_vision import DECODER_POSITIONS, placements
from .reading import BFLOAT16, ConversionError


def to_numpy(weight: torch.Tensor) -> np.ndarray:
    """A weight's bits; bfloat16 as numpy's nameless two bytes."""
    if weight.dtype == torch.bfloat16:
        return weight.detach().contiguous().view(torch.int16).numpy().view(BFLOAT16)
    if weight.dtype != torch.float32:
        raise ConversionError(f"a weight is {weight.dtype}; float32 and bfloat16 can be exported")
    return weight.detach().numpy()


def leaves(model: IGCaptionerForConditionalGeneration, scan: bool) -> Iterator[tuple[str, np.ndarray]]:
    """`(name, array)` of every leaf. Raises ConversionError if big_vision cannot hold the model."""
    structure, sizes = export_plan(model.config, scan)
    weights = model.state_dict()
    if not structure.learned_positions:
        _check_fixed_positions(weights.pop(DECODER_POSITIONS))
    used: set[str] = set()

    def take(name: str) -> np.ndarray:
        used.add(name)
        return to_numpy(weights[name])

    for placement in placements(structure):
        yield placement.leaf, placement.to_leaf(take, sizes)
    if left := sorted(weights.keys() - used):
        raise ConversionError(f"these weights have no leaf: {', '.join(left)}")


def _check_fixed_positions(positions: torch.Tensor) -> None:
    table = torch.from_numpy(sincos_text_positions(*positions.shape)).to(positions.dtype)
    if not torch.equal(table, positions):
        raise ConversionError(
            "the encoder's positions are fixed, but the decoder's have been trained: big_vision fixes both or neither"
        )


def upstream_config(config: IGCaptionerConfig) -> dict:
    """Configuration for `convert_big_vision --config`: upstream's model arguments, and what goes with them."""
    structure, sizes = export_plan(config, scan=False)
    model = infer_model(structure, sizes)
    # upstream keeps an embedding for the mask token where this is positive; 0.75 is CapPa's
    model["masked_pred_prob"] = (config.parallel_prediction_prob or 0.75) if model.pop("masked") else 0.0
    model["masking_ratio"] = 1.0
    size = list(as_height_width(config.vision_config.image_size, "image_size"))
    return {"model": model, "image_size": size, "pad_id": PAD, "eos_id": config.eos_token_id}


def export(
    model: str | Path, output: str | Path, *, bare: bool = False, scan: bool = False, overwrite: bool = False
) -> Path:
    """Writes `output` (.npz) and the configuration beside it (.json), one leaf in memory at a time.

    Args:
        model: a folder or a repository on the Hub.
        bare: leave out the prefix `params/`, as published checkpoints do.
        scan: stack the layers of each tower in one leaf.

    Raises:
        ConversionError: the model does not fit, or a file exists.
        OSError: reading or writing failed.
    """
    output = Path(output).expanduser()
    if output.suffix != ".npz":
        raise ConversionError(f"the output must end in .npz, got {output}")
    description = output.with_suffix(".json")
    for path in (output, description):
        if path.exists() and not overwrite:
            raise ConversionError(f"{path} exists; --overwrite replaces it")
    loaded = load_model(IGCaptionerForConditionalGeneration, model)
    text = json.dumps(upstream_config(loaded.config), indent=1) + "\n"
    prefix = "" if bare else "params/"
    _replace(output, lambda path: _write_npz(path, prefix, leaves(loaded, scan)))
    _replace(description, lambda path: path.write_text(text, encoding="utf-8"))
    return output


def _write_npz(path: Path, prefix: str, arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays:
            with archive.open(f"{prefix}{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside `path` and renames, so that no half of a file is ever there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m conversion.export_big_vision", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder, or repository on the Hub")
    parser.add_argument("--output", required=True, type=Path, help="the .npz to write; a .json goes beside it")
    parser.add_argument("--bare", action="store_true", help="leave out the prefix params/")
    parser.add_argument("--scan", action="store_true", help="stack the layers of each tower (upstream's scan=True)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    options = parser.parse_args(arguments)
    try:
        path = export(options.model, options.output, bare=options.bare, scan=options.scan, overwrite=options.overwrite)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(path)


if __name__ == "__main__":
    main()
