"""What a server is installed with: the pins that everything is tested with, each by its hash."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parents[1]
AGAIN = "run make requirements"


def read_pins(path: Path) -> dict[str, Requirement]:
    """By name; hashes and comments are none."""
    lines = (line.strip().removesuffix("\\") for line in path.read_text().splitlines())
    pins = [Requirement(line) for line in lines if line and line[0] not in "-#"]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    return {canonicalize_name(pin.name): pin for pin in pins}


SERVER = read_pins(HERE / "recipes/serve/requirements.txt")


def test_a_server_has_the_versions_that_everything_is_tested_with() -> None:
    tested = read_pins(HERE / "constraints.txt")
    for name, pin in SERVER.items():
        if name in tested:
            assert pin.specifier == tested[name].specifier, f"{name}: {AGAIN}"
        else:
            assert pin.marker is not None, f"{name} is wanted here, and not tested: {AGAIN}"


def test_everything_that_a_server_asks_for_is_there() -> None:
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["serve"], *extras["postgres"], *extras["traces"]]
    for requirement in map(Requirement, asked):
        pin = SERVER.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name}: {AGAIN}"
        assert requirement.specifier.contains(str(pin.specifier).removeprefix("==")), AGAIN


def test_each_pin_has_hashes_and_nothing_says_where_from() -> None:
    text = (HERE / "recipes/serve/requirements.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    pins = re.split(r"\n(?=\S)", "\n".join(lines))
    assert len(pins) == len(SERVER)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", pin) for pin in pins)
    assert "://" not in text
    assert "index-url" not in text
    assert not {"torch", "transformers"} & SERVER.keys()
