// The health of the run: words for the pill and the banner (pure functions), and the list of checks.

import { field, fill, make } from "./dom.js";
import { formatDuration, formatName, plural } from "./format.js";

const ORDER = ["fail", "warn", "ok"];
const CLASSES = { fail: "bad", warn: "warn", ok: "good" };
const WORDS = { fail: "fails", warn: "needs attention", ok: "ok" };
const PLURALS = ["restarts", "answers", "comparators"];
const MOST = 3; // notices in the banner; the list below has all of them

/** Returns the level of the run's health: "ok", "warn" or "fail"; of a daemon that sends none, "ok". */
export function healthLevel(status) {
  return status.health?.level ?? "ok";
}

/** Returns the checks that are not ok, those that fail first. */
export function troubles(status) {
  const found = (status.health?.checks ?? []).filter((check) => check.level !== "ok");
  return found.sort((a, b) => ORDER.indexOf(a.level) - ORDER.indexOf(b.level));
}

/** Tells whether a check has the level "fail". */
export function fails(status, name) {
  return troubles(status).some((check) => check.level === "fail" && check.name === name);
}

/** Tells whether the run has just been created: it has no parameters yet, and nothing else fails. */
export function isStarting(status) {
  const failing = troubles(status).filter((check) => check.level === "fail");
  return failing.length === 1 && failing[0].name === "answers" && status.state !== "trainer_down";
}

/** Returns the display name of a check: "source:queue" -> "Source queue". */
export function nameCheck(name) {
  const words = formatName(name).replace(":", " ");
  return words[0].toUpperCase() + words.slice(1);
}

/** Returns a few words about the checks that are not ok for the pill, or null: "Disk fails", "2 warnings". */
export function describeTrouble(status) {
  const found = troubles(status);
  const worst = found.filter((check) => check.level === found[0].level);
  if (found.length === 0) return null;
  if (worst[0].level === "warn") return plural(worst.length, "warning");
  if (worst.length > 1) return `${worst.length} checks fail`;
  return worst[0].name.length < 12 ? `${nameCheck(worst[0].name)} ${judgement(worst[0])}` : "1 check fails";
}

function judgement({ name, level }) {
  return PLURALS.includes(name) ? WORDS[level].replace("fails", "fail").replace("needs", "need") : WORDS[level];
}

/** Returns the notices of the checks that are not ok, [{title, text, level}], and one for those that do not fit. */
export function listNotices(status, texts = {}) {
  const found = troubles(status);
  const notices = found.slice(0, MOST).map((check) => ({
    title: texts[check.name]?.title ?? `${nameCheck(check.name)} ${judgement(check)}.`,
    text: texts[check.name]?.text ?? `${sentence(check.evidence)} ${check.what_to_do}`.trim(),
    level: texts[check.name]?.level ?? CLASSES[check.level],
  }));
  if (found.length > MOST) {
    const more = `${plural(found.length - MOST, "more check")} in the list “Health” below.`;
    notices.push({ title: "", text: more, level: notices[0].level });
  }
  return notices;
}

function sentence(text) {
  return `${text[0].toUpperCase()}${text.slice(1)}${text.endsWith(".") ? "" : "."}`;
}

/** Fills the list of checks; it opens by itself when a check stops being ok. */
export function fillHealth(status) {
  const checks = status.health?.checks ?? [];
  const level = isStarting(status) ? "ok" : healthLevel(status);
  const panel = document.querySelector('[data-panel="health"]');
  panel.hidden = checks.length === 0;
  document.body.dataset.health = level;
  if (level !== "ok" && panel.dataset.level === "ok") panel.open = true;
  panel.dataset.level = level;
  fill("health-summary", level === "ok" && isStarting(status) ? "Health: starting" : summarise(status, checks));
  const sorted = checks.toSorted((a, b) => ORDER.indexOf(a.level) - ORDER.indexOf(b.level));
  field("checks").replaceChildren(...sorted.map((check) => describeCheck(check, status.now)));
}

function summarise(status, checks) {
  const count = troubles(status).length;
  if (count === 0) return "Health: all is well";
  return `Health: ${count} of ${plural(checks.length, "check")} ${count === 1 ? "needs" : "need"} attention`;
}

function describeCheck(check, now) {
  const level = make("td", "level", check.because ? `see ${nameCheck(check.because).toLowerCase()}` : WORDS[check.level]);
  level.dataset.level = check.because ? "" : CLASSES[check.level];
  const name = make("th", "", nameCheck(check.name));
  name.scope = "row";
  const since = make("td", "number", check.since ? formatDuration(Math.max(0, Math.round(now - check.since))) : "");
  [level.dataset.label, since.dataset.label] = ["Level", "For"];
  const advice = check.what_to_do ? [make("p", "note", check.what_to_do)] : [];
  const evidence = make("td", "words", make("p", "", sentence(check.evidence)), ...advice);
  return make("tr", "", name, level, since, evidence);
}
