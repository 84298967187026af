"""Render the table of letters."""

from typing import Any

from tests.experiments.common.tables import Row
from tests.experiments.glyphs.embedding import EMBEDDINGS
from tests.experiments.glyphs.rows import WAYS, Training, list_plans
from tests.experiments.glyphs.training import BATCH, TEST_QUERIES

NAME = "glyph_table"


def sort_rows(rows: list[Row]) -> list[Row]:
    """Return the rows in the order of the table, those of one label by their shots."""
    order = [*EMBEDDINGS, *list_plans()]
    return sorted(rows, key=lambda row: (order.index(row["label"]), row["shots"]))


def render(result: dict[str, Any]) -> str:
    """Return the table as Markdown: a row for each algorithm, a column for each number of shots."""
    rows = result["rows"]
    (train_scripts, test_scripts), (train, test) = rows[0]["scripts"], rows[0]["letters"]
    tasks = rows[0]["asked"]["tasks"]
    about = f"""# Letters of unseen scripts, {WAYS}-way, by every algorithm

`{result["command"]}` made the newest rows.

Letters of Debian's fonts-noto-core: {train:,} letters of {train_scripts} scripts for training, {test:,} letters of
{test_scripts} other scripts for testing. Every image gets a random rotation, scale, shear, shift and deformation;
28 x 28. Network: `conv4` with strides, group normalisation and 32 filters, or as stated. Chance is {1 / WAYS:.0%}.
Accuracy after adaptation on {TEST_QUERIES} query images per class, over {tasks} tasks, with its 95 % interval over the
tasks; one seed.

*Budget* is the training of the row: minutes of processor time on one core and the steps that they gave, or a number of
steps. A step of the embedding is {BATCH} images. *4 x 5 letters, 5 queries* is a meta-step of 4 tasks of 5 letters,
with 5 query images of each, and as many support images as in the test. *1 + 5 images* is one support image, and one
training for both columns. *Settings* says how they were chosen: on *validation* scripts, or *by the authors* without a
search. The validation scripts are a quarter of the training scripts, and the trainings of the search did not see them
([what was tried](glyph_tuning.md)). The trainings of this table see all training scripts. The test scripts are used
once per row. Rows of an older commit were not computed again.

| algorithm | paper | inner loop | training | settings | budget | 1-shot | 5-shot | commit |
|---|---|---|---|---|---|---|---|---|
"""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    table = "".join(f"| {' | '.join(_format_cells([row for row in rows if row['label'] == n]))} |\n" for n in labels)
    return about + table


def _format_cells(rows: list[Row]) -> list[str]:
    asked, by_shots = rows[0]["asked"], {row["shots"]: f"{row['accuracy']:.1%} ± {row['interval']:.1%}" for row in rows}
    return [
        rows[0]["label"],
        rows[0]["paper"],
        describe_inner_loop(asked),
        describe_training(asked),
        "validation" if asked["training"]["tuned"] else "by the authors",
        _format_budget(rows),
        by_shots.get(1, ""),
        by_shots.get(5, ""),
        rows[0]["commit"],
    ]


def describe_inner_loop(asked: dict[str, Any]) -> str:
    """Return the rule, its rate and steps, and the estimator, of a row that has them."""
    if "rule" not in asked:
        return ""
    if not asked["steps"]:
        return f"{asked['rule']}, no step; {asked['gradient']}"
    adapts = "" if asked["fast"] == "all" else f", {asked['fast']} only"
    return f"{asked['rule']}, lr {asked['lr']:g}, {asked['steps']} steps{adapts}; {asked['gradient']}"


def describe_training(asked: dict[str, Any]) -> str:
    """Return on what a row is trained, in words."""
    training = asked["training"]
    parts = [f"{training['filters']} filters"] * (training["filters"] != Training.filters)
    parts += ["max-pooling"] * (training["pool"] == "max")
    turned = ["quarter turns"] * (training["turns"] > 1)
    if "rule" not in asked:
        return "; ".join([*parts, *turned, f"adam, lr {training['rate']:g}, annealed"])
    shots = training["shots"]
    shown = f"{shots} + {training['queries']} images" if shots else f"{training['queries']} queries"
    parts.append(f"{asked['batch']} x {training['ways']} letters, {shown}")
    parts += turned
    parts += [f"{name} {value:g} at first" for name, value in training["learned"].items()]
    parts.append(f"{asked['optimizer']}, lr {asked['meta_lr']:g}" + ", annealed" * training["anneal"])
    return "; ".join(parts)


def _format_budget(rows: list[Row]) -> str:
    steps = " and ".join(dict.fromkeys(f"{row['steps']:,}" for row in rows)) + " steps"
    minutes = rows[0]["asked"].get("minutes")
    return f"{minutes:g} min: {steps}" if minutes else steps
