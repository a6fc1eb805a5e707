"""Random views of images, and the fixed view that the model's image processor takes. PIL and numpy only.

Shapes: B images, H x W pixels.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance

from ig_captioner.input_rules import centre_box

from .config import AugmentationConfig


@dataclass(frozen=True)
class ImageSettings:
    """Settings of the model's image processor: size (height, width) in pixels, PIL's resampling filter, the mean and
    standard deviation of each channel, of values in [0, 1], and `crop_pct`."""

    size: tuple[int, int]
    resample: int = Image.Resampling.BICUBIC
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    crop_pct: float | None = None

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The part (left, top, right, bottom) of an image that is resized, in pixels."""
        return centre_box(height, width, self.size, self.crop_pct)


def random_box(
    box: tuple[float, float, float, float], config: AugmentationConfig, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A crop (left, top, right, bottom) of `box`, in pixels; with `shift` it may reach over the border of `box`."""
    left, top, right, bottom = box
    width = right - left
    height = bottom - top
    scale = rng.uniform(*config.scale)
    ratio = math.exp(rng.uniform(math.log(config.ratio[0]), math.log(config.ratio[1])))
    box_width = min(1.0, math.sqrt(scale * ratio)) * width
    box_height = min(1.0, math.sqrt(scale / ratio)) * height
    left += rng.uniform(0, width - box_width) + rng.uniform(-config.shift, config.shift) * width
    top += rng.uniform(0, height - box_height) + rng.uniform(-config.shift, config.shift) * height
    return left, top, left + box_width, top + box_height


def reflect_border(image: np.ndarray, box: tuple[float, ...]) -> tuple[np.ndarray, tuple[float, ...]]:
    """Pads uint8 [H, W, 3] by reflection until `box` lies inside; returns the image and the moved box."""
    left, top, right, bottom = box
    height, width = image.shape[:2]
    before_x = max(0, math.ceil(-left))
    before_y = max(0, math.ceil(-top))
    after_x = max(0, math.ceil(right - width))
    after_y = max(0, math.ceil(bottom - height))
    if before_x or before_y or after_x or after_y:
        image = np.pad(image, ((before_y, after_y), (before_x, after_x), (0, 0)), mode="reflect")
    return image, (left + before_x, top + before_y, right + before_x, bottom + before_y)


def augment(
    image: np.ndarray | Image.Image, config: AugmentationConfig, settings: ImageSettings, rng: np.random.Generator
) -> np.ndarray:
    """Random view of an image, or of uint8 [H, W, 3], resized to `settings.size`."""
    width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    box = random_box(settings.box(width, height), config, rng)
    if config.shift:
        image, box = reflect_border(np.asarray(image), box)
    if config.changes_detail:
        image = change_detail(image, config, settings, box, rng)
        box = (0, 0, *image.size)
    view = resize(image, settings, box)
    if rng.random() < config.flip_probability:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.color_jitter:
        amount = rng.uniform(-config.color_jitter, config.color_jitter, 4)
        levels = np.arange(256)[None] - 127.5
        jittered = levels * (1 + amount[0]) + 127.5 + 255 * amount[1:, None]  # [3, 256]: what each level becomes
        view = view.point(jittered.clip(0, 255).astype(np.uint8).flatten().tolist())
    return np.asarray(view)


def change_detail(
    image: np.ndarray | Image.Image,
    config: AugmentationConfig,
    settings: ImageSettings,
    box: tuple[float, ...],
    rng: np.random.Generator,
) -> Image.Image:
    """The box of an image with fewer pixels than it had, and smoothed or sharpened, as `config` says."""
    low, high = config.detail
    share = math.exp(rng.uniform(math.log(low), math.log(high)))
    width, height = (max(1, round(share * side)) for side in (box[2] - box[0], box[3] - box[1]))
    smaller = resize(image, dataclasses.replace(settings, size=(height, width)), box)
    if config.sharpness == (1.0, 1.0):
        return smaller
    return ImageEnhance.Sharpness(smaller).enhance(rng.uniform(*config.sharpness))


def resize(
    image: np.ndarray | Image.Image, settings: ImageSettings, box: tuple[float, ...] | None = None
) -> Image.Image:
    """Resizes an image, or a box of it, to the model's size, as its image processor does."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    height, width = settings.size
    return image.resize((width, height), settings.resample, box=box or settings.box(*image.size))


def normalise(
    images: np.ndarray | torch.Tensor,
    settings: ImageSettings,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], less the mean and over the standard deviation of the settings."""
    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format)
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (settings.mean, settings.std))
    return pixels.sub_(255 * mean).div_(255 * std)
