// A line chart over rounds, drawn by uPlot. It is rebuilt when its lines or the theme change; otherwise only its data.

import { formatCompact } from "./format.js";
import { resolveColor } from "./palette.js";
import { drawDots, drawErrors, drawSides } from "./marks.js";
import { makeFrame, showValues } from "./legend.js";
import { walkByKeys } from "./keyboard.js";
import { findLonely } from "./series.js";

const { uPlot } = window;
const FONT = "12px system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif";

/**
 * Creates a chart in `section` and returns {render, repaint}.
 *
 * `render(model)` shows a model of models.js; `repaint()` redraws it in the colours of the current theme.
 */
export function makeChart(section, announce) {
  const chart = { section, frame: makeFrame(section), plot: null, model: null, shape: "", hidden: new Set(), seen: new Set() };
  new ResizeObserver(() => chart.plot?.setSize(roomFor(chart))).observe(chart.frame.canvas);
  walkByKeys(chart, announce);
  return {
    render: (model) => render(chart, model),
    repaint: () => chart.model && draw(chart),
  };
}

function render(chart, model) {
  chart.model = model;
  chart.section.hidden = model === null;
  if (model === null) return;
  hideMinor(chart);
  const shape = JSON.stringify(model.lines.map((line) => [line.name, line.look, line.minor]));
  if (chart.plot === null || shape !== chart.shape) draw(chart);
  else chart.plot.setData(dataOf(model));
  chart.shape = shape;
  chart.frame.title.textContent = model.title;
  chart.frame.note.textContent = model.note;
  chart.frame.canvas.setAttribute("aria-label", `${model.title}. ${model.summary} Use the arrow keys to move along the rounds.`);
  showValues(chart);
}

/** Hides each line that is collapsed when it first appears; from then on the reader chooses. */
function hideMinor({ model, hidden, seen }) {
  for (const { name, minor } of model.lines) {
    if (minor && !seen.has(name)) hidden.add(name);
    seen.add(name);
  }
}

function draw(chart) {
  chart.plot?.destroy();
  chart.plot = new uPlot(options(chart), dataOf(chart.model), chart.frame.canvas);
  chart.frame.setEntries(chart.model.lines, chart.hidden, (name) => toggleLine(chart, name));
  showValues(chart);
}

function toggleLine(chart, name) {
  if (!chart.hidden.delete(name)) chart.hidden.add(name);
  const index = chart.model.lines.findIndex((line) => line.name === name);
  chart.plot.setSeries(index + 1, { show: !chart.hidden.has(name) });
}

const dataOf = (model) => [model.rounds, ...model.lines.map((line) => line.values)];

function roomFor(chart) {
  const { clientWidth, clientHeight } = chart.frame.canvas;
  return { width: Math.max(200, clientWidth), height: Math.max(160, clientHeight) };
}

function options(chart) {
  const { model } = chart;
  return {
    ...roomFor(chart),
    padding: [10, 12, 0, 0],
    legend: { show: false },
    cursor: cursorOptions(model),
    scales: { x: { time: false, range: spanRounds }, y: { range: () => spanValues(chart) } },
    axes: [
      axis("round", { incrs: wholeSteps(), values: (_, ticks) => ticks.map(formatCompact), size: 24, space: 64 }),
      axis(model.unit, { values: (_, ticks) => ticks.map(model.tick), size: 46, space: 36 }),
    ],
    series: [{}, ...model.lines.map((line) => lineOptions(line, chart.hidden))],
    bands: model.band ? [{ series: model.band.map((i) => i + 1), fill: resolveColor("band") }] : [],
    hooks: {
      drawAxes: [
        (plot) => {
          drawSides(plot, chart.model, FONT);
          drawDots(plot, chart.model, chart.hidden);
        },
      ],
      draw: [(plot) => drawErrors(plot, chart.model, chart.hidden)],
      setCursor: [() => showValues(chart)],
    },
  };
}

function cursorOptions(model) {
  return {
    y: false,
    drag: { x: false, y: false, setScale: false },
    sync: { key: "rounds", scales: ["x", null] },
    dataIdx: (plot, series, index) =>
      series === 0 || model.lines[series - 1]?.gaps ? index : nearestPresent(plot.data[series], index),
    points: { size: (_, series) => (model.lines[series - 1]?.look.marker ? 12 : 9) },
  };
}

/** Returns the index of the value nearest to `index` that is not null; null if there is none. */
export function nearestPresent(values, index) {
  for (let step = 0; step < values.length; step += 1) {
    if (values[index - step] != null) return index - step;
    if (values[index + step] != null) return index + step;
  }
  return null;
}

function axis(label, rest) {
  const grid = { stroke: resolveColor("grid"), width: 1 };
  return {
    label,
    labelSize: 20,
    labelFont: FONT,
    font: FONT,
    stroke: resolveColor("muted"),
    grid,
    ticks: { ...grid, size: 4 },
    gap: 5,
    ...rest,
  };
}

const wholeSteps = () =>
  [1, 2, 5].flatMap((n) => Array.from({ length: 9 }, (_, e) => n * 10 ** e)).sort((a, b) => a - b);

function lineOptions({ name, look, values, gaps = false }, hidden) {
  const color = resolveColor(`ink-${look.color}`);
  const alone = values.length === 1;
  return {
    show: !hidden.has(name),
    stroke: color,
    width: look.marker ? 1.5 : 2,
    dash: look.dash.map((length) => length * uPlot.pxRatio),
    spanGaps: !gaps,
    points: {
      show: look.marker || alone,
      filter: (plot, series, shown) => (gaps && !shown ? findLonely(plot.data[series]) : null),
      size: look.marker ? 8 : 6,
      fill: color,
      stroke: color,
    },
  };
}

const spanRounds = (_, low, high) => (low === high ? [low - 1, high + 1] : [low, high]);

function spanValues({ model, hidden }) {
  const shown = model.lines.filter((line) => !hidden.has(line.name));
  const values = shown.flatMap((line) => line.values).filter((value) => value !== null);
  const dots = model.dots
    .filter((dot) => !hidden.has(dot.name))
    .flatMap((dot) => dot.values)
    .filter((value) => value !== null);
  dots.sort((a, b) => a - b);
  // The scale ignores the outer 2 % of the single rounds, so that a few outliers do not flatten the lines.
  values.push(...dots.slice(Math.floor(dots.length * 0.02), Math.ceil(dots.length * 0.98)));
  if (model.zero) values.push(0);
  if (values.length === 0) return [0, 1];
  return padRange(
    values.reduce((a, b) => Math.min(a, b)),
    values.reduce((a, b) => Math.max(a, b)),
    model.bounds ?? [],
  );
}

function padRange(low, high, [floor = -Infinity, ceiling = Infinity]) {
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  return [
    low - room < floor || (low >= 0 && low < 0.5 * high && floor === 0) ? Math.min(floor, low) : low - room,
    Math.min(ceiling, high + room),
  ];
}
