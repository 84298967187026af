// The row of tiles at the top: rounds, loss, accuracy, regret, pace, checkpoint.

import { field, fill, fillBar, make, makeSwatch, show } from "./dom.js";
import {
  formatAgo,
  formatCount,
  formatDuration,
  formatName,
  formatPercent,
  formatReal,
  formatSigned,
  plural,
} from "./format.js";
import { poolOf } from "./pool.js";
import { relativeChange } from "./series.js";
import { describeLosses, describeMean, describePace, explainRegret, judgeVerdict } from "./wording.js";

const ROWS = 4; // regrets in the tile; the table has all of them

/** Fills all tiles. `ledger` is null until fetched; `names` has the daemon's learner first; `elapsed` is in seconds. */
export function fillTiles({ status, ledger, names, kinds, looks, minor, elapsed }) {
  fillRounds(status);
  fillLoss(status, ledger, names[0]);
  fillAccuracy(status, names[0]);
  const order = [...kinds, ...names.filter((name) => !minor.has(name)), ...minor];
  fillRegret(status.regret ?? {}, names[0], looks, order);
  fillPace(status);
  fillCheckpoint(status, elapsed);
}

function fillRounds({ rounds: { ingested, learned, skipped }, last }) {
  fill("learned", formatCount(learned));
  const left = skipped ? `, ${formatCount(skipped)} skipped` : "";
  const entity = last?.entity == null ? "" : `; the last one of ${last.entity}`;
  fill("learned-note", `of ${formatCount(ingested)} ingested${left}${entity}`);
  fillBar("learned", ingested ? (learned + (skipped ?? 0)) / ingested : 0);
}

/** Fills the tile of the loss: that of the pool, or of the learner that leads where there is no pool. */
function fillLoss(status, ledger, own) {
  const { last, learners } = status;
  const name = poolOf(status) ?? own;
  fill("loss", formatReal(learners?.[name]?.mean_loss_last_100 ?? null));
  const losses = name === own ? ledger?.loss_after : ledger?.learners[name]?.loss;
  const change = losses ? relativeChange(losses) : null;
  const { rounds_last_100: rounds, charged_rounds_last_100: charged } = learners?.[name] ?? {};
  const mean = `${name === own ? "" : "the pool, "}${describeMean(rounds, charged)}`;
  fill("loss-trend", change === null ? mean : `${mean}; ${describeChange(change)} over the rounds shown`);
  const single = last && !last.skipped ? `last task ${describeLosses(last)}` : "";
  fill("loss-note", name === own ? single : `${formatName(own)} alone ${formatReal(learners?.[own]?.mean_loss_last_100 ?? null)}`);
  field("loss-trend").dataset.level = change === null || change < 0.02 ? "" : "warn";
}

function describeChange(change) {
  const size = Math.round(Math.abs(change) * 100);
  if (size < 2) return "→ steady";
  return change < 0 ? `↓ down ${size}\u202f%` : `↑ up ${size}\u202f%`;
}

function fillAccuracy(status, own) {
  const { last, learners } = status;
  const name = poolOf(status) ?? own;
  const mean = learners?.[name]?.mean_accuracy_last_100 ?? null;
  const single = name === own ? (last?.accuracy ?? null) : null;
  show('[data-tile="accuracy"]', mean !== null || single !== null);
  fill("accuracy", formatPercent(mean ?? single));
  const over = mean === null ? "last task" : describeMean(learners[name].accuracy_rounds_last_100);
  fill("accuracy-when", name === own ? over : `the pool, ${over}`);
  fill("accuracy-note", single !== null && mean !== null ? `last task ${formatPercent(single)}` : "");
}

function fillRegret(regret, own, looks, order) {
  const entries = orderAgainst(regret, order);
  const rows = entries.slice(0, ROWS).flatMap(([name, entry]) => describeAgainst(name, entry, own, looks));
  if (entries.length === 0) rows.push(make("dt", "none", "No comparator or baseline has been scored yet."));
  if (entries.length > ROWS) rows.push(make("dt", "none", `and ${entries.length - ROWS} more in the table below`));
  field("regret").replaceChildren(...rows);
}

function orderAgainst(regret, order) {
  const place = ([name, entry]) => (entry.kind === "baseline" ? order.length : 0) + order.indexOf(name);
  return Object.entries(regret)
    .filter(([, entry]) => entry?.value != null)
    .sort((a, b) => place(a) - place(b));
}

function describeAgainst(name, entry, own, looks) {
  const look = looks.get(name);
  const title = make("dt", "", ...(look ? [makeSwatch(look)] : []), `against ${formatName(name)}`);
  const error = entry.standard_error > 0 ? ` ± ${formatReal(entry.standard_error)}` : "";
  const value = entry.kind === "baseline" ? formatSigned(entry.value) : (entry.lower_bound ? "≥ " : "") + formatReal(entry.value);
  const figure = make("dd", "sum", value + error);
  const words = make("dd", "note", explainRegret(own, entry));
  words.dataset.level = judgeVerdict(entry);
  return [title, figure, words];
}

function fillPace(status) {
  const pace = describePace(status);
  fill("pace", pace.verdict);
  field("pace").dataset.level = pace.level;
  fill("pace-rates", pace.rates);
  fill("pace-pending", pace.pending);
}

function fillCheckpoint({ checkpoint, now, rounds }, elapsed) {
  fill("checkpoint", checkpoint ? formatAgo(now - checkpoint.timestamp + elapsed) : "None yet");
  const since = checkpoint ? Math.max(0, rounds.learned + (rounds.skipped ?? 0) - checkpoint.round) : 0;
  fill(
    "checkpoint-note",
    checkpoint ? `of round ${formatCount(checkpoint.round)}; ${plural(since, "round")} since` : "",
  );
}

/** Fills the header: version, run, uptime, number of ranks, restarts of the trainer. */
export function fillHeader(status, elapsed) {
  fill("version", status.version ? `v${status.version}` : "");
  const up = status.started ? `up ${formatDuration(Math.round(status.now - status.started + elapsed))}` : "";
  const restarts = status.trainer?.restarts ? `trainer restarted ${plural(status.trainer.restarts, "time")}` : "";
  const ranks = status.trainer?.world_size > 1 ? plural(status.trainer.world_size, "rank") : "";
  fill("run", [status.run, up, ranks, restarts].filter(Boolean).join(" · "));
}
