"""The zero-shot pipeline built, saved, loaded as remote code, and beside transformers' own."""

import json
import os
import subprocess
import sys

import pytest
import torch
from small_checkpoint import TASK, make_config, make_image_processor, make_pipeline, make_tokenizer
from transformers import ZeroShotImageClassificationPipeline, pipeline
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from ig_captioner import (
    IGCaptionerForZeroShotImageClassification,
    IGCaptionerProcessor,
    IGCaptionerVisionModel,
    IGZeroShotImageClassificationPipeline,
    pipeline_ig_captioner,
)


LABELS = ["cat", "dog", "photo of a cat"]
TEMPLATE = "a photo of a {}."


@pytest.fixture(scope="module")
def model() -> IGCaptionerForZeroShotImageClassification:
    torch.manual_seed(0)
    return IGCaptionerForZeroShotImageClassification(make_config()).eval()


@pytest.fixture
def classifier(model) -> IGZeroShotImageClassificationPipeline:
    return make_pipeline(model)


def scores_of(results: list[list[dict]]) -> torch.Tensor:
    """Scores [B, C] in the order of LABELS."""
    return torch.tensor(
        [[{entry["label"]: entry["score"] for entry in entries}[label] for label in LABELS] for entries in results]
    )


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What the pipeline's file and transformers' pipelines log as warnings and errors."""
    messages: list[str] = []
    for logger in (pipeline_ig_captioner.logger, sys.modules["transformers.pipelines.base"].logger):
        for level in ("warning", "error"):
            monkeypatch.setattr(logger, level, messages.append)
    return messages


def test_building_is_quiet_and_asks_for_a_score(model, log):
    make_pipeline(model)
    assert not log
    with pytest.raises(ValueError, match="IGCaptionerVisionModel cannot be scored with"):
        make_pipeline(IGCaptionerVisionModel(make_config().vision_config))
    for part in ("tokenizer", "image_processor"):
        with pytest.raises(ValueError, match="tokenizer and an image_processor"):
            make_pipeline(model, **{part: None})


def test_what_the_factory_is_told_to_load():
    # Anything but False for the video processor makes the factory look for remote code that is not there.
    flags = {"tokenizer": True, "image_processor": True, "processor": False, "feature_extractor": False}
    for name, value in {**flags, "video_processor": False}.items():
        assert getattr(IGZeroShotImageClassificationPipeline, f"_load_{name}") is value


def test_a_tokenizer_without_eos_is_warned_about(model, log):
    make_pipeline(model, tokenizer=make_tokenizer("<s> $A"))
    assert len(log) == 1 and "EOS" in log[0]


def test_built_from_a_processor_alone(model, classifier, photos):
    processor = IGCaptionerProcessor(make_image_processor(), make_tokenizer(model_max_length=12))
    parts = {"tokenizer": None, "image_processor": None, "processor": processor}
    built = make_pipeline(model, candidate_labels=LABELS, **parts)
    assert built(photos[0]) == classifier(photos[0], LABELS)


def test_pipeline_factory(model, classifier, photos):
    parts = {
        "tokenizer": classifier.tokenizer,
        "image_processor": classifier.image_processor,
        "device": "cpu",
    }
    built = pipeline(TASK, model=model, pipeline_class=IGZeroShotImageClassificationPipeline, top_k=1, **parts)
    assert built(photos[0], LABELS) == classifier(photos[0], LABELS, top_k=1)


def test_the_stock_pipeline_runs_on_the_model(model, classifier, photos):
    parts = {
        "tokenizer": classifier.tokenizer,
        "image_processor": classifier.image_processor,
        "device": "cpu",
    }
    stock = ZeroShotImageClassificationPipeline(model=model, task=TASK, **parts)
    for batch_size in (1, 4):
        results = stock(photos, candidate_labels=LABELS, hypothesis_template=TEMPLATE, batch_size=batch_size)
        ours = classifier(photos, candidate_labels=LABELS)
        torch.testing.assert_close(scores_of(results), scores_of(ours), atol=1e-5, rtol=1e-5)


IN_A_CLEAN_PROCESS = """
import json, sys
from transformers import AutoImageProcessor, AutoProcessor, pipeline
folder, again, photo = sys.argv[1:]
classifier = pipeline(model=folder, trust_remote_code=True, device="cpu")
results = classifier(photo, candidate_labels=["cat", "dog", "photo of a cat"])
classifier.save_pretrained(again)
for loaded in (folder, again):
    for auto in (AutoProcessor, AutoImageProcessor):
        name = auto.__name__.replace("Auto", "IGCaptioner")
        assert type(auto.from_pretrained(loaded, trust_remote_code=True)).__name__ == name
reloaded = pipeline("zero-shot-image-classification", model=again, trust_remote_code=True, device="cpu")
assert reloaded(photo, candidate_labels=["cat", "dog", "photo of a cat"]) == results
assert "ig_captioner" not in sys.modules
print(json.dumps([type(classifier).__name__, results]))
"""


@pytest.mark.core
def test_a_saved_pipeline_loads_in_a_clean_process_as_remote_code(classifier, photos, tmp_path):
    photos[0].save(tmp_path / "photo.png")
    classifier.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["custom_pipelines"][TASK]
    assert saved["impl"] == "pipeline_ig_captioner.IGZeroShotImageClassificationPipeline"
    assert saved["pt"] == ["AutoModelForZeroShotImageClassification"]
    arguments = [str(tmp_path / name) for name in ("saved", "again", "photo.png")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", IN_A_CLEAN_PROCESS, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, results = json.loads(done.stdout.splitlines()[-1])
    assert name == "IGZeroShotImageClassificationPipeline"
    torch.testing.assert_close(scores_of([results]), scores_of([classifier(photos[0], LABELS)]))


def test_the_file_can_be_remote_code():
    path = pipeline_ig_captioner.__file__
    own = {"compiled_labels", "configuration_ig_captioner", "information_gain", "input_rules"}
    own.add("processing_ig_captioner")
    assert set(get_relative_imports(path)) == own
    assert set(get_imports(path)) <= {
        "collections",
        "contextlib",
        "dataclasses",
        "math",
        "numbers",
        "typing",
        "torch",
        "transformers",
    }
