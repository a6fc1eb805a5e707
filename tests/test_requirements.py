"""setup.cfg, the pinned versions and the lowest versions agree."""

import configparser
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).parent.parent


def requirements() -> dict[str, Requirement]:
    """Of the package with its extra `test`, by name."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    lines = f"{config['options']['install_requires']}\n{extras['test']}".splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {normalised(requirement.name): requirement for requirement in found}


def pins(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normalised(name): Version(version) for name, version in pairs}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_every_requirement_is_pinned_within_its_bounds(file):
    pinned = pins(file)
    assert pinned.keys() >= requirements().keys()
    for name, requirement in requirements().items():
        assert pinned[name] in requirement.specifier, name


def test_the_lowest_versions_are_the_lower_bounds():
    lowest = pins("constraints-lowest.txt")
    lowest.pop("torch")  # of which one release only has a small build
    for name, version in lowest.items():
        bounds = [Version(bound.version) for bound in requirements()[name].specifier if bound.operator == ">="]
        assert bounds == [version], name


def test_no_other_torch_is_installed():
    assert len({pins(f"constraints{name}.txt")["torch"] for name in ("", "-newest", "-lowest")}) == 1
