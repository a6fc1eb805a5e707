"""Converts a Cap or CapPa of google-research/big_vision to a folder for the Hub.

    python -m conversion.convert_big_vision --checkpoint checkpoint.npz --tokenizer sentencepiece.model --output_dir out

Upstream: https://github.com/google-research/big_vision, `models/proj/cappa`. See docs/conversion.md.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ig_captioner import IGCaptionerImageProcessor
from ig_captioner.configuration_ig_captioner import as_height_width

from .command import Plan, Report, convert_with, main_with, make_plan
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
from .key_map_big_vision import DECODER_POSITIONS, find_sizes, find_structure, placements
from .reading import ConversionError, open_checkpoint
from .tokenizer import load_tokenizer


UPSTREAM = "https://github.com/google-research/big_vision"
BILINEAR = 2  # Pillow's; upstream's evaluation uses tf.image.resize with this method, but without antialiasing


def read_tokenizer(path: str | Path, text_length: int, given: Given) -> PreTrainedTokenizerBase:
    """Raises ConversionError if the tokenizer ends texts otherwise than the configuration says."""
    tokenizer = load_tokenizer(path, text_length)
    if given.eos_token_id not in (None, tokenizer.eos_token_id):
        raise ConversionError(f"eos_id is {given.eos_token_id} in the config, but {tokenizer.eos_token_id} in {path}")
    return tokenizer


def plan(
    checkpoint: str | Path,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
) -> Plan:
    """Decides everything from names, shapes and what is given. Raises ConversionError for all that does not fit."""
    opened = open_checkpoint(checkpoint)
    given = read_given(config, image_size)
    structure = find_structure(opened.leaves)
    table = placements(structure)
    sizes = find_sizes(opened.leaves, table)
    inferred = infer_model(structure, sizes)
    notes = [f"{name} in the given config was not checked" for name in cross_check(inferred, given)]
    text_tokenizer = None
    eos_token_id = given.eos_token_id
    if tokenizer is not None:
        text_tokenizer = read_tokenizer(tokenizer, find_text_length(inferred, given), given)
        eos_token_id = text_tokenizer.eos_token_id
    if eos_token_id is None:
        eos_token_id = EOS
        notes.append(f"end-of-sequence is taken to be token {EOS}, as in the c4_en vocabulary")
    model_config = build_config(inferred, sizes, given, eos_token_id)
    height, width = as_height_width(model_config.vision_config.image_size, "image_size")
    image_processor = IGCaptionerImageProcessor(size={"height": height, "width": width}, resample=BILINEAR)
    facts = {
        "code of the source": f"[big_vision]({UPSTREAM}), `models/proj/cappa` (Apache-2.0)",
        "token ids": f"padding and start 0, end-of-sequence {eos_token_id}",
    }
    constants = {}
    text = model_config.text_config
    if not structure.learned_positions:
        constants[DECODER_POSITIONS] = sincos_text_positions(text.max_position_embeddings, text.hidden_size)
    parts = (opened, table, model_config, image_processor, text_tokenizer)
    return make_plan(*parts, notes=notes, facts=facts, constants=constants)


def convert(checkpoint: str | Path, output_dir: str | Path, **options) -> Report:
    """Converts, saves, reloads and checks; see [`command.convert_with`] for the options."""
    return convert_with(plan, checkpoint, output_dir, **options)


def main(arguments: list[str] | None = None) -> None:
    main_with(plan, "convert_big_vision", __doc__.split("\n")[0], arguments)


if __name__ == "__main__":
    main()
