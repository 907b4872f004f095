/** The page of the service: it sends recordings, shows and plays detections, and downloads tables. */

import { playControls, viewControls } from "../controls.js";
import { make } from "../dom.js";
import { Player } from "../player.js";
import { Spectrogram } from "../spectrogram.js";
import { clock, say } from "../strings.js";
import { Table } from "../table.js";
import { Api } from "./api.js";
import { makeChooser } from "./chooser.js";
import { Downloads } from "./downloads.js";
import { keyDialog } from "./key.js";
import { RecordingList } from "./list.js";
import { OptionsForm } from "./options.js";
import { Recording } from "./recordings.js";
import { servedTable } from "./served.js";
import { Thresholds } from "./thresholds.js";

/** @typedef {import("../spectrogram.js").Mark} Mark */

const HOVERED = 5; // labels of a window that are named

class Page {
  constructor() {
    this.api = new Api(keyDialog());
    this.options = new OptionsForm(this.api);
    this.thresholds = new Thresholds();
    /** @type {Recording[]} */
    this.recordings = [];
    /** @type {Recording | null} */
    this.open = null;
    /** @type {any} as GET / answers */
    this.served = null;
    /** @type {any} the probe that the thresholds are for, and the lowest score that was fetched */
    this.head = null;
    this.lowest = 0;
    /** @type {Promise<void>} */
    this.queue = Promise.resolve();
    this.list = new RecordingList();
    this.downloads = new Downloads(this);
    this.player = new Player();
    this.message = make("p", { class: "status", role: "status" });
    this.hover = make("p", { class: "hover" });
    const picture = make("div");
    this.spectrogram = new Spectrogram(picture);
    const detections = make("section", { class: "panel" });
    this.table = this.makeTable(detections);
    this.viewer = make(
      "section",
      { "aria-label": say("spectrogram"), hidden: true },
      picture,
      this.hover,
      playControls(this.player, this.spectrogram),
      viewControls(this.spectrogram),
    );
    this.results = make("div", { class: "results", hidden: true }, this.thresholds.element, detections);
    this.about = make("footer");
    document.body.append(
      make("header", {}, make("h1", {}, "avex-serve"), this.options.element),
      make(
        "main",
        {},
        makeChooser(
          (files) => this.add(files),
          (folders) => this.tell(say("service.folder", { names: folders.join(", ") })),
        ),
        this.message,
        this.list.element,
        this.viewer,
        this.results,
        this.downloads.element,
      ),
      this.about,
    );
    this.listen();
  }

  /** @param {HTMLElement} container */
  makeTable(container) {
    const seconds = (/** @type {number} */ value) => value.toFixed(2);
    /** @type {Table<Mark>} */
    const table = new Table(container, say("detections"), [
      { name: say("start"), text: (row) => seconds(row.start), value: (row) => row.start, numeric: true },
      { name: say("end"), text: (row) => seconds(row.end), value: (row) => row.end, numeric: true },
      { name: say("label"), text: (row) => row.label, value: (row) => row.label },
      { name: say("score"), text: (row) => (row.score ?? 0).toFixed(3), value: (row) => row.score ?? 0, numeric: true },
      {
        name: say("probability"),
        text: (row) => row.probability?.toFixed(3) ?? "",
        value: (row) => row.probability ?? -1,
        numeric: true,
        optional: true,
      },
    ]);
    return table;
  }

  listen() {
    this.options.addEventListener("change", () => this.askAgain());
    this.thresholds.addEventListener("change", () => this.filter());
    this.list.addEventListener("open", (event) => this.show(/** @type {CustomEvent} */ (event).detail));
    this.list.addEventListener("remove", (event) => this.remove(/** @type {CustomEvent} */ (event).detail));
    this.table.addEventListener("choose", (event) => this.choose(/** @type {CustomEvent} */ (event).detail));
    this.spectrogram.addEventListener("select", (event) => this.choose(/** @type {CustomEvent} */ (event).detail));
    this.spectrogram.addEventListener("hover", (event) => this.name(/** @type {CustomEvent} */ (event).detail));
    this.spectrogram.addEventListener("failed", (event) => this.tell(/** @type {CustomEvent} */ (event).detail));
  }

  async start() {
    this.served = await this.api.ask("./");
    const { warnings, models, formats } = this.served;
    this.tell(warnings.join(" "));
    this.about.replaceChildren(servedTable(this.served));
    this.downloads.setFormats(formats);
    await this.options.setModels(models);
    if (this.options.model === null) {
      this.tell(say("service.empty"));
    }
  }

  /** @param {string} text */
  tell(text) {
    this.message.textContent = text;
  }

  /** @param {File[]} files */
  add(files) {
    for (const file of files) {
      const recording = new Recording(file);
      this.recordings.push(recording);
      this.list.add(recording);
      this.enqueue(recording);
    }
    const [first] = this.recordings.slice(-files.length);
    if (files.length > 0 && (this.open === null || files.length === 1)) {
      this.show(first);
    }
  }

  /** @param {Recording} recording */
  remove(recording) {
    recording.cancel();
    this.recordings = this.recordings.filter((each) => each !== recording);
    this.list.remove(recording);
    if (this.open === recording) {
      this.open = null;
      this.player.load(null);
      this.spectrogram.close();
      this.viewer.hidden = true;
      this.results.hidden = true;
      if (this.recordings.length > 0) {
        this.show(this.recordings[0]);
      }
    }
    this.downloads.show();
  }

  /**
   * Ask about recordings one after the other: several at once would only wait for each other at the service.
   *
   * @param {Recording} recording
   */
  enqueue(recording) {
    recording.state = "waiting";
    this.list.show(recording);
    this.queue = this.queue.then(() => this.analyse(recording));
  }

  /** @param {Recording} recording */
  async analyse(recording) {
    const { model, head } = this.options;
    if (!this.recordings.includes(recording) || recording.state !== "waiting" || model === null || head === null) {
      return;
    }
    await recording.analyse(this.api, this.options.values, model, this.served.limits, () => this.list.show(recording));
    if (recording === this.open) {
      this.showResults();
    }
  }

  /** Another bundle, probe or option: all answers are of another question. */
  askAgain() {
    const { head, values } = this.options;
    if (head !== null && (head !== this.head || values.lowest !== this.lowest)) {
      this.thresholds.reset(head, values.lowest);
      this.head = head;
      this.lowest = values.lowest;
    }
    for (const recording of this.recordings) {
      recording.cancel();
      recording.answer = null;
      recording.marks = [];
      this.enqueue(recording);
    }
    if (this.open !== null) {
      this.show(this.open);
    }
    this.showResults();
  }

  /** @param {Recording} recording */
  async show(recording) {
    this.open = recording;
    this.list.mark(recording);
    this.viewer.hidden = false;
    this.showResults();
    try {
      const { sound, place, channel } = await recording.open(this.api, this.options.values.channel);
      if (this.open === recording) {
        this.player.load(sound);
        this.spectrogram.open(place, sound, channel);
      }
    } catch (error) {
      if (this.open === recording) {
        this.spectrogram.close();
        this.player.load(null);
        this.tell(say("spectrogram.failed", { reason: String(/** @type {Error} */ (error).message) }));
      }
    }
  }

  showResults() {
    this.results.hidden = this.open?.answer === null || this.open === null;
    this.thresholds.setMarks(this.open?.marks ?? []);
  }

  /** Show the detections that pass. */
  filter() {
    const shown = this.thresholds.marks.filter((each) => this.thresholds.passes(each));
    this.spectrogram.setMarks(shown);
    this.table.setRows(shown);
    this.downloads.show();
  }

  /**
   * Select a detection and play it.
   *
   * @param {Mark} mark
   */
  choose(mark) {
    this.table.choose(mark);
    this.spectrogram.select(mark);
    this.spectrogram.setPosition(mark.start);
    this.player.play(mark.start, mark.end);
  }

  /**
   * Name the labels of the window under the pointer, those below the threshold too.
   *
   * @param {{time: number, frequency: number} | null} place
   */
  name(place) {
    if (place === null) {
      this.hover.textContent = "";
      return;
    }
    const { time, frequency } = place;
    const here = this.thresholds.marks.filter((each) => each.start <= time && time < each.end);
    here.sort((one, other) => (other.score ?? 0) - (one.score ?? 0));
    const names = here.slice(0, HOVERED).map((each) => `${each.label} ${(each.score ?? 0).toFixed(2)}`);
    const labels = names.join(", ");
    this.hover.textContent = say("hover", { time: clock(time, 2), frequency: (frequency / 1000).toFixed(1), labels });
  }
}

const page = new Page();
page.start().catch((error) => page.tell(error.message));
