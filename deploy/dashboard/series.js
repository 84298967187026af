// Computes what the charts show from the regret ledger: pure functions of plain data.

const NONE = Object.freeze({});
const ENOUGH = 5; // minimum number of values for a meaningful trailing mean

/**
 * Returns the ledger with rounds counted from 1, as comparators and checkpoints count them: 100 means that a hundred
 * rounds are learned. The daemon names each point by its last round, counted from 0, and sends the count as `to`.
 */
export function countRounds(ledger) {
  const shift = ledger.rounds.length ? ledger.to - ledger.rounds.at(-1) : 0;
  return { ...ledger, rounds: ledger.rounds.map((round) => round + shift) };
}

/** Returns the names of all learners in the sources: the one that leads first, the rest as configured. */
export function orderLearners(leader, ...sources) {
  const names = [...new Set(sources.flatMap((source) => Object.keys(source ?? NONE)))];
  const own = names.includes(leader) ? leader : names[0];
  return own === undefined ? [] : [own, ...names.filter((name) => name !== own)];
}

/** Returns the kinds of comparator in the status and the ledger: hindsight first, the rest in alphabetical order. */
export function comparatorKinds(regret, comparators) {
  const known = Object.entries(regret ?? NONE)
    .filter(([, entry]) => entry?.kind !== "baseline")
    .map(([name]) => name);
  const kinds = [...new Set([...known, ...(comparators ?? []).map((point) => point.kind)])].sort();
  return kinds.sort((a, b) => (b === "hindsight") - (a === "hindsight"));
}

/**
 * Returns the mean of the last `window` values at each place; null where the value is null or too few values precede.
 * With `across`, null values are skipped, and the result is null only where the whole window is null.
 */
export function trailingMean(values, window, across = false) {
  return values.map((value, i) => {
    // Each window is summed anew: after a huge value, subtracting what leaves the window would not restore the rest.
    const known = values.slice(Math.max(0, i + 1 - window), i + 1).filter((one) => one !== null);
    const unknown = across ? known.length === 0 : value === null;
    return unknown || i + 1 < Math.min(window, ENOUGH) ? null : known.reduce((a, b) => a + b) / known.length;
  });
}

/** Returns the places of values without a neighbour, which a line with gaps does not show. */
export function findLonely(values) {
  return values.flatMap((value, i) => (value != null && values[i - 1] == null && values[i + 1] == null ? [i] : []));
}

/** Returns how many points to average for a chart of `count` points: about 7 % of them, at least 1. */
export function smoothingWindow(count) {
  return count < 20 ? 1 : Math.max(5, Math.round(count / 15));
}

/** Returns the number of rounds per point. */
export function roundsPerPoint(rounds) {
  return rounds.length < 2 ? 1 : Math.max(1, Math.round((rounds.at(-1) - rounds[0]) / (rounds.length - 1)));
}

/** Returns the change of the mean from the first to the last tenth of `values`: -0.6 is a fall of 60 %; or null. */
export function relativeChange(values) {
  const present = values.filter((value) => value !== null);
  if (present.length < 20) return null;
  const tenth = Math.max(5, Math.floor(present.length / 10));
  const mean = (part) => part.reduce((sum, value) => sum + value, 0) / part.length;
  const [first, last] = [mean(present.slice(0, tenth)), mean(present.slice(-tenth))];
  return first > 0 ? last / first - 1 : null;
}

/**
 * Returns regret by round: the own learner's cumulative loss minus each baseline's, and the comparators' points.
 *
 * @returns {{rounds: number[], lines: Map<string, (number|null)[]>, points: Map<string, Object[]>}} `lines` has one
 *   value per round (null where only a comparator has one); `points` has {regret, standardError, exact,
 *   lowerBound} or null per round.
 */
export function regretByRound(ledger, names, kinds) {
  const seen = (point) => point.as_of_round >= ledger.from && point.as_of_round <= ledger.to;
  const comparators = (ledger.comparators ?? []).filter(seen);
  const rounds = [...new Set([...ledger.rounds, ...comparators.map((point) => point.as_of_round)])].sort(
    (a, b) => a - b,
  );
  const place = new Map(rounds.map((round, i) => [round, i]));
  const [own, ...baselines] = names;
  const lines = new Map(
    baselines.map((name) => [name, spread(difference(ledger, own, name), ledger.rounds, rounds, place)]),
  );
  const points = new Map(kinds.map((kind) => [kind, new Array(rounds.length).fill(null)]));
  for (const { kind, as_of_round, regret, standard_error, exact, lower_bound } of comparators) {
    const known = { exact: exact ?? false, lowerBound: lower_bound ?? false };
    points.get(kind)[place.get(as_of_round)] = { regret, standardError: standard_error ?? 0, ...known };
  }
  return { rounds, lines, points };
}

function difference(ledger, own, name) {
  const known = ledger.learners[name]?.regret;
  if (known) return known;
  const [mine, theirs] = [own, name].map((learner) => ledger.learners[learner]?.cumulative_loss ?? []);
  return ledger.rounds.map((_, i) => (mine[i] == null || theirs[i] == null ? null : mine[i] - theirs[i]));
}

function spread(values, from, to, place) {
  const wide = new Array(to.length).fill(null);
  from.forEach((round, i) => {
    wide[place.get(round)] = values[i];
  });
  return wide;
}
