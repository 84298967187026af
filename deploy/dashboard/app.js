// The page: polls the daemon, stores the last responses, and shows them.

import { getJson, keepToken, Unauthorized } from "./api.js";
import { makeChart } from "./charts.js";
import { fill } from "./dom.js";
import { formatAgo } from "./format.js";
import { modelCharts } from "./models.js";
import { findMinor, putPoolSecond } from "./pool.js";
import { assignLooks } from "./palette.js";
import {
  askForToken,
  clock,
  copyCommand,
  showExample,
  showFigures,
  showLost,
  showState,
  showStatus,
  showVerdict,
} from "./panels.js";
import { startPolling } from "./poll.js";
import { comparatorKinds, countRounds, orderLearners } from "./series.js";
import { fillTable, toggleMore } from "./table.js";
import { fillHeader, fillTiles } from "./tiles.js";
import { currentTheme, onThemeChange, toggleTheme } from "./theme.js";

const POINTS = 400;

/** The state of the page: the last responses, the time they arrived, and the reader's choices. */
const page = { status: null, ledger: null, ledgerKey: null, fetched: null, lost: null, range: "all", charts: null };

async function refresh() {
  const status = await getJson("v1/status");
  Object.assign(page, { status, fetched: Date.now(), lost: null });
  await refreshLedger(status);
  render();
}

async function refreshLedger(status) {
  const key = JSON.stringify([status.rounds.learned, status.rounds.skipped, status.regret, page.range]);
  if (key === page.ledgerKey) return;
  try {
    page.ledger = countRounds(await getJson("v1/regret", { from: firstRound(status.rounds), points: POINTS }));
    page.ledgerKey = key;
    fill("ledger-error", "");
  } catch (error) {
    if (error instanceof Unauthorized) throw error;
    fill("ledger-error", `The charts could not be updated: ${error.message}`);
  }
}

function firstRound({ learned, skipped }) {
  return page.range === "all" ? 0 : Math.max(0, learned + (skipped ?? 0) - Number(page.range));
}

function render() {
  const { status, ledger } = page;
  showLost(page.lost);
  showFigures(status);
  showExample(status.example);
  showStatus(status);
  showVerdict(status);
  const configured = orderLearners(status.leader, status.learners, ledger?.learners);
  const kinds = comparatorKinds(status.regret, ledger?.comparators);
  const looks = assignLooks(configured, kinds); // in the order of the configuration, as in the report
  const [names, minor] = [putPoolSecond(configured, status), findMinor(configured, status)];
  const view = { status, ledger, names, kinds, looks, minor, elapsed: elapsed() };
  fillHeader(status, view.elapsed);
  fillTiles(view);
  fillTable(view);
  if (ledger?.rounds.length) renderCharts(modelCharts(ledger, names, kinds, looks, minor));
  tick();
}

function renderCharts(models) {
  page.charts ??= Object.fromEntries(Object.keys(models).map((name) => [name, chartIn(name)]));
  for (const [name, chart] of Object.entries(page.charts)) chart.render(models[name]);
}

const chartIn = (name) =>
  makeChart(document.querySelector(`[data-chart="${name}"]`), (words) => fill("announce", words));

const elapsed = () => (page.fetched === null ? 0 : (Date.now() - page.fetched) / 1000);

function failed(error, wait) {
  if (error instanceof Unauthorized) {
    page.lost = null;
    showLost(null);
    askForToken(error.refused ? error.message : "");
    return false;
  }
  page.lost = { reason: error.message, since: page.fetched, retryAt: Date.now() + wait };
  showState("lost", "No connection", "No connection");
  tick();
  return true;
}

/** Updates the texts that depend on the time; also called between two polls. */
function tick() {
  if (page.lost) showLost(page.lost);
  if (page.status === null) return;
  fillHeader(page.status, elapsed());
  fill(
    "updated",
    `Updated ${formatAgo(elapsed())}, at ${clock(page.fetched)}. Updates every 2 seconds while this tab is visible.`,
  );
}

function nameThemeButton() {
  const other = currentTheme() === "dark" ? "light" : "dark";
  const button = document.querySelector('[data-action="theme"]');
  button.setAttribute("aria-label", `Switch to the ${other} theme`);
  button.title = `Switch to the ${other} theme`;
}

function listen(polling) {
  const on = (selector, kind, listener) => document.querySelector(selector).addEventListener(kind, listener);
  on('[data-action="theme"]', "click", toggleTheme);
  on('[data-action="retry"]', "click", () => polling.now());
  on('[data-action="more"]', "click", toggleMore);
  on('[data-action="copy"]', "click", (event) => copyCommand(event.currentTarget));
  on('[data-action="copy-example"]', "click", (event) => copyCommand(event.currentTarget));
  on('[data-field="ranges"]', "change", (event) => {
    page.range = event.target.value;
    polling.now();
  });
  on('[data-panel="token"]', "submit", (event) => {
    event.preventDefault();
    keepToken(document.getElementById("token").value.trim());
    polling.now();
  });
  onThemeChange(() => {
    nameThemeButton();
    for (const chart of Object.values(page.charts ?? {})) chart.repaint();
  });
}

nameThemeButton();
listen(startPolling(refresh, failed));
setInterval(tick, 1000);
