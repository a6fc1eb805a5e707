"""The part of converters after the plan: fill, verify, save, reload and describe a model; and the command line."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ig_captioner import IGCaptionerConfig, IGCaptionerImageProcessor, IGCaptionerProcessor
from ig_captioner.checkpoint import load_processor
from ig_captioner.release import check_target, new_folder

from .key_map_big_vision import Placement
from .reading import Checkpoint, ConversionError
from .verification import check, measure, read_reference
from .writing import build_model, push, save_and_reload, write_card


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SUMMARY = "These weights were converted from another format, not trained, by this package."


@dataclass
class Plan:
    """All that is decided before an array is read.

    constants: weights that the source computes or does without. facts: what the card tells about the source's code.
    """

    checkpoint: Checkpoint
    placements: list[Placement]
    config: IGCaptionerConfig
    processor: IGCaptionerProcessor | IGCaptionerImageProcessor
    notes: list[str]
    facts: dict[str, str]
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every weight of the model, leaf by leaf."""
        for placement in self.placements:
            yield from placement.to_weights(self.checkpoint.read(placement.leaf))
        yield from self.constants.items()

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


def make_plan(
    checkpoint: Checkpoint,
    placements: list[Placement],
    config: IGCaptionerConfig,
    image_processor: IGCaptionerImageProcessor,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    notes: list[str],
    facts: dict[str, str],
    constants: dict[str, np.ndarray],
) -> Plan:
    """Ends the planning of every converter. Raises ConversionError if there are more tokens than embeddings."""
    if checkpoint.skipped:
        notes = [*notes, f"{len(checkpoint.skipped)} leaves are not of this model: {checkpoint.skipped[0]}, ..."]
    if tokenizer is None:
        notes = [*notes, "no --tokenizer was given: the folder will score token ids, not texts"]
        return Plan(checkpoint, placements, config, image_processor, notes, facts, constants)
    vocab_size = config.text_config.vocab_size
    if len(tokenizer) > vocab_size:
        raise ConversionError(f"the tokenizer has {len(tokenizer)} tokens, but the checkpoint {vocab_size}")
    processor = IGCaptionerProcessor(image_processor, tokenizer)
    return Plan(checkpoint, placements, config, processor, notes, facts, constants)


@dataclass
class Report:
    """A record of a conversion. differences: reference output -> largest absolute one, in float32 and as stored."""

    directory: Path
    sha256: str
    num_leaves: int
    notes: list[str]
    differences: dict[str, float] = field(default_factory=dict)
    stored_differences: dict[str, float] = field(default_factory=dict)


# what a converter knows: checkpoint, config, tokenizer and image size, as on the command line, to a plan
Planner = Callable[[str | Path, str | Path | None, str | Path | None, tuple[int, int] | None], Plan]


def convert_with(
    planner: Planner,
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

    Raises ConversionError for whatever does not fit and OSError; nothing is left behind then.
    """
    directory = Path(output_dir).expanduser().resolve()
    check_target(directory, overwrite)
    plan = planner(checkpoint, config, tokenizer, image_size)
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
    """Facts about the source, for the card."""
    facts = {
        "converted from": f"`{plan.checkpoint.store.path.name}`, {report.num_leaves} leaves, each read once",
        "sha256 of the source": f"`{report.sha256}`",
        "licence of the weights": license or "not stated by the checkpoint; ask its authors",
        **plan.facts,
        "prior": "trained without the unconditional term, so `prior_weight` is 0: texts are ranked by log P(T given I)",
    }
    if not report.differences:
        return {**facts, "verified": "weights only (no reference outputs were given)"}
    for name, value in report.differences.items():
        stored = report.stored_differences[name]
        facts[f"largest difference, `{name}`"] = f"{value:.1e} in float32, {stored:.1e} as stored ({dtype})"
    return facts


def parse_arguments(name: str, description: str, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m conversion.{name}", description=description)
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="FILE_OR_DIR[:subtree]",
        help=".npz file, or folder as upstream writes it",
    )
    add("--output_dir", required=True, type=Path, help="the folder to write")
    add("--config", type=Path, help="JSON of upstream's configuration, to be checked against the checkpoint")
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


def run(planner: Planner, options: argparse.Namespace) -> None:
    image_size = tuple(options.image_size) if options.image_size else None
    if options.dry_run:
        plan = planner(options.checkpoint, options.config, options.tokenizer, image_size)
        _print_notes(plan.notes)
        print(plan.table())
        print(json.dumps(plan.config.to_diff_dict(), indent=1, default=str))
        return
    names = ("config", "tokenizer", "dtype", "max_shard_size", "verify", "atol", "overwrite", "license")
    arguments = {name: getattr(options, name) for name in names}
    report = convert_with(planner, options.checkpoint, options.output_dir, image_size=image_size, **arguments)
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


def main_with(planner: Planner, name: str, description: str, arguments: list[str] | None) -> None:
    """The command `python -m conversion.{name}`."""
    options = parse_arguments(name, description, arguments)
    try:
        run(planner, options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
