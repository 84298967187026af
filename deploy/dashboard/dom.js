// Finds, creates and fills elements of the page. Text only: data is never inserted as markup.

/** Returns the element whose data-field is `name`. */
export function field(name) {
  return document.querySelector(`[data-field="${name}"]`);
}

/** Sets a field's text if it has changed; an unchanged field keeps the selection and the screen reader's position. */
export function fill(name, text) {
  const node = field(name);
  if (node.textContent !== text) node.textContent = text;
}

/** Sets the text of every element that names the learner that leads. */
export function fillLeader(text) {
  for (const node of document.querySelectorAll("[data-leader]")) if (node.textContent !== text) node.textContent = text;
}

/** Shows or hides the element that matches `selector`. */
export function show(selector, visible) {
  document.querySelector(selector).hidden = !visible;
}

/** Creates an element with a class and with children, which are nodes or text. */
export function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

/** Sets the length of a bar to `share` (0 to 1). */
export function fillBar(name, share) {
  const clipped = Math.min(1, Math.max(0, share));
  document.querySelector(`[data-bar="${name}"]`).style.transform = `scaleX(${clipped})`;
}

/** Creates the swatch of a series: a short line with its colour, dashes and marker. */
export function makeSwatch({ color, dash = [], marker = false }) {
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  const attributes = {
    class: `swatch ink-${color}`,
    viewBox: "0 0 24 10",
    width: 24,
    height: 10,
    "aria-hidden": "true",
  };
  for (const [name, value] of Object.entries(attributes)) picture.setAttribute(name, value);
  const line = document.createElementNS(space, "path");
  const stroke = {
    d: "M1 5h22",
    stroke: "currentColor",
    "stroke-width": 2.5,
    "stroke-dasharray": dash.join(" ") || "none",
  };
  for (const [name, value] of Object.entries(stroke)) line.setAttribute(name, value);
  picture.append(line);
  if (marker) {
    const dot = document.createElementNS(space, "circle");
    for (const [name, value] of Object.entries({ cx: 12, cy: 5, r: 4, fill: "currentColor" }))
      dot.setAttribute(name, value);
    picture.append(dot);
  }
  return picture;
}
