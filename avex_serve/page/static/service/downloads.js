/** What can be taken away: tables of detections, embeddings, and the command that asks the same. */

import { choice, labelled, make, save, statusLine } from "../dom.js";
import { say } from "../strings.js";
import { predictQuery, sharedQuery } from "./recordings.js";

/** @typedef {import("./api.js").Api} Api */
/** @typedef {import("./options.js").OptionsForm} OptionsForm */
/** @typedef {import("./recordings.js").Recording} Recording */
/** @typedef {import("./thresholds.js").Thresholds} Thresholds */

/**
 * What the page holds.
 *
 * @typedef {object} Held
 * @property {Api} api
 * @property {OptionsForm} options
 * @property {Thresholds} thresholds
 * @property {Recording[]} recordings
 * @property {Recording | null} open
 */

export class Downloads {
  /** @param {Held} held */
  constructor(held) {
    this.held = held;
    /** @type {Map<Blob, Promise<string>>} */
    this.digests = new Map();
    this.format = choice([]);
    this.folder = make("input", { type: "text", autocomplete: "off" });
    this.output = choice([]);
    this.status = statusLine();
    this.command = make("code");
    const all = () => held.recordings.filter((each) => each.answer !== null);
    const one = () => all().filter((each) => each === held.open);
    const button = (/** @type {string} */ name, /** @type {() => Promise<void>} */ act) =>
      make("button", { type: "button", click: () => this.report(act) }, say(name));
    this.element = make(
      "section",
      { class: "command", "aria-labelledby": "downloads-title" },
      make("h2", { id: "downloads-title" }, say("downloads")),
      make(
        "div",
        { class: "controls" },
        labelled(say("format"), this.format),
        labelled(say("folder"), this.folder),
        button("download.one", () => this.table(one())),
        button("download.all", () => this.table(all())),
      ),
      make(
        "div",
        { class: "controls" },
        labelled(say("embedding"), this.output),
        button("embeddings.json", () => this.embeddings("json")),
        button("embeddings.csv", () => this.embeddings("csv")),
      ),
      this.status,
      make("h2", {}, say("command")),
      make("pre", { tabindex: 0 }, this.command),
      make("div", { class: "controls" }, button("command.copy", () => this.copy())),
    );
  }

  /** @param {string[]} formats of tables, as GET / lists them */
  setFormats(formats) {
    this.format.replaceChildren(...formats.map((value) => make("option", { value }, say(`format.${value}`))));
  }

  /** Show what the model offers, and the command for the open recording. */
  show() {
    const { options, open } = this.held;
    const outputs = options.model?.embeddings.map((/** @type {any} */ each) => each.output) ?? [];
    if (String(outputs) !== String([...this.output.options].map((each) => each.value))) {
      this.output.replaceChildren(...outputs.map((/** @type {string} */ value) => make("option", { value }, value)));
    }
    this.output.disabled = outputs.length === 0;
    if (options.model !== null) {
      this.command.textContent = this.commandFor(open?.name ?? "recording.wav");
    }
  }

  /** @param {string} name of the file */
  commandFor(name) {
    const { options, thresholds, api } = this.held;
    const query = predictQuery({ ...options.values, lowest: thresholds.value });
    if (options.head !== null && thresholds.calibrated.size + thresholds.own.size > 0) {
      const changed = this.changedThresholds();
      if (changed.length > 0) {
        query.set("threshold", JSON.stringify(Object.fromEntries(changed)));
      } else {
        query.delete("threshold");
      }
    }
    const key = "Authorization" in api.headers ? `-H "Authorization: Bearer $AVEX_KEY" ` : "";
    const file = quoted(name.startsWith("-") ? `./${name}` : name);
    return `curl ${key}--data-binary @${file} ${quoted(`${new URL("predict", document.baseURI)}?${query}`)}`;
  }

  /** Labels with another threshold than the service gives them, if it is asked for none. */
  changedThresholds() {
    const { options, thresholds } = this.held;
    const { labels, threshold, thresholds: calibrated = {} } = options.head;
    return labels
      .map((/** @type {string} */ label) => [label, thresholds.of(label)])
      .filter((/** @type {[string, number]} */ [label, value]) => value !== (calibrated[label] ?? threshold));
  }

  async copy() {
    await navigator.clipboard.writeText(this.command.textContent ?? "");
    this.status.textContent = say("command.copied");
  }

  /** @param {() => Promise<void>} act */
  async report(act) {
    this.status.textContent = "";
    try {
      await act();
    } catch (error) {
      this.status.textContent = String(/** @type {Error} */ (error).message);
    }
  }

  /** @param {Recording[]} recordings those with an answer */
  async table(recordings) {
    if (recordings.length === 0) {
      throw new Error(say("download.none"));
    }
    this.status.textContent = say("download.working");
    const { api, options, thresholds } = this.held;
    const asked = options.values;
    const described = [];
    for (const recording of recordings) {
      described.push(await this.describe(recording));
    }
    const body = JSON.stringify({
      format: this.format.value,
      folder: this.folder.value,
      threshold: thresholds.value,
      thresholds: Object.fromEntries([...thresholds.calibrated, ...thresholds.own]),
      model: asked.model,
      version: asked.version,
      probe: asked.probe,
      overlap: asked.overlap,
      final_clip: asked.finalClip,
      channel: asked.channel,
      recordings: described,
    });
    const content = await api.ask("tables", { body, kind: "blob", headers: { "Content-Type": "application/json" } });
    save(content, content.name);
    this.status.textContent = say("download.done");
  }

  /**
   * A recording with the detections that are shown, in the form of POST /tables.
   *
   * @param {Recording} recording
   */
  async describe(recording) {
    const { file, name, marks } = recording;
    const { sound } = await recording.open(this.held.api, this.held.options.values.channel);
    const shown = marks.filter((each) => this.held.thresholds.passes(each));
    const labels = [...new Set(shown.map((each) => each.label))];
    const places = new Map(labels.map((label, index) => [label, index]));
    return {
      name,
      digest: await this.digest(file),
      head: await base64(await recording.head()),
      duration: sound.duration,
      labels,
      label: shown.map((each) => places.get(each.label)),
      start: shown.map((each) => each.start),
      end: shown.map((each) => each.end),
      score: shown.map((each) => each.score),
    };
  }

  /**
   * @param {File} file
   * @returns {Promise<string>} its SHA-256
   */
  digest(file) {
    const known = this.digests.get(file);
    if (known !== undefined) {
      return known;
    }
    const digest = new Promise((/** @type {(digest: string) => void} */ resolve, reject) => {
      const worker = new Worker(new URL("digest-worker.js", import.meta.url), { type: "module" });
      worker.addEventListener("message", ({ data }) => {
        worker.terminate();
        if (data.error === undefined) {
          resolve(data.digest);
        } else {
          reject(new Error(data.error));
        }
      });
      worker.postMessage({ id: 0, file });
    });
    this.digests.set(file, digest);
    return digest;
  }

  /** @param {"json" | "csv"} kind */
  async embeddings(kind) {
    const { api, options, open } = this.held;
    if (open === null) {
      throw new Error(say("download.none"));
    }
    this.status.textContent = say("download.working");
    const query = new URLSearchParams({ ...sharedQuery(options.values), output: this.output.value });
    const stem = open.name.replace(/\.\w+$/, "");
    if (kind === "json") {
      save(await api.ask(`embed?${query}`, { body: open.file, kind: "blob" }), `${stem}.embeddings.json`);
    } else {
      const answer = await api.ask(`embed?${query}`, { body: open.file });
      save(new Blob([embeddingRows(answer)], { type: "text/csv" }), `${stem}.embeddings.csv`);
    }
    this.status.textContent = say("download.done");
  }
}

/**
 * A line for each vector, with the span of its window; a sequence of vectors has several lines of one span.
 *
 * @param {{spans: number[][], embeddings: any[]}} answer of /embed
 */
function embeddingRows({ spans, embeddings }) {
  const lines = embeddings.flatMap((each, index) =>
    (Array.isArray(each[0]) ? each : [each]).map((/** @type {number[]} */ vector) => [...spans[index], ...vector]),
  );
  const head = ["start", "end", ...(lines[0] ?? []).slice(2).map((/** @type {number} */ _, /** @type {number} */ index) => `e${index}`)];
  return [head, ...lines].map((line) => `${line.join(",")}\n`).join("");
}

/** @param {Blob} content */
async function base64(content) {
  const bytes = new Uint8Array(await content.arrayBuffer());
  let text = "";
  for (const each of bytes) {
    text += String.fromCharCode(each);
  }
  return btoa(text);
}

/**
 * A text as one word of a shell.
 *
 * @param {string} text
 */
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
