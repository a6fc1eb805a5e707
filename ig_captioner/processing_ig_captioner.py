"""Images and texts as IG Captioner reads them: resizing and normalising, templates, padding and truncation.

Image rules. RGB by the rules of `input_rules`, resized straight to `size` (no crop, the aspect ratio is not kept,
unless `crop_pct` is set), then scaled to [-1, 1]. The interpolation is bicubic: both backends antialias it when they
shrink, and where they enlarge (32-pixel CIFAR photos) it keeps the edges that bilinear blurs. The class attributes
are only defaults; each checkpoint's processor file says what it was trained with.

Text rules. What is scored is exactly what the tokenizer returns: the text's tokens and EOS, no start token (the model
adds that). Lower-casing belongs to the tokenizer's normaliser, EOS to its template, the longest text to its
`model_max_length`. Padding is on the right; truncation takes tokens off the text, never EOS ("sticky" in big_vision).
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers import ImagesKwargs, PilBackend, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.image_utils import PILImageResampling
from transformers.utils import is_torchvision_available

from .configuration_ig_captioner import AUTO_MAP
from .input_rules import centre_box, check_pixels, naming_the_image, read_image, shorten, tell, to_rgb


if is_torchvision_available():
    from transformers import TorchvisionBackend as _Backend
else:
    _Backend = PilBackend

# Words like "[PAD]" in a text are words, not the special tokens of that name.
TEXT_RULES = {"padding": True, "padding_side": "right", "truncation": True, "split_special_tokens": True}
IMAGE_CHANNELS = (1, 3, 4)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array, with float32 in place of the formats that numpy lacks (bfloat16, float8)."""
    tensor = tensor.detach().cpu()
    is_known = tensor.dtype in (torch.float16, torch.float32, torch.float64) or not tensor.is_floating_point()
    return (tensor if is_known else tensor.float()).numpy()


def array_to_pil(array: np.ndarray | torch.Tensor) -> PIL.Image.Image:
    """One image from [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels: uint8, or floats in [0, 1].

    Where both ends could be the channels, a tensor is read as channels first and an array as channels last.
    """
    pixels = as_numpy(array) if isinstance(array, torch.Tensor) else array
    name = f"{type(array).__name__} of {pixels.dtype}, shape {tuple(array.shape)}"
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3:
        first = pixels.shape[0] in IMAGE_CHANNELS
        last = pixels.shape[-1] in IMAGE_CHANNELS
        if last and not (first and isinstance(array, torch.Tensor)):
            pixels = np.moveaxis(pixels, -1, 0)
    if pixels.ndim != 3 or pixels.shape[0] not in IMAGE_CHANNELS:
        raise ValueError(f"not one image of 1, 3 or 4 channels: {name}")
    if np.issubdtype(pixels.dtype, np.floating) and pixels.min() >= 0 and pixels.max() <= 1:
        pixels = (pixels * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        span = f"{pixels.min()} to {pixels.max()}"
        raise ValueError(f"pixels must be uint8, or floats in [0, 1], got {span}: {name}")
    return to_pil_image(pixels, input_data_format="channels_first")


def load_rgb_image(image: Any, timeout: float | None = None) -> PIL.Image.Image:
    """Reads one RGB image from a path, URL, base64 string, PIL image, array or tensor.

    Args:
        image: see [`array_to_pil`] for arrays and tensors.
        timeout (`float`, *optional*): seconds to wait for a URL.

    Raises:
        ValueError: naming the image, if there is none, or it cannot be read or decoded.
    """
    if image is None:
        raise ValueError("no image was given, got None")
    source = os.fspath(image) if isinstance(image, os.PathLike) else image
    if isinstance(source, str):
        return read_image(source, timeout)
    if not isinstance(source, (PIL.Image.Image, np.ndarray, torch.Tensor)):
        raise ValueError(
            "an image must be a path, URL, base64 string, PIL image, numpy array or torch tensor "
            f"(for a column of a data set use KeyDataset), got {type(image).__name__}: {shorten(image)}"
        )
    with naming_the_image(getattr(image, "filename", None) or image):
        return check_pixels(to_rgb(source if isinstance(source, PIL.Image.Image) else array_to_pil(source)))


class IGCaptionerImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of [`IGCaptionerImageProcessor`]."""

    crop_pct: float | None


class IGCaptionerImageProcessor(_Backend):
    r"""Turns images into `pixel_values` [B, 3, H, W], on torchvision where it is installed, else on Pillow.

    Takes what transformers' image processors take (PIL images, arrays, tensors, paths, URLs, and lists of
    them), plus `pathlib` paths and two-dimensional grey arrays. As there, float arrays in [0, 1] need
    `do_rescale=False`. Files are decoded by Pillow with both backends, so their pixels do not depend on what
    is installed; resized values may differ by a level or two of 255.

    Args:
        size (`{"height": int, "width": int}`): pixels, 224 x 224 by default; an int is a square.
        crop_pct (`float`, *optional*): photos keep their proportions: not all of them is resized, but the part in the
            centre with the proportions of `size` (1.0), or this share of it (0.875, say, where others resize to 256
            pixels and cut out 224). By default they are squashed, so that nothing at their sides is lost; encoders that
            were trained otherwise know objects in their proportions.
        resample, image_mean, image_std, do_*: as in transformers; bicubic, 0.5, 0.5, all on but cropping.
    """

    valid_kwargs = IGCaptionerImagesKwargs

    model_input_names = ["pixel_values"]
    do_convert_rgb = True
    do_resize = True
    size = {"height": 224, "width": 224}
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    crop_pct = None

    def __init__(self, **kwargs):
        # AutoProcessor looks here too, in folders written by `pipeline.save_pretrained`.
        names = ("AutoImageProcessor", "AutoProcessor")
        kwargs.setdefault("auto_map", {name: AUTO_MAP[name] for name in names})
        super().__init__(**kwargs)

    def fetch_images(self, image_url_or_urls):
        """Opens paths and URLs; images stay as they are, but for a channel axis added to grey arrays."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return load_rgb_image(image_url_or_urls)
        image = super().fetch_images(image_url_or_urls)
        return image[None] if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 2 else image

    def process_image(self, image, do_convert_rgb=None, **kwargs):
        """One image in the backend's format, channels first; PIL images by the rules of [`to_rgb`]."""
        if isinstance(image, PIL.Image.Image):
            image = to_rgb(image) if do_convert_rgb else PIL.ImageOps.exif_transpose(image)
        elif isinstance(image, torch.Tensor) and self.backend == "pil":
            image = torch.from_numpy(as_numpy(image))
        if isinstance(image, (np.ndarray, torch.Tensor)) and kwargs.get("do_rescale", self.do_rescale):
            _check_span(image)
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)

    def _preprocess(self, images, do_resize, size, crop_pct=None, **kwargs):
        """As in transformers, on images [C, H, W]; what is to be resized is cut to its centre first."""
        if do_resize and crop_pct is not None:
            images = [self._centre(image, size, crop_pct) for image in images]
        return super()._preprocess(images, do_resize=do_resize, size=size, **kwargs)

    @staticmethod
    def _centre(image, size, crop_pct):
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct must lie in (0, 1], got {crop_pct}")
        if not (size.height and size.width):
            raise ValueError(f"crop_pct needs a size of height and width, got {size}")
        height, width = image.shape[-2:]
        left, top, right, bottom = centre_box(height, width, (size.height, size.width), crop_pct)
        return image[..., top:bottom, left:right]


def _check_span(pixels: np.ndarray | torch.Tensor) -> None:
    """Raises ValueError for arrays that `do_rescale` would take out of [0, 1], such as those of 16 bits."""
    low = float(pixels.min())
    high = float(pixels.max())
    if not (low >= 0 and high <= 255):
        raise ValueError(f"pixels of an array must be from 0 to 255, got {low:g} to {high:g} ({pixels.dtype})")


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_positions: int | None = None, **kwargs
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` [N, L] of N texts, by the text rules; `kwargs` override the rules.

    Texts that are too long are cut, and told as an [`IGCaptionerWarning`], unless `kwargs` say where to cut.

    Args:
        max_positions: how many tokens the model has positions for; a text is cut there, or where the tokenizer says.

    Raises:
        ValueError: if the arguments make the tokenizer return another number of rows than texts.
    """
    limit = min(tokenizer.model_max_length, max_positions or tokenizer.model_max_length)
    rules = TEXT_RULES if max_positions is None else {**TEXT_RULES, "max_length": limit}
    fixed = {"return_tensors": "pt", "return_attention_mask": True}
    encoded = tokenizer(texts, **{**rules, **kwargs, **fixed})
    rows = len(encoded["input_ids"])
    if rows != len(texts):
        raise ValueError(f"{len(texts)} texts became {rows} rows with tokenizer_kwargs {kwargs!r}")
    if not {"max_length", "truncation"} & set(kwargs):  # else whoever asked knows that texts may be cut
        tell_of_cut_texts(tokenizer, texts, encoded["attention_mask"].sum(dim=-1).tolist(), limit)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def tell_of_cut_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], lengths: Sequence[int], limit: int
) -> None:
    """Warns of texts that have lost tokens: `lengths` are those of N texts cut at `limit` tokens."""
    full = [text for text, length in zip(texts, lengths, strict=True) if length == limit]
    if full:
        cut = cut_texts(tokenizer, full, limit)
        if cut:
            tell(f"texts are longer than the {limit} tokens that the model reads, and were cut", cut)


def cut_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int) -> list[str]:
    """The texts that have more than `limit` tokens, end-of-sequence included."""
    whole = tokenizer(list(texts), split_special_tokens=True, verbose=False)["input_ids"]
    return [text for text, ids in zip(texts, whole, strict=True) if len(ids) > limit]


def gives_scored_form(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tells whether the tokenizer adds EOS after a text and nothing else, as the model scores it."""
    eos = tokenizer.eos_token_id
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    return eos is not None and tokenizer("a")["input_ids"] == [*bare, eos]


class IGCaptionerProcessor(ProcessorMixin):
    r"""Image processor and tokenizer in one: `processor(images=None, text=None, **kwargs)`.

    Gives `pixel_values` for images, `input_ids` and `attention_mask` for texts, in scored form (module
    docstring): ready for `model.score`, as `labels` once padding is set to -100, or as the prompt of
    `model.generate`.

    Args:
        image_processor ([`IGCaptionerImageProcessor`]): any image processor of transformers will do.
        tokenizer (`PreTrainedTokenizerBase`): its template must add EOS after a text, and no start token.

    Raises:
        ValueError: if the tokenizer's template does something else.
    """

    def __init__(self, image_processor, tokenizer, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        if not gives_scored_form(tokenizer):
            tokens = tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"])
            raise ValueError(
                f"the tokenizer must add its EOS token {tokenizer.eos_token!r} after a text, and nothing "
                f"else, but turns 'a' into {tokens}"
            )

    def __call__(self, images=None, text=None, **kwargs):
        """As in transformers, with the text rules as defaults. Warns of texts that are cut, unless it was asked to."""
        text_kwargs = kwargs.get("text_kwargs", {})
        asked = {*kwargs, *text_kwargs}
        # transformers refuses an argument that comes both by itself and in `text_kwargs`
        rules = {name: value for name, value in TEXT_RULES.items() if name not in kwargs}
        kwargs["text_kwargs"] = {**rules, **text_kwargs}
        encoded = super().__call__(images=images, text=text, **kwargs)
        if text is not None and "attention_mask" in encoded and not {"max_length", "truncation"} & asked:
            texts = [text] if isinstance(text, str) else text
            lengths = [int(sum(mask)) for mask in encoded["attention_mask"]] if len(texts) else []
            tell_of_cut_texts(self.tokenizer, texts, lengths, self.tokenizer.model_max_length)
        return encoded


# A folder saved from these classes carries this file, so that it loads where the package is not installed.
IGCaptionerImageProcessor.register_for_auto_class("AutoImageProcessor")
IGCaptionerProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "IGCaptionerImageProcessor",
    "IGCaptionerProcessor",
    "encode_texts",
    "load_rgb_image",
]
