"""Starts a captioner from a public image encoder and, if you like, a public language model as its decoder.

    python -m conversion.init_from_pretrained --encoder google/siglip-base-patch16-224 \\
        --decoder openai-community/gpt2 --output_dir out

Encoders: SigLIP and SigLIP 2 (fixed resolution), CLIP, ViT, and DINOv2 with or without registers are rewritten as this
package's (`pretrained_encoder.py`); any other of transformers, and these with `--as_is`, stay what they are. Decoders:
GPT-2 (`pretrained_decoder.py`), or a new one. The result has to be trained, as nothing in it has learnt to read images
into texts.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ig_captioner import (
    IGCaptionerConfig,
    IGCaptionerForConditionalGeneration,
    IGCaptionerImageProcessor,
    IGCaptionerProcessor,
)
from ig_captioner.checkpoint import load_processor
from ig_captioner.configuration_ig_captioner import as_height_width
from ig_captioner.encoders import image_processor_for
from ig_captioner.release import check_target, new_folder

from .pretrained_decoder import Decoder, fill_decoder, load_decoder, merge_fields
from .pretrained_encoder import Family, Taken, find_family, load_as_it_is, load_converted, resized
from .reading import ConversionError
from .tokenizer import load_for_decoder
from .writing import generation_config, save_and_reload, write_card


SUMMARY = "Parts of these weights come from elsewhere; the whole has to be trained before it can describe images."


@dataclass
class Report:
    """A record of what was taken from where. new: names of our weights that are random."""

    directory: Path
    encoder: Taken = field(default_factory=lambda: Taken("", [], []))
    decoder: Taken | None = None
    new: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def image_processor_of(encoder: str | Path, family: Family, image_size: tuple[int, int]) -> IGCaptionerImageProcessor:
    """The source's mean, deviation and interpolation, and a straight resize without cropping."""
    try:
        source, _ = IGCaptionerImageProcessor.get_image_processor_dict(encoder)
    except OSError:
        source = {}
    mean, std = family.mean_std
    height, width = image_size
    return IGCaptionerImageProcessor(
        size={"height": height, "width": width},
        resample=source.get("resample", IGCaptionerImageProcessor.resample),
        image_mean=list(source.get("image_mean") or mean),
        image_std=list(source.get("image_std") or std),
    )


def take_encoder(
    encoder: str | Path, as_is: bool, image_size: tuple[int, int] | None, report: Report
) -> tuple[PreTrainedModel, IGCaptionerImageProcessor]:
    """The encoder, as it is or rewritten, and the image processor for it; fills the encoder's part of the report."""
    family = None if as_is else find_family(encoder)
    if family is None:
        model, report.encoder = load_as_it_is(encoder)
        return model, image_processor_for(encoder, image_size)
    ours, report.encoder = load_converted(encoder, family)
    native = as_height_width(ours.config.image_size, "image_size")
    if image_size not in (None, native):
        ours = resized(ours, image_size)
        report.notes.append(f"positions were resampled from images of {native} to {image_size} pixels")
    return ours, image_processor_of(encoder, family, image_size or native)


def make_config(
    vision: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, text: dict, **fields: Any
) -> IGCaptionerConfig:
    """A configuration whose special tokens are the tokenizer's; `text` are fields of the text configuration.

    Args:
        fields: others, of the whole.

    Raises:
        ConversionError: more tokens than the decoder has embeddings for.
    """
    start = tokenizer.pad_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id")}
    text = {"vocab_size": len(tokenizer), "decoder_start_token_id": start, **ids, **text}
    if len(tokenizer) > text["vocab_size"]:
        raise ConversionError(f"the tokenizer has {len(tokenizer)} tokens, but the decoder {text['vocab_size']}")
    return IGCaptionerConfig(vision_config=vision, text_config=text, **fields)


def build_model(config: IGCaptionerConfig, encoder, decoder: Decoder | None, report: Report, seed: int):
    """A captioner with the weights of `encoder` and, if there is one, of `decoder`."""
    torch.manual_seed(seed)
    model = IGCaptionerForConditionalGeneration(config).eval()
    model.model.vision_model.load_state_dict(encoder.state_dict(), strict=True)
    report.new = [name for name in model.state_dict() if not name.startswith("model.vision_model.")]
    if decoder is not None:
        report.new = fill_decoder(model, decoder)
        report.decoder = decoder.taken
    model.generation_config = generation_config(config.text_config)
    return model


def init_from_pretrained(
    encoder: str | Path,
    tokenizer: str | Path | None,
    output_dir: str | Path,
    *,
    decoder: str | Path | None = None,
    text_config: dict | None = None,
    image_size: tuple[int, int] | None = None,
    image_tokens: dict | None = None,
    as_is: bool = False,
    seed: int = 0,
    overwrite: bool = False,
) -> Report:
    """Writes a captioner with the sources' weights, and random ones for what they do not have.

    Arguments are as on the command line; without a `tokenizer`, the decoder's is taken.

    Args:
        image_tokens: `image_token_grids`, `image_token_norm` and `image_position_embedding` of the configuration.

    Raises:
        ConversionError: a source of another kind, or one that computes something else here; nothing is left then.
        OSError: reading or writing failed.
    """
    if tokenizer is None and decoder is None:
        raise ConversionError("a new decoder needs a tokenizer (--tokenizer)")
    directory = Path(output_dir).expanduser().resolve()
    text = text_config or {}
    check_target(directory, overwrite)
    report = Report(directory)
    vision_model, image_processor = take_encoder(encoder, as_is, image_size, report)
    source = None if decoder is None else load_decoder(decoder)
    tied = not text.get("head_bias")
    if source is not None:
        text = merge_fields(source.fields, text)
        tied = source.model.config.tie_word_embeddings
    text_tokenizer = load_for_decoder(decoder if tokenizer is None else tokenizer)
    config = make_config(vision_model.config, text_tokenizer, text, tie_word_embeddings=tied, **(image_tokens or {}))
    text_tokenizer.model_max_length = config.text_config.max_position_embeddings
    processor = IGCaptionerProcessor(image_processor, text_tokenizer)
    model = build_model(config, vision_model, source, report, seed)
    with new_folder(directory) as folder:
        model = save_and_reload(model, folder, None)
        processor.save_pretrained(folder)
        load_processor(folder)
        write_card(folder, model, directory.name, None, SUMMARY, _facts(report))
    return report


def _facts(report: Report) -> dict[str, str]:
    """Facts about the sources, for the card."""
    decoder = report.decoder
    return {
        "encoder": f"`{report.encoder.source}`, {len(report.encoder.loaded)} tensors",
        "decoder": f"`{decoder.source}`, {len(decoder.loaded)} tensors" if decoder else "new, not trained",
        "new tensors": str(len(report.new)),
    }


def print_report(report: Report) -> None:
    parts = (("encoder", "features", report.encoder), ("decoder", "logits without an image", report.decoder))
    for name, outputs, part in parts:
        if part is not None:
            difference = "as it is" if part.difference is None else f"{outputs} differ by at most {part.difference:.1e}"
            print(f"loaded {len(part.loaded)} tensors of the {name} {part.source}; {difference}")
            for dropped in part.dropped:
                print(f"dropped {dropped}")
    for note in report.notes:
        print(note)
    print(f"new, random: {len(report.new)} tensors")
    for name in report.new if report.decoder is not None else ["the whole decoder"]:
        print(f"  {name}")
    print(f"now train {report.directory}")


def parse_arguments(arguments: list[str] | None) -> dict:
    """Arguments of [`init_from_pretrained`]."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.init_from_pretrained", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--encoder", required=True, help="folder, or repository on the Hub")
    add("--decoder", help="folder or repository of a GPT-2 (default: a new decoder)")
    add("--tokenizer", help="folder or repository (default: the decoder's)")
    add("--output_dir", required=True, type=Path, help="the folder to write")
    add("--text_config", type=Path, help="JSON of fields of IGCaptionerTextConfig (default: CapPa's)")
    add("--fusion", choices=("prefix", "cross_attention"), help="how the decoder reads the image (default: prefix)")
    add("--num_text_only_layers", type=int, metavar="N", help="lower layers that never see the image (default: 0)")
    add("--image_size", type=int, nargs=2, metavar=("H", "W"), help="pixels, if not the source's")
    add("--as_is", action="store_true", help="keep an encoder that could be rewritten as this package's as it is")
    add("--image_token_grids", type=int, nargs="+", metavar="N", help="means over N x N cells, in place of all tokens")
    add("--image_token_norm", action="store_true", help="normalise the image tokens, with weights of their own")
    add("--image_position_embedding", choices=("none", "learned", "sincos2d"), help="of the image tokens")
    add("--seed", type=int, default=0, help="of the random weights (default: 0)")
    add("--overwrite", action="store_true", help="replace an earlier model in --output_dir")
    options = vars(parser.parse_args(arguments))
    file = options.pop("text_config")
    text = json.loads(file.read_text(encoding="utf-8")) if file else {}
    stated = {name: options.pop(name) for name in ("fusion", "num_text_only_layers")}
    options["text_config"] = text | {name: value for name, value in stated.items() if value is not None}
    names = ("image_token_grids", "image_token_norm", "image_position_embedding")
    given = {name: options.pop(name) for name in names}
    options["image_tokens"] = {name: value for name, value in given.items() if value}
    options["image_size"] = tuple(options["image_size"]) if options["image_size"] else None
    return options


def main(arguments: list[str] | None = None) -> None:
    try:
        report = init_from_pretrained(**parse_arguments(arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print_report(report)


if __name__ == "__main__":
    main()
