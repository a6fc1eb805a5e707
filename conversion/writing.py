"""From named arrays to a folder for the Hub: filling a model completely, saving it, and reloading it to be sure."""

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig

from ig_captioner import IGCaptionerConfig, IGCaptionerForConditionalGeneration
from ig_captioner.hub import CARD_FILE, fill_card, load_model

from .reading import ConversionError


def build_model(
    config: IGCaptionerConfig, weights: Iterable[tuple[str, np.ndarray]]
) -> IGCaptionerForConditionalGeneration:
    """A float32 model in evaluation mode whose every weight comes from `weights`, each exactly once.

    The model takes no memory before its weights arrive.

    Raises:
        ConversionError: listing weights that were not filled, and arrays that are no weight or do not fit.
    """
    with torch.device("meta"):
        model = IGCaptionerForConditionalGeneration._from_config(config, dtype=torch.float32)
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    filled: dict[str, torch.Tensor] = {}
    wrong = []
    for name, array in weights:
        if name in filled:
            wrong.append(f"{name} is filled twice")
        elif name not in wanted:
            wrong.append(f"{name} is no weight of the model")
        elif array.shape != wanted[name]:
            wrong.append(f"{name} is {wanted[name]}, but the checkpoint has {array.shape}")
        filled[name] = torch.tensor(array, dtype=torch.float32)  # a copy in torch's order
    wrong += [f"{name} was not filled" for name in sorted(wanted.keys() - filled.keys())]
    if wrong:
        raise ConversionError("checkpoint and model do not match:\n  " + "\n  ".join(wrong))
    model.load_state_dict(filled, strict=True, assign=True)
    text = config.text_config
    model.generation_config = GenerationConfig(
        decoder_start_token_id=text.decoder_start_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        max_length=text.max_position_embeddings,
    )
    return model.eval()


def check_target(directory: Path, overwrite: bool) -> None:
    """Raises ConversionError unless `directory` is new, empty, or an earlier model that may be replaced."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir() or directory == Path.cwd().resolve():
        raise ConversionError(
            f"{directory} is {'the current folder' if directory.is_dir() else 'a file'}; name another"
        )
    if not overwrite:
        raise ConversionError(f"{directory} is not empty; --overwrite replaces an earlier model")
    try:
        model_type = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        model_type = None
    if model_type != IGCaptionerConfig.model_type or any(entry.is_dir() for entry in directory.iterdir()):
        raise ConversionError(f"{directory} is not overwritten, because it is no folder of an IG Captioner")


@contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` that takes its name in the end, or vanishes if there was an error."""
    folder, old = (directory.with_name(f".{directory.name}.{os.getpid()}.{end}") for end in ("partial", "old"))
    folder.mkdir(parents=True)
    try:
        yield folder
        if directory.exists():
            directory.rename(old)
        try:
            folder.rename(directory)
        except OSError:
            if old.exists():
                old.rename(directory)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def digests(model: torch.nn.Module) -> dict[str, str]:
    """Weight name -> digest of dtype, shape and bytes: equal digests are equal weights."""
    result = {}
    for name, weight in model.state_dict().items():
        data = weight.detach().contiguous().view(torch.uint8).numpy()
        result[name] = f"{weight.dtype} {tuple(weight.shape)} {hashlib.sha256(data).hexdigest()}"
    return result


def save_and_reload(
    model: IGCaptionerForConditionalGeneration, folder: Path, max_shard_size: str | int | None
) -> IGCaptionerForConditionalGeneration:
    """Saves a model, empties it (its weights are not needed twice), and returns what `from_pretrained` makes of it.

    Raises:
        ConversionError: if any weight, or the configuration, changed on the way.
    """
    before, config = digests(model), model.config.to_dict()
    model.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    model.to("meta")
    gc.collect()
    reloaded = load_model(IGCaptionerForConditionalGeneration, folder)
    after = digests(reloaded)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise ConversionError(f"{len(changed)} weights change when saved and loaded, such as {changed[0]}")
    volatile = ("_name_or_path", "transformers_version", "architectures", "dtype")
    again = reloaded.config.to_dict()
    keys = [key for key in config.keys() | again.keys() if key not in volatile]
    if differing := sorted(key for key in keys if _plain(config.get(key)) != _plain(again.get(key))):
        raise ConversionError(f"the configuration changes when saved and loaded: {', '.join(differing)}")
    return reloaded


def _plain(value):
    """Without what loading adds to nested configurations, and with lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if key not in ("dtype", "_name_or_path")}
    return list(value) if isinstance(value, tuple) else value


def write_card(
    folder: Path, model: IGCaptionerForConditionalGeneration, name: str, license: str | None, facts: dict[str, str]
) -> None:
    """The package's card, with where the weights come from: `facts` as a table."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    section = (
        f"\n## Source\n\nThese weights were converted, not trained, by this package.\n\n| | |\n|---|---|\n{rows}\n"
    )
    (folder / CARD_FILE).write_text(str(fill_card(model, name, license)).rstrip() + "\n" + section, encoding="utf-8")


def push(directory: Path, repository: str) -> None:
    """Uploads a finished folder to the Hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Converted weights")
