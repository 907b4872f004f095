/**
 * A worker that reads a recording and computes columns of its spectrogram.
 *
 * In: {place, channel} opens a recording, and {prepare} with an address makes it ready for that; then {id, start, end,
 * columns, size} asks for columns. A new question ends the work on the one before. Out: {id, first, levels} with the
 * next columns, as bytes: 0 is FLOOR, 255 is 0 dB relative to a sine at full scale. After the last column {id, done},
 * where `done` says whether the picture is complete: a long stretch is computed roughly first, and then once more. Or
 * {id, error}.
 */

import { openBytes } from "./bytes.js";
import { Spectrum } from "./fft.js";
import { FLOOR } from "./levels.js";
import { openWav } from "./wav.js";

/** @typedef {Pick<import("./wav.js").Sound, "read">} Source */

const PIECE = 32; // columns that are computed between two answers
const MOST_FRAMES = 32; // of a column; of longer columns, stretches at equal distances are computed
const RUNS = 4; // such stretches
const ROUGH = 2 ** 22; // samples that are transformed for a rough picture
const MOST_SAMPLES = 2 ** 21; // that are read at once
const MOST_PREPARED = 4; // recordings

/** @type {Promise<import("./wav.js").Sound | null>} */
let sound = Promise.resolve(null);
/** @type {Map<string, Promise<import("./wav.js").Sound | null>>} */
const prepared = new Map(); // by address
let newest = -1;
/** @type {Spectrum | null} */
let spectrum = null;

self.addEventListener("message", ({ data }) => {
  if ("prepare" in data) {
    prepare(data.prepare);
    return;
  }
  if ("place" in data) {
    const ready = data.channel === "mix" ? prepared.get(data.place.url) : undefined;
    sound = ready ?? open(data.place, data.channel);
    return;
  }
  newest = data.id;
  answer(data).catch((error) => self.postMessage({ id: data.id, error: String(error.message ?? error) }));
});

/** @param {string} url */
function prepare(url) {
  if (!prepared.has(url)) {
    const opened = open({ url }, "mix");
    opened.catch(() => prepared.delete(url));
    prepared.set(url, opened);
    if (prepared.size > MOST_PREPARED) {
      prepared.delete(prepared.keys().next().value ?? "");
    }
  }
}

/**
 * @param {import("./bytes.js").Place} place
 * @param {number | "mix"} channel
 */
function open(place, channel) {
  const opened = openBytes(place).then((bytes) => openWav(bytes, channel));
  opened.catch(() => null); // each question reports it
  return opened;
}

/** @param {{id: number, start: number, end: number, columns: number, size: number}} asked */
async function answer({ id, start, end, columns, size }) {
  const opened = await sound;
  if (opened === null) {
    throw new Error("no WAV file");
  }
  if (spectrum?.size !== size) {
    spectrum = new Spectrum(size);
  }
  const hop = ((end - start) * opened.sampleRate) / columns; // samples
  const whole = Math.min(MOST_FRAMES, Math.max(1, Math.round(hop / size)));
  const rough = Math.min(whole, Math.max(1, Math.floor(ROUGH / columns / size)));
  const source = await readAhead(opened, start * opened.sampleRate, columns * hop, size + 2 * Math.ceil(hop));
  if (id !== newest) {
    return;
  }
  for (const frames of new Set([rough, whole])) {
    for (let first = 0; first < columns; first += PIECE) {
      const count = Math.min(PIECE, columns - first);
      const left = start * opened.sampleRate + first * hop;
      const levels = await compute(source, spectrum, left, hop, count, frames);
      if (id !== newest) {
        return;
      }
      self.postMessage({ id, first, levels }, { transfer: [levels.buffer] });
    }
    self.postMessage({ id, done: frames === whole });
  }
}

/**
 * A short stretch of a recording, read by one request instead of one for each piece; a long one as it is.
 *
 * @param {Source} opened
 * @param {number} from sample
 * @param {number} count samples
 * @param {number} around samples that the frames at its ends need besides
 * @returns {Promise<Source>}
 */
async function readAhead(opened, from, count, around) {
  const begin = Math.floor(from) - around;
  const samples = Math.ceil(count) + 2 * around + 2;
  if (samples > MOST_SAMPLES) {
    return opened;
  }
  const wave = await opened.read(begin, samples);
  return { read: async (first, length) => wave.subarray(first - begin, first - begin + length) };
}

/**
 * @param {Source} opened
 * @param {Spectrum} transform
 * @param {number} from sample at the left edge of the first column
 * @param {number} hop samples from column to column
 * @param {number} count columns
 * @param {number} frames of a column
 * @returns {Promise<Uint8Array>} column by column, from 0 Hz up
 */
async function compute(opened, transform, from, hop, count, frames) {
  const { size, bins } = transform;
  const levels = new Uint8Array(count * bins);
  const powers = new Float32Array(bins);
  const whole = Math.ceil(count * hop) + size;
  const begin = Math.floor(from + hop / 2 - Math.max(hop, size) / 2);
  const all = whole <= MOST_SAMPLES ? await opened.read(begin, whole + Math.ceil(hop)) : null;
  for (let column = 0; column < count; column += 1) {
    powers.fill(0);
    const middle = from + (column + 0.5) * hop;
    const left = middle - Math.max(hop, size) / 2;
    if (all !== null) {
      const step = frames > 1 ? (hop - size) / (frames - 1) : 0;
      for (let frame = 0; frame < frames; frame += 1) {
        transform.keepLargest(all, Math.round(left + frame * step) - begin, powers);
      }
    } else {
      const runs = Math.min(RUNS, frames);
      const run = Math.ceil(frames / runs);
      const starts = Array.from({ length: runs }, (_, i) => Math.round(left + (i * hop) / runs));
      for (const wave of await Promise.all(starts.map((each) => opened.read(each, run * size)))) {
        for (let frame = 0; frame < run; frame += 1) {
          transform.keepLargest(wave, frame * size, powers);
        }
      }
    }
    for (let bin = 0; bin < bins; bin += 1) {
      const decibels = powers[bin] > 0 ? 10 * Math.log10(powers[bin]) : FLOOR;
      levels[column * bins + bin] = Math.min(255, Math.max(0, Math.round((1 - decibels / FLOOR) * 255)));
    }
  }
  return levels;
}
