// Shows and hides parts of the page: the state pill, the banners, the token form, the empty state.

import { daemonAddress, hasToken } from "./api.js";
import { field, fill, make, show } from "./dom.js";
import { formatDuration, plural } from "./format.js";
import { describeTrouble, fillHealth, healthLevel, isStarting } from "./health.js";
import { judgeState } from "./pool.js";
import { chooseNotices, isTrainerDown, nameState } from "./wording.js";

/** Shows a state in the pill and in the tab's title; `detail` precedes the title. */
export function showState(state, word, detail, level = "ok") {
  const pill = document.querySelector(".pill");
  if (pill.dataset.state !== state) pill.dataset.state = state;
  if (pill.dataset.health !== level) pill.dataset.health = level;
  fill("state", word);
  const title = detail ? `${detail} · online-meta` : "online-meta";
  if (document.title !== title) document.title = title;
}

/** Shows the state in `status`, its health, and its notices. */
export function showStatus(status) {
  showPill(status);
  fillHealth(status);
  const notices = chooseNotices(status);
  show('[data-banner="notice"]', notices.length > 0);
  if (notices.length === 0) return;
  document.querySelector('[data-banner="notice"]').className = `banner ${notices[0].level}`;
  const lines = notices.map(({ title, text }) => make("p", "", make("strong", "", title), ` ${text}`));
  if (field("notices").textContent !== lines.map((line) => line.textContent).join("")) {
    field("notices").replaceChildren(...lines);
  }
}

/** Shows whether meta-learning pays; a daemon of 0.1.0 does not say. */
export function showVerdict({ verdict, rounds }) {
  const shown = verdict != null && rounds.learned > 0;
  show('[data-panel="verdict"]', shown);
  if (!shown) return;
  document.querySelector('[data-panel="verdict"]').dataset.verdict = judgeState(verdict);
  fill("verdict", verdict.sentence);
  fill("advice", verdict.advice);
}

function showPill(status) {
  const state = isTrainerDown(status) ? "trainer_down" : status.state;
  const rounds = plural(status.rounds.learned, "round");
  const trouble = state === "draining" ? null : describeTrouble(status);
  if (trouble === null) return showState(state, nameState(state), `${nameState(state)}, ${rounds}`);
  if (isStarting(status)) return showState("starting", "Starting", `Starting, ${rounds}`);
  const word = state === "trainer_down" ? nameState(state) : trouble;
  return showState(state, word, `${word}, ${rounds}`, healthLevel(status));
}

/** Shows the banner of a lost connection for {reason, since, retryAt} (times in milliseconds); null hides it. */
export function showLost(lost) {
  show('[data-banner="lost"]', lost !== null);
  document.body.classList.toggle("stale", lost !== null);
  if (lost === null) return;
  const seconds = Math.max(0, Math.ceil((lost.retryAt - Date.now()) / 1000));
  const next = seconds > 0 ? `Trying again in ${formatDuration(seconds)}.` : "Trying again …";
  const kept = lost.since === null ? "" : ` The figures below are those of ${clock(lost.since)}.`;
  fill("lost", `${lost.reason}${kept} ${next}`);
}

/** Returns a timestamp (milliseconds) as the reader's local time. */
export function clock(moment) {
  return new Date(moment).toLocaleTimeString([], {
    hour: "2-digit",
    minute: "2-digit",
    second: "2-digit",
    hour12: false,
  });
}

/** Shows the token form with a message (empty the first time), and moves the focus to it once. */
export function askForToken(message) {
  const hidden = document.querySelector('[data-panel="token"]').hidden;
  show('[data-panel="token"]', true);
  show('[data-panel="figures"]', false);
  show('[data-banner="notice"]', false);
  fill("token-error", message);
  showState("locked", "Token needed", "Token needed");
  if (hidden) document.getElementById("token").focus();
}

/** Shows the figures, with the charts or, before the first round, with instructions for sending a task. */
export function showFigures({ rounds }) {
  const begun = rounds.learned + (rounds.skipped ?? 0) > 0;
  show('[data-panel="token"]', false);
  show('[data-panel="figures"]', true);
  show('[data-panel="charts"]', begun);
  show('[data-panel="empty"]', !begun);
  if (begun) return;
  fill("empty-title", rounds.pending ? "The first round is being learned" : "No rounds yet");
  fill(
    "empty-text",
    rounds.pending
      ? `${plural(rounds.pending, "task")} received. The charts appear after the first round. To send more tasks:`
      : "The daemon is running and waits for its first task. To send tasks:",
  );
  fill("command", `online-meta submit FILE... --url ${daemonAddress()}`);
}

/**
 * Shows the command that sends an example: `example`, a task in JSON, or if it is null, the long one that the daemon
 * serves. A daemon of 0.1.0 has none.
 */
export function showExample(example) {
  show('[data-panel="example"]', example !== undefined);
  if (example === undefined) return;
  const bearer = hasToken() ? ' -H "Authorization: Bearer $TOKEN"' : "";
  const command = `curl ${daemonAddress()}/v1/tasks${bearer} -H 'Content-Type: application/json'`;
  const piped = `curl -s ${daemonAddress()}/v1/examples/tasks${bearer} | ${command} --data-binary @-`;
  fill("example", example === null ? piped : `${command} -d '${JSON.stringify(example)}'`);
}

/** Copies the command before a button, and confirms it on the button. */
export async function copyCommand(button) {
  const command = button.previousElementSibling;
  try {
    await navigator.clipboard.writeText(command.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(command); // The clipboard needs TLS; without it, select the text.
    button.textContent = "Selected";
  }
  setTimeout(() => {
    button.textContent = "Copy";
  }, 2000);
}
