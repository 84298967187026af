// Builds the models of the charts from the ledger: lines, units, titles and notes.

import { findCalibration } from "./calibration.js";
import { findEfficiency } from "./efficiency.js";
import { formatCompact, formatName, formatPercent, formatReal, formatSigned, formatCount, plural } from "./format.js";
import { poolRegretLines, weightLines } from "./pool.js";
import { regretByRound, roundsPerPoint, smoothingWindow, trailingMean } from "./series.js";

/**
 * Returns the model of each chart by name; null if there is nothing to show. The lines of the answers in the set `minor`
 * are collapsed.
 */
export function modelCharts(ledger, names, kinds, looks, minor = new Set()) {
  const window = smoothingWindow(ledger.rounds.length);
  const context = { ledger, names, kinds, looks, minor, window, note: describeSmoothing(ledger.rounds, window) };
  return {
    pool: modelPool(context),
    weights: modelWeights(context),
    adaptation: modelAdaptation(context),
    learners: modelLearners(context),
    regret: modelRegret(context),
    accuracy: modelAccuracy(context),
    calibration: modelCalibration(context),
    efficiency: modelEfficiency(context),
  };
}

function describeSmoothing(rounds, window) {
  const each = roundsPerPoint(rounds);
  const dots = each === 1 ? "single rounds" : `means of ${plural(each, "round")}`;
  return window === 1
    ? `Points: ${dots}.`
    : `Lines: mean of the last ${plural(window * each, "round")}; dots: ${dots}.`;
}

function common({ ledger, note, minor }, title, unit, lines, rest) {
  const model = {
    title,
    unit,
    note,
    rounds: ledger.rounds,
    lines: lines.map((line) => ({ ...line, minor: minor.has(line.name) })),
    dots: [],
    format: formatReal,
    tick: formatCompact,
    ...rest,
  };
  return { ...model, summary: summarise(model) };
}

function summarise({ lines, format }) {
  const parts = lines.filter((line) => !line.minor).map((line) => `${line.label} ${format(line.values.findLast((value) => value !== null))}`);
  return `Latest: ${parts.join(", ")}.`;
}

function modelPool(context) {
  const { ledger, looks } = context;
  if (!ledger.pool) return null;
  const title = "The pool’s regret against its best expert, and its bound";
  const lines = poolRegretLines(ledger.pool, looks);
  const clipped = lines.length > 2 ? " Regret and bound are those of clipped losses." : "";
  return common(context, title, "regret (loss, summed)", lines, {
    zero: true,
    format: formatSigned,
    note: `The pool’s cumulative loss minus that of the expert that has lost least. It never exceeds the bound.${clipped}`,
  });
}

function modelWeights(context) {
  const { ledger, looks, window } = context;
  if (!ledger.pool) return null;
  const lines = weightLines(ledger.pool, looks).map(smooth(window));
  return common({ ...context, minor: new Set() }, "The pool’s weight on each expert", "share of the weight", lines, {
    bounds: [0, 1],
    format: formatPercent,
    tick: formatShare,
    note: withoutDots(context.note),
  });
}

function modelAdaptation(context) {
  const { ledger, names, looks, window } = context;
  const own = looks.get(names[0]);
  const before = { name: "before", label: "before adaptation", look: { color: "muted", dash: [6, 3], marker: false } };
  const after = { name: "after", label: "after adaptation", look: own };
  const raw = [ledger.loss_before, ledger.loss_after].map(blanks);
  const lines = [before, after].map((line, i) => ({ ...line, values: trailingMean(raw[i], window) }));
  const dots = window === 1 ? [] : [before, after].map((line, i) => ({ ...line, values: raw[i] }));
  const title = `Loss on new tasks: ${formatName(names[0])} before and after adaptation`;
  return common(context, title, "loss (query set)", lines, { dots, band: [0, 1], bounds: [0] });
}

function modelLearners(context) {
  const { ledger, names, looks, window } = context;
  const present = names.filter((name) => ledger.learners[name]?.loss);
  if (present.length === 0) return null;
  const raw = present.map((name) => blanks(ledger.learners[name].loss));
  const line = (name, i) => ({
    name,
    label: formatName(name),
    look: looks.get(name),
    values: trailingMean(raw[i], window),
  });
  const title =
    present.length === 1
      ? "Loss after adaptation"
      : `Loss after adaptation: ${formatName(names[0])} against the baselines`;
  return common(context, title, "loss (query set)", present.map(line), {
    bounds: [0],
    note: withoutDots(context.note),
  });
}

function modelRegret(context) {
  const { ledger, names, kinds, looks } = context;
  const { rounds, lines, points } = regretByRound(ledger, names, kinds);
  const baselines = [...lines].map(([name, values]) => ({
    name,
    label: `against ${formatName(name)}`,
    look: looks.get(name),
    values,
  }));
  const comparators = [...points]
    .map(([name, found]) => ({
      name,
      label: `against ${formatName(name)} (${isExact(found) ? "exact" : "estimate"})`,
      exact: isExact(found),
      bounded: found.findLast((point) => point !== null)?.lowerBound ?? false,
      look: looks.get(name),
      values: found.map((point) => point && point.regret),
      errors: found.map((point) => point?.standardError ?? 0),
    }))
    .filter((line) => line.values.some((value) => value !== null));
  if (baselines.length + comparators.length === 0) return null;
  const own = formatName(names[0]);
  return common(
    context,
    `Regret: ${own}’s cumulative loss minus the other’s`,
    "regret (loss, summed)",
    [...baselines, ...comparators],
    {
      rounds,
      zero: true,
      format: formatSigned,
      note: explainSigns(own, comparators, rounds),
      sides: { above: `${own} lost more`, below: `${own} lost less` },
    },
  );
}

function explainSigns(own, comparators, rounds) {
  const negative = `Negative against a baseline: ${own} lost less.`;
  if (comparators.length === 0) return negative;
  const latest = Math.max(...comparators.map((line) => rounds[line.values.findLastIndex((value) => value !== null)]));
  const age = `last computed as of round ${formatCount(latest)}.`;
  const exact = comparators.filter((line) => line.exact).map((line) => `${sentenceCase(line.name)} is exact`);
  const estimates = comparators.filter((line) => !line.exact).map(describeEstimate);
  return `${negative} ${[...exact, ...estimates].join(". ")}; ${age}`;
}

const isExact = (points) => points.findLast((point) => point !== null)?.exact ?? false;
const sentenceCase = (name) => formatName(name)[0].toUpperCase() + formatName(name).slice(1);

function describeEstimate({ name, bounded }) {
  return bounded
    ? `${sentenceCase(name)} is an estimate, an upper bound of the true minimum, so the regret shown against it is a lower bound`
    : `${sentenceCase(name)} is an estimate from a sample of the rounds (bars: one standard error)`;
}

function modelAccuracy(context) {
  const { ledger, names, looks, window } = context;
  const found = names.map((name, i) => ledger.learners[name]?.accuracy ?? (i === 0 ? ledger.accuracy : null) ?? []);
  const present = names
    .map((name, i) => ({ name, label: formatName(name), look: looks.get(name), raw: blanks(found[i]) }))
    .filter(({ raw }) => raw.some((value) => value !== null));
  if (present.length === 0) return null;
  const alone = present.length === 1;
  return common(
    context,
    `Accuracy on new tasks: ${describeWho(present)}`,
    "accuracy (query set)",
    present.map(smooth(window)),
    {
      dots: alone && window > 1 ? present.map((line) => ({ ...line, values: line.raw })) : [],
      note: alone ? context.note : withoutDots(context.note),
      bounds: [0, 1],
      format: formatPercent,
      tick: formatShare,
    },
  );
}

function modelCalibration(context) {
  const { ledger, names, looks, window } = context;
  const found = findCalibration(ledger, names, looks);
  if (found === null) return null;
  return common(context, found.title, found.unit, found.lines.map(smooth(window)), {
    note: `${withoutDots(context.note)} ${found.note}`,
    bounds: [0, 1],
    format: formatPercent,
    tick: formatShare,
    minor: new Set(),
  });
}

function modelEfficiency(context) {
  const { ledger, names, looks, window } = context;
  const found = findEfficiency(ledger, names, looks);
  if (found === null) return null;
  return common(context, found.title, found.unit, found.lines.map(smooth(window)), {
    note: `${withoutDots(context.note)} ${found.note}`.trim(),
    bounds: [0],
  });
}

const formatShare = (share) => formatCompact(Math.round(share * 1000) / 10) + "\u202f%";
const describeWho = ([own, ...others]) =>
  others.length ? `${own.label} against the baselines` : `${own.label} after adaptation`;
const smooth = (window) => (line) => ({ ...line, values: trailingMean(line.raw, window, line.gaps) });
const withoutDots = (note) => note.replace(/; dots.*/, ".");
const blanks = (values) => values.map((value) => value ?? null);
