/** A table that is sorted by its headings and shown a page at a time, so that a million rows are no burden. */

import { make } from "./dom.js";
import { say } from "./strings.js";

/**
 * @template Row
 * @typedef {object} Column
 * @property {string} name for its heading
 * @property {(row: Row) => string} text
 * @property {(row: Row) => number | string} value that rows are sorted by
 * @property {boolean} [numeric]
 * @property {boolean} [optional] hidden while its text is empty in all rows
 */

const PAGE = 100; // rows

/**
 * Events: `choose` with a row that is clicked, or on which Enter is pressed.
 *
 * @template Row
 */
export class Table extends EventTarget {
  /**
   * @param {HTMLElement} container
   * @param {string} caption
   * @param {Column<Row>[]} columns
   */
  constructor(container, caption, columns) {
    super();
    this.columns = columns;
    this.visible = columns.map((column) => !column.optional);
    /** @type {Row[]} */
    this.rows = [];
    /** @type {Row[]} */
    this.sorted = [];
    this.by = 0;
    this.descending = false;
    this.first = 0;
    /** @type {Row | null} */
    this.chosen = null;
    this.headings = columns.map((column, index) =>
      make(
        "th",
        { scope: "col", class: column.numeric ? "numeric" : null },
        make("button", { type: "button", click: () => this.sort(index) }, column.name),
      ),
    );
    this.body = make("tbody");
    this.range = make("span");
    this.previous = make("button", { type: "button", click: () => this.turn(-PAGE) }, say("table.previous"));
    this.next = make("button", { type: "button", click: () => this.turn(PAGE) }, say("table.next"));
    const table = make("table", {}, make("caption", {}, caption), make("thead", {}, make("tr", {}, ...this.headings)));
    table.append(this.body);
    container.append(
      make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, table),
      make("div", { class: "controls" }, this.previous, this.next, this.range),
    );
    this.render();
  }

  /** @param {Row[]} rows */
  setRows(rows) {
    this.rows = rows;
    this.visible = this.columns.map((column) => !column.optional || rows.some((row) => column.text(row) !== ""));
    this.order();
    this.first = Math.min(this.first, Math.max(0, Math.floor((rows.length - 1) / PAGE) * PAGE));
    this.render();
  }

  /**
   * Sort by a column; by the same one, the other way round.
   *
   * @param {number} index
   */
  sort(index) {
    this.descending = index === this.by ? !this.descending : Boolean(this.columns[index].numeric) && index > 0;
    this.by = index;
    this.first = 0;
    this.order();
    this.render();
  }

  /**
   * Mark a row as chosen, and show its page.
   *
   * @param {Row | null} row
   */
  choose(row) {
    this.chosen = row;
    const at = row === null ? -1 : this.sorted.indexOf(row);
    if (at >= 0) {
      this.first = Math.floor(at / PAGE) * PAGE;
    }
    this.render();
    this.body.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  }

  /** @param {number} by rows */
  turn(by) {
    this.first = Math.min(Math.max(0, this.first + by), Math.floor(Math.max(0, this.rows.length - 1) / PAGE) * PAGE);
    this.render();
  }

  order() {
    const { value } = this.columns[this.by];
    const sign = this.descending ? -1 : 1;
    this.sorted = [...this.rows].sort((one, other) => {
      const [left, right] = [value(one), value(other)];
      return sign * (left < right ? -1 : left > right ? 1 : 0);
    });
  }

  render() {
    this.headings.forEach((heading, index) => {
      heading.hidden = !this.visible[index];
      heading.setAttribute("aria-sort", index !== this.by ? "none" : this.descending ? "descending" : "ascending");
    });
    const shown = this.sorted.slice(this.first, this.first + PAGE);
    this.body.replaceChildren(...shown.map((row) => this.line(row)));
    const count = this.rows.length;
    this.range.textContent =
      count === 0
        ? say("table.none")
        : say("table.page", { first: this.first + 1, last: this.first + shown.length, count });
    this.previous.disabled = this.first === 0;
    this.next.disabled = this.first + PAGE >= count;
  }

  /** @param {Row} row */
  line(row) {
    const tell = () => this.dispatchEvent(new CustomEvent("choose", { detail: row }));
    const cells = this.columns.map((column, index) => {
      const text = column.text(row);
      return make(
        "td",
        { class: column.numeric ? "numeric" : null, hidden: !this.visible[index] },
        index === 0 ? make("button", { type: "button", class: "plain", click: tell }, text) : text,
      );
    });
    return make("tr", { "aria-current": row === this.chosen ? "true" : null, click: this.clicked(tell) }, ...cells);
  }

  /** @param {() => void} tell */
  clicked(tell) {
    return (/** @type {MouseEvent} */ event) => {
      if (!(event.target instanceof HTMLButtonElement)) {
        tell();
      }
    };
  }
}
