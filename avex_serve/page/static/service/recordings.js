/** Recordings that the user chose: their samples, and what the service finds in them. */

import { openBytes } from "../bytes.js";
import { clock, say } from "../strings.js";
import { openWav } from "../wav.js";
import { LINES, documentOf, reachedIn } from "./lines.js";
import { cutPieces, wavOf } from "./pieces.js";

/** @typedef {import("../spectrogram.js").Mark} Mark */
/** @typedef {import("../wav.js").Sound} Sound */
/** @typedef {import("./api.js").Api} Api */

/**
 * What is asked about a recording.
 *
 * @typedef {object} Options
 * @property {string} model
 * @property {string} version
 * @property {string} probe
 * @property {number} overlap seconds
 * @property {string} finalClip
 * @property {number | "mix"} channel
 * @property {number} lowest score that is fetched
 */

/**
 * A recording that can be read.
 *
 * @typedef {{sound: Sound, place: {blob: Blob}, channel: number | "mix"}} Opened the channel is that of the place
 */

/**
 * What the service says about a model, as GET /models/NAME, and what it accepts.
 *
 * @typedef {{audio: {sample_rate: number, window: number} | null}} Model
 * @typedef {{body_bytes: number, seconds: number}} Limits
 */

const PIECE_BYTES = 2 ** 26; // of a recording that is sent in pieces
const SENDING = 0.3; // of the progress of a recording
const PART = 0.9; // of the service's limits that a piece may reach
const HEAD_BYTES = 2 ** 15; // of a file, and of each of its chunks, in which its metadata is
const HEAD_CHUNKS = ["bext", "LIST", "guan", "wamd"];

export class Recording {
  /** @param {File} file */
  constructor(file) {
    this.file = file;
    /** @type {Promise<Opened> | null} */
    this.opening = null;
    this.openedChannel = "";
    /** @type {any} the answer of the service, without its detections */
    this.answer = null;
    /** @type {Mark[]} */
    this.marks = [];
    /** @type {"waiting" | "working" | "done" | "failed"} */
    this.state = "waiting";
    this.progress = 0;
    this.message = "";
    /** @type {AbortController | null} */
    this.work = null;
  }

  get name() {
    return this.file.name;
  }

  /**
   * Its samples: read from the file, or decoded by the service.
   *
   * @param {Api} api
   * @param {number | "mix"} channel
   */
  open(api, channel) {
    if (this.opening === null || this.openedChannel !== String(channel)) {
      this.openedChannel = String(channel);
      this.opening = openFile(api, this.file, channel);
      this.opening.catch(() => {
        this.opening = null;
      });
    }
    return this.opening;
  }

  /**
   * Ask the service about it.
   *
   * @param {Api} api
   * @param {Options} options
   * @param {Model} model
   * @param {Limits} limits
   * @param {() => void} changed called when state or progress changes
   */
  async analyse(api, options, model, limits, changed) {
    this.work?.abort();
    const work = new AbortController();
    this.work = work;
    this.state = "working";
    this.progress = 0;
    this.message = say("service.sending");
    changed();
    try {
      const answer = await this.ask(api, options, model, limits, work.signal, (part, message) => {
        this.progress = part;
        this.message = message;
        changed();
      });
      this.marks = answer.detections.map(
        (/** @type {Mark} */ each) => ({ ...each, high: (model.audio?.sample_rate ?? Infinity) / 2 }),
      );
      this.answer = { ...answer, detections: [] };
      this.state = "done";
      this.message = answer.warnings.join(" ");
    } catch (error) {
      if (work.signal.aborted) {
        return;
      }
      this.marks = [];
      this.answer = null;
      this.state = "failed";
      this.message = String(/** @type {Error} */ (error).message);
    }
    changed();
  }

  /** Give up what is under way. */
  cancel() {
    this.work?.abort();
  }

  /**
   * @param {Api} api
   * @param {Options} options
   * @param {Model} model
   * @param {Limits} limits
   * @param {AbortSignal} signal
   * @param {(part: number, message: string) => void} progress
   * @returns {Promise<any>}
   */
  async ask(api, options, model, limits, signal, progress) {
    const seconds = await this.seconds();
    const whole = { body: this.file, offset: 0, from: -Infinity, to: Infinity, seconds, last: true };
    const pieces = (await this.pieces(options, model, limits)) ?? [whole];
    /** @type {any} */
    let answer = null;
    for (const [index, piece] of pieces.entries()) {
      const query = predictQuery({ ...options, finalClip: piece.last ? options.finalClip : "none" });
      const report = (/** @type {number} */ done, /** @type {string} */ message) =>
        progress(
          (index + done) / pieces.length,
          pieces.length === 1 ? message : say("service.pieces", { message, piece: index + 1, pieces: pieces.length }),
        );
      const text = await api.ask(`predict?${query}`, {
        body: piece.body,
        kind: "text",
        headers: { Accept: LINES },
        signal,
        progress: (sent) => report(sent * SENDING, say(sent < 1 ? "service.sending" : "service.computing")),
        received: (lines) => {
          const reached = reachedIn(lines);
          const part = piece.seconds === null ? 1 : reached / piece.seconds;
          report(SENDING + part * (1 - SENDING), say("service.reached", { time: clock(reached, 0) }));
        },
      });
      const part = documentOf(text);
      const rate = model.audio?.sample_rate ?? 1;
      const detections = piece === whole ? part.detections : moved(part.detections, piece, rate);
      const warnings = new Set([...(answer?.warnings ?? []), ...part.warnings]);
      answer = {
        ...part,
        duration: piece.offset + part.duration,
        warnings: [...warnings],
        detections: [...(answer?.detections ?? []), ...detections],
      };
    }
    return answer;
  }

  /**
   * @param {Options} options
   * @param {Model} model
   * @param {Limits} limits
   */
  async pieces(options, model, limits) {
    if (model.audio === null) {
      return null;
    }
    const sound = await openWav(await openBytes({ blob: this.file }));
    if (sound === null || (this.file.size <= limits.body_bytes && sound.duration <= limits.seconds)) {
      return null;
    }
    const { sample_rate: sampleRate, window } = model.audio;
    const most = { bytes: Math.min(PIECE_BYTES, limits.body_bytes * PART), seconds: limits.seconds * PART };
    return cutPieces(this.file, sound, { sampleRate, window, overlap: options.overlap }, most);
  }

  /** Its length if that is known without the service: the progress of others is not measured. */
  async seconds() {
    const sound = await openWav(await openBytes({ blob: this.file }));
    return sound?.duration ?? null;
  }

  /**
   * The part of the file that says when, where and by what it was recorded.
   *
   * @returns {Promise<Blob>}
   */
  async head() {
    const bytes = await openBytes({ blob: this.file });
    const sound = await openWav(bytes);
    if (sound === null) {
      return this.file.slice(0, HEAD_BYTES);
    }
    const { format, chunks, start, frameBytes } = sound.layout;
    const kept = chunks.filter((each) => HEAD_CHUNKS.includes(each.name) && each.to - each.from <= HEAD_BYTES);
    return wavOf(
      format,
      kept.map(({ from, to }) => this.file.slice(from, to)),
      this.file.slice(start, start + frameBytes),
    );
  }
}

/**
 * The options of /predict.
 *
 * @param {Options} options
 */
export function predictQuery(options) {
  return new URLSearchParams({
    ...sharedQuery(options),
    ...(options.probe === "" ? {} : { probe: options.probe }),
    threshold: String(options.lowest),
  });
}

/**
 * The options of /predict and /embed.
 *
 * @param {Options} options
 */
export function sharedQuery(options) {
  return {
    model: options.model,
    version: options.version,
    ...(options.overlap > 0 ? { overlap: String(options.overlap) } : {}),
    ...(options.finalClip === "remainder" ? {} : { final_clip: options.finalClip }),
    ...(options.channel === "mix" ? {} : { channel: String(options.channel) }),
  };
}

/**
 * The detections that are wanted of a piece, in seconds of the recording.
 *
 * @param {Mark[]} detections
 * @param {import("./pieces.js").Piece} piece
 * @param {number} rate Hz of the model, whose samples windows begin at
 */
function moved(detections, { offset, from, to }, rate) {
  const time = (/** @type {number} */ seconds) => Math.round((offset + seconds) * rate) / rate;
  const slack = 0.5 / rate;
  return detections
    .filter((each) => offset + each.start >= from - slack && offset + each.start < to - slack)
    .map((each) => ({ ...each, start: time(each.start), end: time(each.end) }));
}

/**
 * @param {Api} api
 * @param {File} file
 * @param {number | "mix"} channel
 * @returns {Promise<Opened>}
 */
async function openFile(api, file, channel) {
  const local = await openWav(await openBytes({ blob: file }), channel);
  if (local !== null && local.frames > 0) {
    return { sound: local, place: { blob: file }, channel };
  }
  const query = channel === "mix" ? "" : `?channel=${channel}`;
  const blob = await api.ask(`wav${query}`, { body: file, kind: "blob" });
  const sound = await openWav(await openBytes({ blob }));
  if (sound === null) {
    throw new Error(say("service.unreadable"));
  }
  return { sound, place: { blob }, channel: "mix" };
}
