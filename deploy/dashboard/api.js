// The daemon's answers as JSON, from the page's own origin.

import { recall, remember } from "./storage.js";

const PATIENCE_MS = 10_000;

/** The daemon wants a bearer token (`refused` is false) or did not take the one sent (`refused` is true). */
export class Unauthorized extends Error {
  constructor(refused) {
    super(refused ? "The daemon did not take this token." : "The daemon asks for a token.");
    this.refused = refused;
  }
}

/** Keeps the bearer token for this tab; null forgets it. */
export function keepToken(token) {
  remember("sessionStorage", "token", token);
}

/** Returns the daemon's own address, without a slash at its end. */
export function daemonAddress() {
  return new URL(".", document.baseURI).href.replace(/\/$/, "");
}

/**
 * Returns the JSON that `path` answers with.
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
