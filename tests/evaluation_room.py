"""Photos, captions and models that evaluations are tested on; their fixtures are in `conftest.py`."""

import io
import json
import tarfile

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from ig_captioner.evaluation.rows import Row


NAMES = ["cat", "hot dog", "bird"]
TEMPLATES = ["a photo of a {}.", "a small {}"]
PHOTOS = 24
LABELS = [index * index % 3 for index in range(PHOTOS)]  # no bird
KEYS = [f"photo{index:02d}" for index in range(PHOTOS)]
CAPTIONS = [
    [f"{NAMES[index % 3]} {index}", f"{NAMES[index % 2]} and {index}", "a cat"][: 1 + index % 3]
    for index in range(PHOTOS)
]
HELD_OUT = 0.3
PAIRS = {  # by category: (file name, right caption, wrong caption); one photo is missing, one is asked about twice
    "swap_att": [(f"{index:012d}.jpg", f"a cat {index}", f"{index} a cat") for index in range(8)],
    "replace_obj": [(f"{index:012d}.jpg", f"a small cat {index}", f"hot {index}") for index in (3, 9, 10, 11, 99)],
}


def make_clip(folder):
    """A random CLIP with a tokenizer of whole words, whose end-of-text token has the largest id, as CLIP's has.

    CLIP takes a text's features there. (With `eos_token_id` 2, transformers takes them at the largest id of the text.)
    """
    words = sorted({word for text in [*NAMES, *TEMPLATES] for word in text.replace(".", " .").split()} - {"{}"})
    vocabulary = {word: index for index, word in enumerate(["[pad]", "[unknown]", *words, "[end]"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unknown]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = vocabulary["[end]"]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [end]", special_tokens=[("[end]", end)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[pad]", eos_token="[end]")

    torch.manual_seed(1)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "pad_token_id": 0, "eos_token_id": end}
    vision = {**size, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, initializer_factor=5.0)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)


def values(row):
    """Figures by name, of a `Row` or of a row of a results file."""
    metrics = row.metrics if isinstance(row, Row) else row["metrics"]
    return {name: estimate["value"] for name, estimate in metrics.items()}


def by_name(rows):
    return {row["name"]: row for row in rows}


def make_images(number):
    """Noise, so that no two images score alike."""
    pixels = torch.randint(0, 256, (number, 12, 10, 3), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


def pair_by_pair(model, processor, images, texts):
    """log P(T|I) [B, N] and log P(T) [N], one `model.score` per pair, without padding."""
    caption, prior = torch.empty(len(images), len(texts)), torch.empty(len(texts))
    for b, image in enumerate(images):
        for n, text in enumerate(texts):
            inputs = processor(images=image, text=text, return_tensors="pt")
            with torch.no_grad():
                output = model.score(inputs["pixel_values"], inputs["input_ids"])
            caption[b, n], prior[n] = output.caption_log_likelihood, output.prior_log_likelihood
    return caption, prior


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, samples):
    """`samples`: (key, {extension: content})."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for key, files in samples:
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def make_room(root, model, processor) -> None:
    """Fills a folder with a model, a CLIP model, and the same photos as shards and as a folder per class."""
    images = make_images(PHOTOS)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    make_clip(root / "clip")

    def metadata(index):
        return json.dumps({"class_name": NAMES[LABELS[index]], "captions": CAPTIONS[index]}).encode()

    (root / "shards").mkdir()
    samples = [(key, {"png": png(images[index]), "json": metadata(index)}) for index, key in enumerate(KEYS)]
    write_shard(root / "shards" / "a.tar", [*samples[:9], ("broken", {"png": b"", "json": metadata(0)})])
    write_shard(root / "shards" / "b.tar.gz", samples[9:])
    for index, image in enumerate(images):
        folder = root / "folder" / NAMES[LABELS[index]].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{KEYS[index]}.png")
    (root / "templates.txt").write_text("\n".join(TEMPLATES))
    (root / "prompts.json").write_text(json.dumps({"classes": NAMES, "templates": TEMPLATES}))


def make_sets(root) -> None:
    """Fills a folder with SugarCrepe, ARO and Winoground, and a shard of the photos."""
    (root / "sugarcrepe").mkdir()
    for category, pairs in PAIRS.items():
        entries = [dict(zip(("filename", "caption", "negative_caption"), pair, strict=True)) for pair in pairs]
        content = {str(index): entry for index, entry in enumerate(entries)}
        (root / "sugarcrepe" / f"{category}.json").write_text(json.dumps(content))
    keys = [f"coco_{index:012d}" for index in range(12)]
    images = make_images(len(keys))
    write_shard(root / "photos.tar", [(key, {"png": png(image)}) for key, image in zip(keys, images, strict=True)])
    boxes = [
        {
            "image_path": f"{index // 2:012d}.jpg",
            "true_caption": f"a cat {index}",
            "false_caption": f"{index} a cat",
            **dict(zip(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), (1, 2 + index % 2, 6, 5), strict=True)),
        }
        for index in range(12)
    ]
    (root / "visual_genome_relation.json").write_text(json.dumps(boxes))
    (root / "images").mkdir()
    for index, image in enumerate(images):
        image.save(root / "images" / f"ex_{index // 2}_img_{index % 2}.png")
    lines = [
        {
            "id": index,
            "image_0": f"ex_{index}_img_0",
            "image_1": f"ex_{index}_img_1",
            "caption_0": f"a cat {index}",
            "caption_1": f"cat a {index}",
            "tag": "x",
        }
        for index in range(7)
    ]
    (root / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
