"""The examples in the guides on sources are valid configurations and cover every source kind."""

import re
import tomllib

import pytest

import streams.sources
from deploy.checks.preflight import open_sources
from deploy.config.config import make_config
from online_meta import registry
from tests.docs.pages import code_of, read_page

PAGES = ("how-to/brokers.md", "how-to/sources.md", "how-to/rows.md", "how-to/tables.md")
TOML = [text for page in PAGES for text in code_of(read_page(page), "toml")]
RUN = {
    "run": {"path": "x"},
    "task": {"x_shape": [1], "y": "real", "y_shape": [1]},
    "model": {"build": "trainers.models:mlp", "args": {"inputs": 1, "outputs": 1}, "loss": "mse"},
}


@pytest.mark.parametrize("hidden", ["", "# "], ids=["whole", "as it is"])
@pytest.mark.parametrize("text", TOML)
def test_each_example_is_a_configuration(text: str, hidden: str) -> None:
    """Each example is valid as printed, and with its commented-out lines active."""
    read = tomllib.loads(re.sub(r"(?m)^# (?=\w+ = )", hidden, text))
    read = {**RUN, **read}
    assert [one.kind for one in make_config(read, "page").source] == [one["kind"] for one in read["source"]]


@pytest.mark.parametrize("text", [text for text in TOML if 'kind = "samples"' in text])
def test_the_row_examples_open_their_source(text: str) -> None:
    """The change detector is built from its name and options when the source is opened."""
    assert list(open_sources(make_config({**RUN, **tomllib.loads(text)}, "page"))) == ["samples"]


def test_every_broker_has_an_example() -> None:
    assert re.findall(r'^kind = "(\w+)"', "".join(TOML), flags=re.MULTILINE)[:3] == ["redis", "kafka", "nats"]


def test_every_kind_has_an_example() -> None:
    named = set(re.findall(r'\bkind = "(\w+)"', "".join(TOML))) - {
        "number",
        "category",
        "date",
        "text",
    }  # kinds of columns
    assert named | {"rainbow_digits"} == set(registry.names(streams.sources))
    assert '"rainbow_digits"' in "".join(TOML)
