"""Every mistake in a configuration ends with one sentence that says where it is and what would be right."""

import json
from pathlib import Path

import pytest

from deploy.config import Config, read_config, read_settings, write_settings
from deploy.exits import ConfigError
from tests.daemon import run_cli
from tests.deploy.conftest import Cli

MODELS = "tests.deploy.user_models"
GOOD_ARGS = "args = { inputs = 1, outputs = 1, hidden = [8] }"
BUILD = 'build = "trainers.models:mlp"'

MISTAKES: dict[str, tuple[str, str, str]] = {
    # name: (what stands in the file, what is put in its place, what the error says after the file's name)
    "section": ("[meta]", "[meat]", "there is no section [meat]: did you mean 'meta'? known: checkpoint, engine,"),
    "key": ("batch = 2", "bach = 2", "[meta] has no key 'bach': did you mean 'batch'? known: batch, clip_norm,"),
    "deep key": ("[serve]", "[serve]\nlimits = { backlogg = 1 }", "[serve.limits] has no key 'backlogg': did you mean"),
    "key of no section": (
        "[run]",
        "seed = 1\n[run]",
        "seed = 1 stands in no section: put it below one of [run], [task]",
    ),
    "text for number": ("batch = 2", 'batch = "2"', "[meta] batch = '2': must be a whole number"),
    "bool for number": ("batch = 2", "batch = true", "[meta] batch = true: must be a whole number"),
    "fraction for number": ("batch = 2", "batch = 2.5", "[meta] batch = 2.5: must be a whole number"),
    "number for text": (BUILD, "build = 3", "[model] build = 3: must be a string"),
    "number for list": ("x_shape = [1]", "x_shape = 1", "[task] x_shape = 1: must be a list"),
    "too small": ("batch = 2", "batch = 0", "[meta] batch = 0: must be at least 1"),
    "not above zero": ("batch = 2", "lr = 0.0", "[meta] lr = 0.0: must be greater than 0"),
    "infinite": ("batch = 2", "lr = inf", "[meta] lr = inf: must be a finite number"),
    "NaN": (GOOD_ARGS, "args = { inputs = nan }", "[model.args] inputs = nan: must be a finite number"),
    "inside a list": ("x_shape = [1]", "x_shape = [1, 0]", "[task] x_shape[1] = 0: must be at least 1"),
    "choice": ('y = "real"', 'y = "reel"', "[task] y = 'reel': must be 'class' or 'real'"),
    "no path": ('path = "', 'seed = 1 # "', '[run] path is missing, for example path = "runs/first"'),
    "no build": (BUILD, "", '[model] build is missing, for example build = "trainers.models:mlp"'),
    "class without ways": ('y = "real"\ny_shape = [1]', 'y = "class"', "[task] ways is None; y = 'class' needs the"),
    "rule": ("[inner]", '[inner]\nrule = "sdg"', "[inner] rule = 'sdg': did you mean 'sgd'? known: "),
    "rule option": ("[inner]", "[inner]\noptions = { beta = 1 }", "[inner.options] has no key 'beta': it takes none"),
    "glob": ("[inner]", '[inner]\nfast = "head.*"', "[inner] fast = 'head.*' matches none of the weights"),
    "gradient": ("batch = 2", 'gradient = "exakt"', "[meta] gradient = 'exakt': did you mean 'exact'? known: "),
    "replay": ("batch = 2", 'replay = "uniformly"', "[meta] replay = 'uniformly': did you mean 'uniform'?"),
    "optimizer": ("batch = 2", 'optimizer = "adm"', "[meta] no optimizer is called 'adm': did you mean 'adam'?"),
    "engine": ("[serve]", '[engine]\nkind = "lokal"\n[serve]', "[engine] kind = 'lokal': did you mean 'local'?"),
    "device": (
        "[serve]",
        '[engine]\ndevice = "gpu"\n[serve]',
        "[engine] device = 'gpu': RuntimeError: Expected one of",
    ),
    "loss": ('loss = "mse"', 'loss = "mce"', "[model] no loss is called 'mce': did you mean 'mse'?"),
    "no import path": (BUILD, 'build = "trainers.models.mlp"', "is no import path: write it as 'package.module:name'"),
    "no module": (BUILD, 'build = "trayners:mlp"', "[model] 'trayners:mlp' cannot be imported: No module named"),
    "no builder": (BUILD, 'build = "trainers.models:mpl"', "trainers.models has no 'mpl': did you mean mlp"),
    "model argument": (GOOD_ARGS, "args = { input = 1 }", "model.args {'input': 1} do not fit trainers.models:mlp:"),
    "no model": (BUILD + "\n" + GOOD_ARGS, 'build = "builtins:dict"', "builtins:dict returned a dict, not a torch.nn."),
    "model raises": (BUILD + "\n" + GOOD_ARGS, f'build = "{MODELS}:raises"', "[model] KeyError: 'no such layer'"),
    "output": ("outputs = 1", "outputs = 3", "gives an output of shape (4, 3) for 4 samples; [task] y_shape = (1,) ne"),
    "input": (
        "inputs = 1",
        "inputs = 7",
        "[model] trainers.models:mlp with loss 'mse' does not take a task of x_shape",
    ),
    "loss of classes": (
        'loss = "mse"',
        'loss = "cross_entropy"',
        "'cross_entropy' is for classes, but [task] y = 'real'",
    ),
    "batch norm": (
        BUILD + "\n" + GOOD_ARGS,
        f'build = "{MODELS}:running_statistics"',
        "the layer '1' (BatchNorm1d) kee",
    ),
    "dropout": (
        BUILD + "\n" + GOOD_ARGS,
        f'build = "{MODELS}:dropout"',
        "gives another gradient when it is asked again",
    ),
    "deaf": (
        BUILD + "\n" + GOOD_ARGS,
        f'build = "{MODELS}:Deaf"',
        "no weight of tests.deploy.user_models:Deaf has a m",
    ),
    "endless": (BUILD + "\n" + GOOD_ARGS, f'build = "{MODELS}:Endless"', "on a made-up task is nan: it must be finite"),
    "baseline": ('["from_scratch"]', '["scratch"]', "[regret] baselines = 'scratch': did you mean 'from_scratch'?"),
    "baseline is learner": ('["from_scratch"]', '["ftml"]', "[regret] baselines = 'ftml' is the learner that the"),
    "baseline twice": ('["from_scratch"]', '["from_scratch", "from_scratch"]', "names 'from_scratch' more than once"),
    "baseline option": ("steps = 2 }", "stepz = 2 }", "[regret.options.from_scratch] has no key 'stepz': did you mean"),
    "baseline option's type": (
        "{ steps = 2 }",
        '{ steps = "2" }',
        "[regret.options.from_scratch] steps = '2': must be a",
    ),
    "options of nothing": ("options.from_scratch", "options.scratch", "[regret] options = 'scratch': did you mean"),
    "comparator": ("every_rounds = 5\nh", 'comparator = "hindsite"\nh', "[regret] comparator[0] = 'hindsite': must be"),
    "source kind": ("[serve]", '[[source]]\nkind = "htp"\n[serve]', "[source 1] kind = 'htp': did you mean 'http'?"),
    "no source kind": ("[serve]", '[[source]]\nname = "a"\n[serve]', "[source 1] kind is missing: known: files, http,"),
    "source name": (
        "[serve]",
        '[[source]]\nkind = "http"\nname = "a b"\n[serve]',
        "[source 1] name = 'a b': must be le",
    ),
    "source option": (
        "[serve]",
        '[[source]]\nkind = "sinusoid"\ntask = 1\n[serve]',
        "[source 1] has no key 'task': did",
    ),
    "source option's range": (
        "[serve]",
        '[[source]]\nkind = "sinusoid"\ntasks = 0\n[serve]',
        "[source 1] tasks = 0: mu",
    ),
    "source option missing": ("[serve]", '[[source]]\nkind = "files"\n[serve]', "[source 1] folder is missing"),
    "one source table": (
        "[serve]",
        '[source]\nkind = "http"\n[serve]',
        "write each source as a table of its own: [[so",
    ),
    "same source name": ("[serve]", '[[source]]\nkind = "http"\n' * 2 + "[serve]", "two are called 'http': give one"),
    "source of others": (
        "[serve]",
        '[[source]]\nkind = "rainbow_digits"\n[serve]',
        "makes tasks with x_shape = (3, 28,",
    ),
    "source not there": (
        "[serve]",
        '[[source]]\nkind = "files"\nfolder = "/no"\n[serve]',
        "[[source]] files: /no: No su",
    ),
    "exposed": (
        "[serve]",
        '[serve]\nhost = "0.0.0.0"',
        "[serve] host = '0.0.0.0' can be reached by others: give tls_c",
    ),
    "exposed everywhere": ("[serve]", '[serve]\nhost = ""', "[serve] host = '' can be reached by others"),
    "no token file": ("[serve]", '[serve]\ntoken_file = "/no"', "[serve] token_file /no cannot be read: No such file"),
    "key without certificate": ("[serve]", '[serve]\ntls_key = "/no"', "[serve] tls_cert and tls_key go together"),
    "no certificate": ("[serve]", '[serve]\ntls_cert = "/no"\ntls_key = "/no"', "[serve] tls_cert /no cannot be read"),
    "not TOML": ("[run]", "[run", "is not TOML: Expected ']'"),
}


def test_the_configuration_they_are_made_in_is_right(cli: Cli, config: Path) -> None:
    ended = cli("check", config)
    assert (ended.code, ended.err) == (0, "")
    assert "trainers.models:mlp, 25 weights, a finite meta-gradient (exact)" in ended.out.replace("\n", "")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained(cli: Cli, config: Path, mistake: str) -> None:
    right, wrong, told = MISTAKES[mistake]
    assert config.read_text().count(right) == 1, "the mistake is not made"
    config.write_text(config.read_text().replace(right, wrong))
    ended = cli("check", config)
    assert ended.code == 78
    assert ended.err.startswith(f"error: {config}")
    assert told in ended.err
    assert ended.err.count("\n") == 1


def test_all_missing_sections_are_told_at_once(cli: Cli, config: Path) -> None:
    config.write_text("")
    ended = cli("check", config)
    assert ended.code == 78
    assert [line.split(" is missing")[0] for line in ended.err.splitlines()[1:]] == [
        "  section [run]",
        "  section [task]",
        "  section [model]",
    ]


def test_a_value_where_a_section_belongs(cli: Cli, config: Path) -> None:
    config.write_text("meta = 3\n" + config.read_text().replace("[meta]\nbatch = 2", ""))
    assert f"{config}: meta = 3: it must be a table, [meta]" in cli("check", config).err


def test_a_port_that_is_none(cli: Cli, config: Path) -> None:
    ended = cli("check", config, "--set", "serve.port=65536")
    assert (ended.code, ended.err) == (78, f"error: {config}: [serve] port = 65536: must be at most 65535\n")


@pytest.mark.parametrize(
    ("contents", "told"),
    [
        (b" \n", "is empty: put a long random token in it"),
        (b"\xff\xfe", "holds no token: it must be ASCII"),
        (b"two words", "holds more than a token: it must be one word on one line"),
        (b"one\ntwo", "holds more than a token: it must be one word on one line"),
    ],
)
def test_a_token_that_no_header_carries(cli: Cli, config: Path, contents: bytes, told: str) -> None:
    token = config.with_name("token")
    token.write_bytes(contents)
    ended = cli("check", config, "--set", f"serve.token_file={token}")
    assert ended.code == 78
    assert f"{config}: [serve] token_file {token} {told}" in ended.err


def test_a_certificate_that_is_none(cli: Cli, config: Path) -> None:
    ended = cli("check", config, "--set", f"serve.tls_cert={config}", "--set", f"serve.tls_key={config}")
    assert ended.code == 78
    assert f"tls_cert {config} and tls_key {config} must be a PEM certificate and its key" in ended.err


@pytest.mark.parametrize("there", ["missing", "folder", "not text"])
def test_a_file_that_cannot_be_read(cli: Cli, tmp_path: Path, there: str) -> None:
    file = tmp_path if there == "folder" else tmp_path / "x.toml"
    if there == "not text":
        file.write_bytes(b"\xff\xfe")
    ended = cli("serve", file)
    assert ended.code == 78
    told = {"missing": "No such file or directory", "folder": "Is a directory", "not text": "is not TOML: 'utf-8'"}
    assert f"error: {file}" in ended.err
    assert told[there] in ended.err


@pytest.mark.parametrize("override", ["meta.batch", "batch=3", "=3", ".batch=3", "meta.=3", "meta=3", ""])
def test_an_override_that_is_none(cli: Cli, config: Path, override: str) -> None:
    ended = cli("check", config, "--set", override)
    assert ended.code == 78
    assert f"--set {override!r}: write it as section.key=value, for example meta.gradient=reptile" in ended.err


def test_an_override_into_a_value(cli: Cli, config: Path) -> None:
    ended = cli("check", config, "--set", "run.path.deep=3")
    assert (ended.code, "'path' is a value and not a section" in ended.err) == (78, True)


def test_overrides_are_toml_or_plain_text(config: Path) -> None:
    sets = (
        "meta.gradient=reptile",
        "meta.lr=1e-2",
        'inner.fast=["1.*"]',
        "serve.limits={ backlog = 7 }",
        "run.path=a b",
    )
    made = read_config(config, sets)
    assert (made.meta.gradient, made.meta.lr, made.inner.fast) == ("reptile", 0.01, ("1.*",))
    assert (made.serve.limits.backlog, made.run.path) == (7, "a b")
    with pytest.raises(ConfigError, match=r"port = '0\\nx=1'"):
        read_config(config, ("serve.port=0\nx=1",))


def test_a_lone_name_is_a_list_of_one(config: Path) -> None:
    made = read_config(config, ("regret.comparator=hindsight", "regret.baselines=from_scratch", "inner.fast=*"))
    assert (made.regret.comparator, made.regret.baselines, made.inner.fast) == (
        ("hindsight",),
        ("from_scratch",),
        ("*",),
    )


def test_batch_norm_of_the_batch_itself_is_allowed(cli: Cli, config: Path) -> None:
    sets = ("--set", f"model.build={MODELS}:own_statistics", "--set", "model.args={}")
    assert cli("check", config, *sets).code == 0


def test_what_the_trainer_reads_is_what_was_configured(config: Path, tmp_path: Path) -> None:
    made: Config = read_config(config)
    write_settings(tmp_path / "settings.json", made)
    assert read_settings(tmp_path / "settings.json") == made.trainer()
    assert json.loads((tmp_path / "settings.json").read_text())["meta"]["batch"] == 2


@pytest.mark.parametrize("mistake", ["rule", "gradient", "optimizer", "engine", "baseline option's type", "batch norm"])
def test_serve_finds_it_before_it_makes_anything(cli: Cli, config: Path, mistake: str) -> None:
    right, wrong, told = MISTAKES[mistake]
    config.write_text(config.read_text().replace(right, wrong))
    ended = cli("serve", config)
    assert ended.code == 78
    assert told in ended.err
    assert [path.name for path in config.parent.iterdir()] == ["config.toml"]


def test_in_a_process_of_its_own_there_is_one_line_and_no_traceback(config: Path) -> None:
    config.write_text(config.read_text().replace("[inner]", '[inner]\nrule = "sdg"'))
    ended = run_cli("serve", config)
    assert ended.returncode == 78
    assert ended.stderr.startswith(f"error: {config}: [inner] rule = 'sdg': did you mean 'sgd'?")
    assert ended.stderr.count("\n") == 1
