"""A captioner outside transformers: `torch.export` programs, and ONNX graphs that need neither torch nor this package.

    python -m ig_captioner.export MODEL FOLDER

`score` becomes four programs, which share nothing but tensors:

    image_encoder   pixel_values -> image_key_values, all that the decoder reads of an image
    text_scorer     image_key_values, input_ids, attention_mask -> log P(T|I)
    text_prior      input_ids, attention_mask -> log P(T)
    label_scorer    image_key_values and the trie of compiled labels -> log P(T|I), shared beginnings read once

The numbers of images and texts, the length of texts and everything about a trie are dynamic; the image size is not.
Texts are what the tokenizer returns, padded on the right, no longer than the model has positions for; nothing checks
that. Nothing is split into chunks either: a call holds [B, C, L, V] logits, or [B, N, V] of a trie, at once. The trie's
tensors are under their input names in the `labels.safetensors` that `CompiledLabels.save` writes, log P(T) beside
them. Scores are those of `score` to 1e-3 nats (measured: about 1e-5), the information gain is
log P(T|I) - prior_weight * log P(T).

Smaller weights are a matter of loading, not of this file. `benchmarks/export.py` measures what they cost: on a CPU
bfloat16 saves time too, while int8 weights save only space.

    from_pretrained(..., dtype=torch.bfloat16)
    from_pretrained(..., quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))    # torchao.quantization

Legend: B images, C texts, L text tokens, G blocks of Q positions, N nodes and E edges of a trie, F fusion layers,
H heads, P image tokens, D decoder width, V vocabulary. Log-likelihoods are in nats.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from . import input_rules
from .compiled_labels import max_positions_of
from .configuration_ig_captioner import as_height_width
from .decoder_ig_captioner import TextStates
from .exported import SETTINGS_FILE, TOKENIZER_FILE
from .information_gain import shift_right
from .input_rules import default_templates
from .label_trie import TextTrie, build_trie
from .scoring_ig_captioner import IGCaptionerScorer


WEIGHTS_FILE, RULES_FILE = "weights.bin", "input_rules.py"
TRIE_FIELDS = tuple(field.name for field in dataclasses.fields(TextTrie))
OUTPUTS = {
    "image_encoder": "image_key_values",
    "text_scorer": "caption_log_likelihood",
    "text_prior": "prior_log_likelihood",
    "label_scorer": "caption_log_likelihood",
}
# The fused attention of some encoders of transformers (Swin) becomes no ONNX graph.
SPELLED_OUT = {"vision_config": "eager", "text_config": "sdpa"}
MIN_SHARED_BYTES = 1024  # smaller tensors stay in their graphs, where they may be shapes


# What is exported


class ImageEncoder(nn.Module):
    """Images [B, channels, height, width] to the keys and values of every fusion layer [B, F, 2, H, P, head]."""

    def __init__(self, model: IGCaptionerScorer):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: Tensor) -> Tensor:
        key_values, _ = self.model.encode_image(pixel_values)
        return torch.stack([torch.stack(pair, dim=1) for pair in key_values], dim=1)


class _Decoder(nn.Module):
    def __init__(self, model: IGCaptionerScorer):
        super().__init__()
        self.decoder = model.model.decoder
        self.lm_head = model.lm_head
        self.start_token_id = model.config.decoder_start_token_id

    def read_texts(self, input_ids: Tensor) -> TextStates:
        """Texts [C, L] as a trie without branches: padding, being last, is seen by no token of its text."""
        tokens = shift_right(input_ids, self.start_token_id)
        depths = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return self.decoder.read_trie(tokens, depths, torch.full_like(input_ids, input_ids.shape[1]))

    def fuse(self, text: TextStates, image_key_values: Tensor) -> Tensor:
        """The states of G texts or blocks under every image, [B * G, Q, D]."""
        key_values = [(layer[:, 0], layer[:, 1]) for layer in image_key_values.unbind(1)]
        return self.decoder.fuse(text.repeat(image_key_values.shape[0]), key_values)

    def log_likelihoods(self, states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """log P [B, C] of texts [C, L] from states [B * C, L, D]."""
        # not `token_log_likelihoods`: the ONNX exporter takes its cross-entropy for one that is reduced to a scalar
        images = states.shape[0] // input_ids.shape[0]
        log_p = self.lm_head(states).float().log_softmax(dim=-1)
        of_tokens = log_p.gather(-1, input_ids.repeat(images, 1)[..., None])[..., 0]
        sums = of_tokens.masked_fill(attention_mask.repeat(images, 1) == 0, 0.0).sum(dim=-1)
        return sums.view(images, -1)


class TextScorer(_Decoder):
    """log P(T|I) [B, C] of texts [C, L] under images."""

    def forward(self, image_key_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.fuse(self.read_texts(input_ids), image_key_values)
        return self.log_likelihoods(states, input_ids, attention_mask)


class TextPrior(_Decoder):
    """log P(T) [C] of texts [C, L], from the prior source of the configuration; reference images become weights."""

    image_key_values: Tensor | None

    def __init__(self, model: IGCaptionerScorer):
        super().__init__(model)
        references = model._references(None, None, model.device)
        read = None if references is None else ImageEncoder(model)(references)
        self.register_buffer("image_key_values", read)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        text = self.read_texts(input_ids)
        if self.image_key_values is None:
            return self.log_likelihoods(self.decoder.fuse(text), input_ids, attention_mask)[0]
        scores = self.log_likelihoods(self.fuse(text, self.image_key_values), input_ids, attention_mask)
        return scores.logsumexp(dim=0) - math.log(len(self.image_key_values))


class LabelScorer(_Decoder):
    """log P(T|I) [B, C] of the texts of a trie (see `TextTrie`) under images."""

    def forward(
        self,
        image_key_values: Tensor,
        tokens: Tensor,
        depths: Tensor,
        ends: Tensor,
        nodes: Tensor,
        edge_nodes: Tensor,
        edge_tokens: Tensor,
        text_edges: Tensor,
    ) -> Tensor:
        states = self.fuse(self.decoder.read_trie(tokens, depths, ends), image_key_values)
        at_nodes = states.view(image_key_values.shape[0], -1, states.shape[-1])[:, nodes]
        log_p = self.lm_head(at_nodes).float().log_softmax(dim=-1)[:, edge_nodes, edge_tokens]
        return F.pad(log_p, (0, 1))[:, text_edges].sum(dim=-1)


# torch.export


@torch.no_grad()
def export_programs(
    model: IGCaptionerScorer, image_size: int | tuple[int, int] | None = None
) -> dict[str, ExportedProgram]:
    """The four programs by name; `torch.export.save` writes one, `program.module()` takes its inputs by name.

    Args:
        model: in evaluation mode.
        image_size: pixels, one number or `(height, width)`; the configuration's if not given.

    Raises:
        ValueError: in training mode, and for an image size that the patch size does not divide.
    """
    if model.training:
        raise ValueError("programs are exported in evaluation mode, but the model is in training mode: call eval()")
    config = model.config
    device = model.device
    height, width = as_height_width(config.image_size if image_size is None else image_size, "image_size")
    pixel_values = torch.zeros(2, config.image_channels, height, width, dtype=model.dtype, device=device)
    encoder = ImageEncoder(model).eval()
    key_values = encoder(pixel_values)
    # no size of an example may be 0 or 1: such sizes would be taken for constants
    texts = torch.arange(24, device=device).view(8, 3) % model.config.text_config.vocab_size
    mask = torch.ones_like(texts)
    trie = build_trie(texts, mask, model.config.decoder_start_token_id, block_size=1).to(device)
    images, number, length, blocks, positions, nodes, edges = (
        Dim(name) for name in ("images", "texts", "length", "blocks", "positions", "nodes", "edges")
    )
    of_texts = {0: number, 1: length}
    of_blocks = {0: blocks, 1: positions}
    of_edges = {0: edges}
    of_trie = [of_blocks, of_blocks, of_blocks, {0: nodes}, of_edges, of_edges, of_texts]
    read = {"image_key_values": (key_values, {0: images})}
    text = {"input_ids": (texts, of_texts), "attention_mask": (mask, of_texts)}
    compiled = {name: (getattr(trie, name), dims) for name, dims in zip(TRIE_FIELDS, of_trie, strict=True)}
    return {
        "image_encoder": _program(encoder, {"pixel_values": (pixel_values, {0: images})}),
        "text_scorer": _program(TextScorer(model), read | text),
        "text_prior": _program(TextPrior(model), text),
        "label_scorer": _program(LabelScorer(model), read | compiled),
    }


def _program(module: nn.Module, inputs: dict[str, tuple[Tensor, dict[int, Any]]]) -> ExportedProgram:
    """Args: `inputs`: an example of each, and which of its dimensions are dynamic."""
    examples = {name: example for name, (example, _) in inputs.items()}
    shapes = {name: dims for name, (_, dims) in inputs.items()}
    return torch.export.export(module.eval(), (), examples, dynamic_shapes=shapes)


# ONNX


def export_onnx(model: IGCaptionerScorer, processor: Any, folder: str | Path) -> None:
    """Writes `image_encoder.onnx`, `text_scorer.onnx`, `text_prior.onnx` and `label_scorer.onnx`, and what feeds them.

    Weights are in `weights.bin`, once for all four. `settings.json` has the image processor's settings and, of the
    configuration, `prior_weight`, `score_temperature`, `abstain_threshold` and `prompt_templates`; `tokenizer.json` is
    for `tokenizers.Tokenizer.from_file`, with padding and truncation set. `input_rules.py` is a copy of the module that
    reads image files and cleans texts, for Pillow and numpy.

    Args:
        model: in evaluation mode and float32, loaded with `attn_implementation=SPELLED_OUT`.
        processor: an [`IGCaptionerProcessor`]; its image size is that of the encoder.

    Raises:
        ValueError: for a model in training mode or of another dtype.
        ImportError: without `onnxscript` (`pip install ig_captioner[export]`).
    """
    if model.dtype != torch.float32:
        raise ValueError(f"ONNX graphs are written in float32, but the model is {model.dtype}: load it without a dtype")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = processor.image_processor.size
    programs = export_programs(model, (size["height"], size["width"]))
    _save_graphs({name: _graph(program, OUTPUTS[name]) for name, program in programs.items()}, folder)
    _tokenizer(model, processor.tokenizer).save(str(folder / TOKENIZER_FILE))
    image_processor = {k: v for k, v in processor.image_processor.to_dict().items() if k != "auto_map"}
    settings = {
        "prior_weight": model.config.prior_weight,
        "score_temperature": model.config.score_temperature,
        "abstain_threshold": model.config.abstain_threshold,
        "prompt_templates": default_templates(model.config),
        "image_processor": image_processor,
    }
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(input_rules.__file__, folder / RULES_FILE)


def _graph(program: ExportedProgram, output: str) -> Any:
    """An `onnx_ir.Model`."""
    # about torchvision, which no graph uses, and about torch's own use of torch
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance\\(treespec", FutureWarning)
        exported = torch.onnx.export(program, output_names=[output], verbose=False)
    if exported is None:
        raise RuntimeError(f"torch.onnx.export made no graph of {output!r}")
    return exported.model


def _save_graphs(graphs: dict[str, Any], folder: Path) -> None:
    """Writes ONNX files whose equal weights are one and the same range of `weights.bin`."""
    import onnx_ir

    offsets: dict[bytes, int] = {}
    with (folder / WEIGHTS_FILE).open("wb") as file:
        for graph in graphs.values():
            for value in graph.graph.initializers.values():
                tensor = value.const_value
                data = tensor.tobytes()
                if len(data) < MIN_SHARED_BYTES:
                    continue
                digest = hashlib.sha256(data).digest()
                if digest not in offsets:
                    file.write(bytes(-file.tell() % 64))
                    offsets[digest] = file.tell()
                    file.write(data)
                value.const_value = onnx_ir.ExternalTensor(
                    WEIGHTS_FILE,
                    offsets[digest],
                    len(data),
                    tensor.dtype,
                    shape=tensor.shape,
                    name=tensor.name,
                    base_dir=folder,
                )
    for name, graph in graphs.items():
        onnx_ir.save(graph, folder / f"{name}.onnx")


def _tokenizer(model: IGCaptionerScorer, tokenizer: Any) -> Tokenizer:
    """A copy that pads and truncates by the text rules."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.enable_truncation(min(tokenizer.model_max_length, max_positions_of(model) or tokenizer.model_max_length))
    copy.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return copy


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ig_captioner.export", description="Writes a captioner as ONNX.")
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("folder", type=Path, help="where the files go")
    options = parser.parse_args(arguments)
    from .checkpoint import load_model, load_processor
    from .modeling_ig_captioner import IGCaptionerForZeroShotImageClassification

    try:
        model = load_model(
            IGCaptionerForZeroShotImageClassification,
            options.model,
            dtype=torch.float32,
            attn_implementation=SPELLED_OUT,
        )
        export_onnx(model, load_processor(options.model), options.folder)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
    for path in sorted(options.folder.iterdir()):
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
