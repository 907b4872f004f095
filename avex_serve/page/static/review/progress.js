/** How far the review is: counts of the label, reliability of its scores, agreement of annotators, all labels. */

import { make } from "../dom.js";
import { say } from "../strings.js";
import { Table } from "../table.js";
import { ask } from "./api.js";
import { describeDensity, describeFound, drawChart } from "./chart.js";
import { retrainingPanel } from "./retraining.js";

/** @typedef {{label: string, present: number, absent: number, unsure: number}} Row */

const WAIT = 300; // ms after a decision, so that a fast reviewer asks for figures once

/** Events: `choose` with a label of the table. */
export class Progress extends EventTarget {
  /** @param {import("./filters.js").Start} start */
  constructor(start) {
    super();
    this.target = start.target_precision;
    this.timer = 0;
    this.question = 0;
    /** @type {Row[]} */
    this.rows = [];
    this.counts = make("p", { class: "facts", id: "counts" });
    this.chart = make("div");
    this.density = make("div");
    this.agreement = make("ul");
    const all = make("div");
    const column = (/** @type {"present" | "absent" | "unsure"} */ name) => ({
      name: say(`review.${name}`),
      text: (/** @type {Row} */ row) => String(row[name]),
      value: (/** @type {Row} */ row) => row[name],
      numeric: true,
    });
    this.table = new Table(all, say("review.all"), [
      { name: say("review.label"), text: (row) => row.label, value: (row) => row.label },
      column("present"),
      column("absent"),
      column("unsure"),
    ]);
    this.table.addEventListener("choose", (event) => {
      const { label } = /** @type {CustomEvent<Row>} */ (event).detail;
      this.dispatchEvent(new CustomEvent("choose", { detail: label }));
    });
    const link = (/** @type {string} */ address, /** @type {string} */ name, file = "reviews.csv") =>
      make("li", {}, make("a", { href: address, download: file }, say(name)));
    const report = start.report ? [make("li", {}, make("a", { href: "report" }, say("review.report")))] : [];
    this.element = make(
      "aside",
      { class: "panel", "aria-label": say("review.progress") },
      make("h2", {}, say("review.progress")),
      this.counts,
      this.chart,
      make("h2", {}, say("review.density.title")),
      this.density,
      make("h2", {}, say("review.agreement")),
      this.agreement,
      all,
      make(
        "ul",
        {},
        link("api/reviews.csv", "review.download"),
        link("api/reviews.csv?agreed", "review.download.agreed"),
        link("api/densities.csv", "review.density.download", "densities.csv"),
        ...report,
      ),
      make("p", { class: "facts" }, say("review.folder", { folder: start.folder })),
      retrainingPanel(),
    );
  }

  /** @param {string} label */
  refresh(label) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.load(label).catch((error) => {
        this.counts.textContent = String(error.message);
      });
    }, WAIT);
  }

  /** @param {string} label */
  async load(label) {
    const question = ++this.question;
    const [, found] = await Promise.all([this.loadCounts(), ask(`api/label?${new URLSearchParams({ name: label })}`)]);
    if (question !== this.question) {
      return;
    }
    const own = this.rows.find((row) => row.label === label) ?? { label, present: 0, absent: 0, unsure: 0 };
    this.counts.textContent = say("review.counts", own);
    this.chart.replaceChildren(drawChart(found), describeFound(found, this.target));
    this.density.replaceChildren(describeDensity(found));
  }

  async loadCounts() {
    const { labels, agreement } = await ask("api/counts");
    this.rows = Object.entries(labels).map(([label, { present, absent, unsure }]) => ({ label, present, absent, unsure }));
    this.table.setRows(this.rows);
    const lines = agreement.map((/** @type {any} */ each) =>
      say("review.kappa", { ...each, kappa: each.value === null ? "–" : each.value.toFixed(2) }),
    );
    const shown = lines.length > 0 ? lines : [say("review.alone")];
    this.agreement.replaceChildren(...shown.map((/** @type {string} */ line) => make("li", {}, line)));
  }

  /**
   * Labels that are most often present so far, then the others.
   *
   * @param {string[]} labels
   */
  frequent(labels) {
    const present = new Map(this.rows.map((row) => [row.label, row.present]));
    return [...new Set([...labels, ...present.keys()])].sort((one, other) => (present.get(other) ?? 0) - (present.get(one) ?? 0));
  }
}
