"""Commands about checkpoints: `info`, `compile-labels`, `release`, `push`."""

import argparse
from pathlib import Path
from typing import Any

from ..installed import DEFAULT_CHECKPOINT
from .arguments import (
    MODEL_HELP,
    add_captioner,
    add_command,
    add_device,
    add_format,
    add_labels,
    add_prior,
    add_strict,
    check_labels,
    read_labels,
)
from .output import print_csv, print_json, printable, table


INFO_EXAMPLES = """\
examples:
  ig-captioner info                      # the checkpoint in the package
  ig-captioner info runs/tiny/checkpoint-00002000/model
  ig-captioner info me/my-captioner --format jsonl | jq .parameters
"""
COMPILE_LABELS_EXAMPLES = """\
examples:
  ig-captioner compile-labels my-labels --labels-file names.txt --template "a photo of a {}." "a drawing of a {}."
  ig-captioner compile-labels imagenet-labels --labels-file imagenet --templates-file imagenet
  ig-captioner classify photos/ --labels-file imagenet-labels --top-k 5
"""
RELEASE_EXAMPLES = """\
examples:
  ig-captioner release my-captioner                              # the checkpoint in the package
  ig-captioner release my-captioner --model runs/tiny/checkpoint-00002000/model --repo-id me/my-captioner
  ig-captioner release my-captioner --model mine/ --results out/zero-shot/results.json out/retrieval/results.json
"""
PUSH_EXAMPLES = """\
examples:
  ig-captioner push my-captioner me/my-captioner --private       # a folder of ig-captioner release
  ig-captioner push my-captioner me/my-captioner --revision v2 --message "Trained for twice as long"

You have to be logged in (hf auth login), or HF_TOKEN has to be set.
"""


# ---------------------------------------------------------------------------------------------------------------------
# Parsers


def add_info(commands) -> None:
    summary = "Say what a checkpoint is; its weights are not read."
    parser = add_command(commands, info, "[DIR_OR_REPO]", summary, INFO_EXAMPLES)
    parser.add_argument("model", nargs="?", default=DEFAULT_CHECKPOINT, metavar="DIR_OR_REPO", help=MODEL_HELP)
    add_format(parser)


def add_compile_labels(commands) -> None:
    summary = "Precompute a label set, and keep it in a folder."
    usage = "DIR --labels-file FILE_OR_NAME"
    parser = add_command(commands, compile_labels, usage, summary, COMPILE_LABELS_EXAMPLES, MODEL_HELP, check_labels)
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder to write, missing or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace compiled labels in DIR")
    add_labels(parser)
    add_prior(parser)
    add_strict(parser)
    add_captioner(parser)
    add_device(parser)


def add_release(commands) -> None:
    summary = "Write the complete Hub folder of a checkpoint: weights, code, tokenizer, processor, card."
    model = "checkpoint to release, folder or Hub repository (default: the one in the package)"
    parser = add_command(commands, release, "DIR", summary, RELEASE_EXAMPLES, model)
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder to write, missing or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier release, with all files in DIR")
    parser.add_argument("--repo-id", metavar="NAME", help="what the examples of a new card load (default: DIR's name)")
    parser.add_argument("--license", metavar="ID", help="licence in the card's metadata, such as apache-2.0")
    results = "results.json of ig-captioner evaluate, for a card that is filled by code"
    parser.add_argument("--results", type=Path, nargs="+", default=[], metavar="FILE", help=results)


def add_push(commands) -> None:
    summary = "Upload a release to the Hub."
    parser = add_command(commands, push, "DIR_OR_MODEL REPO", summary, PUSH_EXAMPLES)
    parser.add_argument("folder", metavar="DIR_OR_MODEL", help="a release, or a checkpoint, which is released first")
    parser.add_argument("repo_id", metavar="REPO", help="repository on the Hub, made if it is missing: USER/NAME")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", metavar="R", help="branch to push to (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="what the commit says")


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def info(arguments: argparse.Namespace) -> int:
    """Prints what the configuration, the tokenizer and the card say."""
    described = describe_checkpoint(arguments.model)
    if arguments.format == "jsonl":
        print_json(described)
    elif arguments.format == "csv":
        print_csv([described])
    else:
        width = max(map(len, described)) + 1
        for name, value in described.items():
            print(f"{name.replace('_', ' ') + ':':<{width}}  {_shown(value)}")
    return 0


def compile_labels(arguments: argparse.Namespace) -> int:
    """Writes compiled labels, for `classify --labels-file` and `CompiledLabels.load`."""
    from ..captioners.arguments import load_scorer, read_prior
    from ..release import new_folder

    labels, templates = read_labels(arguments)
    directory = arguments.directory.expanduser().resolve()
    _check_labels_folder(directory, arguments.overwrite)
    compiled = load_scorer(arguments).compile_labels(labels, templates, **read_prior(arguments))
    with new_folder(directory) as folder:
        compiled.save(folder)
    print(f"{printable(directory)}: {len(compiled.labels):,} labels in {len(compiled.templates):,} templates")
    return 0


def release(arguments: argparse.Namespace) -> int:
    """Writes a release and prints what is in it."""
    from ..release import names_of_files, save_release

    options = {name: getattr(arguments, name) for name in ("overwrite", "repo_id", "license", "results")}
    folder = save_release(arguments.directory, arguments.model, **options)
    names = names_of_files(folder)
    print(f"{printable(folder)}: {len(names)} files, written and loaded again")
    print(table([["bytes", "file"], *([f"{(folder / name).stat().st_size:,}", printable(name)] for name in names)]))
    return 0


def push(arguments: argparse.Namespace) -> int:
    """Uploads a release and prints where it is."""
    from ..release import push_release

    options = {"revision": arguments.revision, "commit_message": arguments.message}
    print(printable(push_release(arguments.folder, arguments.repo_id, private=arguments.private, **options)))
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What they do


def describe_checkpoint(model: str) -> dict[str, Any]:
    """Sizes, architecture and settings by name."""
    from ..checkpoint import folder_or_repository, is_own, load_processor
    from ..configuration_ig_captioner import IGCaptionerConfig
    from ..input_rules import default_templates
    from ..release import read_in_short

    if not is_own(folder_or_repository(model)):
        return _describe_captioner(model)
    processor = load_processor(model)
    config = IGCaptionerConfig.from_pretrained(model)
    text = config.text_config
    return {
        "checkpoint": str(model),
        "in_short": read_in_short(model) or "unknown",
        "licence": _read_licence(model),
        **_describe_weights(model),
        **_describe_encoder(config),
        "text_layers": text.num_hidden_layers,
        "text_width": text.hidden_size,
        "text_only_layers": text.num_text_only_layers,
        "fusion": text.fusion,
        "vocabulary": text.vocab_size,
        "longest_text": min(processor.tokenizer.model_max_length, text.max_position_embeddings),
        "prior_weight": config.prior_weight,
        "prior_source": config.prior_source,
        "templates": " | ".join(default_templates(config)),
        "score_temperature": config.score_temperature,
        "abstain_threshold": "none" if config.abstain_threshold is None else config.abstain_threshold,
    }


def _describe_captioner(model: str) -> dict[str, Any]:
    """Describes a captioner of the Hub and how it would be asked, from its configuration only."""
    from ..captioners.info import describe_captioner

    return {
        "checkpoint": str(model),
        "licence": _read_licence(model),
        **_describe_weights(model),
        **describe_captioner(model),
    }


def _describe_encoder(config: Any) -> dict[str, Any]:
    vision = config.vision_config
    if config.has_own_encoder:
        return {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "image_layers": vision.num_hidden_layers,
            "image_width": vision.hidden_size,
        }
    return {
        "image_size": config.image_size,
        "image_encoder": f"{vision.model_type} of transformers",
        "image_width": config.text_config.encoder_hidden_size,
        "image_tokens": config.num_image_tokens,
    }


def _describe_weights(model: str) -> dict[str, Any]:
    """Reads sizes and dtypes from the headers of the safetensors files."""
    from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata

    from ..card import DTYPES

    read = get_local_safetensors_metadata if Path(model).is_dir() else get_safetensors_metadata
    counts = read(model).parameter_count
    dtypes = ", ".join(DTYPES.get(name, name) for name in sorted(counts, key=counts.get, reverse=True))
    return {"parameters": sum(counts.values()), "dtype": dtypes}


def _read_licence(model: str) -> str:
    from huggingface_hub import ModelCard

    from ..release import CARD_FILE

    try:
        card = ModelCard.load(Path(model, CARD_FILE) if Path(model).is_dir() else model)
    except (OSError, ValueError):  # there is none, or it has no metadata
        return "unknown"
    return str(card.data.get("license_name") or card.data.get("license") or "unknown")


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " x ".join(map(_shown, value))
    return printable(f"{value:,}" if isinstance(value, int) else value)


def _check_labels_folder(directory: Path, overwrite: bool) -> None:
    """Refuses to replace anything but compiled labels: raises OSError."""
    from ..compiled_labels import JSON_FILE, TENSOR_FILE

    if directory.is_file():
        raise NotADirectoryError(f"{directory} is a file")
    files = {path.name for path in directory.iterdir()} if directory.exists() else set()
    others = sorted(files - {JSON_FILE, TENSOR_FILE})
    if others:
        raise FileExistsError(
            f"{directory} is not replaced: it holds {others[0]!r}, which is no part of compiled labels"
        )
    if files and not overwrite:
        raise FileExistsError(f"{directory} is not empty; --overwrite replaces compiled labels")
