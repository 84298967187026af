// The pool and the verdict: which answers matter, in what order, and the charts of the pool; pure functions of plain data.

import { formatName, formatPercent, formatReal, plural } from "./format.js";

const MANY = 8; // answers that are all shown; of more, those with little weight are collapsed
const SHOWN = 6;
const LITTLE = 0.01; // an expert with a smaller share is collapsed
const MENTIONED = 0.05; // an expert whose share was never larger has no line of its own

/** Returns the name of the pool, or null if there is none. */
export function poolOf({ leader, verdict }) {
  return verdict && verdict.reference !== leader ? verdict.reference : null;
}

/** Returns the names with the pool in the second place, after the learner that leads. */
export function putPoolSecond(names, status) {
  const pool = poolOf(status);
  const [own, ...rest] = names;
  return names.includes(pool) ? [own, pool, ...rest.filter((name) => name !== pool)] : names;
}

/**
 * Returns the set of the answers that are collapsed, so that a page with some 20 answers stays readable: all but the
 * leader, the pool, the best that does not learn across tasks, and those with most of the pool's weight.
 */
export function findMinor(names, { verdict }) {
  if (names.length <= MANY) return new Set();
  const weights = verdict?.weights ?? {};
  const weight = (name) => weights[name] ?? 0;
  const needed = new Set([names[0], verdict?.reference, verdict?.best_without]);
  const rest = names.filter((name) => !needed.has(name)).sort((a, b) => weight(b) - weight(a));
  const known = Object.keys(weights).length > 0;
  const kept = rest.slice(0, SHOWN + 1 - needed.size).filter((name) => !known || weight(name) >= LITTLE);
  return new Set(rest.filter((name) => !kept.includes(name)));
}

/** Returns the lines of the chart of weights: the heaviest experts, and all others together. */
export function weightLines({ weights }, looks) {
  const most = (name) => weights[name].reduce((one, other) => Math.max(one, other ?? 0), 0);
  const latest = (name) => weights[name].findLast((value) => value !== null) ?? 0;
  const names = Object.keys(weights).sort((a, b) => latest(b) - latest(a) || most(b) - most(a));
  const heavy = names.filter((name) => most(name) >= MENTIONED).slice(0, SHOWN);
  const shown = names.length <= heavy.length + 1 ? names : heavy;
  const lines = shown.map((name) => ({ name, label: formatName(name), look: looks.get(name), raw: weights[name] }));
  const rest = names.filter((name) => !shown.includes(name));
  if (rest.length === 0) return lines;
  const together = weights[rest[0]].map((value, i) =>
    value === null ? null : rest.reduce((sum, name) => sum + (weights[name][i] ?? 0), 0),
  );
  const look = { color: "muted", dash: [6, 3], marker: false };
  return [...lines, { name: "the others", label: `${rest.length} others together`, look, raw: together }];
}

/**
 * Returns the lines of the chart of the pool's regret, at the end of each bucket: the regret and its bound, and where the
 * aggregation clips losses, the regret of the losses as they are.
 */
export function poolRegretLines({ regret, bound, unclipped_regret: unclipped, name }, looks) {
  const muted = (dash) => ({ color: "muted", dash, marker: false });
  const clips = (unclipped ?? []).some((value, i) => value !== null && Math.abs(value - regret[i]) > 1e-6);
  return [
    { name: "regret", label: "regret against the best expert", look: looks.get(name), values: regret },
    { name: "bound", label: "bound", look: muted([6, 3]), values: bound },
    ...(clips ? [{ name: "unclipped", label: "regret without clipping", look: muted([2, 3]), values: unclipped }] : []),
  ];
}

/** Describes an answer's mean share of the pool's weight, or a dash for what is no expert. */
export function describeWeight(name, { verdict }) {
  return formatPercent(verdict?.weights?.[name] ?? null);
}

/** Describes what a learner costs a round; of further answers of a learner, "with FTML". */
export function describeCost(name, { verdict }) {
  const [learner, steps] = name.split("@");
  const seconds = verdict?.seconds_per_round?.[learner];
  if (seconds == null) return formatReal(null);
  if (steps !== undefined) return `with ${formatName(learner)}`;
  return seconds < 0.1 ? `${formatReal(seconds * 1000)}\u202fms` : `${formatReal(seconds)}\u202fs`;
}

/** Returns the level of a verdict, for its colour. */
export function judgeState(verdict) {
  return { pays: "good", does_not: "warn" }[verdict?.state] ?? "";
}

/** Returns the label of the button that shows or hides the collapsed answers. */
export function nameMore(count, hidden) {
  return hidden ? `Show ${plural(count, "more answer")}` : "Show fewer answers";
}
