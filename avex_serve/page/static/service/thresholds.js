/** Thresholds: one for all labels, and some for single labels, with the numbers of detections that pass. */

import { labelled, make } from "../dom.js";
import { say } from "../strings.js";

/** @typedef {import("../spectrogram.js").Mark} Mark */

const MOST_LABELS = 50; // that are listed at once
const STEPS = 200; // of the slider

/**
 * Events: `change` when another threshold is set.
 */
export class Thresholds extends EventTarget {
  constructor() {
    super();
    this.value = 0.5;
    /** @type {Map<string, number>} */
    this.own = new Map();
    /** @type {Map<string, number>} those of the bundle's calibration, until one is set for all labels */
    this.calibrated = new Map();
    /** @type {Mark[]} */
    this.marks = [];
    this.slider = make("input", { type: "range", input: () => this.set(Number(Number(this.slider.value).toPrecision(4))) });
    this.exact = make("input", { type: "number", class: "number", step: "any", change: () => this.set(Number(this.exact.value)) });
    this.count = make("p", { class: "status", role: "status" });
    this.note = make("p", { class: "status", hidden: true }, say("threshold.calibrated"));
    this.search = make("input", { type: "search", input: () => this.list() });
    this.labels = make("ul", { class: "labels" });
    this.more = make("p", { class: "status" });
    this.element = make(
      "section",
      { class: "panel threshold", "aria-label": say("threshold") },
      labelled(say("threshold"), this.slider),
      labelled(say("threshold.exact"), this.exact),
      this.count,
      this.note,
      make("h2", {}, say("threshold.labels")),
      labelled(say("threshold.search"), this.search),
      this.labels,
      this.more,
    );
  }

  /**
   * Begin with the threshold of another probe.
   *
   * @param {{threshold: number, thresholds?: Record<string, number>, score_scale: string}} head
   * @param {number} lowest score that is fetched
   */
  reset({ threshold, thresholds = {}, score_scale: scale }, lowest) {
    const top = scale === "logits" ? 10 : 1;
    Object.assign(this.slider, { min: lowest, max: top, step: (top - lowest) / STEPS });
    Object.assign(this.exact, { min: lowest });
    this.own.clear();
    this.calibrated = new Map(Object.entries(thresholds));
    this.move(Math.max(threshold, lowest));
  }

  /** @param {number} value for all labels without one of their own */
  set(value) {
    this.calibrated.clear();
    this.move(value);
  }

  /** @param {number} value */
  move(value) {
    this.value = value;
    this.note.hidden = this.calibrated.size === 0;
    this.slider.value = String(value);
    this.exact.value = String(value);
    this.changed();
  }

  /** @param {Mark[]} marks those of the open recording, with all scores that were fetched */
  setMarks(marks) {
    this.marks = marks;
    this.changed();
  }

  /**
   * Whether a detection reaches the threshold of its label.
   *
   * @param {Mark} mark
   */
  passes(mark) {
    return (mark.score ?? 0) >= this.of(mark.label);
  }

  /** @param {string} label */
  of(label) {
    return this.own.get(label) ?? this.usual(label);
  }

  /** @param {string} label the threshold that it has if none was set for it */
  usual(label) {
    return this.calibrated.get(label) ?? this.value;
  }

  changed() {
    this.list();
    this.dispatchEvent(new Event("change"));
  }

  list() {
    /** @type {Map<string, {passing: number, all: number, best: number}>} */
    const counts = new Map();
    let passing = 0;
    for (const mark of this.marks) {
      const count = counts.get(mark.label) ?? { passing: 0, all: 0, best: -Infinity };
      const passes = this.passes(mark) ? 1 : 0;
      count.passing += passes;
      count.all += 1;
      count.best = Math.max(count.best, mark.score ?? 0);
      passing += passes;
      counts.set(mark.label, count);
    }
    this.count.textContent = say("threshold.count", { passing, all: this.marks.length });
    const wanted = this.search.value.toLowerCase();
    const found = [...counts].filter(([label]) => label.toLowerCase().includes(wanted));
    found.sort(([, one], [, other]) => other.best - one.best);
    const shown = found.slice(0, MOST_LABELS);
    this.show(shown.map(([label]) => label));
    for (const [label, { passing: passes, all }] of shown) {
      const line = this.lines.get(label);
      if (line !== undefined) {
        line.count.textContent = say("threshold.of", { passing: passes, all });
        line.field.placeholder = String(Number(this.usual(label).toPrecision(4)));
      }
    }
    this.more.textContent =
      found.length > shown.length ? say("threshold.more", { count: found.length - shown.length }) : "";
  }

  /** @type {Map<string, {count: HTMLElement, field: HTMLInputElement}>} */
  lines = new Map();

  /**
   * Lines for these labels; those that are there stay, so that a field keeps the focus.
   *
   * @param {string[]} labels
   */
  show(labels) {
    if (labels.length === this.lines.size && labels.every((each) => this.lines.has(each))) {
      return;
    }
    this.lines.clear();
    this.labels.replaceChildren(
      ...labels.map((label) => {
        const count = make("span", { class: "numeric" });
        const field = make("input", {
          type: "number",
          class: "number",
          step: "any",
          value: this.own.get(label),
          "aria-label": say("threshold.own", { label }),
          change: () => this.setOwn(label, field.value),
        });
        this.lines.set(label, { count, field });
        return make("li", {}, make("span", { class: "name" }, label), count, field);
      }),
    );
  }

  /**
   * @param {string} label
   * @param {string} text empty: the threshold for all labels
   */
  setOwn(label, text) {
    if (text === "") {
      this.own.delete(label);
    } else {
      this.own.set(label, Number(text));
    }
    this.changed();
  }
}
