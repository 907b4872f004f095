/** Which bundle and probe are asked, and how a recording is cut. */

import { choice, labelled, make } from "../dom.js";
import { number } from "../controls.js";
import { say } from "../strings.js";

/** @typedef {import("./api.js").Api} Api */
/** @typedef {import("./recordings.js").Options} Options */

const FINAL_CLIPS = ["remainder", "extend", "full", "none"];
/** Where scores begin that are fetched, by their scale. */
const LOWEST = { sigmoid: 0.05, softmax: 0.05, logits: -2 };

/**
 * Events: `change` when another question is to be asked.
 */
export class OptionsForm extends EventTarget {
  /** @param {Api} api */
  constructor(api) {
    super();
    this.api = api;
    /** @type {any} as GET /models/NAME */
    this.model = null;
    this.bundle = choice([], { change: () => this.chooseBundle() });
    this.probe = choice([], { change: () => this.chooseProbe() });
    const change = () => this.tell();
    this.overlap = number({ min: 0, step: "any", value: 0 }, change);
    this.finalClip = choice(
      FINAL_CLIPS.map((each) => [each, say(`final.${each}`)]),
      { change },
    );
    this.channel = number({ min: 1, step: 1 }, change);
    this.lowest = number({ step: "any" }, change);
    this.element = make(
      "div",
      { class: "controls" },
      labelled(say("bundle"), this.bundle),
      labelled(say("probe"), this.probe),
      make(
        "details",
        {},
        make("summary", {}, say("options")),
        make(
          "div",
          { class: "controls" },
          labelled(say("overlap"), this.overlap),
          labelled(say("final"), this.finalClip),
          labelled(say("channel"), this.channel),
          labelled(say("lowest"), this.lowest),
        ),
      ),
    );
  }

  /** The probe that is asked, as GET /models/NAME describes it. */
  get head() {
    return this.model?.probes.find((/** @type {any} */ each) => each.name === this.probe.value) ?? null;
  }

  /** @returns {Options} */
  get values() {
    const { channel } = this;
    return {
      model: this.model.name,
      version: this.model.version,
      probe: this.probe.value,
      overlap: Number(this.overlap.value),
      finalClip: this.finalClip.value,
      channel: channel.value === "" ? "mix" : Number(channel.value),
      lowest: Number(this.lowest.value),
    };
  }

  /** @param {any[]} models as GET / lists them */
  async setModels(models) {
    const usable = models.filter((each) => Object.keys(each.labels).length > 0 || each.kind === "audio");
    this.bundle.replaceChildren(
      ...usable.map(({ name, version }) =>
        make("option", { value: JSON.stringify([name, version]) }, say("bundle.version", { name, version })),
      ),
    );
    if (usable.length > 0) {
      await this.chooseBundle();
    }
  }

  async chooseBundle() {
    const [name, version] = JSON.parse(this.bundle.value);
    this.model = await this.api.ask(`models/${encodeURIComponent(name)}?${new URLSearchParams({ version })}`);
    this.probe.replaceChildren(
      ...this.model.probes.map((/** @type {any} */ each) => make("option", { value: each.name }, each.name)),
    );
    this.chooseProbe();
  }

  chooseProbe() {
    const scale = /** @type {keyof LOWEST} */ (this.head?.score_scale ?? "sigmoid");
    this.lowest.value = String(LOWEST[scale]);
    this.tell();
  }

  tell() {
    this.dispatchEvent(new Event("change"));
  }
}
