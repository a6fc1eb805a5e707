"""Texts and labels compiled for a model: all of scoring that needs no image, done once and kept.

`CompiledTexts` holds a trie (`label_trie.py`) and what a model makes of it without an image. `CompiledLabels` adds
which labels and templates the texts are: an object to build once, save, and pass wherever labels are accepted.

Legend: C texts, L tokens of a text, G blocks of Q positions, D decoder width. Log-likelihoods are in nats.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import safetensors
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_ig_captioner import IGCaptionerTextConfig, IGCaptionerVisionConfig
from .input_rules import default_templates, format_labels
from .label_trie import TextTrie
from .processing_ig_captioner import encode_texts


JSON_FILE = "labels.json"
TENSOR_FILE = "labels.safetensors"
FORMAT = 3  # of a folder of compiled labels; others are refused, as compiling again is cheap
READING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError)
WORDS_PER_SUM = 64  # of 8 bytes, in `checksum`: less than a row of most weights, so that rows that change places show
# Fields that say nothing of the architecture; some are set when a configuration is loaded or saved.
NOT_ARCHITECTURE = ("_name_or_path", "architectures", "dtype", "transformers_version")


@dataclass(frozen=True, repr=False)
class CompiledTexts:
    """A trie, and what a model makes of it without an image.

    Args:
        prior_log_likelihood: log P(T), [C], float32.
        text_states: what the text-only layers make of the blocks, [G, Q, D]; None if there are no such layers.
        projections: queries, keys and values of the first layer that sees images, [3, G, heads, Q, head]; None where
            they are too many to be kept. Not used under gradients.
        fingerprint: of the model, see `fingerprint_of`; "" if nobody is to compare it.
    """

    trie: TextTrie
    prior_log_likelihood: Tensor
    text_states: Tensor | None = None
    projections: Tensor | None = None
    fingerprint: str = ""

    def verified_for(self, model: Any) -> "CompiledTexts":
        """These texts without a fingerprint, for calls of `score` between which `model` does not change.

        Raises:
            ValueError: they were compiled with other weights.
        """
        if self.fingerprint and self.fingerprint != (found := model.fingerprint()):
            raise ValueError(
                "these texts were compiled with other weights, another dtype, or other hooks or adapters: compile them "
                f"again (fingerprint {self.fingerprint[:12]}..., the model's is {found[:12]}...)"
            )
        return dataclasses.replace(self, fingerprint="")

    def to(self, device: torch.device | str) -> "CompiledTexts":
        """These texts on a device."""
        if self.prior_log_likelihood.device == torch.device(device):
            return self
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return CompiledTexts(self.trie.to(device), **moved, fingerprint=self.fingerprint)

    def tensors(self) -> dict[str, Tensor]:
        """What there is beside the trie, by the names of the fields."""
        named = {name: getattr(self, name) for name in ("prior_log_likelihood", "text_states", "projections")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True, repr=False)
class CompiledLabels:
    """Labels in templates, compiled for one model and one tokenizer; `compile_labels` makes one.

    The texts are all labels in the first template, then in the second, and so on, in one trie.
    """

    labels: tuple[str, ...]
    templates: tuple[str, ...]
    texts: CompiledTexts
    tokens_sha256: str

    def __len__(self) -> int:
        """Number of texts, C."""
        return len(self.texts.trie.text_edges)

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self.labels[:3])) + ", ..." * (len(self.labels) > 3)
        return f"CompiledLabels({len(self.labels)} labels ({names}) in {len(self.templates)} templates)"

    def to(self, device: torch.device | str) -> "CompiledLabels":
        """These labels on a device; elsewhere `score` copies them in every call."""
        return dataclasses.replace(self, texts=self.texts.to(device))

    def save(self, directory: str | Path) -> None:
        """Writes `labels.json` and `labels.safetensors` into a folder, which is made if it is missing."""
        if not self.texts.fingerprint:
            raise ValueError(f"these {len(self.labels)} labels have no fingerprint of their model to be saved with")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {item.name: getattr(self.texts.trie, item.name) for item in dataclasses.fields(TextTrie)}
        tensors |= self.texts.tensors()
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, directory / TENSOR_FILE)
        described = {"format": FORMAT, "labels": self.labels, "templates": self.templates}
        described |= {"fingerprint": self.texts.fingerprint, "tokens_sha256": self.tokens_sha256}
        described["sha256"] = _digest_of_content(described, (directory / TENSOR_FILE).read_bytes())
        text = json.dumps(described, indent=2, ensure_ascii=False)
        (directory / JSON_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> "CompiledLabels":
        """Reads what `save` wrote. Whether it fits a model and a tokenizer is checked where it is used.

        Raises:
            ValueError: naming the folder, if the files are missing, damaged or of another format.
        """
        directory = Path(directory)
        try:
            described = json.loads((directory / JSON_FILE).read_text(encoding="utf-8"))
            if described.get("format") != FORMAT:
                raise ValueError(f"format {described.get('format')!r}, this version reads {FORMAT}: compile them again")
            content = (directory / TENSOR_FILE).read_bytes()
            expected = described.pop("sha256")
            if _digest_of_content(described, content) != expected:
                raise ValueError(f"{JSON_FILE} or {TENSOR_FILE} is damaged, or not from the same compilation")
            tensors = load(content)
            trie = TextTrie(**{item.name: tensors.pop(item.name) for item in dataclasses.fields(TextTrie)})
            texts = CompiledTexts(trie, **tensors, fingerprint=described["fingerprint"])
            labels = tuple(described["labels"])
            templates = tuple(described["templates"])
            if len(trie.text_edges) != len(labels) * len(templates):
                raise ValueError(f"{len(trie.text_edges)} texts for {len(labels)} labels in {len(templates)} templates")
            if texts.prior_log_likelihood.shape != trie.text_edges.shape[:1]:
                raise ValueError(f"{len(trie.text_edges)} texts, but priors {tuple(texts.prior_log_likelihood.shape)}")
            if texts.text_states is not None and texts.text_states.shape[:2] != trie.tokens.shape:
                raise ValueError(f"states {tuple(texts.text_states.shape)} of blocks {tuple(trie.tokens.shape)}")
            if texts.projections is not None:
                three, blocks, _, size, _ = texts.projections.shape
                if (three, blocks, size) != (3, *trie.tokens.shape):
                    shapes = tuple(texts.projections.shape), tuple(trie.tokens.shape)
                    raise ValueError(f"projections {shapes[0]} of blocks {shapes[1]}")
            return cls(labels, templates, texts, described["tokens_sha256"])
        except READING_ERRORS as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"cannot read compiled labels from {str(directory)!r}: {reason}") from error

    def check_tokenizer(self, model: Any, tokenizer: PreTrainedTokenizerBase, **kwargs) -> None:
        """Raises ValueError if a tokenizer makes other tokens of the texts than these were compiled from."""
        texts = format_labels(self.labels, self.templates)
        encoded = encode_texts(tokenizer, texts, max_positions_of(model), **kwargs)
        if digest_of_tokens(**encoded) != self.tokens_sha256:
            raise ValueError(
                f"these {len(self.labels)} labels ({self.labels[0]!r}, ...) were compiled with another tokenizer, or "
                "other settings of it: compile them again"
            )


def compile_labels(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    templates: str | Sequence[str] | None = None,
    **options: Any,
) -> CompiledLabels:
    """Does all of the scoring of labels that needs no image.

    Args:
        model: has `compile_texts`; in evaluation mode.
        templates: one or more, with `{}` where the label goes; by default `prompt_templates` of the model's
            configuration, or "a photo of a {}." where it has none.
        options: `prior_source`, `reference_pixel_values`, `chunk_size` and `with_fingerprint`, see `score` and
            `compile_texts` of the model.

    Raises:
        ValueError: naming the value, for labels or templates that are none.
    """
    if templates is None:
        templates = default_templates(model.config)
    listed = (templates,) if isinstance(templates, str) else tuple(templates)
    encoded = encode_for(model, tokenizer, format_labels(labels, listed))
    return CompiledLabels(tuple(labels), listed, model.compile_texts(**encoded, **options), digest_of_tokens(**encoded))


def is_compiled(labels: Any) -> TypeGuard[CompiledLabels]:
    """Tells whether these are `CompiledLabels`, by their fields: remote code has a class of its own for them."""
    return hasattr(labels, "tokens_sha256")


def refuse_prior(**given: Any) -> None:
    """Refuses arguments that say where log P(T) comes from, beside compiled texts, which have it.

    Raises:
        ValueError: naming the first of `given` that is not None.
    """
    for name, value in given.items():
        if value is not None:
            named = f"{name} {value!r}" if isinstance(value, str) else name
            raise ValueError(f"compiled texts have their prior already, but {named} came with them")


def max_positions_of(model: Any) -> int | None:
    """The greatest number of tokens of a text; None if the model sets no limit."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def encode_for(model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str], **kwargs) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [C, L] on the model's device, no longer than it has positions for.

    `kwargs` go to the tokenizer.
    """
    encoded = encode_texts(tokenizer, texts, max_positions_of(model), **kwargs)
    return {name: values.to(model.device) for name, values in encoded.items()}


def _digest_of_content(described: dict[str, Any], tensors: bytes) -> str:
    """SHA-256 of all that a folder of compiled labels says: its JSON, however that is written, and its tensors."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    digest.update(tensors)
    return digest.hexdigest()


def digest_of_tokens(input_ids: Tensor, attention_mask: Tensor) -> str:
    """SHA-256 of the tokens of each text, [N, L], padding left out."""
    mask = attention_mask.cpu().bool()
    digest = hashlib.sha256(mask.sum(dim=-1).numpy().tobytes())
    digest.update(input_ids.cpu().long()[mask].numpy().tobytes())
    return digest.hexdigest()


# Fingerprints


def fingerprint_of(model: Any) -> str:
    """SHA-256 of all that scores depend on: weights and `_circumstances`.

    Of each weight a checksum is hashed: one pass over the weights, at the speed of memory (of the disk, for weights
    that accelerate has offloaded there).
    """
    digest = hashlib.sha256(repr(_circumstances(model)).encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.is_meta:
            value = offloaded_weight(model, name)
        for part in _parts_of(value):
            digest.update(name.encode())
            digest.update(part)
    return digest.hexdigest()


def _parts_of(value: Any) -> Iterator[Any]:
    """Yields form and checksum of an entry of a state dict; packed weights are entries of several tensors."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _parts_of(part)
    elif isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield from checksum(value.detach().dequantize() if value.is_quantized else value.detach())
    else:
        yield repr(value).encode()


def offloaded_weight(model: nn.Module, name: str) -> Tensor:
    """The weight behind a meta tensor of a model that accelerate has offloaded.

    Raises:
        ValueError: nobody knows where it is.
    """
    path, _, own_name = name.rpartition(".")
    hook = getattr(model.get_submodule(path), "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        weights = getattr(part, "weights_map", None)
        if weights is not None:
            return weights[own_name]
    raise ValueError(f"the weight {name} is a meta tensor without content: load the model before it scores texts")


def checksum(tensor: Tensor) -> Iterator[Any]:
    """Sums of a tensor's bytes, taken as integers of 8 bytes, `WORDS_PER_SUM` at a time; the rest as it is.

    Of a quantised tensor (torchao): those of its parts, and how they are to be read.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        names, settings = tensor.__tensor_flatten__()
        yield repr(settings).encode()
        for name in names:
            yield from checksum(getattr(tensor, name))
        return
    content = tensor.contiguous().flatten().view(torch.uint8)
    if content.storage_offset() % 8:  # a view of 8 bytes has to begin at a multiple of them
        content = content.clone()
    end = len(content) - len(content) % (8 * WORDS_PER_SUM)
    yield content[:end].view(torch.int64).view(-1, WORDS_PER_SUM).sum(dim=1).cpu().numpy()
    yield content[end:].cpu().numpy()


def _circumstances(model: Any) -> tuple:
    """Lists all that scores depend on beside weights: the architecture, autocast, hooks and the state of adapters."""
    config = model.config
    image_tokens = (config.image_token_grids, config.image_token_norm, config.image_position_embedding)
    architecture = [architecture_of(config.vision_config), architecture_of(config.text_config), image_tokens]
    autocast = [str(torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    intercepted = [
        (name, *module._forward_hooks, *module._forward_pre_hooks, *_adapter_state(module))
        for name, module in model.named_modules()
        if is_intercepted(module)
    ]
    return architecture, config.decoder_start_token_id, autocast, intercepted


def _adapter_state(module: nn.Module) -> list[str]:
    """The switches of a layer of peft, which change what it computes and none of its weights."""
    return [str(getattr(module, switch, None)) for switch in ("disable_adapters", "active_adapters", "merged")]


def architecture_of(config: PreTrainedConfig) -> str:
    """The architecture that a configuration describes, as one text.

    It is equal before and after saving, and in other versions of transformers: of our own configurations it has only
    the fields that the class declares, of others only those that differ from their defaults.
    """
    own = {IGCaptionerVisionConfig.model_type: IGCaptionerVisionConfig}
    own[IGCaptionerTextConfig.model_type] = IGCaptionerTextConfig
    if config.model_type in own:
        fields = {name: getattr(config, name) for name in own[config.model_type].__annotations__}
    else:
        fields = {name: value for name, value in config.to_diff_dict().items() if name not in NOT_ARCHITECTURE}
    return json.dumps(fields, sort_keys=True, default=str)


def is_intercepted(module: nn.Module) -> bool:
    """Tells whether hooks, adapters (peft) or offloading (accelerate) may change how a module uses its weights."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # transformers' own, which record hidden states, change nothing
    foreign = [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("transformers.")]
    has_adapter = hasattr(module, "disable_adapters") and not isinstance(module, PreTrainedModel)
    is_offloaded = hasattr(module, "_hf_hook")
    is_patched = "forward" in vars(module)  # on this module, not on its class
    return bool(foreign) or has_adapter or is_offloaded or is_patched
