// Describes the figures in words: pure functions of the status.

import { formatCompact, formatCount, formatDuration, formatName, formatPercent, formatRate, formatReal, formatSigned, plural } from "./format.js";
import { fails, healthLevel, isStarting, listNotices } from "./health.js";

const STATES = { running: "Running", idle: "Idle", draining: "Draining", trainer_down: "Trainer down" };

/** Returns the display name of a state; an unknown state is returned unchanged. */
export function nameState(state) {
  return STATES[state] ?? formatName(String(state));
}

/** Describes a regret in words, with the verdict of its interval, because its sign alone is easily misread. */
export function explainRegret(own, entry) {
  return entry.kind === "baseline" ? explainBaseline(formatName(own), entry) : explainComparator(entry);
}

function explainBaseline(name, { value, verdict, interval, rounds, standard_error: error }) {
  const size = formatReal(Math.abs(value));
  const over = rounds == null ? "" : ` over ${plural(rounds, "round")}`;
  const words = {
    ahead: `${name} is ahead by ${size}`,
    behind: `${name} is behind by ${size}`,
    level: `${name} is level with it`,
  };
  const range = interval
    ? `; 95\u202f% interval ${formatSigned(interval[0])} to ${formatSigned(interval[1])}`
    : error > 0
      ? `; standard error ${formatReal(error)}`
      : "";
  return `${words[verdict] ?? "too early to say"}${over}${range}`;
}

function explainComparator(entry) {
  const known = entry.exact ? "exact" : entry.lower_bound ? "estimate, a lower bound" : "estimate";
  const error = entry.standard_error > 0 ? ` (standard error ${formatReal(entry.standard_error)})` : "";
  const settled = entry.exact || entry.settled !== false ? "" : ", not settled";
  const first = entry.first_round > 0 ? `, from round ${formatCount(entry.first_round + 1)} on` : "";
  return `${known}${error}${settled}${first}, as of round ${formatCount(entry.as_of_round)}`;
}

/** Returns the level of a verdict, for its colour: green only once the interval excludes 0. */
export function judgeVerdict({ kind, verdict }) {
  if (kind !== "baseline") return "";
  return { ahead: "good", behind: "warn" }[verdict] ?? "";
}

/** Describes what a mean is over: "mean of the last 100", or of fewer rounds, and how many were not finite. */
export function describeMean(rounds, charged = 0) {
  const over = rounds == null || rounds >= 100 ? "mean of the last 100" : `mean of ${plural(rounds, "round")}`;
  return charged > 0 ? `${over}, ${formatCount(charged)} not finite` : over;
}

/** Describes the losses of a task before and after adaptation. */
export function describeLosses({ loss_before: before, loss_after: after }) {
  return [before, after].map((loss) => (loss == null ? "not finite" : formatReal(loss))).join(" → ");
}

/** Describes the rounds whose query set may have been seen before, and the means without them; "" if there are none. */
export function describeLeaks({ leaks, learners }, names) {
  if (!leaks?.rounds) return "";
  const means = names.map((name) => {
    const { mean_loss_last_100: mean, rounds_last_100: rounds } = learners[name]?.without_leaks ?? {};
    return `${formatName(name)} ${formatReal(mean ?? null)} (${plural(rounds ?? 0, "round")})`;
  });
  return (
    `In ${plural(leaks.rounds, "round")} the query set may have been seen before: ${formatCount(leaks.duplicates)} repeat ` +
    `an earlier task, ${formatCount(leaks.overlaps)} share samples between support and query. ` +
    `Mean loss of the last 100 rounds without them: ${means.join(", ")}.`
  );
}

/** Returns the proficiency as text: "90 % accuracy" or "a loss of 0.5". */
export function nameProficiency(proficiency, isAccuracy) {
  return isAccuracy ? `${formatCompact(proficiency * 100)}\u202f% accuracy` : `a loss of ${formatCompact(proficiency)}`;
}

/** Describes the learning efficiency in the status: "3.20 (reached in 82.0 %)", "never reached", or a dash. */
export function describePoints({ reached, mean_points_needed: points } = {}) {
  if (reached == null) return formatReal(null);
  return points == null ? "never reached" : `${formatReal(points)} (reached in ${formatPercent(reached)})`;
}

/** Returns how the trainer keeps up: {verdict, level: "good" | "warn" | "bad", rates, pending}. */
export function describePace(status) {
  const {
    pending,
    learned_per_second: learned,
    ingested_per_second: arriving,
    oldest_pending_age_seconds: oldest,
  } = status.rounds;
  const rates = `${formatRate(learned)} learned, ${formatRate(arriving)} arriving`;
  const limit = status.backlog_limit;
  const waiting = limit
    ? `${formatCount(pending)} of ${formatCount(limit)} pending`
    : `${formatCount(pending)} pending`;
  const age = pending > 0 && oldest != null ? `, oldest ${formatDuration(oldest)}` : "";
  return { ...judgePace(status, (arriving ?? 0) - (learned ?? 0)), rates, pending: waiting + age };
}

function judgePace(status, growth) {
  const { pending, ingested_per_second: arriving, oldest_pending_age_seconds: oldest } = status.rounds;
  const limit = status.backlog_limit;
  if (["trainer", "restarts", "progress"].some((name) => fails(status, name))) return { verdict: "Stopped", level: "bad" };
  if (healthLevel(status) === "fail" && !isStarting(status)) return { verdict: "Not well", level: "bad" };
  if (limit && pending >= limit) return { verdict: "Backlog full", level: "bad" };
  if (pending === 0) return { verdict: "Up to date", level: "good" };
  if (isTrainerDown(status)) return { verdict: "Waiting", level: "warn" };
  if (growth > 0.05 * (arriving ?? 0) && (oldest ?? 0) > 10) return { verdict: "Falling behind", level: "warn" };
  return growth < 0 && pending > 20
    ? { verdict: "Catching up", level: "good" }
    : { verdict: "Keeping up", level: "good" };
}

/** Returns whether no trainer is running. */
export function isTrainerDown(status) {
  return status.state === "trainer_down" || status.trainer?.alive === false;
}

/** Returns the notices to show above the figures, [{title, text, level}]. */
export function chooseNotices(status) {
  if (status.state === "draining") {
    const text =
      "The daemon finishes its round, saves a checkpoint and stops. It learns pending tasks after the next start.";
    return [{ title: "Draining.", level: "info", text }];
  }
  if (isStarting(status)) {
    const text = "The trainer starts. The daemon already accepts tasks and stores them.";
    return [{ title: "Starting.", level: "info", text }];
  }
  const { rounds, backlog_limit: limit } = status;
  const full = limit && rounds.pending >= limit;
  return listNotices(status, {
    ...(fails(status, "trainer") && { trainer: { title: "Trainer down." } }),
    backlog: {
      title: full ? "Backlog full." : "Backlog nearly full.",
      level: full ? "bad" : "warn",
      text: full
        ? `Pending: ${plural(rounds.pending, "task")}. New tasks get status 429 until some are learned.`
        : nearlyFull(rounds, limit),
    },
  });
}

function nearlyFull(rounds, limit) {
  const growth = (rounds.ingested_per_second ?? 0) - (rounds.learned_per_second ?? 0);
  const soon = growth > 0 ? ` At this rate it will be full in ${formatDuration((limit - rounds.pending) / growth)}.` : "";
  return `${formatCount(rounds.pending)} of ${plural(limit, "task")} are pending.${soon}`;
}
