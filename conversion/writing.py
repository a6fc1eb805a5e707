"""From named arrays to a folder for the Hub: filling a model completely, saving it, and reloading it to be sure."""

import ctypes
import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig

from ig_captioner import IGCaptionerConfig, IGCaptionerForConditionalGeneration, IGCaptionerTextConfig
from ig_captioner.card import CARD_FILE, CardFacts, make_card, write_facts
from ig_captioner.checkpoint import load_model

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
        model = IGCaptionerForConditionalGeneration.from_config(config, dtype=torch.float32)
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
        filled[name] = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))  # a copy without gaps
    wrong += [f"{name} was not filled" for name in sorted(wanted.keys() - filled.keys())]
    if wrong:
        raise ConversionError("checkpoint and model do not match:\n  " + "\n  ".join(wrong))
    model.load_state_dict(filled, strict=True, assign=True)
    model.generation_config = generation_config(config.text_config)
    return model.eval()


def generation_config(text: IGCaptionerTextConfig) -> GenerationConfig:
    return GenerationConfig(
        decoder_start_token_id=text.decoder_start_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        max_length=text.max_position_embeddings,
    )


def digests(model: torch.nn.Module) -> dict[str, str]:
    """Weight name -> digest of dtype, shape and bytes: equal digests are equal weights."""
    result = {}
    for name, weight in model.state_dict().items():
        data = weight.detach().contiguous().flatten().view(torch.uint8).numpy()
        result[name] = f"{weight.dtype} {tuple(weight.shape)} {hashlib.sha256(data).hexdigest()}"
    return result


def save_and_reload(
    model: IGCaptionerForConditionalGeneration, folder: Path, max_shard_size: str | int | None
) -> IGCaptionerForConditionalGeneration:
    """Saves a model, empties it (its weights are not needed twice), and returns what `from_pretrained` makes of it.

    Raises:
        ConversionError: if any weight, or the configuration, changed on the way.
    """
    before = digests(model)
    config = model.config.to_dict()
    model.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    model.to("meta")
    _return_free_memory()
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


def _return_free_memory() -> None:
    """Hands freed weights back to the system: glibc keeps them, which would make the peak twice a checkpoint's size."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _plain(value):
    """Without what loading adds to nested configurations, and with lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if key not in ("dtype", "_name_or_path")}
    return list(value) if isinstance(value, tuple) else value


def write_card(
    folder: Path,
    model: IGCaptionerForConditionalGeneration,
    name: str,
    license: str | None,
    summary: str,
    facts: dict[str, str],
) -> None:
    """The package's card, with where the weights come from: a sentence, and `facts` as a table."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    source = f"{summary}\n\n| | |\n|---|---|\n{rows}"
    write_facts(folder, CardFacts(license=license or "unknown", source=source))
    (folder / CARD_FILE).write_bytes(make_card(folder, model, name))


def push(directory: Path, repository: str) -> None:
    """Uploads a finished folder to the Hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Converted weights")
