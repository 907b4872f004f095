/** The answer of /predict as lines of JSON, which arrive while the service computes. */

/** @typedef {import("../spectrogram.js").Mark} Mark */

/** The type that asks for them. */
export const LINES = "application/x-ndjson";

/**
 * How far an unfinished answer has come: the end of the last window that is complete.
 *
 * @param {string} text
 * @returns {number} seconds
 */
export function reachedIn(text) {
  const end = text.lastIndexOf("\n");
  const line = text.slice(text.lastIndexOf("\n", end - 1) + 1, end);
  return end < 0 ? 0 : (JSON.parse(line).end ?? 0);
}

/**
 * The document that lines amount to.
 *
 * @param {string} text all lines
 * @returns {any} as /predict answers it; an Error if the service gave up before the end
 */
export function documentOf(text) {
  /** @type {any} */
  const answer = { detections: [] };
  for (const line of text.split("\n")) {
    const { event, detections, ...rest } = line === "" ? { event: "" } : JSON.parse(line);
    if (event === "error") {
      throw new Error(rest.error);
    }
    if (event === "window") {
      for (const each of detections) {
        answer.detections.push(each);
      }
    } else if (event !== "") {
      Object.assign(answer, rest);
    }
  }
  return answer;
}
