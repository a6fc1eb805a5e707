"""Converted captioners at work: scores through the pipeline as pair by pair, captions, and tuning by the recipe."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import test_conversion_clip_jax_reference as clip_jax
import test_conversion_reference as big_vision
import torch
from test_conversion_clip_jax import write_config, write_tokenizer
from test_conversion_tokenizer import write_model
from transformers import pipeline

from conversion import convert_big_vision, convert_clip_jax
from ig_captioner import IGCaptionerForConditionalGeneration, IGZeroShotImageClassificationPipeline
from ig_captioner.checkpoint import load_model, load_processor
from tiny import assert_clear_order
from training.config import load_config
from training.train import train


IG_TUNE = Path(__file__).parent.parent / "training" / "configs" / "ig_tune.yaml"
LABELS = ["a photo", "cat", "a cat a photo"]
CLIP_JAX = {
    "clip_jax": {},
    "clip_jax_preln": {"block": {"ln_type": "preln", "use_rmsnorm": False, "normalize_qk": True}},
    "clip_jax_learnt": {"text": {"position_embedding_type": "learnt"}, "block": {"use_bias": True}},
}
BIG_VISION = {"big_vision": {}, "big_vision_bias": {"decoder_bias": True, "mask_row": False}}


def convert(tmp_path, name):
    """Converts random leaves to `tmp_path/out`. Returns numpy's log P(text | image) [B, 1] of one text."""
    if name in BIG_VISION:
        leaves = big_vision.random_leaves(**BIG_VISION[name])
        tokenizer = write_model(tmp_path / "c4.model")
        source = big_vision.save(tmp_path / "checkpoint.npz", leaves)
        convert_big_vision.convert(source, tmp_path / "out", tokenizer=tokenizer)
        return lambda images, text: big_vision.score(leaves, images, np.array([text]))
    config = clip_jax.make_config(**CLIP_JAX[name])
    leaves = clip_jax.random_leaves(config)
    source, file = big_vision.save(tmp_path / "checkpoint.npz", leaves), write_config(tmp_path, config)
    convert_clip_jax.convert(source, tmp_path / "out", config=file, tokenizer=write_tokenizer(tmp_path / "tokenizer"))

    def score(images, text):
        ids = np.array([[clip_jax.BOS, *text]])
        return clip_jax.score(config, leaves, clip_jax.encode(config, leaves, images), ids, np.ones_like(ids))

    return score


def prior_token_by_token(model, text: list[int]) -> float:
    """log P(text), one forward pass per token."""
    total = 0.0
    for i, token in enumerate(text):
        inputs = torch.tensor([[model.config.decoder_start_token_id, *text[:i]]])
        total += float(model(input_ids=inputs, use_cache=False).logits[0, -1].log_softmax(-1)[token])
    return total


@pytest.mark.parametrize("name", [*BIG_VISION, *CLIP_JAX])
@torch.no_grad()
def test_the_pipeline_scores_as_numpy_does_pair_by_pair(tmp_path, name):
    score = convert(tmp_path, name)
    pixels = np.random.default_rng(3).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    photos = [PIL.Image.fromarray(array) for array in pixels]
    model = load_model(IGCaptionerForConditionalGeneration, tmp_path / "out")
    tokenizer = load_processor(tmp_path / "out").tokenizer
    texts = [tokenizer(label)["input_ids"] for label in LABELS]
    assert len(set(map(len, texts))) > 1  # so that some are padded
    captions = np.concatenate([score(pixels / 127.5 - 1, text) for text in texts], axis=1)
    priors = np.array([prior_token_by_token(model, text) for text in texts])
    classify = pipeline(
        "zero-shot-image-classification",
        model=str(tmp_path / "out"),
        pipeline_class=IGZeroShotImageClassificationPipeline,
        trust_remote_code=False,
    )
    for weight in (None, 1.0):
        gain = captions - (weight or 0.0) * priors  # a converted model ranks by likelihood unless told otherwise
        results = classify(photos, LABELS, hypothesis_template="{}", return_log_likelihoods=True, prior_weight=weight)
        assert_clear_order(torch.from_numpy(gain))
        for i, entries in enumerate(results):
            assert [entry["label"] for entry in entries] == [LABELS[j] for j in np.argsort(-gain[i])]
            for entry in entries:
                j = LABELS.index(entry["label"])
                assert entry["caption_log_likelihood"] == pytest.approx(captions[i, j], abs=1e-4)
                assert entry["prior_log_likelihood"] == pytest.approx(priors[j], abs=1e-4)
                assert entry["information_gain"] == pytest.approx(gain[i, j], abs=2e-4)


@pytest.mark.parametrize("name", [*BIG_VISION, *CLIP_JAX])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_changes_no_caption(tmp_path, name, beams):
    convert(tmp_path, name)
    model = load_model(IGCaptionerForConditionalGeneration, tmp_path / "out")
    pixel_values = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"pixel_values": pixel_values, "num_beams": beams, "do_sample": False}
    arguments |= {"output_logits": True, "return_dict_in_generate": True, "min_new_tokens": 6}
    cached, uncached = (model.generate(**arguments, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences) and cached.sequences.shape[1] > 6
    assert bool((cached.sequences[:, 0] == model.config.decoder_start_token_id).all())
    for one, other in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["big_vision", "clip_jax"])
def test_the_recipe_tunes_the_decoder_of_a_converted_model(tmp_path, name):
    convert(tmp_path, name)
    with tarfile.open(tmp_path / "captions-0.tar", "w") as archive:
        for index in range(12):
            photo = io.BytesIO()
            PIL.Image.new("RGB", (8, 8), (20 * index, 0, 0)).save(photo, "PNG")
            for suffix, content in (("png", photo.getvalue()), ("txt", LABELS[index % 3].encode())):
                entry = tarfile.TarInfo(f"{index}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    paths = {"init_from": "out", "tokenizer": "out", "output_dir": "tuned"}
    small = {"data.max_length": 8, "data.num_workers": 0, "batch_size": 8, "max_steps": 2, "evaluation.every_steps": 0}
    small |= {"micro_batches": 1, "log_every_steps": 1, "data.sources.captions.holdout_fraction": 0}
    overrides = {"data_root": tmp_path, **{key: tmp_path / folder for key, folder in paths.items()}, **small}
    final = train(load_config(IG_TUNE, [part for key, value in overrides.items() for part in (f"--{key}", str(value))]))
    before, after = (load_model(IGCaptionerForConditionalGeneration, folder) for folder in (tmp_path / "out", final))
    assert after.config.to_dict()["text_config"] == before.config.to_dict()["text_config"]
    for key, weight in after.state_dict().items():
        assert torch.equal(weight, before.state_dict()[key]) == ("vision_model" in key), key
    rows = [json.loads(line) for line in (tmp_path / "tuned" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(np.isfinite(row["unconditional_loss"]) for row in rows)
    ids = [load_processor(folder).tokenizer("a cat")["input_ids"] for folder in (tmp_path / "out", final)]
    assert ids[0] == ids[1]
