// Moves along a chart's rounds with the arrow keys, for readers without a mouse.

const STRIDES = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };

/** Lets the arrow keys move the cursor of the focused chart; `announce` is called with the values as text. */
export function walkByKeys(chart, announce) {
  chart.frame.canvas.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave(chart);
    if (!(event.key in STRIDES) || !chart.plot) return;
    event.preventDefault();
    const last = chart.model.rounds.length - 1;
    const place = Math.min(last, Math.max(0, (chart.plot.cursor.idx ?? last) + STRIDES[event.key]));
    moveTo(chart, place);
    announce(`${chart.frame.when.textContent}: ${readEntries(chart)}`);
  });
  chart.frame.canvas.addEventListener("blur", () => leave(chart));
}

function moveTo({ plot, model }, place) {
  const left = plot.valToPos(model.rounds[place], "x");
  plot.setCursor({ left, top: plot.over.clientHeight / 2 }, true, true);
}

function leave({ plot }) {
  plot?.setCursor({ left: -10, top: -10 }, true, true);
}

function readEntries({ model, frame, hidden }) {
  const read = (line, i) => (hidden.has(line.name) ? [] : [`${line.label} ${frame.values[i].textContent}`]);
  return model.lines.flatMap(read).join(", ");
}
