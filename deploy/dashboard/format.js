// Formats numbers, times and names. Every function returns a dash for null, which means "unknown".

const DASH = "–";
const MINUS = "\u2212";
const SPACE = "\u202f"; // narrow no-break space between a number and its unit
const STEPS = [
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
];

const known = (value) => typeof value === "number" && Number.isFinite(value);
const withMinus = (text) => text.replace("-", MINUS);

/** 1234 -> "1.2 k", 12 -> "12": short enough for an axis or a tile. */
export function formatCompact(value) {
  if (!known(value)) return DASH;
  const step = STEPS.find(([size]) => Math.abs(value) >= size * 0.99995);
  if (!step) return withMinus(String(Number(value.toPrecision(4))));
  return withMinus(String(Number((value / step[0]).toPrecision(3)))) + SPACE + step[1];
}

/** An integer: all digits up to 9,999, compact above. */
export function formatCount(value) {
  if (!known(value)) return DASH;
  return Math.abs(value) < 10_000 ? withMinus(Math.round(value).toLocaleString("en")) : formatCompact(value);
}

/** A loss, a regret or another real number, to about three digits: 0.4213 -> "0.421", 301.24 -> "301.2". */
export function formatReal(value) {
  if (!known(value)) return DASH;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e4) return formatCompact(value);
  if (size < 1e-3) return withMinus(value.toExponential(1));
  const digits = size >= 10 ? 1 : size >= 1 ? 2 : 3;
  return withMinus(value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
}

/** Like formatReal, with a plus sign for positive numbers. */
export function formatSigned(value) {
  return known(value) && value > 0 ? `+${formatReal(value)}` : formatReal(value);
}

/** 0.8634 -> "86.3 %". */
export function formatPercent(share) {
  return known(share) ? `${(share * 100).toFixed(1)}${SPACE}%` : DASH;
}

/** Seconds: 0.41 -> "0.41 s", 200 -> "3 m 20 s", 11520 -> "3 h 12 m", 2.2e5 -> "2 d 13 h". */
export function formatDuration(seconds) {
  if (!known(seconds)) return DASH;
  const s = Math.max(0, seconds);
  if (s < 0.0005) return `0${SPACE}s`;
  if (s < 59.5) return `${Number(s.toFixed(s < 1 ? 2 : s < 10 ? 1 : 0))}${SPACE}s`;
  const units = [
    ["d", 86400],
    ["h", 3600],
    ["m", 60],
    ["s", 1],
  ];
  const whole = Math.round(s);
  const first = units.findIndex(([, size]) => whole >= size);
  const [big, small] = [units[first], units[first + 1]];
  const rest = Math.floor((whole % big[1]) / small[1]);
  return `${Math.floor(whole / big[1])}${SPACE}${big[0]}` + (rest ? ` ${rest}${SPACE}${small[0]}` : "");
}

/** Elapsed seconds: "just now", "12 s ago", "3 m 20 s ago". */
export function formatAgo(seconds) {
  if (!known(seconds)) return DASH;
  return seconds < 2 ? "just now" : `${formatDuration(Math.round(seconds))} ago`;
}

/** A rate in events per second; a slow rate is shown per minute or per hour. */
export function formatRate(perSecond) {
  if (!known(perSecond)) return DASH;
  if (perSecond === 0) return "0/s";
  if (perSecond >= 0.1) return `${formatReal(Number(perSecond.toPrecision(2))).replace(/\.?0+$/, "")}/s`;
  if (perSecond >= 0.1 / 60) return `${Number((perSecond * 60).toPrecision(2))}/min`;
  return `${Number((perSecond * 3600).toPrecision(2))}/h`;
}

/** The display name of an answer or comparator: "pooled_ridge" -> "pooled ridge", "ftml@10" -> "FTML with 10 steps". */
export function formatName(name) {
  const [learner, further] = name.split("@");
  const shown = learner.replace(/^ftml$/, "FTML").replaceAll("_", " ");
  const [, rule, steps] = (further ?? "").match(/^(.*?)(\d*)$/);
  const words = rule.replaceAll("_", " ");
  if (!steps) return rule ? `${shown} with a ${words}` : shown;
  return `${shown} with ${steps} step${steps === "1" ? "" : "s"}${rule ? ` of ${words}` : ""}`;
}

/** "1 round", "2 rounds". */
export function plural(count, noun) {
  return `${formatCount(count)} ${noun}${count === 1 ? "" : "s"}`;
}
