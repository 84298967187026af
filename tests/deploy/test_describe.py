"""The JSON Schema and the example configuration agree with the code that reads configurations."""

import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest

from deploy.config.config import Config, make_config
from deploy.config.describe import list_sections, make_example, make_schema
from deploy.exits import ConfigError
from tests.deploy.conftest import Cli
from tests.docs.pages import code_of
from tests.house.sources import ROOT

VALIDATOR = jsonschema.Draft202012Validator(make_schema(Config))
BASE = tomllib.loads(make_example(Config))
ROWS = {"kind": "rows", "path": "a.csv", "x": ["a"], "y": ["b"], "group_by": "k"}
WRONG = {
    "unknown section": {"inna": {}},
    "unknown key": {"inner": {"step": 1}},
    "out of range": {"meta": {"batch": 0}},
    "wrong type": {"engine": {"threads": "two"}},
    "unknown rule": {"inner": {"rule": "sdg"}},
    "option of another rule": {"inner": {"rule": "momentum", "options": {"b1": 0.9}}},
    "option of the default rule": {"inner": {"options": {"momentum": 0.9}}},
    "type of an option": {"regret": {"baselines": ["moml"], "options": {"moml": {"alpha": "x"}}}},
    "missing option": {"meta": {"schedule": "cosine", "schedule_options": {}}},
    "unknown comparator": {"regret": {"comparator": ["hindsite"]}},
    "unknown source": {"source": [{"kind": "htp"}]},
    "key of a source": {"source": [{"kind": "sinusoid", "task": 3}]},
    "key of a column": {"source": [{**ROWS, "columns": {"a": {"kind": "number", "missng": "mean"}}}]},
    "path of one's own": {"inner": {"rule": "mine.rule"}},
    "unknown learner": {"learner": [{"kind": "ftlm"}]},
    "name of a learner": {"learner": [{"kind": "ftml", "name": "a b"}]},
    "key of a learner": {"learner": [{"kind": "ftml", "meta": {"lrr": 1}}]},
    "key of the run": {"learner": [{"kind": "ftml", "meta": {"max_skipped": 1}}]},
    "rule of a learner": {"learner": [{"kind": "ftml", "inner": {"rule": "sdg"}}]},
    "option of a learner": {"learner": [{"kind": "moml", "options": {"alfa": 1.0}}]},
}
RIGHT = {
    "nothing more": {},
    "a lone string": {"regret": {"comparator": "dynamic", "baselines": "moml"}},
    "options": {"inner": {"rule": "momentum", "options": {"momentum": 0.5}}},
    "an import path": {"inner": {"rule": "mine:rule", "options": {"any": 1}}},
    "options of an import path": {"regret": {"options": {"mine:baseline": {"any": 1}}}},
    "a source with declared columns": {"source": [{**ROWS, "columns": {"a": {"kind": "category", "values": ["b"]}}}]},
    "a source": {"source": [{"kind": "sinusoid", "name": "waves", "tasks": 3}]},
    "a source of one's own": {"source": [{"kind": "mine:waves", "any": 3}]},
    "learners": {
        "learner": [
            {"kind": "ftml", "meta": {"lr": 0.1}, "inner": {"rule": "momentum", "options": {"momentum": 0.5}}},
            {"kind": "moml", "name": "moml.2", "options": {"alpha": 2.0}},
            {"kind": "mine:learner", "options": {"any": 1}},
        ]
    },
    "a schedule": {"meta": {"schedule": "cosine", "schedule_options": {"rounds": 100}}},
}
PAGES = sorted({*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"})


def uncomment(text: str) -> str:
    """Turn each default, which is commented out, into a key."""
    return re.sub(r"(?m)^# (\w+ = )", r"\1", text)


def test_the_schema_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(VALIDATOR.schema)


@pytest.mark.parametrize("name", RIGHT)
def test_the_schema_allows(name: str) -> None:
    VALIDATOR.validate(BASE | RIGHT[name])


@pytest.mark.parametrize("name", WRONG)
def test_the_schema_forbids_what_reading_refuses(name: str) -> None:
    assert not VALIDATOR.is_valid(BASE | WRONG[name])
    with pytest.raises(ConfigError):
        make_config(BASE | WRONG[name], "here.toml")


def test_the_schema_allows_the_demo_and_every_complete_configuration_in_the_docs() -> None:
    texts = [(ROOT / "deploy" / "demo.toml").read_text()]
    texts += [text for page in PAGES for text in code_of(page.read_text(encoding="utf-8"), "toml")]
    whole = [read for read in map(tomllib.loads, texts) if {"run", "task", "model"} <= read.keys()]
    assert len(whole) >= 3
    for read in whole:
        VALIDATOR.validate(json.loads(json.dumps(read)))


def test_the_example_holds_every_key_at_its_default() -> None:
    text = make_example(Config)
    config = make_config(tomllib.loads(text), "example.toml")
    assert config == make_config(tomllib.loads(uncomment(text)), "example.toml")
    for section, _, keys in list_sections(Config):
        assert f"[{section}]" in text
        for key in keys:
            assert re.search(rf"(?m)^(# )?{key.name} (=|is not set)", text), f"{section}.{key.name}"


def test_every_key_is_described() -> None:
    missing = [
        f"{key.section}.{key.name}" for _, _, keys in list_sections(Config) for key in keys if not key.description
    ]
    assert not missing


def test_the_command_prints_both(cli: Cli, tmp_path: Path) -> None:
    assert json.loads(cli("config", "--schema").out) == VALIDATOR.schema
    assert cli("config", "--example").out == make_example(Config)
    ended = cli("config")
    assert ended.code == 64
    assert "--schema" in ended.err
    assert "--example" in ended.err
