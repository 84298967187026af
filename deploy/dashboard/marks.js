// Draws what uPlot does not: single rounds as faint dots, error bars, and labels above and below zero.

import { resolveColor } from "./palette.js";

function within(plot, paint) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  paint(ctx, window.devicePixelRatio || 1);
  ctx.restore();
}

/** Draws the single points as faint dots behind the smoothed lines. */
export function drawDots(plot, model, hidden) {
  within(plot, (ctx, ratio) => {
    for (const { name, look, values } of model.dots) {
      if (hidden.has(name)) continue;
      ctx.fillStyle = resolveColor(`ink-${look.color}`);
      ctx.globalAlpha = 0.42;
      values.forEach((value, i) => value !== null && dot(plot, ctx, model.rounds[i], value, 1.6 * ratio));
    }
  });
}

function dot(plot, ctx, round, value, radius) {
  ctx.beginPath();
  ctx.arc(plot.valToPos(round, "x", true), plot.valToPos(value, "y", true), radius, 0, 2 * Math.PI);
  ctx.fill();
}

/** Draws error bars of one standard error at the points that have one. */
export function drawErrors(plot, model, hidden) {
  within(plot, (ctx, ratio) => {
    for (const { name, look, values, errors } of model.lines) {
      if (!errors || hidden.has(name)) continue;
      ctx.strokeStyle = resolveColor(`ink-${look.color}`);
      ctx.lineWidth = 1.5 * ratio;
      errors.forEach(
        (error, i) => error > 0 && bar(plot, ctx, model.rounds[i], [values[i] - error, values[i] + error]),
      );
    }
  });
}

function bar(plot, ctx, round, ends) {
  const x = plot.valToPos(round, "x", true);
  const [low, high] = ends.map((value) => plot.valToPos(value, "y", true));
  ctx.beginPath();
  ctx.moveTo(x, low);
  ctx.lineTo(x, high);
  ctx.stroke();
}

/** Draws the zero line of a regret chart, and labels the areas above and below it. */
export function drawSides(plot, model, font) {
  if (!model.sides) return;
  within(plot, (ctx, ratio) => {
    const zero = plot.valToPos(0, "y", true);
    const { left, top, width, height } = plot.bbox;
    ctx.strokeStyle = ctx.fillStyle = resolveColor("muted");
    ctx.lineWidth = 1.5 * ratio;
    ctx.beginPath();
    ctx.moveTo(left, zero);
    ctx.lineTo(left + width, zero);
    ctx.stroke();
    label(ctx, ratio, font, [left, top, height], zero, model.sides);
  });
}

function label(ctx, ratio, font, [left, top, height], zero, { above, below }) {
  ctx.font = font.replace("12px", `${12 * ratio}px`);
  ctx.textAlign = "left";
  ctx.textBaseline = "alphabetic";
  const [x, bottom] = [left + 8 * ratio, top + height];
  if (zero - top > 24 * ratio) ctx.fillText(`\u2191 ${above}`, x, top + 14 * ratio);
  if (bottom - zero > 24 * ratio) ctx.fillText(`\u2193 ${below}`, x, bottom - 8 * ratio);
}
