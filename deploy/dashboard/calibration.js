// The chart of calibration, computed from the ledger: pure functions of plain data.

import { formatName } from "./format.js";

const DASHES = [[], [6, 3], [2, 3]];

/**
 * Returns {title, unit, note, lines}, or null if the run's loss says no distribution. Of numbers the lines are the
 * coverage of each level by the answers that the run gives: those of the pool, or without one of the learner that leads.
 * Of classes they are the calibration errors of all learners.
 */
export function findCalibration(ledger, names, looks) {
  const name = ledger.pool?.name ?? names[0];
  const coverage = ledger.learners[name]?.calibration?.coverage;
  return coverage ? findCoverage(coverage, name, looks.get(name)) : findErrors(ledger, names, looks);
}

function findCoverage(coverage, name, look) {
  const levels = Object.keys(coverage).sort((a, b) => b - a);
  const lines = levels.map((level, i) => ({
    name: level,
    label: `interval of ${Math.round(level * 100)}\u202f%`,
    look: { ...look, dash: DASHES[i % DASHES.length] },
    raw: coverage[level],
  }));
  if (!lines.some(isKnown)) return null;
  return {
    title: `Calibration: targets inside the intervals of ${formatName(name)}`,
    unit: "share of the targets",
    note: "Below its level a line means that answers are too sure, above it that they are not sure enough.",
    lines,
  };
}

function findErrors(ledger, names, looks) {
  const lines = names
    .map((name) => ({
      name,
      label: formatName(name),
      look: looks.get(name),
      raw: ledger.learners[name]?.calibration?.error ?? [],
    }))
    .filter(isKnown);
  if (lines.length === 0) return null;
  return {
    title: "Calibration: distance of probabilities from shares",
    unit: "calibration error",
    note: "Lower is better: classes that an answer gives 70\u202f% are right in 70\u202f% of the cases if it is 0.",
    lines,
  };
}

const isKnown = ({ raw }) => raw.some((value) => value !== null);
