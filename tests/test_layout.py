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


# Folders and files beside them, and what each may import beside itself; a file that is not named may be imported by all
# but the remote-code files. `ig_captioner/__init__.py` names what the package offers, and nothing in it imports that.
PACKAGE_FOLDERS = {  # a folder in another before that
    "ig_captioner.data.ray": {"ig_captioner.data", "ig_captioner.captioners"},
    "ig_captioner.data": set(),
    "ig_captioner.captioners": {"ig_captioner.data"},
    "ig_captioner.evaluation": {"ig_captioner.data", "ig_captioner.captioners"},
    "ig_captioner.demo": {"ig_captioner.data", "ig_captioner.captioners"},
    "ig_captioner.cli": {
        *("ig_captioner.data", "ig_captioner.captioners", "ig_captioner.evaluation", "ig_captioner.demo"),
        "ig_captioner.data.ray",
    },
}
ENTRANCES = {"ig_captioner.__main__", "ig_captioner.api"}  # `api.py` names what the package offers, from all folders
REPORTS = {"ig_captioner.evaluation.report"}  # of an evaluation, which cards and releases read
ARROWS = {  # folder: what it may import of the repository
    "ig_captioner": set(),
    "training": {"ig_captioner"},
    "conversion": {"ig_captioner"},
    "metrics": set(),
}
REPOSITORY = {*ARROWS, "tests", "benchmarks", "examples", "docs"}


def modules_below(*folders: str) -> dict[str, Path]:
    """Paths of all files by the names that they are imported under."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


MODULES = modules_below(*ARROWS)


def imported_modules(name: str) -> set[str]:
    """What a file imports of the files in `MODULES`, wherever in it."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return found & MODULES.keys() - {name}


def folder_of(name: str) -> str | None:
    """The folder of the package that a file is in, if it is in one."""
    return next((folder for folder in PACKAGE_FOLDERS if name == folder or name.startswith(f"{folder}.")), None)


def test_no_circles_between_files():
    imports_of = {name: imported_modules(name) for name in MODULES}
    while free := [name for name, others in imports_of.items() if not others & imports_of.keys()]:
        for name in free:
            del imports_of[name]
    assert not imports_of, f"each of these imports another of them: {sorted(imports_of)}"


@pytest.mark.parametrize("folder", ARROWS)
def test_import_arrows_run_one_way(folder):
    forbidden = REPOSITORY - ARROWS[folder] - {folder}
    for path in (ROOT / folder).rglob("*.py"):
        for level, module in imports(path):
            assert level or module.split(".")[0] not in forbidden, f"{path.name} imports {module}"
            assert level or folder != "ig_captioner" or module.split(".")[0] != "ig_captioner", path.name


def test_arrows_between_the_folders_of_the_package():
    for name in MODULES:
        if not name.startswith("ig_captioner.") or name in ENTRANCES:
            continue
        own, imported = folder_of(name), imported_modules(name)
        assert "ig_captioner" not in imported, f"{name} imports the package itself, not the file of a name"
        others = {folder_of(other) for other in imported - REPORTS} - {own, None}
        assert others <= PACKAGE_FOLDERS.get(own, set()), f"{name} imports {sorted(others)}"


def test_every_folder_is_known():
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE, PACKAGE / "data" / "prompts"}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} == set(PACKAGE_FOLDERS)


def test_contributing_has_a_row_for_every_folder_and_the_reading_order():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folders = [folder.replace(".", "/") for folder in (*ARROWS, *PACKAGE_FOLDERS)]
    assert [folder for folder in folders if f"| `{folder}/` |" not in text] == []
    assert re.findall(r"^\d+\. `(\w+)\.py`", text, flags=re.MULTILINE) == READING_ORDER
    for path in re.findall(r"`(ig_captioner/[\w/]+\.py)`", text):
        assert (ROOT / path).is_file(), path
