"""What docs/sources.md shows is a configuration, and names every kind and option that a user may want."""

import re
import tomllib
from pathlib import Path

import pytest

from deploy.checks.preflight import open_sources
from deploy.config.config import make_config

PAGE = (Path(__file__).parents[2] / "docs" / "sources.md").read_text(encoding="utf-8")
TOML = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
RUN = {
    "run": {"path": "x"},
    "task": {"x_shape": [1], "y": "real", "y_shape": [1]},
    "model": {"build": "trainers.models:mlp", "args": {"inputs": 1, "outputs": 1}, "loss": "mse"},
}


@pytest.mark.parametrize("hidden", ["", "# "], ids=["whole", "as it is"])
@pytest.mark.parametrize("text", TOML)
def test_each_example_is_a_configuration(text: str, hidden: str) -> None:
    """Both as it stands and with the lines that are commented out."""
    read = tomllib.loads(re.sub(r"(?m)^# (?=\w+ = )", hidden, text))
    assert [one.kind for one in make_config({**RUN, **read}, "page").source] == [one["kind"] for one in read["source"]]


@pytest.mark.parametrize("text", [text for text in TOML if 'kind = "samples"' in text])
def test_rows_are_cut_as_the_examples_say(text: str) -> None:
    """What finds changes is built from its name and its options when the source is opened."""
    assert list(open_sources(make_config({**RUN, **tomllib.loads(text)}, "page"))) == ["samples"]


def test_the_brokers_are_all_there() -> None:
    assert re.findall(r'^kind = "(\w+)"', "".join(TOML), flags=re.MULTILINE)[:3] == ["redis", "kafka", "nats"]
