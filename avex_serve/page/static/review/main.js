/** The page of `avex-serve review`: a window at a time, a key for each decision. */

import { labelled, make, statusLine } from "../dom.js";
import { clock, say } from "../strings.js";
import { ask } from "./api.js";
import { Filters, NAMED } from "./filters.js";
import { Listening } from "./listening.js";
import { Progress } from "./progress.js";
import { ReviewQueue } from "./queue.js";

/** @typedef {import("./queue.js").Item} Item */

const QUICK = 9; // labels that have a digit

class Page {
  /** @param {import("./filters.js").Start} start */
  constructor(start) {
    this.start = start;
    this.filters = new Filters(start);
    this.queue = new ReviewQueue();
    this.progress = new Progress(start);
    /** @type {string[]} */
    this.quick = []; // the same until another queue is opened, so that fingers know the digits
    this.status = statusLine();
    this.error = make("p", { class: "error", role: "alert" });
    this.question = make("h2", { class: "question" });
    this.facts = make("p", { class: "facts" });
    this.comment = make("input", { type: "text", maxlength: 1000, autocomplete: "off" });
    this.other = make("input", { type: "text", list: "labels", maxlength: 1000, autocomplete: "off" });
    this.others = make("ol", { class: "others", "aria-label": say("review.others") });
    const place = make("div");
    this.listening = new Listening(place);
    this.answers = make("div", { class: "controls answers", role: "group", "aria-label": say("review.answers") });
    for (const [key, name, act] of this.keys()) {
      this.answers.append(make("button", { type: "button", click: act }, say(`review.${name}`), make("kbd", {}, key)));
    }
    this.work = make(
      "section",
      { "aria-label": say("review.window") },
      this.question,
      this.facts,
      place,
      this.answers,
      make(
        "div",
        { class: "controls" },
        wide(labelled(say("review.other"), this.other)),
        wide(labelled(say("review.comment"), this.comment)),
      ),
      this.others,
      this.status,
      this.error,
    );
    document.title = say("review.title", { title: start.title });
    document.body.append(
      make(
        "main",
        {},
        make("h1", {}, document.title),
        this.filters.build(start),
        make("datalist", { id: "labels" }, ...start.labels.map((value) => make("option", { value }))),
        make("div", { class: "columns" }, this.work, this.progress.element),
      ),
    );
    this.listen();
  }

  /** @returns {[key: string, name: string, act: () => void][]} */
  keys() {
    return [
      ["Y", "present", () => this.answer("present")],
      ["N", "absent", () => this.answer("absent")],
      ["U", "unsure", () => this.answer("unsure")],
      ["S", "later", () => this.queue.skip()],
      ["Z", "undo", () => this.undo()],
      ["P", "again", () => this.listening.play()],
      ["O", "type", () => this.other.focus()],
      ["C", "note", () => this.comment.focus()],
      ...(this.start.strategies.includes("nearest")
        ? [/** @type {[string, string, () => void]} */ (["X", "similar", () => this.showSimilar()])]
        : []),
    ];
  }

  listen() {
    const { queue, filters, progress } = this;
    filters.addEventListener("change", () => this.open());
    queue.addEventListener("change", () => this.show());
    queue.addEventListener("waiting", () => this.work.toggleAttribute("data-saving", queue.waiting > 0));
    queue.addEventListener("saved", () => progress.refresh(filters.label.value));
    progress.addEventListener("choose", (event) => filters.showLabel(/** @type {CustomEvent<string>} */ (event).detail));
    for (const source of [queue, filters, this.listening]) {
      source.addEventListener("failed", (event) => this.fail(/** @type {CustomEvent<string>} */ (event).detail));
    }
    const acts = Object.fromEntries(this.keys().map(([key, , act]) => [key.toLowerCase(), act]));
    document.addEventListener("keydown", (event) => {
      const at = event.target instanceof HTMLElement ? event.target : document.body;
      const typing = at.matches("input:not([type=checkbox], [type=radio], [type=range]), textarea");
      if (typing || event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) {
        return;
      }
      const act = acts[event.key.toLowerCase()] ?? this.digit(event.key) ?? this.space(event);
      if (act !== null && !event.repeat) {
        event.preventDefault();
        act();
      }
    });
    this.other.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && this.other.value.trim() !== "") {
        this.answerOther(this.other.value.trim());
      }
    });
    // The keys that answer are letters of a name as long as its field has the focus.
    for (const field of [filters.annotator, this.other, this.comment]) {
      field.addEventListener("keydown", (event) => {
        if (event.key === "Escape" || (event.key === "Enter" && field !== this.other)) {
          field.blur();
        }
      });
    }
    addEventListener("beforeunload", (event) => {
      if (queue.waiting > 0) {
        event.preventDefault();
      }
    });
  }

  /** @param {string} key */
  digit(key) {
    const button = /^[1-9]$/.test(key) ? this.others.querySelectorAll("button")[Number(key) - 1] : undefined;
    return button === undefined ? null : () => button.click();
  }

  /** @param {KeyboardEvent} event */
  space(event) {
    // A button, a list or a box that has the focus takes the space bar itself.
    const taken = event.target instanceof HTMLElement && event.target.matches("button, select, summary, input");
    return event.key === " " && !taken ? () => this.listening.play() : null;
  }

  /** Ask for the windows that the filters want, the one that the address names first. */
  async open() {
    this.error.textContent = "";
    this.status.textContent = "";
    if (this.filters.annotator.value.trim() === "") {
      this.status.textContent = say("review.annotator.missing");
      this.filters.annotator.focus();
      return;
    }
    try {
      const [first] = await Promise.all([this.named(), this.progress.loadCounts()]);
      this.quick = this.progress.frequent(this.start.labels).slice(0, QUICK + 1);
      await this.queue.open(this.filters.wanted, first);
      this.progress.refresh(this.filters.label.value);
    } catch (error) {
      this.fail(String(/** @type {Error} */ (error).message));
    }
  }

  /**
   * The window that the address names, as links of reports do. It is shown once.
   *
   * @returns {Promise<Item | null>}
   */
  async named() {
    const query = new URLSearchParams(location.search);
    if (!query.has("file")) {
      return null;
    }
    query.set("annotator", this.filters.annotator.value.trim());
    query.set("label", this.filters.label.value);
    const item = await ask(`api/item?${query}`);
    for (const name of NAMED) {
      query.delete(name);
    }
    history.replaceState(null, "", `?${query}`);
    return item;
  }

  show() {
    const item = this.queue.current;
    this.comment.value = "";
    this.other.value = "";
    this.work.setAttribute("data-window", item === null ? "" : String(item.window));
    if (item === null) {
      this.question.textContent = say("review.finished");
      this.facts.textContent = say("review.finished.help");
    } else {
      this.question.textContent = say("review.question", { label: item.label });
      this.facts.textContent = this.describe(item);
      this.facts.title = item.file;
      this.comment.value = item.decisions.find((each) => each.label === item.label)?.comment ?? "";
    }
    const quick = this.quick.filter((label) => label !== item?.label).slice(0, QUICK);
    this.others.replaceChildren(
      ...quick.map((label, index) =>
        make(
          "li",
          {},
          make(
            "button",
            { type: "button", click: () => this.answerOther(label) },
            label,
            make("kbd", {}, String(index + 1)),
          ),
        ),
      ),
    );
    this.listening.show(item);
    this.listening.prepare(this.queue.next);
  }

  /** @param {Item} item */
  describe(item) {
    const name = item.file.slice(item.file.lastIndexOf("/") + 1);
    const file = item.site === "." ? name : `${item.site}/${name}`;
    const facts = [
      say("review.left", { count: this.queue.left }),
      item.score === null ? "" : say("review.score", { score: item.score.toFixed(3) }),
      item.probability === null ? "" : say("review.probability", { probability: item.probability.toFixed(3) }),
      say("review.place", { file, from: clock(item.start), to: clock(item.end) }),
      item.time ?? "",
      ...item.decisions.map((each) => say("review.decided", { label: each.label, decision: say(`review.${each.decision}`) })),
    ];
    return facts.filter((each) => each !== "").join(" · ");
  }

  /** @param {"present" | "absent" | "unsure"} decision */
  answer(decision) {
    const item = this.queue.current;
    if (item !== null) {
      this.decide([{ label: item.label, decision }], say(`review.${decision}`));
    }
  }

  /**
   * It is another label, and not the one that was asked for.
   *
   * @param {string} label
   */
  answerOther(label) {
    const item = this.queue.current;
    this.other.blur();
    if (item === null || label === item.label) {
      this.answer("present");
      return;
    }
    const answers = [
      { label: item.label, decision: "absent" },
      { label, decision: "present" },
    ];
    this.decide(answers, label);
  }

  /**
   * @param {{label: string, decision: string}[]} answers
   * @param {string} words
   */
  decide(answers, words) {
    const item = this.queue.current;
    if (item === null) {
      return;
    }
    this.error.textContent = "";
    const comment = this.comment.value.trim();
    this.queue.decide(answers, comment);
    this.status.textContent = say("review.answered", { label: item.label, decision: words });
  }

  async undo() {
    this.error.textContent = "";
    try {
      const withdrawn = await this.queue.undo();
      this.status.textContent =
        withdrawn.length === 0
          ? say("review.nothing")
          : say("review.withdrawn", {
              decisions: withdrawn.map((each) => `${each.label}: ${say(`review.${each.decision}`)}`).join(", "),
            });
    } catch (error) {
      this.fail(String(/** @type {Error} */ (error).message));
    }
  }

  showSimilar() {
    const item = this.queue.current;
    if (item !== null) {
      this.filters.showSimilar(item.window);
    }
  }

  /** @param {string} reason */
  fail(reason) {
    this.error.textContent = reason;
  }
}

/** @param {HTMLElement} field */
function wide(field) {
  field.classList.add("wide");
  return field;
}

ask("api/start").then(
  (start) => new Page(start).open(),
  (error) => document.body.append(make("p", { class: "error", role: "alert" }, String(error.message))),
);
