"""A converted model against outputs of the code it comes from, stored as an `.npz` of arrays.

Names as in the reference sets described in CONVERSION.md: `images` [B, height, width, 3] in [-1, 1] (or `images_u8`),
`labels` [B, L] in scored form, and what upstream makes of them (`encoded`, `logits_causal`, `class_scores`, ...).

Where there is an `attention_mask` [B, L] of the decoder's inputs, padding is masked (clip-jax), and the positions of
padding, which nobody reads, are not compared. `class_input_ids` and `class_attention_mask` are classes that begin with
the start token.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ig_captioner import IGCaptionerForConditionalGeneration
from ig_captioner.information_gain import IGNORE_INDEX, shift_right

from .reading import ConversionError, NpzStore


class _Run:
    """A model's own version of each reference output."""

    def __init__(self, model: IGCaptionerForConditionalGeneration, inputs: dict[str, Tensor]):
        self.model = model
        self.inputs = inputs
        pixels = inputs["images"] if "images" in inputs else inputs["images_u8"].float() / 255 * 2 - 1
        self.pixel_values = pixels.permute(0, 3, 1, 2).contiguous()
        self.start = model.config.decoder_start_token_id
        self.mask = inputs.get("attention_mask")

    def encoded(self) -> Tensor:
        return self.model.model.vision_model(pixel_values=self.pixel_values).last_hidden_state

    def pre_logits(self) -> Tensor:
        return self.model.model.vision_model(pixel_values=self.pixel_values).pooler_output

    def causal(self, labels: str) -> Tensor:
        decoder_input = shift_right(self.inputs[labels].long(), self.start)
        arguments = {"pixel_values": self.pixel_values, "attention_mask": self.mask, "use_cache": False}
        return self.model(input_ids=decoder_input, **arguments).logits

    def parallel(self, labels: str) -> Tensor:
        tokens = self.inputs[labels].long()  # all replaced by the mask token
        outputs = self.model(
            input_ids=tokens, pixel_values=self.pixel_values, parallel_prediction=True, use_cache=False
        )
        return outputs.logits

    def token_log_likelihoods(self, logits: Tensor, labels: str) -> Tensor:
        tokens = self.inputs[labels].long()[..., None]
        return logits.float().log_softmax(dim=-1).gather(-1, tokens)[..., 0]

    def sequence_log_likelihoods(self, labels: str) -> Tensor:
        scored = self.inputs.get("label_mask", self.inputs[labels] != self.model.config.pad_token_id)
        return (self.token_log_likelihoods(self.causal(labels), labels) * scored).sum(dim=-1)

    def loss(self, labels: str) -> Tensor:
        tokens = self.inputs[labels].long()
        tokens = tokens.masked_fill(tokens == self.model.config.pad_token_id, IGNORE_INDEX)
        return self.model(pixel_values=self.pixel_values, labels=tokens).captioning_loss

    def class_scores(self) -> Tensor:
        classes = self.inputs.get("class_labels")
        mask = None
        if classes is None:
            classes = self.inputs["class_input_ids"][:, 1:]
            mask = self.inputs["class_attention_mask"][:, 1:]
        return self.model.score(self.pixel_values, classes.long(), mask, prior_weight=0.0).caption_log_likelihood


# reference output: the inputs it needs beside the images, and how to compute it
OUTPUTS: dict[str, tuple[tuple[str, ...], Callable[[_Run], Tensor]]] = {
    "encoded": ((), _Run.encoded),
    "pre_logits": ((), _Run.pre_logits),
    "logits_causal": (("labels",), lambda run: run.causal("labels")),
    "logits_causal_short": (("labels_short",), lambda run: run.causal("labels_short")),
    "token_loglik_causal": (("labels",), lambda run: run.token_log_likelihoods(run.causal("labels"), "labels")),
    "seq_loglik_causal": (("labels",), lambda run: run.sequence_log_likelihoods("labels")),
    "loss_causal": (("labels",), lambda run: run.loss("labels")),
    "greedy_logits": (("greedy_tokens_no_stop",), lambda run: run.causal("greedy_tokens_no_stop")),
    "logits_parallel": (("labels",), lambda run: run.parallel("labels")),
    "logits_parallel_short": (("labels_short",), lambda run: run.parallel("labels_short")),
    "class_scores": (("class_labels",), _Run.class_scores),
}


def read_reference(path: str | Path) -> dict[str, np.ndarray]:
    """Raises ConversionError if the file is no `.npz`, or has nothing to compare."""
    if not Path(path).is_file():
        raise ConversionError(f"no such reference: {path}")
    store = NpzStore(Path(path))
    reference = {name: store.read(name) for name in store.leaves}
    if not reference.keys() & {"images", "images_u8"}:
        raise ConversionError(f"{path} has neither images nor images_u8")
    if not any(_comparable(name, reference) for name in OUTPUTS):
        raise ConversionError(f"{path} has none of {', '.join(OUTPUTS)} together with its labels")
    return reference


def _comparable(name: str, reference: dict) -> bool:
    needed = OUTPUTS[name][0]
    if name == "class_scores" and "class_input_ids" in reference:
        needed = ("class_input_ids", "class_attention_mask")
    return name in reference and all(name in reference for name in needed)


@torch.no_grad()
def measure(model: IGCaptionerForConditionalGeneration, reference: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest absolute difference for each output of the reference that can be compared; nan counts as infinite.

    Raises:
        ConversionError: for an output of another shape.
    """
    inputs = {name: torch.from_numpy(array) for name, array in reference.items() if array.dtype.kind in "fiu"}
    run = _Run(model, inputs)
    differences = {}
    for name, (_, compute) in OUTPUTS.items():
        if not _comparable(name, reference):
            continue
        if "parallel" in name and model.config.mask_token_id is None:
            raise ConversionError(f"the reference has {name}, but the checkpoint has no mask token")
        ours = compute(run).float().numpy()
        theirs = reference[name].astype(np.float32)
        if ours.shape != theirs.shape:
            raise ConversionError(f"{name} is {theirs.shape} in the reference, but {ours.shape} here")
        if run.mask is not None and name in ("logits_causal", "token_loglik_causal"):
            ours = ours[run.mask.bool().numpy()]
            theirs = theirs[run.mask.bool().numpy()]
        differences[name] = float(np.nan_to_num(np.abs(ours - theirs), nan=np.inf).max(initial=0.0))
    return differences


def check(differences: dict[str, float], atol: float) -> None:
    """Raises ConversionError naming every output that is further off than `atol`."""
    wrong = [f"{name}: {value:.2e}" for name, value in differences.items() if not value <= atol]
    if wrong:
        raise ConversionError(
            f"the converted model differs from the reference by more than {atol:g}: {', '.join(wrong)}"
        )
