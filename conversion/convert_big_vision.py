"""Converts a Cap or CapPa of google-research/big_vision to a folder for the Hub.

    python -m conversion.convert_big_vision --checkpoint checkpoint.npz --tokenizer sentencepiece.model --output_dir out

Upstream: https://github.com/google-research/big_vision, `models/proj/cappa`. See README.md beside this file.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ig_captioner import IGCaptionerConfig, IGCaptionerImageProcessor, IGCaptionerProcessor
from ig_captioner.configuration_ig_captioner import as_height_width
from ig_captioner.hub import check_target, load_processor, new_folder

from .config_big_vision import (
    EOS,
    Given,
    build_config,
    cross_check,
    find_text_length,
    infer_model,
    read_given,
    sincos_text_positions,
)
from .key_map_big_vision import DECODER_POSITIONS, Placement, Structure, find_sizes, find_structure, placements
from .reading import Checkpoint, ConversionError, open_checkpoint
from .tokenizer import load_tokenizer
from .verification import check, measure, read_reference
from .writing import build_model, push, save_and_reload, write_card


UPSTREAM = "https://github.com/google-research/big_vision"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SUMMARY = "These weights were converted from another format, not trained, by this package."
BILINEAR = 2  # Pillow's; upstream's evaluation uses tf.image.resize with this method, but without antialiasing


@dataclass
class Plan:
    """All that is decided before an array is read."""

    checkpoint: Checkpoint
    structure: Structure
    placements: list[Placement]
    config: IGCaptionerConfig
    processor: IGCaptionerProcessor | IGCaptionerImageProcessor
    notes: list[str]

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every weight of the model, leaf by leaf."""
        for placement in self.placements:
            yield from placement.to_weights(self.checkpoint.read(placement.leaf))
        if not self.structure.learned_positions:
            text = self.config.text_config
            yield DECODER_POSITIONS, sincos_text_positions(text.max_position_embeddings, text.hidden_size)

    def table(self) -> str:
        """Leaf, shape and weight, a line each."""
        lines = []
        for placement in self.placements:
            leaf = self.checkpoint.leaves[placement.leaf]
            weights = placement.weights[0] + (
                f" (and {len(placement.weights) - 1} more)" if placement.weights[1:] else ""
            )
            lines.append(f"{placement.leaf} {leaf.shape} {leaf.dtype} -> {weights}")
        return "\n".join(lines)


@dataclass
class Report:
    """What was converted. differences: reference output -> largest absolute difference, in float32 and as stored."""

    directory: Path
    sha256: str
    num_leaves: int
    notes: list[str]
    differences: dict[str, float] = field(default_factory=dict)
    stored_differences: dict[str, float] = field(default_factory=dict)


def make_plan(checkpoint: Checkpoint, given: Given, tokenizer: str | Path | None = None) -> Plan:
    """Decides everything from names, shapes and what is given. Raises ConversionError for all that does not fit."""
    structure = find_structure(checkpoint.leaves)
    plan = placements(structure)
    sizes = find_sizes(checkpoint.leaves, plan)
    inferred = infer_model(structure, sizes)
    notes = [f"{name} in the given config was not checked" for name in cross_check(inferred, given)]
    if checkpoint.skipped:
        notes.append(f"{len(checkpoint.skipped)} leaves are not of this model: {checkpoint.skipped[0]}, ...")
    text_tokenizer = None
    eos_token_id = given.eos_token_id
    if tokenizer is not None:
        text_tokenizer = load_tokenizer(tokenizer, find_text_length(inferred, given))
        _check_tokenizer(text_tokenizer, tokenizer, given, inferred["vocab_size"])
        eos_token_id = text_tokenizer.eos_token_id
    else:
        notes.append("no --tokenizer was given: the folder will score token ids, not texts")
    if eos_token_id is None:
        eos_token_id = EOS
        notes.append(f"end-of-sequence is taken to be token {EOS}, as in the c4_en vocabulary")
    config = build_config(inferred, sizes, given, eos_token_id)
    height, width = as_height_width(config.vision_config.image_size, "image_size")
    image_processor = IGCaptionerImageProcessor(size={"height": height, "width": width}, resample=BILINEAR)
    processor = IGCaptionerProcessor(image_processor, text_tokenizer) if text_tokenizer else image_processor
    return Plan(checkpoint, structure, plan, config, processor, notes)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str | Path, given: Given, vocab_size: int) -> None:
    if given.eos_token_id not in (None, tokenizer.eos_token_id):
        raise ConversionError(f"eos_id is {given.eos_token_id} in the config, but {tokenizer.eos_token_id} in {path}")
    if len(tokenizer) > vocab_size:
        raise ConversionError(f"{path} has {len(tokenizer)} tokens, but the checkpoint {vocab_size}")


def convert(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
    dtype: str = "float32",
    max_shard_size: str | int | None = None,
    verify: str | Path | None = None,
    atol: float = 1e-4,
    overwrite: bool = False,
    license: str | None = None,
) -> Report:
    """Converts, saves, reloads and checks; arguments as on the command line.

    Raises:
        ConversionError: whatever does not fit; nothing is left behind then.
        OSError: reading or writing failed.
    """
    directory = Path(output_dir).expanduser().resolve()
    check_target(directory, overwrite)
    plan = make_plan(open_checkpoint(checkpoint), read_given(config, image_size), tokenizer)
    reference = None if verify is None else read_reference(verify)
    model = build_model(plan.config, plan.weights())
    report = Report(directory, plan.checkpoint.sha256(), len(plan.placements), plan.notes)
    if reference is not None:
        report.differences = measure(model, reference)
        check(report.differences, atol)
    model.to(DTYPES[dtype])
    with new_folder(directory) as folder:
        model = save_and_reload(model, folder, max_shard_size)
        plan.processor.save_pretrained(folder)
        if isinstance(plan.processor, IGCaptionerProcessor):
            load_processor(folder)
        if reference is not None:
            report.stored_differences = measure(model, reference)
            if dtype == "float32":
                check(report.stored_differences, atol)
        write_card(folder, model, directory.name, license, SUMMARY, _facts(plan, report, dtype, license))
    return report


def _facts(plan: Plan, report: Report, dtype: str, license: str | None) -> dict[str, str]:
    """What the card tells about the source."""
    facts = {
        "converted from": f"`{plan.checkpoint.store.path.name}`, {report.num_leaves} leaves, each read once",
        "sha256 of the source": f"`{report.sha256}`",
        "code of the source": f"[big_vision]({UPSTREAM}), `models/proj/cappa` (Apache-2.0)",
        "licence of the weights": license or "not stated by the checkpoint; ask its authors",
        "token ids": "padding and start 0, end-of-sequence " + str(plan.config.eos_token_id),
        "prior": "trained without the unconditional term, so `prior_weight` is 0: texts are ranked by log P(T given I)",
    }
    if not report.differences:
        return {**facts, "verified": "weights only (no reference outputs were given)"}
    for name, value in report.differences.items():
        stored = report.stored_differences[name]
        facts[f"largest difference, `{name}`"] = f"{value:.1e} in float32, {stored:.1e} as stored ({dtype})"
    return facts


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m conversion.convert_big_vision", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="FILE_OR_DIR[:subtree]", help=".npz file or tensorstore folder")
    add("--output_dir", required=True, type=Path, help="the folder to write")
    add("--config", type=Path, help="JSON of upstream's model arguments, to be checked against the checkpoint")
    add("--tokenizer", type=Path, help="SentencePiece .model, tokenizer.json, or a folder with one of them")
    add("--image_size", type=int, nargs=2, metavar=("H", "W"), help="pixels, where the patches are no square grid")
    add("--dtype", choices=DTYPES, default="float32", help="of the stored weights (default: float32)")
    add("--max_shard_size", help="largest weight file, such as 2GB (default: as transformers)")
    add("--verify", type=Path, metavar="REF.npz", help="outputs of the source's own code to compare with")
    add("--atol", type=float, default=1e-4, help="largest difference allowed by --verify (default: 1e-4)")
    add("--license", help="the Hub's name of the weights' licence, for the card")
    add("--dry_run", action="store_true", help="print what would be converted, and write nothing")
    add("--overwrite", action="store_true", help="replace an earlier model in --output_dir")
    add("--push_to_hub", metavar="REPO", help="upload the finished folder to this repository")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    image_size = tuple(options.image_size) if options.image_size else None
    if options.dry_run:
        plan = make_plan(open_checkpoint(options.checkpoint), read_given(options.config, image_size), options.tokenizer)
        _print_notes(plan.notes)
        print(plan.table())
        print(json.dumps(plan.config.to_diff_dict(), indent=1, default=str))
        return
    names = ("config", "tokenizer", "dtype", "max_shard_size", "verify", "atol", "overwrite", "license")
    arguments = {name: getattr(options, name) for name in names}
    report = convert(options.checkpoint, options.output_dir, image_size=image_size, **arguments)
    _print_notes(report.notes)
    for name, value in report.stored_differences.items():
        print(f"{name}: {value:.2e}")
    print(f"{report.num_leaves} leaves converted, reloaded and found equal: {report.directory}")
    if options.push_to_hub:
        push(report.directory, options.push_to_hub)
        print(f"pushed to {options.push_to_hub}")


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    try:
        run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
