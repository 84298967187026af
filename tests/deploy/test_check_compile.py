"""``online-meta check --compile`` compiles the programs of a run before its first round."""

from dataclasses import replace
from pathlib import Path

import pytest

from deploy.commands._programs import share_programs
from deploy.config.config import read_config
from tests.deploy.conftest import Cli
from tests.support.compiler import Compiler
from tests.support.daemon import write_sinusoid
from trainers.settings import EngineSettings

SOURCE = """
[[source]]
kind = "sinusoid"
"""
ALONE = ("--set", "regret.baselines=[]", "--set", "regret.comparator=[]", "--set", "meta.batch=4")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Programs are compiled by a compiler of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return Compiler(tmp_path, monkeypatch)


def test_a_check_fills_the_cache_with_the_programs_of_the_run(cli: Cli, compiler: Compiler, tmp_path: Path) -> None:
    config = write_sinusoid(tmp_path, SOURCE)
    ended = cli("check", "--compile", config, *ALONE)
    assert ended.code == 0, ended.err
    (line,) = [line for line in ended.out.splitlines() if line.startswith("programs")]
    assert line.startswith("programs ftml, support x float32[")
    assert line.endswith(": compiled")
    assert len([*(tmp_path / "caches/online-meta/programs").glob("*.pt2")]) == compiler.count == 1
    assert cli("check", "--compile", config, *ALONE).out.splitlines()[-1].endswith(": found in the cache")
    assert compiler.count == 1
    (tmp_path / "other").mkdir(mode=0o700)
    cli("check", "--compile", config, *ALONE, "--set", f"engine.programs={tmp_path / 'other'}")
    assert compiler.count == 2


def test_the_cache_is_in_the_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(write_sinusoid(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert share_programs(config).engine.programs == str(tmp_path / "caches/online-meta/programs")
    for home in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        assert share_programs(config).engine.programs == str(Path.home() / ".cache/online-meta/programs")
    for own in ("", "/mine"):
        assert share_programs(replace(config, engine=EngineSettings(programs=own))).engine.programs == own


def test_a_check_says_why_it_compiles_nothing(cli: Cli, compiler: Compiler, tmp_path: Path) -> None:
    config = write_sinusoid(tmp_path)
    assert "no task is known yet" in cli("check", "--compile", config, *ALONE).out
    assert "programs" not in cli("check", config, *ALONE).out
    assert "compiles nothing" in cli("check", "--compile", config, *ALONE, "--set", "engine.batching=loop").out
    ended = cli("check", "--compile", config, *ALONE, "--set", 'engine.programs=""')
    assert (ended.code, "there is no folder for compiled programs" in ended.err) == (78, True)
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o755)
    ended = cli("check", "--compile", config, *ALONE, "--set", f"engine.programs={tmp_path / 'open'}")
    assert ended.code == 78
    assert "chmod 700" in ended.err
    assert compiler.count == 0
