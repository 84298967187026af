// Small values that survive a reload. The page also works if the browser denies storage.

/** Returns the text stored under `key`, or null. `area` names the storage: "localStorage" or "sessionStorage". */
export function recall(area, key) {
  try {
    return window[area].getItem(`online-meta.${key}`);
  } catch {
    return null;
  }
}

/** Stores `text` under `key`, or deletes the key if `text` is null. */
export function remember(area, key, text) {
  try {
    if (text === null) window[area].removeItem(`online-meta.${key}`);
    else window[area].setItem(`online-meta.${key}`, text);
  } catch {
    // Private windows and strict settings deny storage; the value then lasts as long as the page.
  }
}
