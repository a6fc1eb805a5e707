"""Configuration of IG Captioner: a ViT encoder, a text decoder, and how the two are trained and scored.

The default sizes are those of big_vision's CapPa at B/16 (arXiv 2306.07915), with prefix fusion, biases and a tied
head; every place where public captioners differ (norms, activations, positions, fusion, special tokens) is a field.
"""

import copy
import math
import shutil
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .vision_ig_captioner import ImageLayout, layout_of, size_of, vision_part


# Every checkpoint carries its code: these files. The two tables after them tell transformers, as `file.Class`, which
# class to take for which Auto class and which pipeline.
REMOTE_CODE_FILES = (
    "compat_ig_captioner.py",
    "input_rules.py",
    "vision_ig_captioner.py",
    "configuration_ig_captioner.py",
    "information_gain.py",
    "text_rules.py",
    "encoder_ig_captioner.py",
    "decoder_ig_captioner.py",
    "processing_ig_captioner.py",
    "label_trie.py",
    "compiled_labels.py",
    "scoring_ig_captioner.py",
    "pipeline_ig_captioner.py",
    "modeling_ig_captioner.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_ig_captioner.IGCaptionerConfig",
    "AutoModel": "modeling_ig_captioner.IGCaptionerModel",
    "AutoModelForImageTextToText": "modeling_ig_captioner.IGCaptionerForConditionalGeneration",
    "AutoModelForZeroShotImageClassification": "modeling_ig_captioner.IGCaptionerForZeroShotImageClassification",
    "AutoProcessor": "processing_ig_captioner.IGCaptionerProcessor",
    "AutoImageProcessor": "processing_ig_captioner.IGCaptionerImageProcessor",
}
CUSTOM_PIPELINES = {
    "zero-shot-image-classification": {
        "impl": "pipeline_ig_captioner.IGZeroShotImageClassificationPipeline",
        "pt": ["AutoModelForZeroShotImageClassification"],
        "type": "multimodal",
    }
}

PRIOR_SOURCES = ("unconditional", "reference_images")


def copy_remote_code(directory: str | Path) -> list[str]:
    """Copies the Python files that a saved model refers to from the folder of this one. Returns their names."""
    here = Path(__file__).parent
    if here.resolve() != Path(directory).resolve():
        for name in REMOTE_CODE_FILES:
            shutil.copyfile(here / name, Path(directory) / name)
    return list(REMOTE_CODE_FILES)


def as_height_width(size: int | list[int] | tuple[int, int], name: str) -> tuple[int, int]:
    """`(height, width)` from one integer or a pair. Raises ValueError naming `name` for anything else."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(not isinstance(side, int) or side < 1 for side in pair):
        raise ValueError(f"{name} must be a positive integer or a pair (height, width) of them, got {size!r}")
    return pair


def _check_blocks(config: "IGCaptionerVisionConfig | IGCaptionerTextConfig") -> None:
    """Checks the fields that encoder and decoder share. Raises ValueError naming field and value."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    of_one = ("num_channels", "vocab_size", "max_position_embeddings")  # of the encoder, or of the decoder
    for name in (*sizes, *of_one):
        if hasattr(config, name) and getattr(config, name) < 1:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")
    for name in ("dropout", "attention_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(config, name)}")
    if not config.norm_eps > 0:
        raise ValueError(f"norm_eps must be positive, got {config.norm_eps}")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act {config.hidden_act!r} is no activation of transformers")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}"
        )
    if config.norm == "layernorm" and config.norm_bias and not config.norm_scale:
        raise ValueError("norm_scale=False needs norm_bias=False: a LayerNorm has no bias without a scale")


@strict
class IGCaptionerVisionConfig(PreTrainedConfig):
    r"""The image encoder: a pre-norm ViT without a class token.

    Args:
        image_size (`int` or `(height, width)`): pixels the learned positions are laid out for. Images of another size
            are accepted as long as the patch size divides them; positions are resampled.
        patch_size (`int` or `(height, width)`): pixels per patch.
        position_embedding (`"learned"`, `"factorized"` or `"sincos2d"`): a table of all patches; the sum of one of rows
            and one of columns; or fixed, without weights.
        num_register_tokens (`int`): learned tokens appended after the patches, without positions; the decoder reads
            them, mean pooling does not.
        pre_norm: normalises the image tokens before the first block, too (CLIP).
        hidden_act, gated_mlp: activation by its transformers name (`gelu_pytorch_tanh`, `gelu`, ...); with
            `gated_mlp` the MLP is `act(x W_gate) * (x W_up) W_down` (GEGLU for a GELU).
        norm (`"layernorm"` or `"rmsnorm"`), norm_eps, norm_bias, norm_scale: the norms of the blocks and the final one;
            RMSNorm has no bias. Without scale and bias norms have no parameters.
        post_attention_norm: normalises what attention returns, too, before it is added; always with a scale.
        mid_mlp_norm: normalises between the projections of the MLP, after the gate (with `post_attention_norm`:
            NormFormer, arXiv 2110.09456).
        qk_norm: RMSNorm of the queries and the keys of each head, with a scale, before rotary positions.
        patch_bias, attention_bias, mlp_bias: whether those projections have biases.
        dropout, attention_dropout: after each sub-layer, and on the attention weights.
    """

    model_type = "ig_captioner_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    position_embedding: Literal["learned", "factorized", "sincos2d"] = "learned"
    num_register_tokens: int = 0
    pre_norm: bool = False
    hidden_act: str = "gelu_pytorch_tanh"
    gated_mlp: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-6
    norm_bias: bool = True
    norm_scale: bool = True
    post_attention_norm: bool = False
    mid_mlp_norm: bool = False
    qk_norm: bool = False
    patch_bias: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches `(rows, columns)` at `image_size`."""
        height, width = as_height_width(self.image_size, "image_size")
        patch_height, patch_width = as_height_width(self.patch_size, "patch_size")
        return height // patch_height, width // patch_width

    @property
    def layout(self) -> ImageLayout:
        """The tokens of one image at `image_size`."""
        return ImageLayout(self.hidden_size, *self.grid_size, trailing=self.num_register_tokens)

    def validate_architecture(self):
        """Part of `@strict`: called when the object is built and when it is saved."""
        _check_blocks(self)
        image = as_height_width(self.image_size, "image_size")
        patch = as_height_width(self.patch_size, "patch_size")
        if image[0] % patch[0] or image[1] % patch[1]:
            raise ValueError(f"image_size {self.image_size!r} is not a multiple of patch_size {self.patch_size!r}")
        if self.position_embedding == "sincos2d" and self.hidden_size % 4:
            raise ValueError(
                f"position_embedding='sincos2d' needs a multiple of 4 as hidden_size, got {self.hidden_size}"
            )
        if self.num_register_tokens < 0:
            raise ValueError(f"num_register_tokens must not be negative, got {self.num_register_tokens}")


@strict
class IGCaptionerTextConfig(PreTrainedConfig):
    r"""The text decoder: causal over text, with or without an image.

    Args:
        max_position_embeddings (`int`): longest text in tokens, the end-of-sequence token included.
        position_embedding (`"learned"` or `"rotary"`), rope_theta: rotary is half-split and applies to text only.
        fusion (`"prefix"` or `"cross_attention"`): projected image tokens in front of the text, seen by all of it and
            by one another (prefix-LM); or a cross-attention sub-layer in each block (CapPa).
        num_text_only_layers (`int`): this many lower layers never see the image, so that log P(T|I) and log P(T)
            share them. The more of the layers, the less a node of a trie costs per image (see `docs/scoring.md`); so do
            a small `hidden_size`, `vocab_size` and `embedding_size`.
        encoder_hidden_size (`int`, *optional*): width of the image tokens; taken from the vision config.
        embedding_size (`int`, *optional*): width of the token embedding and of the head, with a projection between it
            and `hidden_size` on either side (factorised, as in ALBERT, arXiv 1909.11942, and ELECTRA); by default both
            have the width of the decoder, without projections.
        head_bias (`bool`): whether the output projection has a bias.
        norm_bias (`bool`): biases of the LayerNorms inside the blocks; the final LayerNorm always has one, unless
            `norm_scale` is off.
        pad_token_id, bos_token_id, eos_token_id: as everywhere in transformers.
        decoder_start_token_id (`int`, *optional*): what the model puts in front of a text; `bos_token_id` if not given.
        mask_token_id (`int`, *optional*): the input of parallel prediction. If it equals `vocab_size`, the embedding
            has one row more than the head, which never predicts it (big_vision).

    The other fields are as in [`IGCaptionerVisionConfig`].
    """

    model_type = "ig_captioner_text_model"
    base_config_key = "text_config"

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    position_embedding: Literal["learned", "rotary"] = "learned"
    rope_theta: float | int = 10000.0
    fusion: Literal["prefix", "cross_attention"] = "prefix"
    num_text_only_layers: int = 0
    encoder_hidden_size: int | None = None
    embedding_size: int | None = None
    hidden_act: str = "gelu_pytorch_tanh"
    gated_mlp: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-6
    norm_bias: bool = True
    norm_scale: bool = True
    post_attention_norm: bool = False
    mid_mlp_norm: bool = False
    qk_norm: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = None
    mask_token_id: int | None = 3

    def __post_init__(self, **kwargs):
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.bos_token_id
        super().__post_init__(**kwargs)

    @property
    def num_embeddings(self) -> int:
        """Rows of the token embedding: `vocab_size`, and one more where the mask token lies outside the vocabulary."""
        return self.vocab_size + (self.mask_token_id == self.vocab_size)

    @property
    def embedding_width(self) -> int:
        """Width of the token embedding and of what the head reads."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    def validate_architecture(self):
        """Part of `@strict`: called when the object is built and when it is saved."""
        _check_blocks(self)
        if not 0 <= self.num_text_only_layers < self.num_hidden_layers:
            raise ValueError(
                f"num_text_only_layers must leave at least one of the {self.num_hidden_layers} layers for the image, "
                f"got {self.num_text_only_layers}"
            )
        if self.embedding_size is not None and self.embedding_size < 1:
            raise ValueError(f"embedding_size must be positive or None, got {self.embedding_size}")
        if self.position_embedding == "rotary" and (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"rotary positions need an even head size, got {self.hidden_size // self.num_attention_heads}"
            )
        if self.decoder_start_token_id is None:
            raise ValueError("decoder_start_token_id and bos_token_id are both None: a text needs a start token")

    def validate_token_ids(self):
        """Part of `@strict`: special tokens must have an embedding."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "mask_token_id"):
            value = getattr(self, name)
            for token_id in value if isinstance(value, list) else [value]:
                if token_id is not None and not 0 <= token_id < self.num_embeddings:
                    raise ValueError(f"{name} {token_id} lies outside the {self.num_embeddings} rows of the embedding")


@strict
class IGCaptionerConfig(PreTrainedConfig):
    r"""A captioner that scores texts by information gain, `log P(T|I) - prior_weight * log P(T)`.

    Args:
        vision_config (`dict` or config, *optional*): an [`IGCaptionerVisionConfig`], or the configuration (a dict has
            its `model_type`) of any vision model that `AutoModel` builds; of a CLIP or SigLIP, its vision part. That
            model is then the encoder, under its own parameter names.
        text_config (`dict` or config, *optional*): see [`IGCaptionerTextConfig`].
        image_token_grids (`list[int]`, *optional*): the decoder reads the means over the cells of these g x g grids in
            place of all image tokens: `[2, 1]` gives five, the quarters and the whole. Class and register tokens are
            left out then. By default the tokens are read as they come.
        image_token_norm (`bool`): a LayerNorm over the encoder's width in front of the decoder, trained with it.
        image_position_embedding (`"none"`, `"learned"` or `"sincos2d"`): added to the image tokens after that norm,
            for encoders whose tokens do not say where they come from: one learned vector per token, or fixed
            sine-cosine values of the place in the image (none for class and register tokens).
        conditional_weight, unconditional_weight (`float`): weights a and b of the training loss
            `a * CE(T|I) + b * CE(T)` (arXiv 2311.17072). The defaults 1.5 and 0.5 are what we remember of the paper,
            unverified.
        parallel_prediction_prob (`float`): share of training examples whose text is predicted in parallel, from mask
            tokens and the image alone (CapPa, arXiv 2306.07915: 0.75; 0 switches it off).
        label_smoothing (`float`): share of each target of CE(T|I) that is spread evenly over the vocabulary, in
            training mode only. CE(T) stays as it is, and so do the losses that are reported beside `loss`.
        loss_reduction (`"token"` or `"sequence"`): mean over all tokens of a batch, as everywhere in transformers, or
            the mean over texts of each text's mean, as big_vision and clip-jax train.
        prior_weight (`float`): weight of log P(T) in the score; 0 ranks by likelihood, 1 by information gain.
        prior_source (`"unconditional"` or `"reference_images"`): where log P(T) comes from: the decoder without an
            image, or, for models that were never trained so, the mean of P(T|I) over reference images (VisualGPTScore,
            arXiv 2306.01879). A call may give those; by default they are three plain images, black, grey and white.
        score_temperature (`float`): what the pipeline divides information gains by before their softmax or sigmoid; 1
            leaves them as they are, fitted values make scores agree with how often they are right. It moves no ranking.
            Not named `temperature`, which transformers would take for the one of sampling.
        abstain_threshold (`float`, *optional*): nats of information gain that "none of these" has as a further
            candidate of the pipeline; there is none by default.
        prompt_templates (`list[str]`, *optional*): the sentences that labels are put in where a call names none, with
            one `{}` each; several are averaged. "a photo of a {}." if not given.
        tie_word_embeddings (`bool`, *optional*): whether the output projection is the token embedding; by default
            wherever the mask token lies inside the vocabulary, without which it cannot be.
    """

    model_type = "ig_captioner"
    sub_configs = {"vision_config": IGCaptionerVisionConfig, "text_config": IGCaptionerTextConfig}
    # so that Trainer's predictions are the logits only
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "encoder_last_hidden_state",
        "captioning_loss",
        "unconditional_loss",
        "parallel_loss",
        "logits_per_text",
        "caption_log_likelihood",
        "prior_log_likelihood",
    ]

    vision_config: Any = None
    text_config: Any = None
    image_token_grids: list[int] | None = None
    image_token_norm: bool = False
    image_position_embedding: Literal["none", "learned", "sincos2d"] = "none"
    conditional_weight: float | int = 1.5
    unconditional_weight: float | int = 0.5
    parallel_prediction_prob: float | int = 0.0
    label_smoothing: float | int = 0.0
    loss_reduction: Literal["token", "sequence"] = "token"
    prior_weight: float | int = 1.0
    prior_source: Literal["unconditional", "reference_images"] = "unconditional"
    score_temperature: float | int = 1.0
    abstain_threshold: float | int | None = None
    prompt_templates: list[str] | None = None
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        self.vision_config = self._vision_config()
        if self.text_config is None or isinstance(self.text_config, dict):
            self.text_config = IGCaptionerTextConfig(**(self.text_config or {}))
        elif getattr(self.text_config, "model_type", None) != IGCaptionerTextConfig.model_type:
            raise TypeError(f"text_config must be a dict or an IGCaptionerTextConfig, got {self.text_config!r}")
        if self.text_config.encoder_hidden_size is None:
            self.text_config = copy.deepcopy(self.text_config)
            self.text_config.encoder_hidden_size = self.image_layout.width
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.text_config.num_embeddings == self.text_config.vocab_size
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        kwargs.setdefault("custom_pipelines", {task: dict(impl) for task, impl in CUSTOM_PIPELINES.items()})
        super().__post_init__(**kwargs)

    def _vision_config(self) -> PreTrainedConfig:
        """Our encoder's configuration, unless another `model_type` is given."""
        value, own_type = self.vision_config, IGCaptionerVisionConfig.model_type
        if isinstance(value, PreTrainedConfig):
            return value if value.model_type == own_type else vision_part(value)
        if value is not None and not isinstance(value, dict):
            raise TypeError(f"vision_config must be a dict or a config, got {value!r}")
        fields = value or {}
        is_own = fields.get("model_type", own_type) == own_type
        return IGCaptionerVisionConfig(**fields) if is_own else vision_part(fields)

    @property
    def has_own_encoder(self) -> bool:
        """Tells whether the encoder is this package's ViT."""
        return self.vision_config.model_type == IGCaptionerVisionConfig.model_type

    @property
    def image_size(self) -> tuple[int, int]:
        """`(height, width)` of the images that the encoder was made for; 224 x 224 where it does not say."""
        return size_of(self.vision_config)

    @property
    def image_channels(self) -> int:
        return getattr(self.vision_config, "num_channels", 3)

    @property
    def image_layout(self) -> ImageLayout:
        """Layout of what the encoder returns for one image of `image_size`."""
        return self.vision_config.layout if self.has_own_encoder else layout_of(self.vision_config)

    @property
    def num_image_tokens(self) -> int:
        """Number of tokens that the decoder reads of one image of `image_size`."""
        if self.image_token_grids is None:
            return self.image_layout.tokens
        return sum(grid**2 for grid in self.image_token_grids)

    def validate_image_tokens(self):
        """Part of `@strict`: called when the object is built and when it is saved."""
        grids = self.image_token_grids
        if grids is not None and (not grids or min(grids) < 1):
            raise ValueError(f"image_token_grids must be None or positive numbers, got {grids}")
        width = self.text_config.encoder_hidden_size
        if self.image_position_embedding == "sincos2d" and width % 4:
            raise ValueError(
                f"image_position_embedding='sincos2d' needs an encoder width of a multiple of 4, got {width}"
            )

    def validate_architecture(self):
        """Part of `@strict`: called when the object is built and when it is saved."""
        if self.has_own_encoder and self.text_config.encoder_hidden_size != self.vision_config.hidden_size:
            raise ValueError(
                f"text_config.encoder_hidden_size {self.text_config.encoder_hidden_size} differs from "
                f"vision_config.hidden_size {self.vision_config.hidden_size}"
            )
        if not 0 <= self.parallel_prediction_prob <= 1:
            raise ValueError(f"parallel_prediction_prob must lie in [0, 1], got {self.parallel_prediction_prob}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.parallel_prediction_prob > 0 and self.text_config.mask_token_id is None:
            raise ValueError("parallel prediction needs text_config.mask_token_id, got None")
        for name in ("conditional_weight", "unconditional_weight", "prior_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if not 0 < self.score_temperature < math.inf:
            raise ValueError(f"score_temperature must be finite and positive, got {self.score_temperature}")
        if self.abstain_threshold is not None and not -math.inf < self.abstain_threshold < math.inf:
            raise ValueError(f"abstain_threshold must be finite, or None, got {self.abstain_threshold}")
        if self.tie_word_embeddings and self.text_config.num_embeddings != self.text_config.vocab_size:
            raise ValueError(
                "tie_word_embeddings=True needs the mask token inside the vocabulary, got mask_token_id = vocab_size = "
                f"{self.text_config.vocab_size}"
            )

    def validate_prompt_templates(self):
        """Part of `@strict`: a list of at least one sentence, each with one place for the label."""
        if self.prompt_templates is not None and not self.prompt_templates:
            raise ValueError("prompt_templates must hold at least one template, or be None, got []")
        for template in self.prompt_templates or ():
            if template.count("{}") != 1:
                raise ValueError(f"every template of prompt_templates must have one {{}} in it, got {template!r}")

    def validate_token_ids(self):
        """Part of `@strict`: the text config checks them; a mask token may lie outside the vocabulary."""


def _of_text_config(name: str) -> property:
    """Makes a property that reads and writes a field of `text_config`."""

    def get(self: IGCaptionerConfig) -> int | list[int] | None:
        return getattr(self.text_config, name)

    def set_(self: IGCaptionerConfig, value: int | list[int] | None) -> None:
        setattr(self.text_config, name, value)

    return property(get, set_, doc=f"`text_config.{name}`")


# The special tokens live in the text config; Trainer and collators look for them on the whole. A property is not
# serialised, so there is one source of truth.
for _name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "mask_token_id"):
    setattr(IGCaptionerConfig, _name, _of_text_config(_name))

IGCaptionerVisionConfig.register_for_auto_class("AutoConfig")  # an encoder saved by itself brings its code along


__all__ = ["IGCaptionerConfig", "IGCaptionerTextConfig", "IGCaptionerVisionConfig"]
