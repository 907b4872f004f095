/** Another head from the decisions: started, watched and cancelled; its reports, and its scores for the queue. */

import { make, plainTable, statusLine } from "../dom.js";
import { say } from "../strings.js";
import { ask } from "./api.js";

const WAIT = 1000; // ms between two looks at a training

/**
 * @typedef {{a: number | null, b: number | null, difference: number | null, low: number | null, high: number | null}} Difference
 * @typedef {{average_precision: Difference}} Figures
 */

/**
 * @typedef {object} Head
 * @property {number} number
 * @property {string} name
 * @property {boolean} report
 * @property {boolean} before
 * @property {boolean} scores
 * @property {{recordings: number, macro: Figures, labels: Record<string, Figures>, notes: string[]} | null} comparison
 */

/** @typedef {{missing: string | null, running: boolean, lines: string[], error: string | null, heads: Head[]}} State */

/**
 * Review the scores of another head: the page is loaded again, since labels differ.
 *
 * @param {string} probe
 */
export async function useScores(probe) {
  await ask("api/scores", { probe });
  location.reload();
}

/** The panel; it asks for its state itself. */
export function retrainingPanel() {
  const status = statusLine();
  const error = make("p", { class: "error", role: "alert" });
  const lines = make("pre", { hidden: true });
  const heads = make("div");
  const fail = (/** @type {Error} */ reason) => {
    error.textContent = reason.message;
  };
  const act = (/** @type {string} */ name) => {
    error.textContent = "";
    ask(`api/retraining/${name}`, {}).then(show, fail);
  };
  let timer = 0;
  let wasRunning = false;
  let cancelled = false;
  const stop = () => {
    cancelled = true;
    act("cancel");
  };
  const start = make("button", { type: "button", hidden: true, click: () => act("start") }, say("review.retrain"));
  const cancel = make("button", { type: "button", hidden: true, click: stop }, say("review.retrain.cancel"));

  /** @param {State} state */
  function show(state) {
    clearTimeout(timer);
    start.hidden = state.running || state.missing !== null;
    cancel.hidden = !state.running;
    lines.hidden = !state.running;
    lines.textContent = state.lines.join("\n");
    if (state.running) {
      status.textContent = state.lines.at(-1) ?? "";
      timer = setTimeout(() => ask("api/retraining").then(show, fail), WAIT);
    } else if (wasRunning) {
      const [newest] = state.heads;
      const done = cancelled ? say("review.retrain.cancelled") : say("review.retrain.done", { name: newest?.name ?? "" });
      status.textContent = state.error === null ? done : "";
      cancelled = false;
    } else {
      status.textContent = state.missing ?? say("review.retrain.help");
    }
    error.textContent = state.error === null ? "" : say("review.retrain.failed", { reason: state.error });
    wasRunning = state.running;
    heads.replaceChildren(...state.heads.map((each) => describeHead(each, fail)));
  }

  ask("api/retraining").then(show, fail);
  return make(
    "section",
    { "aria-label": say("review.retrain.title") },
    make("h2", {}, say("review.retrain.title")),
    status,
    error,
    lines,
    make("div", { class: "controls" }, start, cancel),
    heads,
  );
}

/**
 * @param {Head} head
 * @param {(error: Error) => void} fail
 */
function describeHead(head, fail) {
  const { name, number, comparison } = head;
  const link = (/** @type {string} */ which, /** @type {string} */ text) =>
    make("li", {}, make("a", { href: `retrained/${number}/${which}`, target: "_blank" }, say(text, { name })));
  const use = make("button", { type: "button", click: () => useScores(name).catch(fail) }, say("review.retrain.use", { name }));
  return make(
    "div",
    {},
    make("h3", {}, name),
    comparison === null ? make("p", { class: "facts" }, say("review.retrain.none")) : compared(name, comparison),
    make(
      "ul",
      {},
      head.before ? link("before", "review.retrain.before") : null,
      head.report ? link("after", "review.retrain.report") : null,
    ),
    head.scores ? use : null,
  );
}

/**
 * @param {string} name
 * @param {NonNullable<Head["comparison"]>} comparison
 */
function compared(name, { recordings, macro, labels, notes }) {
  const names = ["label", "retrain.was", "retrain.is", "retrain.change"].map((each) => say(`review.${each}`));
  const all = { [say("review.retrain.mean")]: macro, ...labels };
  const rows = Object.entries(all).map(([label, { average_precision: found }]) => [label, ...figures(found)]);
  const found = plainTable(say("review.retrain.table", { name, recordings }), names, rows);
  found.append(...notes.map((each) => make("p", { class: "facts" }, each)));
  return found;
}

/** @param {Difference} found */
function figures({ a, b, difference, low, high }) {
  const shown = (/** @type {number | null} */ value) => (value === null ? "–" : value.toFixed(3).replace("-0.000", "0.000"));
  const signed = (/** @type {number | null} */ value) => (value !== null && value > 0 ? `+${shown(value)}` : shown(value));
  const values = { difference: signed(difference), low: signed(low), high: signed(high) };
  return [shown(a), shown(b), difference === null ? "–" : say("review.retrain.difference", values)];
}
