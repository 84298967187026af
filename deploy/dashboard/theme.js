// The light or dark theme: the system's choice unless the reader chose the other one. Loaded before the first paint.

import { recall, remember } from "./storage.js";

const dark = window.matchMedia("(prefers-color-scheme: dark)");
const system = () => (dark.matches ? "dark" : "light");

/** Returns the current theme: "light" or "dark". */
export function currentTheme() {
  return document.documentElement.dataset.theme ?? system();
}

/** Switches to the other theme and stores the choice; switching back to the system's theme deletes it. */
export function toggleTheme() {
  const next = currentTheme() === "dark" ? "light" : "dark";
  remember("localStorage", "theme", next === system() ? null : next);
  applyTheme();
}

/** Calls `listener` whenever the current theme may have changed. */
export function onThemeChange(listener) {
  dark.addEventListener("change", listener);
  document.addEventListener("themechange", listener);
}

function applyTheme() {
  const chosen = recall("localStorage", "theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  else delete document.documentElement.dataset.theme;
  document.dispatchEvent(new Event("themechange"));
}

applyTheme();
