"""Releases: complete, loaded by transformers alone, and never half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from small_checkpoint import make_tokenizer, save_checkpoint

import ig_captioner
from ig_captioner import (
    IGCaptionerForConditionalGeneration,
    IGCaptionerForZeroShotImageClassification,
    IGCaptionerVisionModel,
    release,
)
from ig_captioner.checkpoint import load_model, load_processor
from ig_captioner.release import RELEASE_FILES, save_release


HEADS = [IGCaptionerForConditionalGeneration, IGCaptionerForZeroShotImageClassification]
CODE = [name for name in RELEASE_FILES if name.endswith(".py")]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder, hidden files included."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save_checkpoint(tmp_path / "source")


@pytest.fixture
def room(tmp_path) -> Path:
    """Where releases go: what is left behind shows."""
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


# What is written


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_release_is_complete_and_keeps_weights(tmp_path, room, head, dtype):
    checkpoint = save_checkpoint(tmp_path / "source", head, dtype)
    before = contents(checkpoint)
    folder = save_release(room / "new" / "tiny", checkpoint)
    assert folder == room / "new" / "tiny" and contents(checkpoint) == before
    assert sorted(path.name for path in folder.iterdir()) == sorted([*RELEASE_FILES, "card.yaml", "model.safetensors"])
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    source, written = (load_file(path / "model.safetensors") for path in (checkpoint, folder))
    assert source.keys() == written.keys()
    for name, weight in source.items():
        assert weight.dtype == dtype == written[name].dtype and torch.equal(weight, written[name])
    for name in CODE:
        assert (folder / name).read_bytes() == (Path(ig_captioner.__file__).parent / name).read_bytes()
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
        assert path.stat().st_mode & 0o777 == (checkpoint / "config.json").stat().st_mode & 0o777, path.name


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_weights_keep_their_dtype_whatever_the_configuration_says(checkpoint, room, stored):
    """Stored as float16 and loaded as float32, or the other way round, where rounding must not be stored."""
    loaded = {torch.float16: torch.float32, torch.float32: torch.float16}[stored]
    weights = {name: weight.to(stored) for name, weight in load_file(checkpoint / "model.safetensors").items()}
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    config["dtype"] = str(loaded).removeprefix("torch.")
    (checkpoint / "config.json").write_text(json.dumps(config))
    folder = save_release(room / "tiny", checkpoint)
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert load_model(IGCaptionerForZeroShotImageClassification, folder).dtype == loaded
    names = [str(dtype).removeprefix("torch.") for dtype in (stored, loaded)]
    assert "stored as {}, loaded as {}".format(*names) in (folder / "README.md").read_text(encoding="utf-8")


def test_a_release_of_shards_holds_the_same_weights(checkpoint, room):
    model = load_model(IGCaptionerForZeroShotImageClassification, checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="20KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    written = load_file(save_release(room / "tiny", checkpoint) / "model.safetensors")
    assert written.keys() == weights.keys() and all(torch.equal(written[name], weights[name]) for name in weights)


def test_relative_folders_and_strings(checkpoint, room, monkeypatch):
    monkeypatch.chdir(room)
    (room / "empty").mkdir()
    assert save_release("empty", str(checkpoint)) == room / "empty"
    assert save_release("other", "empty") == room / "other"
    assert sorted(os.listdir(room)) == ["empty", "other"]
    first, second = contents(room / "empty"), contents(room / "other")
    assert first.pop("release.json") != second.pop("release.json")  # it knows the card
    assert first.pop("README.md").replace(b"empty", b"other") == second.pop("README.md")  # its examples load the folder
    assert first == second


def test_references_to_code_are_those_of_this_package(checkpoint, room):
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "someone/else--modeling_old.Model"}
    config["custom_pipelines"]["image-to-text"] = {"impl": "old.Pipeline", "pt": [], "type": "multimodal"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    written = json.loads((save_release(room / "tiny", checkpoint) / "config.json").read_text())
    assert written["auto_map"] == release.AUTO_MAP
    assert list(written["custom_pipelines"]) == ["zero-shot-image-classification"]


def test_generation_of_a_calibrated_checkpoint_is_that_of_any_other(checkpoint, tmp_path, room):
    calibrated = save_checkpoint(tmp_path / "calibrated", score_temperature=4.0, abstain_threshold=-1.5)
    plain, other = (load_model(IGCaptionerForConditionalGeneration, folder) for folder in (checkpoint, calibrated))
    assert other.config.score_temperature == 4 and not hasattr(other.config, "temperature")
    assert other.generation_config.to_dict() == plain.generation_config.to_dict()
    saved = json.loads((save_release(room / "release", calibrated) / "generation_config.json").read_text())
    assert "temperature" not in saved


def test_a_card_of_its_own_is_kept(checkpoint, room):
    card = "---\nlicense: cc0-1.0\nlibrary_name: transformers\n---\r\n\n# Schön\n{{ not a template }}\n".encode()
    (checkpoint / "README.md").write_bytes(card)
    assert (save_release(room / "a", checkpoint) / "README.md").read_bytes() == card
    changed = ModelCard.load(save_release(room / "b", checkpoint, license="mit") / "README.md")
    assert changed.data.license == "mit" and "{{ not a template }}" in changed.text
    assert not (room / "a" / "card.yaml").exists()


# What is refused, and what is left behind


def test_only_an_earlier_release_is_overwritten(checkpoint, room, monkeypatch):
    folder = save_release(room / "tiny", checkpoint)
    (folder / "old.txt").write_text("old")
    before = contents(room)
    with pytest.raises(FileExistsError, match=r"tiny is not empty.*--overwrite"):
        save_release(folder, checkpoint)
    assert contents(room) == before
    (folder / "results").mkdir()
    (folder / "results" / "zero-shot.json").write_text("{}")
    save_release(folder, checkpoint, overwrite=True)
    assert not {"tiny/old.txt", "tiny/results"} & contents(room).keys() and len(os.listdir(room)) == 1

    save_release(checkpoint, checkpoint, overwrite=True)  # completed in place
    assert set(RELEASE_FILES) <= set(os.listdir(checkpoint))
    (checkpoint / ".git").mkdir()
    other = save_release(room / "other", folder)
    (other / "results").mkdir()
    (other / "results" / "cat.jpg").write_text("cat")
    (room / "photos").mkdir()
    (room / "photos" / "cat.jpg").write_text("cat")
    (room / "file").write_text("file")
    before = contents(room.parent)
    monkeypatch.chdir(folder)
    refused = {checkpoint: "holds the folder '.git'", room / "photos": "no folder of an IG Captioner"}
    refused |= {folder: "current folder", room: "holds the folder", other: "holds the folder 'results'"}
    for target, message in refused.items():
        with pytest.raises(ValueError, match=message):
            save_release(target, folder, overwrite=True)
    with pytest.raises(NotADirectoryError, match="is a file"):
        save_release(room / "file", folder, overwrite=True)
    assert contents(room.parent) == before


@pytest.mark.parametrize("step", ["_verify", "_package_file"])
def test_an_error_leaves_everything_as_it_was(checkpoint, room, monkeypatch, step):
    save_release(room / "tiny", checkpoint)
    before = contents(room)

    def fail(*args, **kwargs):
        assert len(os.listdir(room)) == 2  # the release so far, under another name
        raise KeyboardInterrupt if step == "_verify" else OSError("disk full")

    monkeypatch.setattr(release, step, fail)
    for name in ("tiny", "new"):
        with pytest.raises((KeyboardInterrupt, OSError)):
            save_release(room / name, checkpoint, overwrite=True)
        assert contents(room) == before


def test_the_old_release_stays_if_the_new_one_cannot_take_its_name(checkpoint, room, monkeypatch):
    save_release(room / "tiny", checkpoint)
    before = contents(room)
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        save_release(room / "tiny", checkpoint, overwrite=True)
    assert contents(room) == before


def spoil_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_model_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "clip"}))


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


SOME_WEIGHT = "model.decoder.embed_tokens.weight"
SPOILED = {
    "a weight too few": (
        lambda folder: spoil_weights(folder, lambda w: w.pop(SOME_WEIGHT)),
        "missing_keys.*embed_tokens",
    ),
    "a weight too many": (
        lambda folder: spoil_weights(folder, lambda w: w.update(other=torch.ones(2))),
        "unexpected_keys: other",
    ),
    "not a number": (lambda folder: spoil_weights(folder, lambda w: w[SOME_WEIGHT][0].fill_(torch.nan)), "not finite"),
    "another shape": (lambda folder: spoil_weights(folder, lambda w: w.update({SOME_WEIGHT: torch.ones(2, 2)})), "."),
    "another model": (spoil_model_type, "'clip', not 'ig_captioner'"),
    "pickled weights": (pickle_weights, "safetensors"),
    "cut off": (lambda folder: os.truncate(folder / "model.safetensors", 999), "."),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "."),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), "."),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "broken configuration": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_broken_checkpoint_is_not_released(checkpoint, room, kind):
    spoil, message = SPOILED[kind]
    spoil(checkpoint)
    with pytest.raises(Exception, match=message) as caught:
        save_release(room / "tiny", checkpoint)
    assert not isinstance(caught.value, (AttributeError, KeyError, TypeError))
    assert not contents(room)


def test_a_tokenizer_without_eos_is_not_released(checkpoint, room):
    make_tokenizer("$A").save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="EOS"):
        save_release(room / "tiny", checkpoint)
    assert not contents(room)


@pytest.mark.parametrize("name", ["", "./missing", "/missing/folder", "runs/tiny/model", "~/model", Path("missing")])
def test_missing_folders_are_named(name, room):
    for load in (
        load_processor,
        lambda model: load_model(HEADS[0], model),
        lambda model: save_release(room / "a", model),
    ):
        with pytest.raises(FileNotFoundError, match="no such model folder"):
            load(name)
    assert not contents(room)


def test_a_file_is_no_model(checkpoint):
    with pytest.raises(NotADirectoryError, match="not a file"):
        load_model(HEADS[0], str(checkpoint / "model.safetensors"))


def test_no_code_of_a_checkpoint_is_run(checkpoint):
    """Neither in place of the package's classes nor as a tokenizer of its own."""
    (checkpoint / "evil.py").write_text("raise SystemExit('this ran')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        content = json.loads((checkpoint / name).read_text())
        autos = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
        content["auto_map"] = dict.fromkeys(autos, "evil.Evil")
        (checkpoint / name).write_text(json.dumps(content))
    assert type(load_model(HEADS[0], checkpoint)) is HEADS[0]
    processor = load_processor(checkpoint)
    parts = (processor, processor.image_processor, processor.tokenizer)
    names = ["IGCaptionerProcessor", "IGCaptionerImageProcessor", "TokenizersBackend"]
    assert [type(part).__name__ for part in parts] == names
    assert not any("evil" in name for name in sys.modules)


# Clean processes

WITHOUT_THE_PACKAGE = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ig_captioner":
            raise ImportError("the package is not installed here")

sys.meta_path.insert(0, Blocked())
"""

IN_ANOTHER_PROCESS = """
import json, re, sys
from pathlib import Path

package, save_to, *folders = sys.argv[1:]
if package == "installed":
    import ig_captioner

import torch
import transformers
from PIL import Image
from transformers import pipeline

TRUST = {"trust_remote_code": True}
LABELS = ["cat", "dog", "photo of a cat"]
TEXTS = ["a photo of a " + label + "." for label in LABELS]
AUTOS = {
    "AutoConfig": "IGCaptionerConfig",
    "AutoModel": "IGCaptionerModel",
    "AutoModelForZeroShotImageClassification": "IGCaptionerForZeroShotImageClassification",
    "AutoModelForImageTextToText": "IGCaptionerForConditionalGeneration",
    "AutoProcessor": "IGCaptionerProcessor",
    "AutoImageProcessor": "IGCaptionerImageProcessor",
    "AutoTokenizer": "TokenizersBackend",
}

def load_all(folder):
    loaded = {auto: getattr(transformers, auto).from_pretrained(folder, **TRUST) for auto in AUTOS}
    assert {auto: type(value).__name__ for auto, value in loaded.items()} == AUTOS
    return loaded

def scores_of(folder):
    classifier = pipeline("zero-shot-image-classification", model=folder, **TRUST)
    assert type(classifier).__name__ == "IGZeroShotImageClassificationPipeline"
    entries = classifier("photo.jpg", candidate_labels=LABELS, return_log_likelihoods=True)
    entries = sorted(entries, key=lambda entry: LABELS.index(entry["label"]))
    loaded = load_all(folder)
    inputs = loaded["AutoProcessor"](images=Image.open("photo.jpg"), text=TEXTS, return_tensors="pt")
    rows = [[entry[name] for entry in entries] for name in ("caption_log_likelihood", "information_gain")]
    for auto in ("AutoModelForZeroShotImageClassification", "AutoModelForImageTextToText"):
        with torch.no_grad():
            scores = loaded[auto].eval().score(**inputs)
        rows += [scores.caption_log_likelihood[0].tolist(), scores.information_gain[0].tolist()]
    tokens = loaded["AutoModelForImageTextToText"].generate(pixel_values=inputs["pixel_values"], max_new_tokens=5)
    return {"rows": rows, "caption": tokens.tolist()}

def features_of(folder):
    model = transformers.AutoModel.from_pretrained(folder, **TRUST).eval()
    assert type(model).__name__ == "IGCaptionerVisionModel"
    with torch.no_grad():
        return model(torch.ones(1, 3, 16, 24)).pooler_output.tolist()

def save_again(folder, target):
    loaded = load_all(folder)
    loaded["AutoModelForZeroShotImageClassification"].save_pretrained(target + "/model")
    loaded["AutoProcessor"].save_pretrained(target + "/model")
    pipeline(model=folder, **TRUST).save_pretrained(target + "/pipeline")
    transformers.AutoModel.from_pretrained("vision", **TRUST).save_pretrained(target + "/vision")

def run_card(folder):
    for code in re.findall("```python\\n(.*?)```", Path(folder, "README.md").read_text(), flags=re.DOTALL):
        exec(code, {})

results = {folder: (features_of if "vision" in folder else scores_of)(folder) for folder in folders}
if save_to != "-":
    run_card(folders[0])
    save_again(folders[0], save_to)
assert (package == "installed") == ("ig_captioner" in sys.modules)
print(json.dumps(results))
"""


def run_python(room: Path, code: str, *arguments: str, **variables: str):
    """The JSON that `code` prints last, in a process of its own with caches of its own in `room`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    environment |= {"HF_HOME": str(room / "home"), "HF_MODULES_CACHE": str(room / "modules"), **variables}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_elsewhere(room: Path, package: str, save_to: str, *folders: str) -> dict[str, dict]:
    """What [`IN_ANOTHER_PROCESS`] prints. The package is importable only where it is said to be installed."""
    arguments, variables = (package, save_to, *folders), {"HF_HUB_OFFLINE": "1"}
    if package == "installed":
        variables["PYTHONPATH"] = str(Path(ig_captioner.__file__).parents[1])
        return run_python(room, IN_ANOTHER_PROCESS, *arguments, **variables)
    return run_python(room, WITHOUT_THE_PACKAGE + IN_ANOTHER_PROCESS, *arguments, **variables)


@pytest.mark.core
def test_releases_load_save_and_load_again_in_clean_processes(checkpoint, room):
    """Three processes: without the package, with it, and without it on what both have saved."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).resize((30, 20)).save(room / "photo.jpg")
    save_release(room / "acme" / "tiny", checkpoint, repo_id="acme/tiny")  # so that the card's examples find it
    IGCaptionerVisionModel.from_pretrained(checkpoint).save_pretrained(room / "vision")
    results = [run_elsewhere(room, "blocked", "without", "acme/tiny", "vision")]
    results += [run_elsewhere(room, "installed", "with", "acme/tiny", "without/model", "without/pipeline")]
    again = [f"{saved}/{kind}" for saved in ("without", "with") for kind in ("model", "pipeline", "vision")]
    results += [run_elsewhere(room, "blocked", "-", *again)]

    model, processor = load_model(HEADS[1], checkpoint), load_processor(checkpoint)
    texts = [f"a photo of a {label}." for label in ("cat", "dog", "photo of a cat")]
    with torch.no_grad():
        scores = model.score(**processor(images=str(room / "photo.jpg"), text=texts, return_tensors="pt"))
    expected = torch.stack([scores.caption_log_likelihood[0], scores.information_gain[0]]).repeat(3, 1)
    first = results[0]["acme/tiny"]
    with torch.no_grad():
        features = model.model.vision_model(torch.ones(1, 3, 16, 24)).pooler_output
    for folder, result in (pair for part in results for pair in part.items()):
        if "vision" in folder:
            torch.testing.assert_close(torch.tensor(result), features, atol=1e-5, rtol=0)
            continue
        torch.testing.assert_close(torch.tensor(result["rows"]), expected, atol=1e-5, rtol=0)
        difference = torch.tensor(result["rows"]).double() - torch.tensor(first["rows"]).double()
        assert difference.abs().max() <= 1e-6, folder
        assert result["caption"] == first["caption"]
