// A chart's heading and legend: the name, swatch and value of every line. A click or key press hides or shows a line.

import { formatCount, formatReal, plural } from "./format.js";
import { make, makeSwatch } from "./dom.js";

/** Creates and returns a chart's title, note, legend and the container of its canvas. */
export function makeFrame(section) {
  const title = make("h3", "");
  const note = make("p", "note");
  const when = make("span", "when");
  const entries = make("div", "entries");
  const canvas = make("div", "canvas");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  section.append(make("div", "heading", title, when), note, entries, canvas);
  const frame = { title, note, when, entries, canvas, values: [] };
  return Object.assign(frame, { setEntries: (...rest) => setEntries(frame, ...rest) });
}

function setEntries(frame, lines, hidden, toggle) {
  frame.values = lines.map(() => make("span", "value"));
  const entries = lines.map((line, i) => makeEntry(line, frame.values[i], hidden, toggle));
  const minor = entries.filter((_, i) => lines[i].minor);
  const main = entries.filter((_, i) => !lines[i].minor);
  frame.entries.replaceChildren(...main, ...(minor.length ? [makeMore(minor)] : []));
}

function makeMore(entries) {
  return make("details", "more", make("summary", "", plural(entries.length, "more line")), make("div", "entries", ...entries));
}

function makeEntry(line, value, hidden, toggle) {
  const button = make("button", "entry", makeSwatch(line.look), make("span", "", line.label), value);
  button.type = "button";
  button.title = `Show or hide ${line.label}`;
  const press = () => button.setAttribute("aria-pressed", String(!hidden.has(line.name)));
  button.addEventListener("click", () => {
    toggle(line.name);
    press();
  });
  press();
  return button;
}

/** Shows the values under the cursor in the legend, or the latest values if the cursor is elsewhere. */
export function showValues({ plot, model, frame }) {
  if (!plot || plot.cursor.idxs === undefined) return;
  const place = plot.cursor.idx ?? null;
  const last = model.rounds.length - 1;
  frame.when.textContent =
    place === null ? `latest: round ${formatCount(model.rounds[last])}` : `round ${formatCount(model.rounds[place])}`;
  model.lines.forEach((line, i) => {
    const index = place === null ? line.values.findLastIndex((value) => value !== null) : plot.cursor.idxs[i + 1];
    if (frame.values[i]) frame.values[i].textContent = describeValue(line, model, index ?? -1, place ?? last);
  });
}

function describeValue(line, model, index, asked) {
  if (index < 0 || line.values[index] == null) return "–";
  const error = line.errors?.[index] > 0 ? ` ± ${formatReal(line.errors[index])}` : "";
  const when = line.look.marker || (line.gaps && index !== asked) ? ` at round ${formatCount(model.rounds[index])}` : "";
  return `${model.format(line.values[index])}${error}${when}`;
}
