"""Every recipe in the tree loads, and describes a model that can be built."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ig_captioner import IGCaptionerForConditionalGeneration
from training.build import build_model_config
from training.config import load_config


RECIPES = sorted((Path(__file__).parent.parent / "training" / "configs").glob("*.yaml"))


class Tokens(SimpleNamespace):
    """What a configuration needs to know of a tokenizer."""

    def __len__(self) -> int:
        return 50


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    config = load_config(str(path), [])
    tokens = Tokens(pad_token_id=0, bos_token_id=1, eos_token_id=2, mask_token_id=3)
    model_config = build_model_config(config.model, tokens)
    with torch.device("meta"):
        model = IGCaptionerForConditionalGeneration(model_config)
    assert config.data.max_length <= model.config.text_config.max_position_embeddings
    assert abs(sum(source.weight for source in config.data.sources.values()) - 1) < 1e-9
