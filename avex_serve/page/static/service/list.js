/** The list of recordings, with the progress of each. */

import { make } from "../dom.js";
import { clock, say } from "../strings.js";

/** @typedef {import("./recordings.js").Recording} Recording */

/**
 * Events: `open` and `remove` with a recording.
 */
export class RecordingList extends EventTarget {
  constructor() {
    super();
    this.element = make("ul", { class: "recordings", "aria-label": say("recordings") });
    /** @type {Map<Recording, {item: HTMLElement, line: HTMLElement, bar: HTMLProgressElement}>} */
    this.items = new Map();
  }

  /** @param {Recording} recording */
  add(recording) {
    const tell = (/** @type {string} */ name) => () =>
      this.dispatchEvent(new CustomEvent(name, { detail: recording }));
    const { name } = recording;
    const bar = make("progress", { max: 1, value: 0, "aria-label": say("progress", { name }) });
    const line = make("p", { class: "status", role: "status" });
    const item = make(
      "li",
      {},
      make("button", { type: "button", class: "plain name", click: tell("open") }, name),
      make("button", { type: "button", "aria-label": say("remove.name", { name }), click: tell("remove") }, say("remove")),
      bar,
      line,
    );
    this.items.set(recording, { item, line, bar });
    this.element.append(item);
    this.show(recording);
  }

  /** @param {Recording} recording */
  remove(recording) {
    this.items.get(recording)?.item.remove();
    this.items.delete(recording);
  }

  /**
   * Show state and progress of a recording.
   *
   * @param {Recording} recording
   */
  show(recording) {
    const found = this.items.get(recording);
    if (found === undefined) {
      return;
    }
    const { line, bar } = found;
    const { state, message, progress, answer, marks } = recording;
    bar.hidden = state !== "working";
    bar.value = progress;
    line.classList.toggle("error", state === "failed");
    const text =
      state === "done"
        ? say("service.found", { count: marks.length, length: clock(answer.duration), warnings: message })
        : state === "waiting"
          ? say("service.waiting")
          : message;
    if (line.textContent !== text) {
      line.textContent = text;
    }
  }

  /** @param {Recording | null} recording that is shown below */
  mark(recording) {
    for (const [each, { item }] of this.items) {
      item.classList.toggle("open", each === recording);
      item.querySelector("button")?.setAttribute("aria-pressed", String(each === recording));
    }
  }
}
