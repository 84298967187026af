// Fetches JSON from the daemon, from the page's own origin.

import { recall, remember } from "./storage.js";

const PATIENCE_MS = 10_000;

/** The daemon requires a bearer token (`refused` is false) or rejected the one sent (`refused` is true). */
export class Unauthorized extends Error {
  constructor(refused) {
    super(refused ? "The daemon rejected this token." : "The daemon requires a token.");
    this.refused = refused;
  }
}

/** Stores the bearer token for this tab; null deletes it. */
export function keepToken(token) {
  remember("sessionStorage", "token", token);
}

/** Returns whether a bearer token is stored. */
export function hasToken() {
  return recall("sessionStorage", "token") !== null;
}

/** Returns the daemon's address, without a trailing slash. */
export function daemonAddress() {
  return new URL(".", document.baseURI).href.replace(/\/$/, "");
}

/**
 * Fetches `path` and returns its JSON.
 *
 * @param {string} path Relative to the page, so that a proxy may serve it under a prefix.
 * @param {Object} query Query parameters.
 * @throws {Unauthorized} On 401. @throws {Error} On any other failure, with a message for the reader.
 */
export async function getJson(path, query = {}) {
  const address = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(query)) address.searchParams.set(name, value);
  const token = recall("sessionStorage", "token");
  const answer = await send(address, token);
  if (answer.status === 401) throw new Unauthorized(token !== null);
  if (!answer.ok) throw new Error(`The daemon answered ${answer.status} ${answer.statusText}`.trim() + ".");
  return decode(answer);
}

async function send(address, token) {
  const headers = { Accept: "application/json" };
  if (token !== null) headers.Authorization = `Bearer ${token}`;
  try {
    return await fetch(address, { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  } catch (error) {
    throw new Error(
      error.name === "TimeoutError" ? "The daemon did not answer in time." : "The daemon did not answer.",
    );
  }
}

async function decode(answer) {
  try {
    return await answer.json();
  } catch {
    throw new Error("The daemon’s answer could not be read.");
  }
}
