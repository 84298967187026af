"""Every mistake in a configuration ends with one sentence that names the place and the valid values."""

import json
from pathlib import Path

import pytest

from deploy.config.config import Config, make_config, read_config, read_settings, write_settings
from deploy.exits import ConfigError
from online_meta.learners import MemoryReplayBuffer
from tests.deploy.conftest import Cli
from tests.deploy.mistakes import BUILD, GOOD_ARGS, MISTAKES, MODELS
from tests.support.daemon import run_cli
from trainers.build import build_context
from trainers.learner_settings import list_learners


def test_the_configuration_without_mistakes_is_valid(cli: Cli, config: Path) -> None:
    ended = cli("check", config)
    assert (ended.code, ended.err) == (0, "")
    assert "trainers.models:mlp, 25 weights, a finite meta-gradient (exact)" in ended.out.replace("\n", "")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained(cli: Cli, config: Path, mistake: str) -> None:
    right, wrong, message = MISTAKES[mistake]
    assert config.read_text().count(right) == 1, "the text to replace must occur once"
    config.write_text(config.read_text().replace(right, wrong))
    ended = cli("check", config)
    assert ended.code == 78
    assert ended.err.startswith(f"error: {config}")
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_all_missing_sections_are_reported_at_once(cli: Cli, config: Path) -> None:
    config.write_text("")
    ended = cli("check", config)
    assert ended.code == 78
    assert [line.split(" is missing")[0] for line in ended.err.splitlines()[1:]] == [
        "  section [run]",
        "  section [task]",
        "  section [model]",
    ]


def test_a_value_in_place_of_a_section(cli: Cli, config: Path) -> None:
    config.write_text("meta = 3\n" + config.read_text().replace("[meta]\nbatch = 2", ""))
    assert f"{config}: meta = 3: it must be a table, [meta]" in cli("check", config).err


def test_an_invalid_port(cli: Cli, config: Path) -> None:
    ended = cli("check", config, "--set", "serve.port=65536")
    assert (ended.code, ended.err) == (78, f"error: {config}: [serve] port = 65536: must be at most 65535\n")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b" \n", "is empty: put a long random token in it"),
        (b"\xff\xfe", "holds no token: it must be ASCII"),
        (b"two words", "holds more than a token: it must be one word on one line"),
        (b"one\ntwo", "holds more than a token: it must be one word on one line"),
    ],
)
def test_a_token_that_is_invalid_in_a_header(cli: Cli, config: Path, contents: bytes, message: str) -> None:
    token = config.with_name("token")
    token.write_bytes(contents)
    ended = cli("check", config, "--set", f"serve.token_file={token}")
    assert ended.code == 78
    assert f"{config}: [serve] token_file {token} {message}" in ended.err


def test_an_invalid_certificate(cli: Cli, config: Path) -> None:
    ended = cli("check", config, "--set", f"serve.tls_cert={config}", "--set", f"serve.tls_key={config}")
    assert ended.code == 78
    assert f"tls_cert {config} and tls_key {config} must be a PEM certificate and its key" in ended.err


@pytest.mark.parametrize("there", ["missing", "folder", "not text"])
def test_an_unreadable_file(cli: Cli, tmp_path: Path, there: str) -> None:
    file = tmp_path if there == "folder" else tmp_path / "x.toml"
    if there == "not text":
        file.write_bytes(b"\xff\xfe")
    ended = cli("serve", file)
    assert ended.code == 78
    message = {"missing": "No such file or directory", "folder": "Is a directory", "not text": "is not TOML: 'utf-8'"}
    assert f"error: {file}" in ended.err
    assert message[there] in ended.err


@pytest.mark.parametrize("override", ["meta.batch", "batch=3", "=3", ".batch=3", "meta.=3", "meta=3", ""])
def test_an_invalid_override(cli: Cli, config: Path, override: str) -> None:
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


def test_a_single_name_is_a_list_of_one(config: Path) -> None:
    made = read_config(config, ("regret.comparator=hindsight", "regret.baselines=from_scratch", "inner.fast=*"))
    assert (made.regret.comparator, made.regret.baselines, made.inner.fast) == (
        ("hindsight",),
        ("from_scratch",),
        ("*",),
    )


def test_batch_norm_with_batch_statistics_is_allowed(cli: Cli, config: Path) -> None:
    sets = ("--set", f"model.build={MODELS}:own_statistics", "--set", "model.args={}")
    assert cli("check", config, *sets).code == 0


@pytest.mark.parametrize("gradient", ["exact", "first_order", "reptile"])
def test_a_declared_surrogate_gradient_is_accepted_in_a_configuration(cli: Cli, config: Path, gradient: str) -> None:
    text = config.read_text().replace(BUILD + "\n" + GOOD_ARGS, f'build = "{MODELS}:Rounded"')
    config.write_text(text.replace("[meta]", f'[meta]\ngradient = "{gradient}"'))
    refused = cli("check", config)
    assert refused.code == 78
    assert "the gradient of the layer 'act' (Rounding) is not its slope" in refused.err
    assert "declare surrogate = ['act'] (in [model]" in refused.err
    config.write_text(config.read_text().replace(':Rounded"', ':Rounded"\nsurrogate = ["act"]'))
    ended = cli("check", config)
    assert (ended.code, ended.err) == (0, "")
    assert "the gradient of 'act' is a surrogate; the rest is checked" in " ".join(ended.out.split())


def test_the_model_is_compared_with_the_module_on_a_real_task_too(cli: Cli, config: Path) -> None:
    text = config.read_text().replace(BUILD + "\n" + GOOD_ARGS, f'build = "{MODELS}:CopiedForPositives"')
    config.write_text(text)
    assert cli("check", config).code == 0
    config.write_text(text.replace("[serve]", '[[source]]\nkind = "sinusoid"\n[serve]'))
    ended = cli("check", config)
    assert ended.code == 78
    assert (
        "CopiedForPositives, on a task of the run: the loss does not compute what the model does (off by" in ended.err
    )


def test_notes_on_the_model_are_printed(cli: Cli, config: Path) -> None:
    sets = ("--set", f"model.build={MODELS}:Idle", "--set", "model.args={}")
    ended = cli("check", config, *sets)
    assert (ended.code, ended.err) == (0, "")
    assert (
        "note     at these weights the loss of the tasks tried has no gradient for idle.weight, idle.bias\n"
        in ended.out
    )
    assert "\nnote " not in cli("check", config).out


@pytest.mark.parametrize("gradient", ["first_order", "reptile", "supervised"])
def test_a_wrong_second_derivative_is_accepted_where_none_is_taken(cli: Cli, config: Path, gradient: str) -> None:
    sets = (
        "--set",
        f"model.build={MODELS}:weight_normed",
        "--set",
        "model.args={}",
        "--set",
        f"meta.gradient={gradient}",
    )
    ended = cli("check", config, *sets)
    assert (ended.code, ended.err) == (0, "")
    assert "note     the layer '0' (ParametrizedLinear) is under weight normalisation" in ended.out


@pytest.mark.parametrize(
    ("task", "model"),
    [
        (
            'x_shape = [3, 28, 28]\nx_dtype = "uint8"',
            'build = "trainers.models:conv4"\nargs = { ways = 4, pool = "max" }',
        ),
        (
            'x_shape = [6]\nx_dtype = "int64"',
            'build = "trainers.models:transformer"\nargs = { outputs = 4, length = 6, tokens = 9, dropout = 0.1 }',
        ),
        ("x_shape = [6, 3]", 'build = "trainers.models:gru"\nargs = { inputs = 3, outputs = 4 }'),
        ("x_shape = [6]", 'build = "trainers.models:mlp"\nargs = { inputs = 6, outputs = 4, context = 3 }'),
    ],
)
def test_the_reference_networks_pass(cli: Cli, config: Path, task: str, model: str) -> None:
    text = config.read_text()
    text = text.replace('x_shape = [1]\ny = "real"\ny_shape = [1]', f'{task}\ny = "class"\nways = 4')
    text = text.replace(f"{BUILD}\n{GOOD_ARGS}", model).replace('loss = "mse"', 'loss = "cross_entropy"')
    config.write_text(text)
    ended = cli("check", config)
    assert (ended.code, ended.err) == (0, "")
    assert "a finite meta-gradient (exact)" in ended.out


def test_the_trainer_reads_what_was_configured(config: Path, tmp_path: Path) -> None:
    made: Config = read_config(config)
    write_settings(tmp_path / "settings.json", made)
    assert read_settings(tmp_path / "settings.json") == made.trainer()
    assert json.loads((tmp_path / "settings.json").read_text())["meta"]["batch"] == 2


@pytest.mark.parametrize(
    "mistake",
    [
        "rule",
        "gradient",
        "optimizer",
        "engine",
        "baseline option's type",
        "batch norm",
        "detached",
        "outcome of counts for classes",
        "posterior of a rule that draws nothing",
        "learner without a state",
    ],
)
def test_serve_finds_a_mistake_before_it_creates_anything(cli: Cli, config: Path, mistake: str) -> None:
    right, wrong, message = MISTAKES[mistake]
    config.write_text(config.read_text().replace(right, wrong))
    ended = cli("serve", config)
    assert ended.code == 78
    assert message in ended.err
    assert [path.name for path in config.parent.iterdir()] == ["config.toml"]


def test_serve_refuses_a_source_that_needs_parameters_before_the_first_round(cli: Cli, config: Path) -> None:
    right, wrong, message = MISTAKES["leader that believes in no parameters"]
    config.write_text(config.read_text().replace(right, wrong))
    ended = cli("serve", config)
    assert (ended.code, message in ended.err) == (78, True)
    assert not (config.parent / "run" / "rounds.jsonl").exists()


def test_a_learner_of_ones_own_can_lead_and_answer(cli: Cli, config: Path) -> None:
    kind = '[[learner]]\nkind = "tests.deploy.user_learners:Constant"\n[[learner]]\nkind = "ftml"\n[serve]'
    config.write_text(config.read_text().replace("[serve]", kind))
    ended = cli("check", config)
    assert (ended.code, ended.err) == (0, "")


def test_a_separate_process_prints_one_line_and_no_traceback(config: Path) -> None:
    config.write_text(config.read_text().replace("[inner]", '[inner]\nrule = "sdg"'))
    ended = run_cli("serve", config)
    assert ended.returncode == 78
    assert ended.stderr.startswith(f"error: {config}: [inner] rule = 'sdg': did you mean 'sgd'?")
    assert ended.stderr.count("\n") == 1


def test_strata_of_retention(config: Path) -> None:
    made = read_config(config, ['history.retention={ thin = "stratified", strata = ["time"] }'])
    assert made.history.retention.strata == ("time",)
    with pytest.raises(ConfigError, match=r"strata.*'source'.*'time'|strata.*source.*time"):
        read_config(config, ['history.retention={ strata = ["times"] }'])


LEARNERS = """
[[learner]]
kind = "ftml"
name = "slow"
[[learner]]
kind = "ftml"
name = "fast"
meta = { lr = 1 }
[learner.inner]
rule = "meta_sgd"
fast = "1.*"
[[learner]]
kind = "from_scratch"
options = { steps = 2 }
"""


def test_learners_are_tables_with_settings_of_their_own(cli: Cli, config: Path, tmp_path: Path) -> None:
    text = config.read_text().replace('baselines = ["from_scratch"]\n', "")
    config.write_text(text + LEARNERS)
    made = read_config(config, ("serve.answers=fast",))
    assert [one.name for one in list_learners(made)] == ["slow", "fast", "from_scratch"]
    assert made.learner[1].meta == {"lr": 1.0}
    assert made.learner[1].inner == {"rule": "meta_sgd", "fast": ["1.*"]}
    assert (made.answering, made.trainer().answers, read_config(config).answering) == ("fast", "fast", "pool")
    write_settings(tmp_path / "settings.json", made)
    assert read_settings(tmp_path / "settings.json") == made.trainer()
    assert cli("check", config).code == 0


def test_baselines_follow_the_tables_of_learners(config: Path) -> None:
    config.write_text(config.read_text() + '[[learner]]\nkind = "ftml"\nname = "own"\n')
    assert [one.name for one in list_learners(read_config(config))] == ["own", "from_scratch"]
    config.write_text(config.read_text().replace('baselines = ["from_scratch"]\n', ""))
    assert [one.name for one in list_learners(read_config(config))] == ["own"]


def test_settings_without_learners_are_read(config: Path, tmp_path: Path) -> None:
    made = read_config(config)
    write_settings(tmp_path / "settings.json", made)
    raw = json.loads((tmp_path / "settings.json").read_text())
    del raw["learner"], raw["answers"], raw["meta"]["optimizer_options"]
    (tmp_path / "settings.json").write_text(json.dumps(raw))
    assert read_settings(tmp_path / "settings.json") == made.trainer()


def test_learners_answer_by_other_rules_too(config: Path, cli: Cli) -> None:
    table = "inner.answer_rules.adam={ steps = [10, 30], lr = 0.05 }"
    made = read_config(config, (table, "serve.answers=ftml@adam30"))
    (rule,) = made.inner.answer_rules.values()
    assert (rule.steps, rule.lr, made.answering) == ((10, 30), 0.05, "ftml@adam30")
    assert cli("check", config, "--set", table, "--set", "serve.answers=ftml@adam30").code == 0
    wrong = cli("check", config, "--set", "inner.answer_rules.adm={ steps = [1] }")
    assert wrong.code == 78
    assert "did you mean 'adam'" in wrong.err


def test_one_number_of_answer_steps_is_a_list_of_one(config: Path) -> None:
    made = read_config(config, ("inner.answer_steps=3", "inner.begin=fresh", "serve.answers=ftml@3"))
    assert (made.inner.answer_steps, made.inner.begin, made.answering) == ((3,), "fresh", "ftml@3")
    assert read_config(config, ("inner.answer_steps=[1, 10]",)).inner.answer_steps == (1, 10)


def test_learners_know_whether_labels_are_global(config: Path) -> None:
    classes = ("task.y=class", "task.ways=3", "task.y_shape=[]", "model.loss=cross_entropy", "model.args.outputs=3")
    for override, expected in (((), False), (("task.labels=global",), True)):
        settings = read_config(config, (*classes, *override)).trainer()
        assert build_context(settings, MemoryReplayBuffer()).global_labels is expected


def make_small(inputs=1, regret=None, **task):
    """Return the configuration of tasks with so many inputs, which leaves the learners open."""
    model = {"build": "trainers.models:mlp", "args": {"inputs": inputs, "outputs": 5}, "loss": "mse"}
    model |= {"loss": "cross_entropy"} if task else {}
    task = {"x_shape": [inputs], **(task or {"y": "real", "y_shape": [5]})}
    return make_config({"run": {"path": "runs/x"}, "task": task, "model": model, "regret": regret or {}}, "here.toml")


def test_few_inputs_are_answered_by_the_hierarchical_model_and_from_scratch_makes_few_steps():
    few, many = (make_small(inputs) for inputs in (64, 65))
    cheap = ("from_scratch", "constant", "ridge_head", "pooled_ridge")
    assert few.regret.baselines == (*cheap, "hierarchical_bayes")
    assert few.regret.options == {"from_scratch": {"steps": 50, "lr": 0.01}}
    assert many.regret.baselines == cheap
    assert make_small(y="class", ways=5).regret.options == {"from_scratch": {"steps": 20, "lr": 0.003}}


def test_options_of_from_scratch_of_ones_own_stay_as_they_are():
    made = make_small(regret={"options": {"from_scratch": {"lr": 0.1}}})
    assert made.regret.options == {"from_scratch": {"lr": 0.1}}
    assert "regret.options.from_scratch" not in made.defaults
    assert make_small(regret={"baselines": ["from_scratch"]}).regret.options == {}
    other = make_small(regret={"options": {"constant": {}}})
    assert other.regret.options["from_scratch"] == {"steps": 50, "lr": 0.01}
