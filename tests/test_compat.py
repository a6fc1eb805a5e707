"""The supported versions of transformers: one name or the other for the cache, and nothing private but in one file."""

import ast
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import ig_captioner
from ig_captioner.compat_ig_captioner import CACHE_NAME, CACHE_NAMES, rename_cache
from tiny import BOS, random_images, tiny_model


pytestmark = pytest.mark.core
IDS = torch.tensor([[BOS, 11, 22, 33]])
# where transformers' documentation describes what this package imports
DOCUMENTED_MODULES = {
    "transformers",
    "transformers.activations",
    "transformers.cache_utils",
    "transformers.image_transforms",
    "transformers.image_utils",
    "transformers.masking_utils",
    "transformers.modeling_outputs",
    "transformers.modeling_utils",
    "transformers.utils",
}
NAMED_TUPLES = {"_asdict", "_replace"}
# what tells whether a weight has changed, and whether hooks stand between a module and its result
TORCH_PRIVATE = {"_version", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks"}


@pytest.mark.parametrize("level", ["decoder", "base", "head"])
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_forward_takes_and_fills_the_cache_by_either_name(level, name):
    model = tiny_model("cross")
    forward = {"decoder": model.model.decoder, "base": model.model, "head": model}[level]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = forward(input_ids=IDS)[0]
        start = forward(input_ids=IDS[:, :3], **{name: cache})
        end = forward(input_ids=IDS[:, 3:], **{name: cache})[0]
    assert start[CACHE_NAME] is cache and start.past_key_values is cache
    assert cache.get_seq_length() == IDS.shape[1]
    torch.testing.assert_close(end, whole[:, 3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_generate_goes_on_from_a_cache_by_either_name(name):
    model, images = tiny_model(), random_images(1)
    length = {"max_new_tokens": 3, "min_new_tokens": 3}
    start = model.generate(pixel_values=images, return_dict_in_generate=True, use_cache=True, **length)
    cache = start[CACHE_NAME]
    assert cache.get_seq_length() == start.sequences.shape[1] - 1
    end = model.generate(start.sequences, pixel_values=images, **{name: cache}, **length)
    assert torch.equal(end, model.generate(pixel_values=images, max_new_tokens=6, min_new_tokens=6))


def test_one_cache_by_two_names_is_refused():
    with pytest.raises(ValueError, match="two names of one argument"):
        tiny_model()(input_ids=IDS, cache=DynamicCache(), past_key_values=DynamicCache())


def test_renaming_leaves_other_arguments_alone():
    assert rename_cache({"use_cache": True, "past_key_values": None}, "cache") == {"use_cache": True}
    assert rename_cache({"past_key_values": 1, "x": 2}, "cache") == {"x": 2, "cache": 1}
    assert rename_cache({"cache": 1}, "past_key_values") == {"past_key_values": 1}


def test_a_cache_in_a_training_step_with_checkpointing_is_refused():
    """Layers run twice there, and would write what they read into the cache twice."""
    model = tiny_model()
    model.activation_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing runs layers twice"):
        model(input_ids=IDS, cache=DynamicCache())


def test_generation_in_training_mode_with_checkpointing_uses_the_cache():
    model, images = tiny_model(), random_images(1)
    length = {"max_new_tokens": 5, "min_new_tokens": 5}
    expected = model.generate(pixel_values=images, use_cache=False, **length)
    model.activation_checkpointing_enable()
    model.train()
    assert torch.equal(model.generate(pixel_values=images, **length), expected)


def source_trees() -> dict[str, ast.AST]:
    """The syntax tree of each file of the package but the one that may use what is not public."""
    paths = Path(ig_captioner.__file__).parent.rglob("*.py")
    return {
        path.name: ast.parse(path.read_text(encoding="utf-8"))
        for path in paths
        if path.name != "compat_ig_captioner.py"
    }


def test_undocumented_modules_of_transformers_are_imported_in_one_place():
    for name, tree in source_trees().items():
        for node in ast.walk(tree):
            modules = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                assert module.split(".")[0] != "transformers" or module in DOCUMENTED_MODULES, f"{name}: {module}"


def test_private_names_of_transformers_are_used_in_one_place():
    trees = source_trees()
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                assert node.attr in own | NAMED_TUPLES | TORCH_PRIVATE, f"{name}:{node.lineno} uses {node.attr}"
