// The table of learners and comparators, with the numbers of the charts.

import { field, fill, fillLeader, make, makeSwatch, show } from "./dom.js";
import { formatCount, formatName, formatPercent, formatReal, formatSigned, plural } from "./format.js";
import { describeCost, describeWeight, nameMore, poolOf } from "./pool.js";
import { describeLeaks, describePoints, explainRegret, judgeVerdict, nameProficiency } from "./wording.js";

const LABELS = {
  loss: "mean loss, last 100",
  accuracy: "mean accuracy, last 100",
  sum: "cumulative loss",
  rounds: "rounds",
  regret: "regret against it",
  weight: "weight in the pool",
  cost: "cost of a round",
};
const EFFICIENCY = "learning_efficiency_last_100";

/** Fills the table: one row per answer (the pool first, then the one that leads), then one row per comparator. */
export function fillTable({ status, ledger, names, kinds, looks, minor }) {
  const shown = chooseColumns(status.learners ?? {}, names, status.verdict);
  const pool = poolOf(status);
  const order = names.includes(pool) ? [pool, ...names.filter((name) => name !== pool)] : names;
  const answer = (name) => learnerRow(name, status, names[0], looks, shown);
  show('[data-column="accuracy"]', shown.accuracy);
  show('[data-column="points"]', shown.points !== null);
  show('[data-column="weight"]', shown.weight);
  show('[data-column="cost"]', shown.cost);
  fill("points-column", shown.points ?? "");
  fillLeader(formatName(names[0] ?? "ftml"));
  fill("regret-column", `${formatName(names[0] ?? "own")}’s regret against it`);
  const rows = [
    ...order.filter((name) => !minor.has(name)).map(answer),
    ...kinds.map((kind) => comparatorRow(kind, status, ledger, names[0], looks, shown)),
  ];
  field("learners").replaceChildren(...rows);
  field("more-learners").replaceChildren(...order.filter((name) => minor.has(name)).map(answer));
  show('[data-action="more"]', minor.size > 0);
  labelMore();
  fill("leaks", describeLeaks(status, names));
}

/** Shows or hides the answers with little weight. */
export function toggleMore() {
  field("more-learners").hidden = !field("more-learners").hidden;
  labelMore();
}

function labelMore() {
  const rows = field("more-learners");
  const button = document.querySelector('[data-action="more"]');
  const label = nameMore(rows.childElementCount, rows.hidden);
  if (button.textContent !== label) button.textContent = label;
  button.setAttribute("aria-expanded", String(!rows.hidden));
}

/** Returns the optional columns: {points: its heading or null}, and whether each other one is shown. */
export function chooseColumns(learners, names, verdict) {
  const accuracy = names.some((name) => learners[name]?.mean_accuracy_last_100 != null);
  const proficiency = learners[names[0]]?.[EFFICIENCY]?.proficiency ?? null;
  const points = proficiency === null ? null : `Points to ${nameProficiency(proficiency, accuracy)}, last 100`;
  const [weight, cost] = [verdict?.weights, verdict?.seconds_per_round].map((all) => Object.keys(all ?? {}).length > 0);
  return { accuracy, points, weight, cost };
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

function describeOwn(status) {
  return poolOf(status) === null ? "the learner that this daemon serves" : "the learner that leads";
}

function learnerRow(name, status, own, looks, shown) {
  const learner = status.learners?.[name] ?? {};
  const regret = name === own ? null : status.regret?.[name];
  const words = name === own ? describeOwn(status) : regret ? explainRegret(own, regret) : "not compared yet";
  return row(name, looks.get(name), formatName(name), [
    { label: LABELS.loss, text: withCount(formatReal(learner.mean_loss_last_100 ?? null), learner.rounds_last_100) },
    shown.accuracy
      ? {
          label: LABELS.accuracy,
          text: withCount(formatPercent(learner.mean_accuracy_last_100 ?? null), learner.accuracy_rounds_last_100),
        }
      : null,
    pointsCell(shown, describePoints(learner[EFFICIENCY])),
    shown.weight ? { label: LABELS.weight, text: describeWeight(name, status) } : null,
    shown.cost ? { label: LABELS.cost, text: describeCost(name, status) } : null,
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
    shown.weight ? { label: LABELS.weight, text: formatReal(null) } : null,
    shown.cost ? { label: LABELS.cost, text: formatReal(null) } : null,
    { label: LABELS.sum, text: point ? `${point.lower_bound ? "≤ " : ""}${formatReal(point.cumulative_loss)}` : formatReal(null) },
    { label: LABELS.rounds, text: regret?.rounds == null ? formatReal(null) : formatCount(regret.rounds) },
    { label: LABELS.regret, text: regret ? `${regret.lower_bound ? "≥ " : ""}${formatReal(regret.value)}` : formatReal(null) },
    { label: "", text: regret ? explainRegret(own, regret) : "not computed yet", kind: "words" },
  ]);
}
