"""Checkpoints in and out: loading one from a folder or the Hub, and writing the complete folder that the Hub expects.

A released folder needs nothing but transformers: weights, configuration, tokenizer, processor, a card, and the code
that `trust_remote_code=True` runs. What it must hold stands in `RELEASE_FILES`.

Nothing here runs code from a checkpoint: the package's own classes read it, pickled weights are refused.
"""

import ast
import filecmp
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from . import (
    TINY_CHECKPOINT,
    IGCaptionerConfig,
    IGCaptionerForConditionalGeneration,
    IGCaptionerForZeroShotImageClassification,
    IGCaptionerPreTrainedModel,
    IGCaptionerProcessor,
)
from .configuration_ig_captioner import AUTO_MAP, CUSTOM_PIPELINES, REMOTE_CODE_FILES


Model = TypeVar("Model", bound=IGCaptionerPreTrainedModel)

CARD_FILE = "README.md"
# Every released folder holds these and, in one file or in shards, the weights `model*.safetensors`.
RELEASE_FILES = (
    CARD_FILE,
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    *REMOTE_CODE_FILES,
)

# The card of checkpoints that have none of their own. The file of the same name in the repository's root is a copy for
# readers, made with `cp`; a test compares them.
CARD_TEMPLATE = Path(__file__).with_name("model_card.md")


# ---------------------------------------------------------------------------------------------------------------------
# In


def load_model(model_class: type[Model], model: str | Path, **kwargs) -> Model:
    """The weights of a checkpoint, in evaluation mode, under either head.

    Args:
        model: a folder, or the name of a repository on the Hub.
        kwargs: for `from_pretrained`; without a `dtype` it is the stored one.

    Raises:
        ValueError: another kind of model, or weights that do not fill this one.
        OSError: no such folder or repository, or no safetensors in it.
    """
    name = _folder_or_repository(model)
    arguments = {"dtype": "auto", **kwargs, "use_safetensors": True, "output_loading_info": True}
    loaded, report = model_class.from_pretrained(name, **arguments)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if wrong:
        summary = "; ".join(f"{kind}: {', '.join(keys[:3])} ({len(keys)} in all)" for kind, keys in wrong.items())
        raise ValueError(f"the weights of {name} do not fit its configuration: {summary}")
    return loaded.eval()


def load_processor(model: str | Path) -> IGCaptionerProcessor:
    """Tokenizer and image processor of a checkpoint; errors as in [`load_model`]."""
    return IGCaptionerProcessor.from_pretrained(_folder_or_repository(model), trust_remote_code=False)


def _folder_or_repository(model: str | Path) -> str:
    """The argument of `from_pretrained`, checked to name a checkpoint of this package."""
    name = os.fspath(model)
    looks_like_path = isinstance(model, Path) or name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if not name or (looks_like_path and not Path(name).exists()):
        raise FileNotFoundError(f"no such model folder: {name!r}")
    if Path(name).is_file():
        raise NotADirectoryError(f"a model is a folder or a repository, not a file: {name!r}")
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise FileNotFoundError(f"no model in the folder {name!r}: it has no config.json")
    model_type = IGCaptionerConfig.get_config_dict(name)[0].get("model_type")
    if model_type != IGCaptionerConfig.model_type:
        raise ValueError(f"{name!r} holds a model of type {model_type!r}, not {IGCaptionerConfig.model_type!r}")
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Out


def save_release(
    directory: str | Path,
    model: str | Path = TINY_CHECKPOINT,
    *,
    overwrite: bool = False,
    repo_id: str | None = None,
    license: str | None = None,
) -> Path:
    """Writes the complete Hub folder of a checkpoint, and loads it again to be sure.

    The folder appears under its name only once it has been verified; an error leaves nothing behind.

    Args:
        directory: missing or empty, unless `overwrite` says that an earlier release there, whatever files it holds,
            may be replaced.
        model: a folder or a repository on the Hub, of either head; weights keep their dtype.
        repo_id: the name that the card's examples load; the folder's own by default.
        license: the Hub's name of a licence, for the card's metadata.

    Returns:
        The folder's absolute path.

    Raises:
        ValueError: the folder may not be written, or the checkpoint is incomplete or of another kind.
        OSError: reading or writing failed.
    """
    directory = Path(directory).expanduser().resolve()
    check_target(directory, overwrite)
    loaded = load_model(IGCaptionerForConditionalGeneration, model)
    processor = load_processor(model)
    # A checkpoint may come from elsewhere: what it says about code must fit the code it gets.
    loaded.config.auto_map = dict(AUTO_MAP)
    loaded.config.custom_pipelines = {task: dict(entry) for task, entry in CUSTOM_PIPELINES.items()}
    card = _read_card(os.fspath(model), license) or str(fill_card(loaded, repo_id or directory.name, license))
    with new_folder(directory) as folder:
        loaded.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / CARD_FILE).write_bytes(card.encode("utf-8"))
        for weights in folder.glob("*.safetensors"):  # safetensors lets only their owner read them
            weights.chmod((folder / CARD_FILE).stat().st_mode)
        _verify(folder, loaded, processor)
    return directory


def check_target(directory: Path, overwrite: bool) -> None:
    """Raises ValueError or OSError if `directory` must not be replaced; never lets anything but a release go."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file")
    if directory == Path.cwd().resolve():
        raise ValueError(f"{directory} is the current folder, which cannot be replaced; name another")
    if not any(directory.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{directory} is not empty; overwrite (--overwrite) replaces an earlier release")
    folders = sorted(path.name for path in directory.iterdir() if path.is_dir())
    try:
        model_type = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        model_type = None
    if folders or model_type != IGCaptionerConfig.model_type:
        reason = f"it holds the folder {folders[0]!r}" if folders else "it is no folder of an IG Captioner"
        raise ValueError(f"{directory} is not overwritten, because {reason}; remove it or name another")


@contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` that takes its name in the end, or vanishes if there was an error."""
    folder = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    folder.mkdir(parents=True)
    try:
        yield folder
        if directory.exists():
            directory.rename(old)
        try:
            folder.rename(directory)
        except BaseException:
            if old.exists():
                old.rename(directory)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _read_card(model: str, license: str | None) -> str | None:
    """The checkpoint's own card, if it has one. Raises LocalEntryNotFoundError if the Hub cannot be asked."""
    path = Path(model, CARD_FILE)
    if not Path(model).is_dir():
        try:
            path = Path(hf_hub_download(model, CARD_FILE))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None
    elif not path.is_file():
        return None
    text = path.read_bytes().decode("utf-8")  # line ends as they are
    if license is None:
        return text
    card = ModelCard(text)
    card.data.license = license
    return str(card)


def fill_card(model: IGCaptionerPreTrainedModel, repo_id: str, license: str | None = None) -> ModelCard:
    """The template with what a model's configuration says; a licence that is not given is "unknown"."""
    vision, text = model.config.vision_config, model.config.text_config

    def pixels(size) -> str:
        height, width = (size, size) if isinstance(size, int) else size
        return f"{height} x {width}"

    return ModelCard.from_template(
        ModelCardData(),
        template_path=str(CARD_TEMPLATE),
        model_id=repo_id,
        license=license or "unknown",
        prior_weight=f"{model.config.prior_weight:g}",
        num_parameters=f"{model.num_parameters():,}",
        dtype=str(model.dtype).removeprefix("torch."),
        image_size=pixels(vision.image_size),
        patch_size=pixels(vision.patch_size),
        vision_layers=vision.num_hidden_layers,
        vision_width=vision.hidden_size,
        text_layers=text.num_hidden_layers,
        text_width=text.hidden_size,
        fusion=text.fusion.replace("_", " "),
        max_tokens=text.max_position_embeddings,
        vocab_size=f"{text.vocab_size:,}",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _verify(folder: Path, model: IGCaptionerPreTrainedModel, processor: IGCaptionerProcessor) -> None:
    """Loads what was written. Raises ValueError naming what is missing or differs."""
    missing = sorted(name for name in RELEASE_FILES if not (folder / name).is_file())
    if missing:
        raise ValueError(f"the release would lack {', '.join(missing)}")
    package = Path(__file__).parent
    for name in REMOTE_CODE_FILES:
        if not filecmp.cmp(package / name, folder / name, shallow=False):
            raise ValueError(f"{name} in the release is not the file of this package")
    _check_code_references(folder)

    reloaded = load_model(IGCaptionerForZeroShotImageClassification, folder).state_dict()
    for name, weight in model.state_dict().items():
        # NaN is not equal to itself: broken weights are refused as well
        if reloaded[name].dtype != weight.dtype or not torch.equal(reloaded[name], weight):
            raise ValueError(f"the weight {name} is not finite, or changes when it is saved and loaded")
    again = load_processor(folder)
    sample = "A photo of a cat, and of 2 dogs."
    same_tokens = again.tokenizer(sample)["input_ids"] == processor.tokenizer(sample)["input_ids"]
    if not same_tokens or again.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise ValueError("the tokenizer changes when it is saved and loaded")
    if again.image_processor.to_dict() != processor.image_processor.to_dict():
        raise ValueError("the image processor changes when it is saved and loaded")


def _check_code_references(folder: Path) -> None:
    """Raises ValueError if a JSON file names a `file.Class` that is not in the folder."""
    for path in (folder / "config.json", folder / "processor_config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        image_processor = content.get("image_processor", {})
        references = [*content.get("auto_map", {}).values(), *image_processor.get("auto_map", {}).values()]
        references += [pipeline["impl"] for pipeline in content.get("custom_pipelines", {}).values()]
        for reference in references:
            module, _, name = str(reference).partition(".")
            source = folder / f"{module}.py"
            nodes = ast.parse(source.read_text(encoding="utf-8")).body if source.is_file() else []
            if not any(isinstance(node, ast.ClassDef) and node.name == name for node in nodes):
                raise ValueError(f"{path.name} refers to {reference}, which is not in the release")
