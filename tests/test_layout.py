"""The rules of the layout: import arrows run one way, and what travels as remote code can travel."""

import ast
import re
import sys
from pathlib import Path

import pytest

from ig_captioner.configuration_ig_captioner import AUTO_MAP, CUSTOM_PIPELINES, REMOTE_CODE_FILES


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ig_captioner"
# each remote-code file may import only those before it; modeling imports all
READING_ORDER = [
    "compat_ig_captioner",
    "input_rules",
    "vision_ig_captioner",
    "configuration_ig_captioner",
    "information_gain",
    "text_rules",
    "encoder_ig_captioner",
    "decoder_ig_captioner",
    "processing_ig_captioner",
    "label_trie",
    "compiled_labels",
    "scoring_ig_captioner",
    "pipeline_ig_captioner",
    "modeling_ig_captioner",
]
REMOTE_CODE_IMPORTS = {
    "torch",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "PIL",
    "numpy",
    *sys.stdlib_module_names,
}


def imports(path: Path) -> list[tuple[int, str]]:
    """`(level, module)` of every import in a file; level 0 is absolute."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def test_the_list_of_remote_code_is_complete():
    assert sorted(REMOTE_CODE_FILES) == sorted(f"{name}.py" for name in READING_ORDER)
    implementations = [*AUTO_MAP.values(), *(task["impl"] for task in CUSTOM_PIPELINES.values())]
    for module, name in (implementation.split(".") for implementation in implementations):
        assert f"class {name}(" in (PACKAGE / f"{module}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", READING_ORDER)
def test_remote_code_imports_little_and_only_what_comes_before(name):
    for level, module in imports(PACKAGE / f"{name}.py"):
        if level == 0:
            assert module.split(".")[0] in REMOTE_CODE_IMPORTS, module
        else:
            assert level == 1 and module in READING_ORDER[: READING_ORDER.index(name)], module


@pytest.mark.parametrize("name", READING_ORDER)
def test_no_line_of_prose_looks_like_a_relative_import(name):
    """The code that copies remote files finds imports with a regular expression, in docstrings too."""
    text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
    matched = re.findall(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+))", text, flags=re.MULTILINE)
    assert {module for pair in matched for module in pair if module} <= set(READING_ORDER)


def test_a_model_file_brings_all_others_along():
    assert set(READING_ORDER[:-1]) == {
        module for level, module in imports(PACKAGE / "modeling_ig_captioner.py") if level
    }


ARROWS = {  # folder: what it must not import
    "ig_captioner": {"training", "conversion", "tests", "benchmarks", "examples"},
    "training": {"conversion", "tests", "benchmarks", "examples"},
    "conversion": {"training", "tests", "benchmarks", "examples"},
}


@pytest.mark.parametrize("folder", ARROWS)
def test_import_arrows_run_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for level, module in imports(path):
            assert level or module.split(".")[0] not in ARROWS[folder], f"{path.name} imports {module}"
            assert level or folder != "ig_captioner" or module.split(".")[0] != "ig_captioner", path.name
