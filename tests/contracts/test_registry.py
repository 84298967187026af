"""A folder is a registry of its modules."""

import pytest

import online_meta as om
import online_meta.metagrads
from online_meta import registry


def test_a_rule_has_the_name_of_its_file():
    assert "sgd" in registry.names(om.rules)
    assert registry.load(om.rules, "sgd") is om.rules.sgd


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="did you mean 'first_order'"):
        registry.load(online_meta.metagrads, "firstorder")
    with pytest.raises(AttributeError, match="did you mean 'sgd'"):
        om.rules.sdg  # noqa: B018


def test_files_that_begin_with_an_underscore_are_not_listed(tmp_path, monkeypatch):
    (tmp_path / "shelf").mkdir()
    for name in ("__init__", "_shared", "open"):
        (tmp_path / "shelf" / f"{name}.py").write_text("open = 'opened'\n")
    monkeypatch.syspath_prepend(tmp_path)
    import shelf

    assert registry.names(shelf) == ["open"]
    assert registry.load(shelf, "open") == "opened"
    with pytest.raises(ValueError, match="known: open"):
        registry.load_module(shelf, "_shared")
