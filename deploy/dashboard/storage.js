// Small values that outlive a reload. A browser may deny storage altogether: the page works without it.

/** Returns the text stored under `key`, or null. `area` names the storage: "localStorage" or "sessionStorage". */
export function recall(area, key) {
  try {
    return window[area].getItem(`online-meta.${key}`);
  } catch {
    return null;
  }
}

/** Stores `text` under `key`, or forgets the key when `text` is null. */
export function remember(area, key, text) {
  try {
    if (text === null) window[area].removeItem(`online-meta.${key}`);
    else window[area].setItem(`online-meta.${key}`, text);
  } catch {
    // Private windows and strict settings: the value then lives as long as the page.
  }
}
