// Assigns a look to each learner and comparator, the same in every chart and in the table.
// The colours are distinct under the common kinds of colour blindness; dashes distinguish lines without colour.

const COLORS = 7; // --ink-0 to --ink-6 in colors.css; comparators count down from the last
const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3]];

/**
 * Returns a Map from name to look: {color, dash, marker}.
 *
 * @param {string[]} learners The daemon's own learner first: it gets the first colour and a solid line.
 * @param {string[]} comparators Drawn with markers, because they are known at some rounds only.
 */
export function assignLooks(learners, comparators) {
  const looks = new Map();
  learners.forEach((name, i) => looks.set(name, { color: i % COLORS, dash: DASHES[i % DASHES.length], marker: false }));
  comparators.forEach((name, i) => {
    const color = i === 0 ? "dark" : COLORS - 1 - ((i - 1) % COLORS);
    looks.set(name, { color, dash: [2, 4], marker: true });
  });
  return looks;
}

/** Returns the colour of a CSS custom property, resolved for the canvas under the current theme. */
export function resolveColor(property) {
  const probe = document.createElement("span");
  probe.style.color = `var(--${property})`;
  probe.hidden = true;
  document.body.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}
