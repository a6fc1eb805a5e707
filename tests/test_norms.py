"""The norms a block may have beyond its first ones: with and without parameters, NormFormer's, and per head."""

import pytest
import torch
from torch import nn

from ig_captioner import IGCaptionerForConditionalGeneration
from tiny import BOS, random_images, tiny_config, tiny_model


IDS = torch.tensor([[BOS, 11, 22, 33, 44]])
NORMFORMER = {"post_attention_norm": True, "mid_mlp_norm": True, "norm_bias": False, "qk_norm": True}
NORMFORMER |= {"gated_mlp": True, "position_embedding": "rotary", "fusion": "cross_attention"}


def naive_norm(x: torch.Tensor, kind: str, weight: torch.Tensor | None = None, bias=None) -> torch.Tensor:
    x = x if kind == "rmsnorm" else x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x * (1 if weight is None else weight) + (0 if bias is None else bias)


def naive_normformer(model, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """A rotary decoder with every norm there is, from its weights' names. Logits [1, L, V]."""
    config, weights = model.config.text_config, model.state_dict()
    heads, length = config.num_attention_heads, input_ids.shape[1]

    def norm(x, name):
        return naive_norm(x, config.norm, weights.get(f"{name}.weight"), weights.get(f"{name}.bias"))

    def split(x, name):
        return torch.stack((x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]).chunk(heads, dim=-1), dim=1)

    def turn(x):
        half = x.shape[-1] // 2
        turns = 10_000 ** -(torch.arange(half) / half) * torch.arange(length)[:, None]
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(turns), turns)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def attend(x, read, name, rotate, mask):
        q = naive_norm(split(x, f"{name}.q_proj"), "rmsnorm", weights[f"{name}.q_norm.weight"])
        k = naive_norm(split(read, f"{name}.k_proj"), "rmsnorm", weights[f"{name}.k_norm.weight"])
        scores = rotate(q) @ rotate(k).transpose(2, 3) / q.shape[-1] ** 0.5
        out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ split(read, f"{name}.v_proj")
        out = out.transpose(1, 2).flatten(2) @ weights[f"{name}.o_proj.weight"].T + weights[f"{name}.o_proj.bias"]
        return norm(out, f"{name}_post_norm")

    x, image = weights["model.decoder.embed_tokens.weight"][input_ids], model.model.encode_image(pixel_values)[1]
    causal, everything = torch.ones(length, length).tril().bool(), torch.ones(length, image.shape[1]).bool()
    for layer in (f"model.decoder.layers.{i}" for i in range(config.num_hidden_layers)):
        normed = norm(x, f"{layer}.self_attn_norm")
        x = x + attend(normed, normed, f"{layer}.self_attn", turn, causal)
        normed = norm(x, f"{layer}.cross_attn_norm")
        x = x + attend(normed, image, f"{layer}.cross_attn", lambda states: states, everything)
        normed, mlp = norm(x, f"{layer}.mlp_norm"), model.get_submodule(f"{layer}.mlp")
        inner = nn.functional.gelu(mlp.gate_proj(normed), approximate="tanh") * mlp.up_proj(normed)
        x = x + mlp.down_proj(norm(inner, f"{layer}.mlp.mid_norm"))
    return model.lm_head(norm(x, "model.decoder.norm"))


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("scale", [True, False])
def test_every_norm_by_hand(kind, scale):
    text = {**NORMFORMER, "norm": kind, "norm_scale": scale}
    model = IGCaptionerForConditionalGeneration(tiny_config(text)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    names = model.state_dict().keys()
    assert ("model.decoder.norm.weight" in names) == scale
    assert ("model.decoder.norm.bias" in names) == (scale and kind == "layernorm")
    assert ("model.decoder.layers.0.mlp.mid_norm.weight" in names) == scale
    assert "model.decoder.layers.0.cross_attn_post_norm.weight" in names
    with torch.no_grad():
        expected = naive_normformer(model, random_images(1), IDS)
        logits = model(input_ids=IDS, pixel_values=random_images(1), use_cache=False).logits
        start = model(input_ids=IDS[:, :3], pixel_values=random_images(1), use_cache=True)
        end = model(input_ids=IDS[:, 3:], pixel_values=random_images(1), past_key_values=start.past_key_values).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([start.logits, end], dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_norms_are_absent_unless_asked_for_and_reach_the_image(fusion):
    plain = tiny_model("prefix").state_dict()
    assert not [name for name in plain if "post_norm" in name or "mid_norm" in name or "q_norm" in name]
    norms = {"post_attention_norm": True, "mid_mlp_norm": True, "qk_norm": True}
    torch.manual_seed(0)
    model = IGCaptionerForConditionalGeneration(tiny_config({**norms, "fusion": fusion}, norms)).eval()
    images = random_images(1)
    with torch.no_grad():
        expected = model(input_ids=IDS, pixel_values=images).logits
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("post_norm.weight", "mid_norm.weight", "k_norm.weight")):
                parameter.data *= torch.linspace(0.5, 2, parameter.numel())
                logits = model(input_ids=IDS, pixel_values=images).logits
                assert not torch.equal(logits, expected), name
                expected = logits
