"""Fine-tuning with transformers' Trainer: `training/finetune.py` on a random model and coloured squares."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Trainer

from ig_captioner import IGCaptionerForConditionalGeneration, IGCaptionerImageProcessor, IGCaptionerProcessor
from tests.tiny import padded, random_images, random_texts, tiny_config
from training.config import UsageError
from training.train_tokenizer import train_tokenizer


datasets = pytest.importorskip("datasets")
evaluate = pytest.importorskip("evaluate")
pytest.importorskip("accelerate")

finetuning = importlib.import_module("training.finetune")  # once its libraries are known to be there
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model with dropout, its tokenizer and image processor."""
    tokenizer = train_tokenizer([f"a photo of a {name} square." for name in COLORS], 300)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3}
    torch.manual_seed(0)
    config = tiny_config({"vocab_size": len(tokenizer), "num_text_only_layers": 1, "dropout": 0.1, **special})
    folder = tmp_path_factory.mktemp("checkpoint")
    IGCaptionerForConditionalGeneration(config).save_pretrained(folder)
    image_processor = IGCaptionerImageProcessor(size={"height": 16, "width": 16})
    IGCaptionerProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def by_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("by_folder")
    for name, color in COLORS.items():
        (root / f"{name}_square").mkdir()
        for index in range(8):
            Image.new("RGB", (10, 8), color).save(root / f"{name}_square" / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def by_metadata(tmp_path_factory):
    root = tmp_path_factory.mktemp("by_metadata")
    rows = []
    for index in range(20):
        name = list(COLORS)[index % 3]
        Image.new("RGB", (8, 8), COLORS[name]).save(root / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": f"a {name} square."})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path_factory.mktemp("metrics"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def finetune(checkpoint, data, output_dir, **options):
    values = {"model": checkpoint, "data": data, "output_dir": output_dir, "batch_size": 4, "max_steps": 6, **options}
    values |= {"max_length": 16, "learning_rate": 0.01, "save_steps": 3}
    arguments = [part for name, value in values.items() if value is not True for part in (f"--{name}", str(value))]
    flags = ["--cpu", *(f"--{name}" for name, value in values.items() if value is True)]
    return finetuning.finetune(finetuning.build_parser().parse_args(arguments + flags))


# Data


def test_folder_names_become_captions(by_folder):
    data = finetuning.add_captions(finetuning.load_data(str(by_folder), 0.25, 0), None, "a photo of a {}.")
    assert len(data["train"]) == 18 and len(data["test"]) == 6
    captions = {row["captions"][0] for split in data.values() for row in split}
    assert captions == {f"a photo of a {name} square." for name in COLORS}


def test_metadata_and_saved_data_sets(by_metadata, tmp_path):
    data = finetuning.load_data(str(by_metadata), 0.25, 0)
    assert finetuning.add_captions(data, None, "")["train"][0]["captions"][0].startswith("a ")
    rows = {"image": [Image.new("RGB", (4, 4))] * 4, "captions": [["one", "two"]] * 4}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    data = finetuning.add_captions(finetuning.load_data(str(tmp_path / "saved"), 0.5, 0), None, "")
    assert data["train"][0]["captions"] == ["one", "two"]
    with pytest.raises(ValueError, match="no column title in the data, which has image, captions"):
        finetuning.add_captions(data, "title", "")


def test_captions_that_are_cut_are_counted(checkpoint, by_folder, capsys):
    processor = IGCaptionerProcessor.from_pretrained(checkpoint)
    data = finetuning.add_captions(finetuning.load_data(str(by_folder), 0.25, 0), None, "a photo of a {}.")
    length = len(processor.tokenizer("a photo of a red square.")["input_ids"])
    finetuning.tell_of_cut_captions(data, processor, length + 20)
    assert not capsys.readouterr().out
    finetuning.tell_of_cut_captions(data, processor, 2)
    assert "24 of 24 captions are cut at 2 tokens (--max_length), the first is 'a photo" in capsys.readouterr().out


def test_collator_gives_pixels_and_labels_in_scored_form(checkpoint):
    processor = IGCaptionerProcessor.from_pretrained(checkpoint)
    rows = [{"image": Image.new("RGB", (9, 9)), "captions": [text]} for text in ("a red square.", "a", "blue " * 30)]
    batch = finetuning.Collator(processor, 8)(rows)
    assert set(batch) == {"pixel_values", "labels"} and batch["pixel_values"].shape == (3, 3, 16, 16)
    assert batch["labels"].shape == (3, 8) and batch["labels"][2, -1] == 2
    assert batch["labels"][1].tolist() == [*processor.tokenizer("a")["input_ids"], *[-100] * 6]


def test_metric():
    scores = finetuning.CaptionMatch(keep_in_memory=True).compute(
        predictions=["A red square.", "a blue"], references=["a red square.", "a green circle"]
    )
    assert scores == {"exact_match": 0.5, "word_f1": pytest.approx((1 + 2 / 5) / 2)}


# Runs


def test_resumed_run_has_the_same_weights(checkpoint, by_folder, tmp_path, monkeypatch):
    options = {"label_smoothing": 0.1, "gradient_accumulation_steps": 2, "eval_steps": 4}
    metrics = finetune(checkpoint, by_folder, tmp_path / "run", **options)
    assert {"eval_loss", "eval_exact_match", "eval_word_f1"} <= set(metrics)
    whole = load_file(tmp_path / "run" / "final" / "model.safetensors")
    (tmp_path / "run" / "checkpoint-6").rename(tmp_path / "last")
    micro_steps = []
    trainer, step = finetuning.Seq2SeqTrainer, finetuning.Seq2SeqTrainer.training_step
    monkeypatch.setattr(
        trainer, "training_step", lambda *args, **kwargs: micro_steps.append(1) or step(*args, **kwargs)
    )
    finetune(checkpoint, by_folder, tmp_path / "run", **options, resume=True)
    assert len(micro_steps) == 6, "steps 4 to 6, in two parts each"
    resumed = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert max((whole[name] - resumed[name]).abs().max().item() for name in whole) == 0.0
    with pytest.raises(UsageError, match="label_smoothing: 0.1 -> 0.2; seed: 0 -> 3"):
        finetune(checkpoint, by_folder, tmp_path / "run", **{**options, "label_smoothing": 0.2}, seed=3, resume=True)


def test_a_data_set_without_captions_is_one_line(by_folder, tmp_path, capsys, checkpoint):
    arguments = ["--data", str(by_folder), "--output_dir", str(tmp_path), "--model", str(checkpoint), "--cpu"]
    with pytest.raises(SystemExit) as ended:
        finetuning.main([*arguments, "--caption_column", "title"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("training.finetune: error: no column title in the data")


def test_both_scripts_report_the_loss_of_the_model(checkpoint, by_folder, tmp_path, monkeypatch):
    """Whatever Trainer counts: over all photos in one batch it is `model(**batch).loss`."""
    trainers = []
    initialize = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, *a, **k: trainers.append(self) or initialize(self, *a, **k))
    finetune(checkpoint, by_folder, tmp_path / "script", batch_size=24, max_steps=1)
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "finetune_trainer.py"))["main"]
    monkeypatch.setitem(example.__globals__, "DEFAULT_CHECKPOINT", str(checkpoint))
    monkeypatch.setattr(sys, "argv", ["finetune_trainer", str(by_folder), str(tmp_path / "example"), "--epochs", "1"])
    example()
    for trainer in trainers:
        rows = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
        trainer.args.per_device_eval_batch_size = len(rows)
        trainer.args.predict_with_generate = False
        trainer.compute_metrics = None
        model = trainer.model.eval()
        with torch.no_grad():
            expected = model(**trainer.data_collator(rows)).loss.item()
        assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert len(trainers) == 2


@pytest.mark.core
def test_learns_and_generates_captions(checkpoint, by_metadata, tmp_path):
    metrics = finetune(checkpoint, by_metadata, tmp_path, max_steps=60, eval_fraction=0.3)
    assert metrics["eval_word_f1"] > 0.6
    model = IGCaptionerForConditionalGeneration.from_pretrained(tmp_path / "final")
    processor = IGCaptionerProcessor.from_pretrained(tmp_path / "final")
    pixels = processor(images=Image.new("RGB", (8, 8), COLORS["red"]), return_tensors="pt")["pixel_values"]
    text = processor.tokenizer.decode(model.generate(pixel_values=pixels, max_new_tokens=8)[0], True)
    assert text.startswith("a ")


def test_lora_trains_saves_loads_and_merges(checkpoint, by_folder, tmp_path):
    peft = pytest.importorskip("peft")
    finetune(checkpoint, by_folder, tmp_path, lora_rank=2)
    base, merged = (
        IGCaptionerForConditionalGeneration.from_pretrained(folder).eval()
        for folder in (checkpoint, tmp_path / "final")
    )
    before = base.state_dict()
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("_proj" in name for name in changed)
    ids, mask = padded(random_texts())
    inputs = {"pixel_values": random_images(len(ids)), "labels": ids.masked_fill(mask == 0, -100)}
    expected, plain = merged(**inputs).logits, base(**inputs).logits
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.allclose(adapted(**inputs).logits, expected, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-3)
    assert torch.allclose(adapted.merge_and_unload()(**inputs).logits, expected, atol=1e-4)


def test_photos_of_a_data_set_are_read_by_the_rules_for_all_images(tmp_path):
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / name / f"{number}.png")
    rows = finetuning.load_data(str(tmp_path), 0.5, 0)["train"]
    assert finetuning.read_photo(rows[0]["image"]).getpixel((1, 1)) == (255, 255, 255)
    with pytest.raises(ValueError, match="no image of the formats"):
        finetuning.read_photo({"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "path": "photo.jpg"})
