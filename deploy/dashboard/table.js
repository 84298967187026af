// The table of learners and comparators, with the numbers of the charts.

import { field, fill, fillLeader, make, makeSwatch, show } from "./dom.js";
import { formatCount, formatName, formatPercent, formatReal, formatSigned, plural } from "./format.js";
import { describeLeaks, describePoints, explainRegret, judgeVerdict, nameProficiency } from "./wording.js";

const LABELS = {
  loss: "mean loss, last 100",
  accuracy: "mean accuracy, last 100",
  sum: "cumulative loss",
  rounds: "rounds",
  regret: "regret against it",
};
const EFFICIENCY = "learning_efficiency_last_100";

/** Fills the table: one row per learner (the daemon's own first), then one row per comparator. */
export function fillTable({ status, ledger, names, kinds, looks }) {
  const shown = chooseColumns(status.learners ?? {}, names);
  show('[data-column="accuracy"]', shown.accuracy);
  show('[data-column="points"]', shown.points !== null);
  fill("points-column", shown.points ?? "");
  fillLeader(formatName(names[0] ?? "ftml"));
  fill("regret-column", `${formatName(names[0] ?? "own")}’s regret against it`);
  const rows = [
    ...names.map((name) => learnerRow(name, status, names[0], looks, shown)),
    ...kinds.map((kind) => comparatorRow(kind, status, ledger, names[0], looks, shown)),
  ];
  field("learners").replaceChildren(...rows);
  fill("leaks", describeLeaks(status, names));
}

/** Returns the optional columns: {accuracy: whether it is shown, points: its heading or null}. */
export function chooseColumns(learners, names) {
  const accuracy = names.some((name) => learners[name]?.mean_accuracy_last_100 != null);
  const proficiency = learners[names[0]]?.[EFFICIENCY]?.proficiency ?? null;
  const points = proficiency === null ? null : `Points to ${nameProficiency(proficiency, accuracy)}, last 100`;
  return { accuracy, points };
}

function row(name, look, label, cells) {
  const heading = make("th", "", ...(look ? [makeSwatch(look)] : []), label);
  heading.scope = "row";
  heading.title = name;
  return make("tr", "", heading, ...cells.filter((cell) => cell !== null).map(makeCell));
}

/** Adds the number of rounds that a mean is over, if they are fewer than 100. */
function withCount(text, rounds) {
  return rounds == null || rounds === 0 || rounds >= 100 ? text : `${text} (${plural(rounds, "round")})`;
}

/** Describes a learner's rounds: their number, and how many had no finite loss. */
function describeRounds({ rounds, charged_rounds: charged }) {
  if (rounds == null) return formatReal(null);
  return charged > 0 ? `${formatCount(rounds)} (${formatCount(charged)} not finite)` : formatCount(rounds);
}

function makeCell({ label, text, kind = "number", level = "" }) {
  const cell = make("td", kind, text);
  cell.dataset.level = level;
  cell.dataset.label = label; // shown on a phone, where each row becomes a card
  return cell;
}

function learnerRow(name, status, own, looks, shown) {
  const learner = status.learners?.[name] ?? {};
  const regret = name === own ? null : status.regret?.[name];
  const words =
    name === own ? "the learner that this daemon serves" : regret ? explainRegret(own, regret) : "not compared yet";
  return row(name, looks.get(name), formatName(name), [
    { label: LABELS.loss, text: withCount(formatReal(learner.mean_loss_last_100 ?? null), learner.rounds_last_100) },
    shown.accuracy
      ? {
          label: LABELS.accuracy,
          text: withCount(formatPercent(learner.mean_accuracy_last_100 ?? null), learner.accuracy_rounds_last_100),
        }
      : null,
    pointsCell(shown, describePoints(learner[EFFICIENCY])),
    { label: LABELS.sum, text: formatReal(learner.cumulative_loss ?? null) },
    { label: LABELS.rounds, text: describeRounds(learner) },
    { label: LABELS.regret, text: formatSigned(regret?.value ?? null) },
    { label: "", text: words, kind: "words", level: regret ? judgeVerdict(regret) : "" },
  ]);
}

const pointsCell = ({ points }, text) => (points === null ? null : { label: lowerFirst(points), text });
const lowerFirst = (words) => words[0].toLowerCase() + words.slice(1);

function comparatorRow(kind, status, ledger, own, looks, shown) {
  const regret = status.regret?.[kind];
  const point = (ledger?.comparators ?? []).findLast((entry) => entry.kind === kind);
  return row(kind, looks.get(kind), `${formatName(kind)} (comparator)`, [
    { label: LABELS.loss, text: formatReal(null) },
    shown.accuracy ? { label: LABELS.accuracy, text: formatReal(null) } : null,
    pointsCell(shown, formatReal(null)),
    { label: LABELS.sum, text: point ? `${point.lower_bound ? "≤ " : ""}${formatReal(point.cumulative_loss)}` : formatReal(null) },
    { label: LABELS.rounds, text: regret?.rounds == null ? formatReal(null) : formatCount(regret.rounds) },
    { label: LABELS.regret, text: regret ? `${regret.lower_bound ? "≥ " : ""}${formatReal(regret.value)}` : formatReal(null) },
    { label: "", text: regret ? explainRegret(own, regret) : "not computed yet", kind: "words" },
  ]);
}
