/** The spectrogram and the player of the window that is reviewed. */

import { openBytes } from "../bytes.js";
import { playControls, viewControls } from "../controls.js";
import { make } from "../dom.js";
import { Player } from "../player.js";
import { Spectrogram } from "../spectrogram.js";
import { say } from "../strings.js";
import { openWav } from "../wav.js";

/** @typedef {import("./queue.js").Item} Item */
/** @typedef {import("../wav.js").Sound} Sound */

const CONTEXT = 0.5; // of the window, that is shown before and after it
const LEAST = 1; // seconds of it
const KEPT = 8; // recordings that stay open

/**
 * Events: `failed` with a reason.
 */
export class Listening extends EventTarget {
  /** @param {HTMLElement} container */
  constructor(container) {
    super();
    const picture = make("div");
    this.spectrogram = new Spectrogram(picture);
    this.player = new Player();
    /** @type {Map<number, Promise<Sound>>} */
    this.sounds = new Map();
    this.recording = -1;
    /** @type {Item | null} */
    this.item = null;
    const fail = (/** @type {string} */ reason) => this.dispatchEvent(new CustomEvent("failed", { detail: reason }));
    this.fail = fail;
    this.spectrogram.addEventListener("failed", (event) => fail(/** @type {CustomEvent<string>} */ (event).detail));
    container.append(
      picture,
      playControls(this.player, this.spectrogram),
      make("details", {}, make("summary", {}, say("review.view")), viewControls(this.spectrogram)),
    );
  }

  /**
   * Show a window, and play it if the browser allows that.
   *
   * @param {Item | null} item
   */
  async show(item) {
    this.item = item;
    this.player.stop();
    if (item === null) {
      this.spectrogram.close();
      this.recording = -1;
      return;
    }
    try {
      this.prepare(item); // the worker reads the header meanwhile
      const sound = await this.open(item.recording);
      if (item !== this.item) {
        return;
      }
      if (item.recording !== this.recording) {
        const { low, high } = this.spectrogram.view;
        const sameRate = this.spectrogram.sampleRate === sound.sampleRate;
        this.spectrogram.open({ url: addressOf(item.recording) }, sound);
        this.player.load(sound);
        this.recording = item.recording;
        if (sameRate) {
          this.spectrogram.show({ low, high });
        }
      }
      const mark = { start: item.start, end: Math.min(item.end, sound.duration), label: item.label, score: item.score };
      this.spectrogram.setMarks([mark]);
      this.spectrogram.show(this.stretch(item));
      this.spectrogram.select(mark);
      this.spectrogram.setPosition(item.start);
      if (navigator.userActivation?.hasBeenActive) {
        await this.play();
      }
    } catch (error) {
      this.spectrogram.close();
      this.recording = -1;
      this.fail(say("review.unreadable", { file: item.file, reason: String(/** @type {Error} */ (error).message) }));
    }
  }

  /** Play the window from its start, or stop. */
  async play() {
    if (this.item !== null && this.recording === this.item.recording) {
      await this.player.play(this.item.start, this.item.end);
    }
  }

  /**
   * Read the header of the recording of a window, here and in the worker of the spectrogram.
   *
   * @param {Item | null} item
   */
  prepare(item) {
    if (item !== null) {
      this.open(item.recording).catch(() => null); // reported when it is shown
      if (item.recording !== this.recording) {
        this.spectrogram.prepare(addressOf(item.recording));
      }
    }
  }

  /**
   * @param {number} recording
   * @returns {Promise<Sound>}
   */
  open(recording) {
    let sound = this.sounds.get(recording);
    if (sound === undefined) {
      sound = openBytes({ url: addressOf(recording) }).then(async (bytes) => {
        const opened = await openWav(bytes);
        if (opened === null) {
          throw new Error(say("spectrogram.none"));
        }
        return opened;
      });
      sound.catch(() => this.sounds.delete(recording));
      this.sounds.set(recording, sound);
      if (this.sounds.size > KEPT) {
        this.sounds.delete(this.sounds.keys().next().value ?? -1);
      }
    }
    return sound;
  }

  /** @param {Item} item */
  stretch({ start, end }) {
    const around = Math.max(LEAST, (end - start) * CONTEXT);
    return { start: start - around, end: end + around };
  }
}

/**
 * @param {number} recording
 * @returns {string} the whole address, since the worker of the spectrogram asks from another folder
 */
function addressOf(recording) {
  return new URL(`api/recordings/${recording}.wav`, document.baseURI).href;
}
