/** What is reviewed next: windows from the server, without those that are done, and decisions on their way to it. */

import { ask } from "./api.js";

/**
 * A window to review.
 *
 * @typedef {object} Item
 * @property {number} window
 * @property {string} label
 * @property {number | null} score
 * @property {number | null} probability null: the label is not calibrated
 * @property {number} recording
 * @property {string} file
 * @property {string} site
 * @property {string | null} time of the recorder's clock
 * @property {number} start seconds
 * @property {number} end
 * @property {{label: string, decision: string, comment: string}[]} decisions of this annotator
 */

const ENOUGH = 10; // items left, below which more are asked for
const COUNT = 100; // items that are asked for at once
const MOST = 5000; // that the server sends at once

/**
 * Events: `change` when there is another first item; `waiting` when decisions go on their way or arrive; `saved` when
 * one is on disk; `failed` with a reason.
 */
export class ReviewQueue extends EventTarget {
  constructor() {
    super();
    /** @type {Item[]} */
    this.items = [];
    this.total = 0;
    /** @type {Record<string, any>} */
    this.wanted = {};
    /** @type {Set<string>} */
    this.passed = new Set(); // decided or skipped since the queue was opened
    /** @type {Promise<void>} */
    this.saving = Promise.resolve();
    this.waiting = 0; // decisions on their way
    this.session = 0;
    this.filling = false;
  }

  /** @returns {Item | null} */
  get current() {
    return this.items[0] ?? null;
  }

  /** @returns {Item | null} */
  get next() {
    return this.items[1] ?? null;
  }

  /** How many windows are left. */
  get left() {
    return Math.max(this.items.length, this.total);
  }

  /**
   * Open another queue.
   *
   * @param {Record<string, any>} wanted the body of api/queue
   * @param {Item | null} first that is shown in front of it
   */
  async open(wanted, first = null) {
    this.wanted = wanted;
    this.passed.clear();
    this.items = [];
    const session = ++this.session;
    await this.saving;
    const { items, total } = await ask("api/queue", { ...wanted, count: COUNT });
    if (session !== this.session) {
      return;
    }
    this.total = total;
    this.items = first === null ? items : [first, ...items.filter((/** @type {Item} */ each) => key(each) !== key(first))];
    this.dispatchEvent(new Event("change"));
  }

  /**
   * Decide about the first item, and go on to the next one at once.
   *
   * @param {{label: string, decision: string}[]} answers
   * @param {string} comment
   */
  decide(answers, comment) {
    const item = this.current;
    if (item === null) {
      return;
    }
    const { annotator } = this.wanted;
    this.pass();
    this.waiting += 1;
    this.dispatchEvent(new Event("waiting"));
    this.saving = this.saving
      .then(() => ask("api/decide", { annotator, window: item.window, answers, comment }))
      .then(() => {
        this.dispatchEvent(new Event("saved"));
      })
      .catch((error) => {
        this.putFirst(item);
        this.dispatchEvent(new CustomEvent("failed", { detail: error.message }));
      })
      .finally(() => {
        this.waiting -= 1;
        this.dispatchEvent(new Event("waiting"));
      });
    this.dispatchEvent(new Event("change"));
  }

  /** Leave the first item for later. */
  skip() {
    if (this.current !== null) {
      this.pass();
      this.dispatchEvent(new Event("change"));
    }
  }

  /**
   * Withdraw the last decision, and show its window again.
   *
   * @returns {Promise<{label: string, decision: string}[]>} what was withdrawn
   */
  async undo() {
    await this.saving;
    const { item, withdrawn } = await ask("api/undo", { annotator: this.wanted.annotator });
    if (item !== null) {
      this.total += 1;
      this.putFirst(item);
      this.dispatchEvent(new Event("saved"));
    }
    return withdrawn;
  }

  /** @param {Item} item */
  putFirst(item) {
    this.passed.delete(key(item));
    this.items = [item, ...this.items.filter((each) => key(each) !== key(item))];
    this.dispatchEvent(new Event("change"));
  }

  pass() {
    const item = this.items.shift();
    if (item !== undefined) {
      this.passed.add(key(item));
      this.total = Math.max(0, this.total - 1);
    }
    if (this.items.length < ENOUGH && this.items.length < this.total) {
      this.fill().catch((error) => this.dispatchEvent(new CustomEvent("failed", { detail: error.message })));
    }
  }

  async fill() {
    if (this.filling) {
      return;
    }
    this.filling = true;
    try {
      const session = this.session;
      await this.saving;
      const { items, total } = await ask("api/queue", { ...this.wanted, count: Math.min(MOST, COUNT + this.passed.size) });
      if (session === this.session) {
        const known = new Set([...this.passed, ...this.items.map(key)]);
        const empty = this.current === null;
        this.items.push(...items.filter((/** @type {Item} */ each) => !known.has(key(each))));
        this.total = Math.max(this.items.length, total - this.skippedIn(items));
        if (empty && this.current !== null) {
          this.dispatchEvent(new Event("change"));
        }
      }
    } finally {
      this.filling = false;
    }
  }

  /** @param {Item[]} items */
  skippedIn(items) {
    return items.filter((each) => this.passed.has(key(each))).length;
  }
}

/** @param {Item} item */
function key(item) {
  return `${item.window} ${item.label}`;
}
