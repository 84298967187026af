"""The page on streams without boundaries names every detector and likelihood."""

import inspect
import re

import pytest

from online_meta.testing.test_segmentation import LIKELIHOODS, WAYS
from tests.house.sources import ROOT


@pytest.mark.parametrize("name", [*WAYS, *LIKELIHOODS])
def test_the_page_lists_every_name_with_its_options_and_defaults(name):
    page = (ROOT / "docs" / "concepts" / "streams-without-boundaries.md").read_text(encoding="utf-8")
    (listed,) = re.findall(rf"(?m)^\| `{name}` \| .* \| (.*) \|$", page)
    parameters = inspect.signature({**WAYS, **LIKELIHOODS}[name]).parameters.values()
    optional = [one for one in parameters if one.default is not one.empty]
    assert listed == ", ".join(f"{one.name} {one.default}" for one in optional)
