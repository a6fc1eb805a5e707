"""Tiny models and texts for tests: everything random, nothing downloaded."""

import itertools

import torch

from ig_captioner import IGCaptionerConfig, IGCaptionerForConditionalGeneration


PAD, BOS, EOS, MASK, VOCAB = 0, 1, 2, 3, 61
# every fusion, with and without text-only layers, and the other fields spread over them
VARIANTS = {
    "prefix": {"num_text_only_layers": 1},
    "prefix_rotary": {"num_text_only_layers": 0, "position_embedding": "rotary", "norm": "rmsnorm", "gated_mlp": True},
    "cross": {"fusion": "cross_attention", "num_text_only_layers": 0, "head_bias": True, "attention_bias": False},
    "cross_rotary": {"fusion": "cross_attention", "num_text_only_layers": 2, "position_embedding": "rotary"},
    "factorised": {"num_text_only_layers": 2, "embedding_size": 10},
}


# torch 2.13 chooses the kernel of bfloat16 attention by the processor, and its helpers by ATEN_CPU_CAPABILITY.
BFLOAT16_REASON = "with AVX-512, but ATEN_CPU_CAPABILITY=default, torch's attention in bfloat16 raises"
BFLOAT16_ATTENTION_FAILS = torch.backends.cpu.get_cpu_capability() == "DEFAULT" and torch.cpu._is_avx512_supported()


def tiny_config(text: dict | None = None, vision: dict | None = None, **kwargs) -> IGCaptionerConfig:
    """Encoder and decoder of different widths, so that no projection can be swapped unnoticed."""
    small = {"num_attention_heads": 2, "intermediate_size": 24, "initializer_range": 0.3}
    vision_config = {**small, "hidden_size": 16, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    text_config = {**small, "hidden_size": 24, "num_hidden_layers": 3, "max_position_embeddings": 20}
    text_config |= {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    text_config |= {"mask_token_id": MASK}
    return IGCaptionerConfig(
        vision_config={**vision_config, **(vision or {})}, text_config={**text_config, **(text or {})}, **kwargs
    )


def tiny_model(variant: str = "prefix", model_class=IGCaptionerForConditionalGeneration, attn="sdpa", **kwargs):
    """A random model in evaluation mode; the head is untied where it has a bias."""
    text = VARIANTS[variant]
    kwargs.setdefault("tie_word_embeddings", not text.get("head_bias", False))
    torch.manual_seed(0)
    config = tiny_config(text, **kwargs)
    model = model_class.from_config(config, attn_implementation=attn).eval()
    for parameter in model.parameters():  # biases and norms too, so that none can be forgotten
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def random_images(number: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(1))


def random_texts(lengths: tuple[int, ...] = (5, 2, 7, 1, 5)) -> list[list[int]]:
    """Token ids in scored form: the last one is end-of-sequence."""
    generator = torch.Generator().manual_seed(2)
    return [[*torch.randint(4, VOCAB, (n - 1,), generator=generator).tolist(), EOS] for n in lengths]


def padded(texts: list[list[int]], length: int = 0, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask` [C, L]."""
    length = max(length, max(map(len, texts)))
    ids, masks = [], []
    for text in texts:
        padding = [PAD] * (length - len(text))
        zeros, ones = [0] * len(padding), [1] * len(text)
        ids.append(text + padding if side == "right" else padding + text)
        masks.append(ones + zeros if side == "right" else zeros + ones)
    return torch.tensor(ids), torch.tensor(masks)


def naive_log_likelihoods(model, pixel_values: torch.Tensor | None, text: list[int]) -> list[float]:
    """log P of each token of one text under one image (or none), one forward pass per token: slow and obvious."""
    result = []
    for i, token in enumerate(text):
        inputs = torch.tensor([[BOS, *text[:i]]])
        image = None if pixel_values is None else pixel_values[None]
        logits = model(input_ids=inputs, pixel_values=image, use_cache=False).logits
        result.append(float(logits[0, -1].float().log_softmax(dim=-1)[token]))
    return result


def naive_scores(model, images: torch.Tensor | None, texts: list[list[int]]) -> torch.Tensor:
    """Sums of [`naive_log_likelihoods`]: [B, C], or [C] without images."""
    if images is None:
        return torch.tensor([sum(naive_log_likelihoods(model, None, text)) for text in texts])
    pairs = itertools.product(images, texts)
    return torch.tensor([sum(naive_log_likelihoods(model, *pair)) for pair in pairs]).view(len(images), len(texts))


def assert_clear_order(scores: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Fails if two scores of a row are closer than `tolerance`: rounding, which differs by machine, would rank them."""
    closest = scores.sort(dim=-1).values.diff(dim=-1).min().item()
    assert closest > tolerance, f"two scores differ by {closest:.1e} only"
