/**
 * A worker that reads a recording and computes columns of its spectrogram.
 *
 * In: {place, channel} opens a recording; then {id, start, end, columns, size} asks for columns. A new question ends
 * the work on the one before. Out: {id, first, levels} with the next columns, as bytes: 0 is FLOOR, 255 is 0 dB
 * relative to a sine at full scale. After the last column {id, done}, where `done` says whether the picture is
 * complete: a long stretch is computed roughly first, and then once more. Or {id, error}.
 */

import { openBytes } from "./bytes.js";
import { Spectrum } from "./fft.js";
import { FLOOR } from "./levels.js";
import { openWav } from "./wav.js";

const PIECE = 32; // columns that are computed between two answers
const MOST_FRAMES = 32; // of a column; of longer columns, stretches at equal distances are computed
const RUNS = 4; // such stretches
const ROUGH = 2 ** 22; // samples that are transformed for a rough picture
const MOST_SAMPLES = 2 ** 21; // that are read at once

/** @type {Promise<import("./wav.js").Sound | null>} */
let sound = Promise.resolve(null);
let newest = -1;
/** @type {Spectrum | null} */
let spectrum = null;

self.addEventListener("message", ({ data }) => {
  if ("place" in data) {
    sound = openBytes(data.place).then((bytes) => openWav(bytes, data.channel));
    sound.catch(() => null); // each question reports it
    return;
  }
  newest = data.id;
  answer(data).catch((error) => self.postMessage({ id: data.id, error: String(error.message ?? error) }));
});

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
  for (const frames of new Set([rough, whole])) {
    for (let first = 0; first < columns; first += PIECE) {
      const count = Math.min(PIECE, columns - first);
      const left = start * opened.sampleRate + first * hop;
      const levels = await compute(opened, spectrum, left, hop, count, frames);
      if (id !== newest) {
        return;
      }
      self.postMessage({ id, first, levels }, { transfer: [levels.buffer] });
    }
    self.postMessage({ id, done: frames === whole });
  }
}

/**
 * @param {import("./wav.js").Sound} opened
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
