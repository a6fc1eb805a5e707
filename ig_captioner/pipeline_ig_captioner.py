"""Zero-shot image classification by information gain, with the interface of transformers' own pipeline.

Shapes: B images, C candidate labels, T templates, N = T x C texts, L text tokens.

Deliberate differences from the stock pipeline: the texts are tokenised and compiled once per call (not once per
image); `tokenizer_kwargs` reach the tokenizer; every argument is checked, and a wrong one is a ValueError that names
it; transparent images are put on white; tuples of images and empty lists are accepted (a list in, a list out); a model
in training mode is put into evaluation mode for the call. Where the package is installed, a captioner of the Hub, which
has no method `score`, gets its scores from a `CaptionScorer`.
"""

import math
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForZeroShotImageClassification, ZeroShotImageClassificationPipeline
from transformers.utils import logging

from .compiled_labels import encode_for, is_compiled, refuse_prior
from .configuration_ig_captioner import PRIOR_SOURCES
from .information_gain import REFERENCE_MEANS, label_log_prior, mean_over_templates
from .input_rules import default_templates, format_labels, split_list, tell
from .processing_ig_captioner import gives_scored_form, load_rgb_image


logger = logging.get_logger(__name__)

PARAMETERS = (
    "candidate_labels",
    "hypothesis_template",
    "timeout",
    "tokenizer_kwargs",
    "prior_weight",
    "prior_source",
    "reference_images",
    "reference_mean",
    "label_prior",
    "temperature",
    "abstain_threshold",
    "multi_label",
    "top_k",
    "return_log_likelihoods",
)


def _check_parameters(parameters: dict[str, Any]) -> None:
    """Raises ValueError naming an unknown or wrong argument; `format_labels` checks labels and templates."""

    def is_number(value, kind=Real):
        try:
            return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
        except OverflowError:  # an integer beyond all floats
            return False

    unknown = sorted(set(parameters) - set(PARAMETERS))
    if unknown:
        raise ValueError(f"unknown arguments {unknown} with values {[parameters[name] for name in unknown]}")
    rules = {
        "timeout": ("a positive number of seconds", lambda value: is_number(value) and value > 0),
        "tokenizer_kwargs": ("a dict", lambda value: isinstance(value, dict)),
        "prior_weight": ("a finite number, zero or more", lambda value: is_number(value) and value >= 0),
        "prior_source": (
            "'unconditional' or 'reference_images'",
            lambda value: isinstance(value, str) and value in PRIOR_SOURCES,
        ),
        "reference_mean": (
            "'arithmetic' or 'geometric'",
            lambda value: isinstance(value, str) and value in REFERENCE_MEANS,
        ),
        "reference_images": ("a list of images", lambda value: isinstance(value, (list, tuple)) and len(value) > 0),
        "temperature": ("a finite number above zero", lambda value: is_number(value) and float(value) > 0),
        "abstain_threshold": (
            "a finite number of nats, or -inf for never",
            lambda value: is_number(value) or (isinstance(value, Real) and value == -math.inf),
        ),
        "top_k": ("a positive integer", lambda value: is_number(value, Integral) and value > 0),
    }
    for name, (meaning, is_valid) in rules.items():
        value = parameters.get(name)
        if value is not None and not is_valid(value):
            raise ValueError(f"{name} must be {meaning}, or None, got {value!r}")
    for name in ("multi_label", "return_log_likelihoods"):
        if not isinstance(parameters.get(name, False), bool):
            raise ValueError(f"{name} must be a bool, got {parameters[name]!r}")


def _texts_of(settings: dict[str, Any], config: Any) -> tuple[list[str], list[str], list[str]]:
    """Labels, templates, and all labels in the first template, then in the second, and so on; checked."""
    labels: Any = settings["candidate_labels"]
    asked = settings.get("hypothesis_template")
    templates = default_templates(config) if asked is None else asked
    if isinstance(templates, str):
        templates = [templates]
    if is_compiled(labels):
        if asked is not None and list(templates) != list(labels.templates):
            raise ValueError(f"hypothesis_template {asked!r}, but the labels were compiled with {labels.templates!r}")
        labels, templates = list(labels.labels), list(labels.templates)
    texts = format_labels(labels, templates, "hypothesis_template")
    if len(labels) == 1 and split_list(labels) != labels:
        tell("one label with separators in it is one label: to rank several, pass a list of them", labels)
    return list(labels), list(templates), texts


@dataclass(frozen=True)
class _Candidates:
    """Candidate labels of a call.

    Args:
        num_templates: T, over which the pipeline averages; 1 with a scorer, which does that itself.
        texts: `CompiledTexts` of all labels in each template; with a scorer `CompiledLabels`.
        label_prior: log-probabilities of the labels, [C].
    """

    labels: list[str]
    num_templates: int
    texts: Any
    label_prior: torch.Tensor | None = None


class IGZeroShotImageClassificationPipeline(ZeroShotImageClassificationPipeline):
    r"""Ranks candidate labels for an image by `IG(T, I) = log P(T|I) - prior_weight * log P(T)`, in nats.

    At `prior_weight=1` this is the pointwise mutual information of text and image, `log (P(I|T) / P(I))`: with
    a uniform prior over the labels, exp(IG) is proportional to P(I|T), and so the score, the softmax of IG
    over the candidate labels, is Bayes' posterior P(label|image). At weight w it is the posterior under a
    label prior proportional to P(T)^(1 - w); w = 0 ranks by the captioner's likelihood alone, which favours
    texts that are common anyway.

    Several templates are ensembled by the mean over templates of log P(T|I) and of log P(T), and hence, the
    score being linear in them, of IG.

    "None of these" is one more candidate, with the label None, once there is an `abstain_threshold`: its
    information gain is that threshold. It comes first where no label reaches the threshold, and otherwise after
    those that do. At `prior_weight=1` a threshold of 0 means an image that has nothing to do with any of the texts,
    P(I); but gains of right labels may well be negative, so take one from labelled images and the same templates
    (`ig-captioner evaluate zero-shot --save-threshold`).

    Args (of a call, or of the constructor as defaults for calls):
        candidate_labels (`list[str]` or [`CompiledLabels`]): may repeat. Compiled ones bring their templates.
        hypothesis_template (`str` or `list[str]`, *optional*): `{}` is where the label goes; several templates are
            averaged. The model's config says them (`prompt_templates`) if this does not; "a photo of a {}." if neither
            does.
        prior_weight (`float`, *optional*): weight of log P(T); the model's config says it if this does not.
        prior_source (`str`, *optional*): `"unconditional"`, log P(T) without an image, or `"reference_images"`, the
            mean of P(T|I) over images; the model's config says it if this does not.
        reference_images (`list`, *optional*): those images; plain ones, black, grey and white, if not given.
        reference_mean (`str`, *optional*): `"arithmetic"`, the mean of P(T|I) (the default), or `"geometric"`, the mean
            of log P(T|I).
        label_prior (`list[float]`, *optional*): how likely each label is before the image is seen: weights, all above
            0, or log-probabilities, all at most 0. Their logarithms are added to information gains.
        scorer (`CaptionScorer`, *optional*): what scores texts with a captioner that is none of this package's; made
            from the model if not given.
        temperature (`float`, *optional*): divides information gains before the softmax or sigmoid; the model's config
            says it if this does not. It changes scores, not their order.
        abstain_threshold (`float`, *optional*): nats; see above. The model's config says it if this does not;
            `-math.inf` switches that off.
        multi_label (`bool`, defaults to `False`): scores each label on its own, by the sigmoid of its information
            gain, so that any number of labels can be likely and scores do not add up to one. A score above 0.5 says
            that the image makes the text likelier (IG > 0); at `prior_weight=1` and `temperature=1` it is the
            posterior of "drawn from P(I|T)" against "drawn from P(I)" at even odds.
        top_k (`int`, *optional*): how many labels to return; all by default. The scores stay those over all
            labels.
        return_log_likelihoods (`bool`, defaults to `False`): adds `caption_log_likelihood`, log P(T|I),
            `prior_log_likelihood`, log P(T), and `information_gain` to each entry: nats, means over
            templates. "None of these" has only the last; the others are None.
        timeout (`float`, *optional*): seconds to wait for an image from the web.
        tokenizer_kwargs (`dict`, *optional*): go to the tokenizer, over the text rules of the processor.

    ```python
    >>> classifier = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True)
    >>> classifier("cat.jpg", candidate_labels=["cat", "dog"], hypothesis_template="a photo of a {}.")
    [{"score": 0.93, "label": "cat"}, {"score": 0.07, "label": "dog"}]
    ```
    """

    model: Any
    _load_processor = False
    _load_image_processor = True
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    # Where the package is installed: makes a scorer of the captioner of a pipeline. Remote code has models of its own.
    scorer_for: Callable[[Any], Any] | None = None

    def __init__(self, *, scorer: Any = None, **kwargs):
        self._given_at_init = {name: kwargs[name] for name in PARAMETERS if name in kwargs}
        self.scorer = scorer
        super().__init__(**kwargs)
        if self.scorer is not None:
            return
        if self.tokenizer is None or self.image_processor is None:
            raise ValueError(
                "a tokenizer and an image_processor are needed, got "
                f"{type(self.tokenizer).__name__} and {type(self.image_processor).__name__}"
            )
        if not gives_scored_form(self.tokenizer):
            logger.warning(
                f"{type(self.tokenizer).__name__} does not put EOS, and nothing else, after a text: "
                "log-likelihoods will not be those of complete texts."
            )

    def check_model_type(self, supported_models):
        """Asks for what the pipeline calls, not for a name in transformers' own list, where this model cannot be."""
        missing = [name for name in ("score", "compile_texts") if not callable(getattr(self.model, name, None))]
        if not missing or self.scorer is not None:
            return
        if self.scorer_for is None:
            raise ValueError(
                f"{type(self).__name__} needs a model with a method `{missing[0]}`, such as "
                f"IGCaptionerForZeroShotImageClassification; {type(self.model).__name__} has none"
            )
        self.scorer = self.scorer_for(self)
        self.model = self.scorer.model  # another one where transformers had chosen the wrong class

    def __call__(self, image=None, candidate_labels: list[str] | None = None, **kwargs: Any):
        r"""Classifies one image or many.

        Args:
            image (`str`, `Path`, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list, generator or
                `Dataset` of them): a path, URL, base64 string or image; arrays as uint8 or floats in [0, 1].
            candidate_labels (`list[str]` or [`CompiledLabels`]): may repeat.
            kwargs: see the class; `batch_size` and `num_workers`, as in every pipeline, change no result.

        Returns:
            For one image a list of `{"score": float, "label": str}`, best first (equals stay in the order
            given, "none of these" after them); for a list of images a list of such lists, empty if it is; for a
            generator or `Dataset` an iterator over them.

        Raises:
            ValueError: naming the value, for any wrong argument and any image that cannot be read.
        """
        if "images" in kwargs:  # the stock pipeline's older name
            if image is not None:
                raise ValueError(f"both image and images were given: {image!r} and {kwargs['images']!r}")
            image = kwargs.pop("images")
        if image is None:
            raise ValueError("no image was given, got None")
        if candidate_labels is not None:
            kwargs["candidate_labels"] = candidate_labels
        parameters = {"candidate_labels": None, **self._given_at_init, **kwargs}
        settings = {name: value for name, value in parameters.items() if name not in ("batch_size", "num_workers")}
        _check_parameters(settings)
        image = list(image) if isinstance(image, tuple) else image
        if isinstance(image, (list, Dataset)) and isinstance(image, Sized) and len(image) == 0:
            _texts_of(settings, self.model.config)  # wrong labels are wrong for no image, too
            return []  # the base class looks at the first image
        with in_evaluation(self.model):
            candidates = self._compile(settings)
        # Past the parent, whose `__call__` wants candidate_labels by position.
        return super(ZeroShotImageClassificationPipeline, self).__call__(image, candidates=candidates, **parameters)

    def _sanitize_parameters(self, candidates: "_Candidates | None" = None, **parameters):
        """Checks arguments and sorts them by step. A call passes all settings, the constructor's included."""
        _check_parameters(parameters)
        if candidates is None:  # the constructor: its labels and templates are compiled by calls, and checked here
            _texts_of({"candidate_labels": ["no label yet"], **parameters}, self.model.config)

        def given(*names: str) -> dict[str, Any]:
            return {name: parameters[name] for name in names if name in parameters}

        preprocess = given("timeout")
        forward = given("prior_weight")
        postprocess = given("temperature", "abstain_threshold", "multi_label", "top_k", "return_log_likelihoods")
        if forward.get("prior_weight") is not None:
            forward["prior_weight"] = float(forward["prior_weight"])  # a Fraction is a number, but not to a tensor
        if candidates is not None:
            forward["candidates"] = candidates
            postprocess["candidate_labels"] = candidates.labels
        return preprocess, forward, postprocess

    def _compile(self, settings: dict[str, Any]) -> "_Candidates":
        """Compiles the texts of the candidate labels, once for all images of a call."""
        labels, templates, texts = _texts_of(settings, self.model.config)
        label_prior = settings.get("label_prior")
        log_prior = None if label_prior is None else label_log_prior(label_prior, len(labels))
        given = settings["candidate_labels"]
        if self.scorer is not None:
            compiled = self._compile_for_scorer(given, labels, templates, settings)
            return _Candidates(labels, 1, compiled, log_prior)
        tokenizer_kwargs = settings.get("tokenizer_kwargs") or {}
        prior_source = settings.get("prior_source")
        references = settings.get("reference_images")
        if is_compiled(given):
            refuse_prior(prior_source=prior_source, reference_images=references)
            given.check_tokenizer(self.model, self.tokenizer, **tokenizer_kwargs)
            verified = given.texts.verified_for(self.model).to(self.model.device)
            return _Candidates(labels, len(templates), verified, log_prior)
        try:
            encoded = encode_for(self.model, self.tokenizer, texts, **tokenizer_kwargs)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"the tokenizer refuses tokenizer_kwargs {tokenizer_kwargs!r}: {error}") from error
        compiled = self.model.compile_texts(
            **encoded,
            prior_source=prior_source,
            reference_pixel_values=None if references is None else self._read_references(references, settings),
            reference_mean=settings.get("reference_mean") or REFERENCE_MEANS[0],
            with_fingerprint=False,
        )
        return _Candidates(labels, len(templates), compiled, log_prior)

    def _compile_for_scorer(self, given: Any, labels: list[str], templates: list[str], settings: dict[str, Any]) -> Any:
        """Labels as the scorer takes them: compiled, with their prior."""
        if settings.get("tokenizer_kwargs"):
            raise ValueError(f"tokenizer_kwargs {settings['tokenizer_kwargs']!r} change nothing: the prompt says how")
        names = ("prior_source", "reference_images", "reference_mean")
        prior = {name: settings[name] for name in names if settings.get(name) is not None}
        if not is_compiled(given):
            return self.scorer.compile_labels(labels, templates, **prior)
        refuse_prior(**prior)
        return given

    def _read_references(self, images: list, settings: dict[str, Any]) -> torch.Tensor:
        photos = [load_rgb_image(image, timeout=settings.get("timeout")) for image in images]
        pixels = self.image_processor(images=photos, return_tensors="pt")["pixel_values"]
        return pixels.to(self.device, self.dtype)

    def preprocess(self, image, timeout: float | None = None) -> dict[str, Any]:
        """`pixel_values` [1, 3, H, W] of one image, in the model's dtype; the image itself for a scorer."""
        if self.scorer is not None:
            return {"images": load_rgb_image(image, timeout=timeout)}
        inputs = self.image_processor(images=[load_rgb_image(image, timeout=timeout)], return_tensors="pt")
        return {"pixel_values": inputs.to(self.dtype)["pixel_values"]}

    def _forward(self, model_inputs, candidates: "_Candidates", prior_weight: float | None = None):
        """Scores [B, C], means over T templates; the prior [C] is repeated for each image."""
        with in_evaluation(self.model):
            if self.scorer is None:
                scores = self.model.score(model_inputs["pixel_values"], candidates.texts, prior_weight=prior_weight)
            else:
                scores = self.scorer.score(model_inputs["images"], candidates.texts, prior_weight=prior_weight)
        means = {name: mean_over_templates(values, candidates.num_templates) for name, values in scores.items()}
        if candidates.label_prior is not None:
            gain = means["information_gain"]
            means["information_gain"] = gain + candidates.label_prior.to(gain.device)
        prior = means["prior_log_likelihood"].expand_as(means["caption_log_likelihood"])
        return {**means, "prior_log_likelihood": prior}

    def postprocess(
        self,
        model_outputs,
        candidate_labels: list[str],
        temperature: float | None = None,
        abstain_threshold: float | None = None,
        multi_label: bool = False,
        top_k: int | None = None,
        return_log_likelihoods: bool = False,
    ):
        """Entries of one image, best first, from its rows [1, C]."""
        config = self.model.config
        labels = list(candidate_labels)
        fields = {name: values[0].tolist() for name, values in model_outputs.items()}
        gains = fields["information_gain"]
        _check_gains(gains, labels)
        threshold = getattr(config, "abstain_threshold", None) if abstain_threshold is None else abstain_threshold
        if threshold is not None and threshold > -math.inf:
            labels.append(None)
            gains.append(float(threshold))  # the one field that "none of these" has
        temperature = getattr(config, "score_temperature", 1.0) if temperature is None else temperature
        scores = _scores(gains, temperature, multi_label)
        # Sorted by information gain: far-off labels share a score of 0.
        order = sorted(range(len(gains)), key=lambda i: -gains[i])[:top_k]
        entries = [{"score": scores[i], "label": labels[i]} for i in order]
        if return_log_likelihoods:
            for entry, i in zip(entries, order, strict=True):
                entry.update({name: values[i] if i < len(values) else None for name, values in fields.items()})
        return entries


@contextmanager
def in_evaluation(model: Any) -> Iterator[None]:
    """A model without dropout for a while: modules in training mode are in evaluation mode, and back in the end."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_gains(gains: list[float], labels: list[str]) -> None:
    for gain, label in zip(gains, labels, strict=True):
        if not math.isfinite(gain):
            raise ValueError(
                f"the information gain of {label!r} is {gain}: prior_weight is too large, or the weights of the model "
                "are not finite"
            )


def _scores(gains: list[float], temperature: float, multi_label: bool) -> list[float]:
    """Scores of all candidates, in float64."""
    values = torch.tensor(gains, dtype=torch.float64)
    temperature = float(temperature)
    if multi_label:
        return (values / temperature).sigmoid().tolist()
    # The maximum goes first, as it would in the softmax: quotients by a tiny temperature may be infinite.
    return ((values - values.max()) / temperature).softmax(dim=-1).tolist()


# What `save_pretrained` reads to copy this file and to write `custom_pipelines`, without replacing the stock
# pipeline for the models of others, as registering it with transformers would.
IGZeroShotImageClassificationPipeline._registered_impl = {
    "zero-shot-image-classification": {
        "impl": IGZeroShotImageClassificationPipeline,
        "pt": (AutoModelForZeroShotImageClassification,),
        "type": "multimodal",
    }
}

__all__ = ["IGZeroShotImageClassificationPipeline"]
