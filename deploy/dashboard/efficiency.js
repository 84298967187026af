// The chart of learning efficiency, computed from the ledger: pure functions of plain data.

import { formatName, plural } from "./format.js";
import { assignLooks } from "./palette.js";
import { nameProficiency } from "./wording.js";

/**
 * Returns {title, unit, note, lines}, or null if there is nothing to show. The lines are the mean points needed for the
 * proficiency, one per learner. Without a proficiency, or if no learner reached it, they are the daemon's own learner's
 * loss after each prefix.
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
    note: "Lower is better. Rounds that did not reach it are excluded; there is a gap where none did.",
    lines,
  };
}

function findPrefixes(ledger, names, note) {
  const prefixes = ledger.learners[names[0]]?.efficiency?.prefixes ?? [];
  const labels = prefixes.map(({ points }) => `after ${plural(points, "point")}`);
  const looks = assignLooks([...names, ...labels], []); // colours that no learner uses, while there are enough
  const lines = prefixes
    .map(({ loss }, i) => ({ name: labels[i], label: labels[i], look: looks.get(labels[i]), raw: loss }))
    .filter(isKnown);
  if (lines.length === 0) return null;
  return {
    title: `Learning efficiency: ${formatName(names[0])}’s loss by number of support points`,
    unit: "loss (query set)",
    note,
    lines,
  };
}

const isKnown = ({ raw }) => raw.some((value) => value !== null);
