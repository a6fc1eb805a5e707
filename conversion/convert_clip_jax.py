"""Converts a CapPa of borisdayma/clip-jax to a folder for the Hub.

    python -m conversion.convert_clip_jax --checkpoint DIR --tokenizer DIR --output_dir out

Upstream: https://github.com/borisdayma/clip-jax, `clip_jax/modeling.py`. See docs/conversion.md.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ig_captioner import IGCaptionerImageProcessor

from .command import Plan, Report, convert_with, main_with, make_plan
from .config_clip_jax import TOKENS, build_config, cross_check, find_grid, find_structure, read_config
from .key_map_big_vision import find_sizes
from .key_map_clip_jax import check_family, constants, placements, split_unused
from .reading import Checkpoint, ConversionError, open_checkpoint
from .tokenizer import load_tokenizer


UPSTREAM = "https://github.com/borisdayma/clip-jax"


def find_config(checkpoint: Checkpoint, config: str | Path | None) -> Path:
    """The given file, or the `config.json` that stands in an Orbax folder or, as on the Hub, beside its step."""
    if config is not None:
        return Path(config).expanduser()
    path = checkpoint.store.path.absolute()
    if path.is_dir():
        for folder in (path, path.parent, path.parent.parent):
            if (folder / "config.json").is_file():
                return folder / "config.json"
    raise ConversionError(
        f"there is no config.json with {path}: give upstream's with --config, because the leaves do not tell norms, "
        "activations and special tokens"
    )


def read_tokenizer(path: str | Path, text: dict) -> PreTrainedTokenizerBase:
    """Raises ConversionError if the tokenizer is not the one that the configuration describes."""
    # upstream counts its first token, which is no part of a text here
    length = text["max_length"] - 1
    ids = {name: text[name] for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    tokenizer = load_tokenizer(path, length, **ids)
    if Path(path).suffix == ".model":
        raise ConversionError(f"{path} is a SentencePiece model: clip-jax's tokenizers are tokenizer.json files")
    if tokenizer.eos_token_id != text["eos_token_id"]:
        raise ConversionError(
            f"eos_token_id is {text['eos_token_id']} in the config, but {tokenizer.eos_token_id} in {path}"
        )
    return tokenizer


def plan(
    checkpoint: str | Path,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
) -> Plan:
    """Decides everything from names, shapes and the configuration. Raises ConversionError for all that does not fit."""
    opened = open_checkpoint(checkpoint)
    check_family(opened.leaves)
    file = find_config(opened, config)
    upstream, unknown = read_config(file)
    leaves, unused = split_unused(opened.leaves)
    structure = find_structure(upstream)
    table = placements(structure)
    sizes = find_sizes(leaves, table)
    cross_check(upstream, sizes)
    text = upstream["text"]
    side = upstream["vision"]["image_size"]
    size = image_size or (side, side)
    model_config = build_config(upstream, structure, sizes, find_grid(upstream, sizes, size))
    image_processor = IGCaptionerImageProcessor(size={"height": size[0], "width": size[1]})
    facts = {
        "code of the source": f"[clip-jax]({UPSTREAM}) (Apache-2.0)",
        "token ids": ", ".join(f"{name[:-9]} {text[name]}" for name in TOKENS),
    }
    notes = [f"the configuration is {file}", *(f"{name} in it was not checked" for name in unknown)]
    if unused:
        notes.append(f"{' and '.join(unused)} belong to a contrastive loss that a captioner does not have: left out")
    if text["mlp_dropout_rate"] or upstream["vision"]["mlp_dropout_rate"]:
        notes.append("mlp_dropout_rate is left out: here dropout is applied after each sub-layer, not within the MLP")
    text_tokenizer = None if tokenizer is None else read_tokenizer(tokenizer, text)
    parts = (opened, table, model_config, image_processor, text_tokenizer)
    return make_plan(*parts, notes=notes, facts=facts, constants=constants(structure, sizes))


def convert(checkpoint: str | Path, output_dir: str | Path, **options) -> Report:
    """Converts, saves, reloads and checks; see [`command.convert_with`] for the options."""
    return convert_with(plan, checkpoint, output_dir, **options)


def main(arguments: list[str] | None = None) -> None:
    main_with(plan, "convert_clip_jax", __doc__.split("\n")[0], arguments)


if __name__ == "__main__":
    main()
