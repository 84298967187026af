// How soon a task is learned: from the ledger to the lines of its chart, pure functions of plain data.

import { formatName, plural } from "./format.js";
import { assignLooks } from "./palette.js";
import { nameProficiency } from "./wording.js";

/**
 * Returns {title, unit, note, lines} of what there is to show, or null: the mean points needed for the proficiency, a
 * line a learner; where none is looked for, or nobody has reached it, the own learner's loss after each prefix.
 */
export function findEfficiency(ledger, names, looks) {
  const proficiency = ledger.efficiency?.proficiency ?? null;
  if (proficiency === null) return findPrefixes(ledger, names, "");
  const goal = nameProficiency(proficiency, hasAccuracy(ledger, names[0]));
  return findPoints(ledger, names, looks, goal) ?? findPrefixes(ledger, names, `No learner reached ${goal} in the rounds shown.`);
}

function hasAccuracy(ledger, own) {
  return (ledger.learners[own]?.accuracy ?? []).some((value) => value !== null);
}

function findPoints(ledger, names, looks, goal) {
  const lines = names
    .filter((name) => ledger.learners[name]?.efficiency)
    .map((name) => ({
      name,
      label: formatName(name),
      look: looks.get(name),
      raw: ledger.learners[name].efficiency.mean_points_needed,
      gaps: true,
    }));
  if (!lines.some(isKnown)) return null;
  return {
    title: `Learning efficiency: support points to ${goal}`,
    unit: "points (support set)",
    note: "Fewer is sooner. Rounds that did not reach it are left out: a gap where none did.",
    lines,
  };
}

function findPrefixes(ledger, names, note) {
  const prefixes = ledger.learners[names[0]]?.efficiency?.prefixes ?? [];
  const labels = prefixes.map(({ points }) => `after ${plural(points, "point")}`);
  const looks = assignLooks([...names, ...labels], []); // colours that no learner has, as long as there are some
  const lines = prefixes
    .map(({ loss }, i) => ({ name: labels[i], label: labels[i], look: looks.get(labels[i]), raw: loss }))
    .filter(isKnown);
  if (lines.length === 0) return null;
  return {
    title: `Learning efficiency: ${formatName(names[0])}’s loss after so many support points`,
    unit: "loss (query set)",
    note,
    lines,
  };
}

const isKnown = ({ raw }) => raw.some((value) => value !== null);
