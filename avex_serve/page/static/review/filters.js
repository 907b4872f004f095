/** What is reviewed: label, strategy, filters and annotator. They are kept in the address, so a reload loses nothing. */

import { choice, labelled, make } from "../dom.js";
import { say } from "../strings.js";
import { useScores } from "./retraining.js";

const NAME = "avex-serve-annotator"; // where the browser remembers who reviews
const SKIPS = ["mine", "all", "new", "none"];
export const NAMED = ["file", "start"]; // a window in the address, until it is shown
const NUMBERS = ["lowest", "highest", "per_recording", "seed"];

/**
 * What api/start answers.
 *
 * @typedef {object} Start
 * @property {string} title
 * @property {string[]} labels
 * @property {string[]} sites
 * @property {[first: string, last: string] | null} dates
 * @property {string[]} strategies
 * @property {number} target_precision
 * @property {number} windows
 * @property {number} recordings
 * @property {string[]} annotators
 * @property {string} folder
 * @property {boolean} report of the run, whether there is one
 * @property {string} probe whose scores are reviewed
 * @property {string[]} probes
 */

/**
 * Events: `change` when another queue is wanted; `failed` with a reason.
 */
export class Filters extends EventTarget {
  /** @param {Start} start */
  constructor(start) {
    super();
    const query = new URLSearchParams(location.search);
    const changed = { change: () => this.changed() };
    const field = (/** @type {string} */ name, /** @type {Record<string, any>} */ properties = {}) =>
      make("input", { value: query.get(name), ...properties, ...changed });
    this.annotator = field("annotator", {
      type: "text",
      list: "annotators",
      required: true,
      value: query.get("annotator") ?? localStorage.getItem(NAME) ?? "",
      autocomplete: "off",
    });
    this.label = select(start.labels.map((each) => [each, each]), query.get("label"), changed);
    this.strategy = select(
      start.strategies.map((each) => [each, say(`review.strategy.${each}`)]),
      query.get("strategy"),
      changed,
    );
    this.skip = select(SKIPS.map((each) => [each, say(`review.skip.${each}`)]), query.get("skip"), changed);
    this.site = select(
      [["", say("review.site.all")], ...start.sites.map((each) => /** @type {[string, string]} */ ([each, each]))],
      query.get("site"),
      changed,
    );
    this.probe = select(
      start.probes.map((each) => [each, each]),
      start.probe,
      { change: () => useScores(this.probe.value).catch((error) => this.fail(error.message)) },
    );
    const score = { type: "number", step: "any", class: "number" };
    const hour = { type: "number", min: 0, max: 24, class: "number" };
    const day = { type: "date", min: start.dates?.[0] ?? null, max: start.dates?.[1] ?? null };
    /** @type {Record<string, HTMLInputElement>} */
    this.fields = {
      lowest: field("lowest", score),
      highest: field("highest", score),
      first: field("first", day),
      last: field("last", day),
      from: field("from", hour),
      to: field("to", hour),
      per_recording: field("per_recording", { type: "number", min: 1, class: "number" }),
      seed: field("seed", { type: "number", class: "number" }),
    };
    /** @type {number | null} */
    this.example = null;
  }

  /** The elements. */
  build(/** @type {Start} */ start) {
    const names = make("datalist", { id: "annotators" }, ...start.annotators.map((value) => make("option", { value })));
    const times = start.dates === null ? [] : ["first", "last", "from", "to"];
    const more = ["lowest", "highest", ...times, "per_recording", "seed"];
    return make(
      "div",
      { role: "group", "aria-label": say("review.what") },
      make(
        "div",
        { class: "controls" },
        labelled(say("review.annotator"), this.annotator),
        names,
        start.probes.length > 1 ? labelled(say("review.probe"), this.probe) : null,
        labelled(say("review.label"), this.label),
        labelled(say("review.strategy"), this.strategy),
        labelled(say("review.skip"), this.skip),
      ),
      make(
        "details",
        {},
        make("summary", {}, say("review.filters")),
        make(
          "div",
          { class: "controls" },
          labelled(say("review.site"), this.site),
          ...more.map((name) => labelled(say(`review.filter.${name}`), this.fields[name])),
        ),
      ),
    );
  }

  /** The body of api/queue. */
  get wanted() {
    const text = (/** @type {string} */ name) => this.fields[name].value.trim() || null;
    /** @type {Record<string, any>} */
    const wanted = {
      annotator: this.annotator.value.trim(),
      label: this.label.value,
      strategy: this.strategy.value,
      skip: this.skip.value,
    };
    for (const name of NUMBERS) {
      if (text(name) !== null) {
        wanted[name] = Number(text(name));
      }
    }
    for (const name of ["first", "last"]) {
      if (text(name) !== null) {
        wanted[name] = text(name);
      }
    }
    if (text("from") !== null || text("to") !== null) {
      wanted.hours = [Number(text("from") ?? 0), Number(text("to") ?? 24)];
    }
    if (this.site.value !== "") {
      wanted.sites = [this.site.value];
    }
    if (wanted.strategy === "nearest" && this.example !== null) {
      wanted.example = this.example;
    }
    return wanted;
  }

  /**
   * Order by the similarity to a window.
   *
   * @param {number} window
   */
  showSimilar(window) {
    this.example = window;
    this.strategy.value = "nearest";
    this.changed();
  }

  /**
   * Review another label, if the scores have it.
   *
   * @param {string} label
   */
  showLabel(label) {
    if ([...this.label.options].some((each) => each.value === label)) {
      this.label.value = label;
      this.changed();
    }
  }

  /** @param {string} reason */
  fail(reason) {
    this.dispatchEvent(new CustomEvent("failed", { detail: reason }));
  }

  changed() {
    localStorage.setItem(NAME, this.annotator.value.trim());
    const query = new URLSearchParams();
    const simple = { annotator: this.annotator, label: this.label, strategy: this.strategy, skip: this.skip, site: this.site };
    for (const [name, control] of Object.entries({ ...simple, ...this.fields })) {
      if (control.value !== "") {
        query.set(name, control.value);
      }
    }
    const before = new URLSearchParams(location.search);
    for (const name of NAMED) {
      if (before.has(name)) {
        query.set(name, before.get(name) ?? "");
      }
    }
    history.replaceState(null, "", `?${query}`);
    this.dispatchEvent(new Event("change"));
  }
}

/**
 * @param {[value: string, text: string][]} options
 * @param {string | null} chosen
 * @param {Record<string, any>} properties
 */
function select(options, chosen, properties) {
  const control = choice(options, properties);
  if (chosen !== null && options.some(([value]) => value === chosen)) {
    control.value = chosen;
  }
  return control;
}
