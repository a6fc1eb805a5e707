"""The rules that turn images and texts into model inputs, and the folders they are saved to."""

import base64
import io
import json

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
import torch
from small_checkpoint import EOS, START, make_tokenizer
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    SiglipImageProcessorPil,
)
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from ig_captioner import input_rules, processing_ig_captioner
from ig_captioner.input_rules import centre_box, format_labels
from ig_captioner.processing_ig_captioner import (
    IGCaptionerImageProcessor,
    IGCaptionerProcessor,
    encode_texts,
    load_rgb_image,
)


@pytest.fixture
def photo() -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).resize((60, 40), PIL.Image.Resampling.BICUBIC, box=(0, 0, 12, 8))


@pytest.fixture
def processor() -> IGCaptionerProcessor:
    return IGCaptionerProcessor(IGCaptionerImageProcessor(size={"height": 16, "width": 24}), make_tokenizer())


# Images


def test_default_is_a_straight_resize_to_minus_one_and_one(photo):
    processor = IGCaptionerImageProcessor(size={"height": 16, "width": 24})
    pixels = processor(photo, return_tensors="pt")["pixel_values"]
    resized = np.asarray(photo.resize((24, 16), PIL.Image.Resampling.BICUBIC), dtype=np.float32)
    expected = torch.from_numpy(resized / 255 * 2 - 1).permute(2, 0, 1)
    assert pixels.shape == (1, 3, 16, 24) and pixels.dtype == torch.float32
    # One level of 255 is 0.0078; torchvision rounds differently from Pillow, and may be off by a few.
    assert (pixels[0] - expected).abs().max() < (1e-6 if processor.backend == "pil" else 0.05)


def test_sizes():
    assert dict(IGCaptionerImageProcessor().size) == {"height": 224, "width": 224}
    assert dict(IGCaptionerImageProcessor(size=32).size) == {"height": 32, "width": 32}
    assert dict(IGCaptionerImageProcessor(size=(16, 24)).size) == {"height": 16, "width": 24}


def test_all_forms_of_one_image_agree(photo, tmp_path):
    path = tmp_path / "photo.png"
    photo.save(path)
    array = np.asarray(photo)
    forms = [photo, array, np.moveaxis(array, -1, 0), torch.from_numpy(array.copy()), str(path), path]
    processor = IGCaptionerImageProcessor(size=16)
    reference = processor(photo, return_tensors="pt")["pixel_values"]
    for form in forms:
        torch.testing.assert_close(processor(form, return_tensors="pt")["pixel_values"], reference)
    together = processor(forms, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(together, reference.expand(len(forms), -1, -1, -1))


def transparent_image() -> PIL.Image.Image:
    """Red left half; the right half is black and fully transparent."""
    image = PIL.Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 10, 10))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "P", "PA"])
def test_transparency_becomes_white(mode, tmp_path):
    image = transparent_image()
    if mode == "P":
        image = image.quantize(4)
        image.save(tmp_path / "image.png")
        image = PIL.Image.open(tmp_path / "image.png")
        assert image.mode == "P"
    elif mode == "PA":
        image = image.convert("P").convert("PA")
        image.putalpha(transparent_image().getchannel("A"))
    for loaded in (
        load_rgb_image(image),
        PIL.Image.fromarray(to_levels(IGCaptionerImageProcessor(size=(10, 20)), image)),
    ):
        assert loaded.getpixel((15, 5)) == (255, 255, 255)
        assert loaded.getpixel((5, 5)) == (255, 0, 0)


def to_levels(processor: IGCaptionerImageProcessor, image) -> np.ndarray:
    """The processor's pixels as uint8 [H, W, 3]."""
    pixels = processor(image, return_tensors="np")["pixel_values"][0]
    return ((pixels + 1) * 127.5).round().astype(np.uint8).transpose(1, 2, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "I;16"])
def test_other_modes_become_rgb(mode):
    ramp = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))
    if mode == "I;16":
        image = PIL.Image.fromarray(ramp.astype(np.uint16) * 257)
        assert image.mode == mode
    else:
        image = PIL.Image.fromarray(ramp).convert("RGB" if mode == "CMYK" else "L").convert(mode)
    levels = to_levels(IGCaptionerImageProcessor(size=16), image)
    assert levels.shape == (16, 16, 3)
    if mode != "1":
        np.testing.assert_array_equal(levels, np.repeat(ramp[..., None], 3, axis=-1))
    np.testing.assert_array_equal(np.asarray(load_rgb_image(image)), levels)


def test_grey_arrays_of_two_dimensions(photo):
    grey = np.asarray(photo.convert("L"))
    processor = IGCaptionerImageProcessor(size=16)
    reference = processor(photo.convert("L"), return_tensors="pt")["pixel_values"]
    for form in (grey, [grey], torch.from_numpy(grey.copy()), grey[..., None]):
        torch.testing.assert_close(processor(form, return_tensors="pt")["pixel_values"], reference)


def test_photos_are_turned_upright(photo):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to view
    buffer = io.BytesIO()
    photo.save(buffer, "PNG", exif=exif)
    turned = PIL.Image.open(buffer)
    assert load_rgb_image(turned).size == (40, 60)
    processor = IGCaptionerImageProcessor(size=16)
    upright = processor(photo.transpose(PIL.Image.Transpose.ROTATE_270), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processor(turned, return_tensors="pt")["pixel_values"], upright)


def test_load_rgb_image_reads_arrays_and_base64(photo):
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    array = np.asarray(photo)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for form in (
        photo,
        array,
        tensor,
        tensor / 255,
        array / 255.0,
        encoded,
        f"data:image/png;base64,{encoded}",
    ):
        np.testing.assert_array_equal(np.asarray(load_rgb_image(form)), array)


@pytest.mark.parametrize("shape", [(3, 8, 3), (4, 8, 3)])
def test_ambiguous_arrays_are_channels_last_and_tensors_first(shape):
    array = np.zeros(shape, dtype=np.uint8)
    assert load_rgb_image(array).size == (shape[1], shape[0])
    assert load_rgb_image(torch.from_numpy(array)).size == (shape[2], shape[1])


def broken_files(folder, photo) -> dict[str, str]:
    """Paths of files that are no readable image."""
    photo.resize((300, 200)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("this is not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    names = ("missing.jpg", "truncated.jpg", "text.png", "empty.png", "folder.png")
    return {name: str(folder / name) for name in names}


@pytest.mark.parametrize("name", ["missing.jpg", "truncated.jpg", "text.png", "empty.png", "folder.png"])
def test_unreadable_files_are_named(name, photo, tmp_path):
    path = broken_files(tmp_path, photo)[name]
    with pytest.raises(ValueError, match=name):
        load_rgb_image(path)
    with pytest.raises(ValueError, match=name):
        IGCaptionerImageProcessor()(path)
    if name == "truncated.jpg":  # Pillow opens it, and fails when it decodes
        with pytest.raises(ValueError, match=name):
            load_rgb_image(PIL.Image.open(path))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "None"),
        (b"bytes", "bytes"),
        ({"bytes": b""}, "dict"),
        (3, "int"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"\(2, 8, 8, 3\)"),
        (np.zeros((8, 8, 5), np.uint8), r"\(8, 8, 5\)"),
        (np.full((8, 8, 3), 2.0), "2.0"),
        (torch.full((3, 8, 8), -1.0), "-1.0"),
        (np.zeros((8, 8, 3), np.int64), "int64"),
        ("data:image/png;base64,AAAA", "data:image"),
        ("", "''"),
    ],
)
def test_what_is_no_image_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        load_rgb_image(image)


def test_urls_get_the_timeout_and_their_errors_are_named(monkeypatch, photo):
    seen, data = {}, io.BytesIO()
    photo.save(data, "png")

    def urlopen(request, timeout):
        seen.update(url=request.full_url, timeout=timeout)
        if "refused" in request.full_url:
            raise ConnectionError("nobody home")
        return io.BytesIO(data.getvalue())

    monkeypatch.setattr(input_rules.urllib.request, "urlopen", urlopen)
    assert load_rgb_image("http://localhost/cat.png", timeout=2.5).tobytes() == photo.tobytes()
    assert seen == {"url": "http://localhost/cat.png", "timeout": 2.5}
    with pytest.raises(ValueError, match="http://localhost/refused.*nobody home"):
        load_rgb_image("http://localhost/refused")


# Texts


def test_scored_form_keeps_eos_when_truncated(processor):
    encoded = processor(text=["A photo of a CAT.", "dog", "a a a a a a a a a a a a"], return_tensors="pt")
    assert processor.tokenizer.batch_decode(encoded["input_ids"]) == [
        "a photo of a cat. </s> <pad>",
        "dog </s> <pad> <pad> <pad> <pad> <pad> <pad>",
        "a a a a a a a </s>",
    ]
    assert encoded["attention_mask"].sum(dim=1).tolist() == [7, 2, 8]
    assert not (encoded["input_ids"] == processor.tokenizer.bos_token_id).any()


def test_padding_is_on_the_right_whatever_the_tokenizer_says():
    tokenizer = make_tokenizer(padding_side="left")
    processor = IGCaptionerProcessor(IGCaptionerImageProcessor(), tokenizer)
    for encoded in (
        encode_texts(tokenizer, ["a cat", "dog"]),
        processor(text=["a cat", "dog"], return_tensors="pt"),
    ):
        assert encoded["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_text_rules_can_be_overridden(processor):
    encoded = processor(text=["a cat", "dog"], max_length=2, padding_side="left", return_tensors="pt")
    assert processor.tokenizer.batch_decode(encoded["input_ids"]) == ["a </s>", "dog </s>"]
    encoded = processor(text=["a cat", "dog"], padding="max_length", truncation=False)
    assert [len(row) for row in encoded["input_ids"]] == [8, 8]


def test_encode_texts_is_the_processors_text_side(processor):
    texts = ["a photo of a cat.", "dog"]
    direct, through = encode_texts(processor.tokenizer, texts), processor(text=texts, return_tensors="pt")
    assert set(direct) == {"input_ids", "attention_mask"}
    for name, value in direct.items():
        torch.testing.assert_close(value, through[name])
    with pytest.raises(ValueError, match="3 rows.*overflowing"):
        encode_texts(processor.tokenizer, ["a a a", "dog"], max_length=3, return_overflowing_tokens=True)


@pytest.mark.parametrize("template", ["$A", f"{START} $A {EOS}", f"{EOS} $A", f"$A {EOS} {EOS}"])
def test_processor_refuses_tokenizers_without_the_scored_form(template):
    with pytest.raises(ValueError, match="EOS"):
        IGCaptionerProcessor(IGCaptionerImageProcessor(), make_tokenizer(template))


def test_format_labels():
    assert format_labels(["cat", "dog"], "a {}.") == ["a cat.", "a dog."]
    assert format_labels(("cat", "cat"), ["a {}.", "{}, {}!"]) == [
        "a cat.",
        "a cat.",
        "cat, cat!",
        "cat, cat!",
    ]
    assert format_labels(["{}", "{x}", "{0} {"], "{y} {}") == ["{y} {}", "{y} {x}", "{y} {0} {"]


@pytest.mark.parametrize("labels", [[], "cat", None, {"cat": 1}, {"cat"}, ["cat", 3], ["cat", None], 5])
def test_wrong_labels_are_named(labels):
    wrong = labels[-1] if isinstance(labels, list) and labels else labels
    with pytest.raises(ValueError, match="candidate_labels.*") as raised:
        format_labels(labels, "a {}.")
    assert repr(wrong) in str(raised.value)


@pytest.mark.parametrize("template", ["a photo", "", None, [], 3, ["a {}", "a photo"], ["a {}", None], {"{}"}])
def test_wrong_templates_are_named(template):
    wrong = template[-1] if isinstance(template, list) and template else template
    with pytest.raises(ValueError, match="template must be.*") as raised:
        format_labels(["cat"], template)
    assert repr(wrong) in str(raised.value)


# Both


def test_processor_gives_model_inputs(processor, photo):
    both = processor(images=[photo, photo], text=["a cat", "dog"], return_tensors="pt")
    assert set(both) == {"pixel_values", "input_ids", "attention_mask"}
    assert both["pixel_values"].shape == (2, 3, 16, 24) and both["input_ids"].shape == (2, 3)
    assert set(processor(images=photo, return_tensors="pt")) == {"pixel_values"}
    assert set(processor(text="a cat", return_tensors="pt")) == {"input_ids", "attention_mask"}
    assert set(processor.model_input_names) == {"pixel_values", "input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="at least one"):
        processor()


def test_decoding(processor):
    ids = processor(text=["a cat", "a photo of a dog."], return_tensors="pt")["input_ids"]
    texts = ["a cat", "a photo of a dog."]
    assert processor.post_process_image_text_to_text(ids) == texts
    assert processor.batch_decode(ids, skip_special_tokens=True) == texts
    assert processor.decode(ids[0], skip_special_tokens=True) == "a cat"


def test_save_and_load(processor, photo, tmp_path):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"]["AutoProcessor"] == "processing_ig_captioner.IGCaptionerProcessor"
    image_map = saved["image_processor"]["auto_map"]
    assert image_map["AutoImageProcessor"] == "processing_ig_captioner.IGCaptionerImageProcessor"
    assert saved["image_processor"]["size"] == {"height": 16, "width": 24}
    assert (tmp_path / "processing_ig_captioner.py").is_file()  # a folder carries its code

    reloaded = IGCaptionerProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    expected = processor(images=photo, text="A cat.", return_tensors="pt")
    for name, value in reloaded(images=photo, text="A cat.", return_tensors="pt").items():
        torch.testing.assert_close(value, expected[name])
    reloaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "processor_config.json").read_text())
    assert again == saved


def test_a_folder_with_another_image_processor_carries_the_code_too(tmp_path):
    IGCaptionerProcessor(SiglipImageProcessorPil(), make_tokenizer()).save_pretrained(tmp_path)
    assert (tmp_path / "processing_ig_captioner.py").is_file()
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "IGCaptionerProcessor"
    assert type(loaded.image_processor).__name__.startswith("SiglipImageProcessor")


def test_auto_classes_load_a_saved_folder(processor, photo, tmp_path):
    processor.save_pretrained(tmp_path)
    expected = processor(images=photo, text="A cat.", return_tensors="pt")
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    images = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "IGCaptionerProcessor" and type(images).__name__ == "IGCaptionerImageProcessor"
    for name, value in loaded(images=photo, text="A cat.", return_tensors="pt").items():
        torch.testing.assert_close(value, expected[name])
    torch.testing.assert_close(images(photo, return_tensors="pt")["pixel_values"], expected["pixel_values"])
    assert tokenizer("A cat.")["input_ids"] == expected["input_ids"][0].tolist()


def test_the_file_can_be_remote_code():
    path = processing_ig_captioner.__file__
    assert sorted(get_relative_imports(path)) == ["configuration_ig_captioner", "input_rules"]
    assert set(get_imports(path)) <= {
        "base64",
        "collections",
        "io",
        "os",
        "typing",
        "urllib",
        "numpy",
        "PIL",
        "torch",
        "transformers",
    }


# The part of a photo that is seen


@pytest.mark.parametrize(
    "height, width, size, crop_pct, box",
    [
        (20, 40, (10, 10), None, (0, 0, 40, 20)),
        (20, 40, (10, 10), 1.0, (10, 0, 30, 20)),
        (40, 20, (10, 10), 1.0, (0, 10, 20, 30)),
        (40, 40, (10, 10), 0.5, (10, 10, 30, 30)),
        (40, 40, (10, 20), 1.0, (0, 10, 40, 30)),
        (1, 300, (10, 10), 0.875, (149, 0, 150, 1)),
    ],
)
def test_centre_box(height, width, size, crop_pct, box):
    assert centre_box(height, width, size, crop_pct) == box


def test_crop_pct_keeps_proportions(tmp_path):
    """A photo whose sides are red and blue: only its green centre is seen."""
    photo = PIL.Image.new("RGB", (40, 20), "red")
    photo.paste((0, 255, 0), (10, 0, 30, 20))
    photo.paste((0, 0, 255), (30, 0, 40, 20))
    for processor, is_green in ((IGCaptionerImageProcessor(), False), (IGCaptionerImageProcessor(crop_pct=1.0), True)):
        processor.save_pretrained(tmp_path)
        reloaded = IGCaptionerImageProcessor.from_pretrained(tmp_path)
        assert reloaded.crop_pct == processor.crop_pct
        pixels = reloaded(photo, return_tensors="pt")["pixel_values"][0]
        assert bool((pixels[0] == -1).all() and (pixels[1] == 1).all()) is is_green
    arrays = reloaded([np.asarray(photo)], crop_pct=None, return_tensors="pt")["pixel_values"][0]
    assert bool((arrays[0] > 0).any())


@pytest.mark.parametrize("crop_pct", (0.0, 1.5))
def test_crop_pct_is_a_share(crop_pct):
    with pytest.raises(ValueError, match=rf"crop_pct must lie in \(0, 1\], got {crop_pct}"):
        IGCaptionerImageProcessor(crop_pct=crop_pct)(PIL.Image.new("RGB", (4, 4)))
