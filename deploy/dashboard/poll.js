// Calls a step repeatedly: at a steady pace, more slowly after failures, and not while the tab is hidden.

const INTERVAL_MS = 2_000;
const LONGEST_MS = 30_000;

/**
 * Starts polling at once.
 *
 * @param {function(): Promise<void>} step Throws if it fails.
 * @param {function(Error, number): void} failed Called with the error and the milliseconds until the next try;
 *   returns false to stop until `now()` is called.
 * @returns {{now: function(): void}} `now()` tries at once and then continues at the steady pace.
 */
export function startPolling(step, failed) {
  let timer = null;
  let failures = 0;
  let running = false;
  let again = false;

  async function turn() {
    timer = null;
    running = true;
    let wait = INTERVAL_MS;
    try {
      await step();
      failures = 0;
    } catch (error) {
      failures += 1;
      wait = Math.min(LONGEST_MS, INTERVAL_MS * 2 ** (failures - 1));
      if (failed(error, wait) === false) wait = null;
    }
    running = false;
    schedule(again ? 0 : wait);
  }

  function schedule(wait) {
    again = false;
    if (wait !== null && !document.hidden) timer = setTimeout(turn, wait);
  }

  function now() {
    clearTimeout(timer);
    if (running) again = true;
    else turn();
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) clearTimeout(timer);
    else now();
  });
  turn();
  return { now };
}
