"""Loading a checkpoint from a folder or the Hub: the model, on a device and in a dtype, and its processor.

Nothing here runs code from a checkpoint: the package's own classes read it, and pickled weights are refused.
"""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import torch

from .configuration_ig_captioner import IGCaptionerConfig
from .encoder_ig_captioner import IGCaptionerPreTrainedModel
from .fitting import check_shapes, check_sizes, read_shapes
from .processing_ig_captioner import IGCaptionerProcessor


Model = TypeVar("Model", bound=IGCaptionerPreTrainedModel)
MAX_CAPTION_TOKENS = 30
ADAPTER_ADVICE = "merge it into the model that it belongs to (merge_and_unload of peft), and save that"


def load_model(model_class: type[Model], model: str | Path, **kwargs) -> Model:
    """Loads the weights of a checkpoint, in evaluation mode, under either head.

    Args:
        model: a folder, or the name of a repository on the Hub.
        kwargs: for `from_pretrained`; without a `dtype` it is the stored one.

    Raises:
        ValueError: another kind of model, or weights that do not fill this one.
        OSError: no such folder or repository, or no safetensors in it.
    """
    name = own_checkpoint(model)
    _check_folder(model_class, name)
    arguments = {"dtype": "auto", **kwargs, "use_safetensors": True, "output_loading_info": True}
    loaded, report = model_class.from_pretrained(name, **arguments)
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise ValueError(f"{name} is an adapter for {loaded.name_or_path}: {ADAPTER_ADVICE}")
    wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if wrong:
        summary = "; ".join(f"{kind}: {', '.join(keys[:3])} ({len(keys)} in all)" for kind, keys in wrong.items())
        raise ValueError(f"the weights of {name} do not fit its configuration: {summary}")
    return loaded.eval()


def _check_folder(model_class: type[IGCaptionerPreTrainedModel], name: str) -> None:
    """Raises ValueError for a folder that names another model, or whose configuration does not fit its weights."""
    folder = Path(name)
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").exists():  # transformers would load the model that it names
        raise ValueError(f"{name} holds an adapter (adapter_config.json): {ADAPTER_ADVICE}")
    shapes = read_shapes(folder)
    if shapes is None or model_class.config_class is not IGCaptionerConfig:  # an encoder taken out of a whole model
        return
    try:
        check_sizes(IGCaptionerConfig.get_config_dict(name)[0], len(shapes))
        check_shapes(model_class, IGCaptionerConfig.from_pretrained(name), shapes)
    except ValueError as error:
        raise ValueError(f"the weights of {name} do not fit its configuration: {error}") from error


def load_on_device(model_class: type[Model], model: str | Path, device: str = "auto", dtype: str = "auto") -> Model:
    """Loads a model as in [`load_model`] onto the device "auto", "cpu" or "cuda".

    On a CPU the weights become float32, since half precision is slow there and gains nothing; on a GPU they keep the
    stored dtype.
    """
    chosen = choose_device(device)
    return load_model(model_class, model, dtype=dtype_on(chosen, dtype)).to(chosen)


def load_processor(model: str | Path) -> IGCaptionerProcessor:
    """Loads tokenizer and image processor of a checkpoint; errors as in [`load_model`]."""
    return IGCaptionerProcessor.from_pretrained(own_checkpoint(model), trust_remote_code=False)


def folder_or_repository(model: str | Path) -> str:
    """Checks that `model` may name a checkpoint of transformers. Returns the argument of `from_pretrained`."""
    name = os.fspath(model)
    is_path = isinstance(model, Path) or name.startswith((".", "~", os.sep)) or name.count("/") != 1
    is_path = is_path or Path(name).parent.is_dir()  # and no asking of the Hub, which takes long where it is not there
    if not name or (is_path and not Path(name).exists()):
        raise FileNotFoundError(f"no such model folder: {name!r}{_suggestion(name)}")
    if Path(name).is_file():
        raise NotADirectoryError(f"a model is a folder or a repository, not a file: {name!r}")
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise FileNotFoundError(f"no model in the folder {name!r}: it has no config.json")
    return name


def is_own(name: str, **hub: Any) -> bool:
    """Tells whether a folder or repository holds a checkpoint of this package. `hub`: `revision`, `token` and so on."""
    config, _ = IGCaptionerConfig.get_config_dict(name, **hub)
    return config.get("model_type") == IGCaptionerConfig.model_type


def own_checkpoint(model: str | Path) -> str:
    """Checks that `model` names a checkpoint of this package. Returns the argument of `from_pretrained`."""
    name = folder_or_repository(model)
    model_type = IGCaptionerConfig.get_config_dict(name)[0].get("model_type")
    if model_type != IGCaptionerConfig.model_type:
        raise ValueError(f"{name!r} holds a model of type {model_type!r}, not {IGCaptionerConfig.model_type!r}")
    return name


def dtype_on(device: torch.device, wanted: str = "auto") -> str:
    """Returns what is wanted; for "auto" float32 on a CPU, where half precision is slow as a rule, else "auto"."""
    return "float32" if wanted == "auto" and device.type == "cpu" else wanted


def _suggestion(name: str) -> str:
    """The folder that was probably meant, or what the name of a repository looks like."""
    path = Path(name)
    try:
        siblings = [other.name for other in path.parent.iterdir() if other.is_dir()]
    except OSError:
        siblings = []
    if close := get_close_matches(path.name, siblings, n=1):
        return f"; did you mean {str(path.with_name(close[0]))!r}?"
    return "" if "/" in name or not name else ", and a repository of the Hub is named owner/name"


def choose_device(name: str) -> torch.device:
    """Returns the torch device of "auto", "cpu" or "cuda". Raises ValueError where there is no such device."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ValueError("device cuda: no GPU is available to torch")
    if name == "auto":
        name = "cuda" if has_gpu else "cpu"
    return torch.device(name)


def caption_tokens(wanted: int | None, text_config) -> int:
    """Returns the greatest number of tokens of a caption; `MAX_CAPTION_TOKENS` if none is wanted.

    One position is left for end-of-sequence, which is scored too.

    Raises:
        ValueError: if the model has no positions for `wanted` tokens.
    """
    limit = text_config.max_position_embeddings - 1
    if wanted is not None and wanted > limit:
        raise ValueError(f"a caption of {wanted} tokens: this model's captions have {limit} tokens at most")
    return min(MAX_CAPTION_TOKENS, limit) if wanted is None else wanted
