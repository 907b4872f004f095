/**
 * A WAV that is larger than the service accepts, cut into pieces that give the same windows.
 *
 * A piece begins where a window begins and a sample is, of the file and of the model. It has a window more on each
 * side than is wanted of it, because a resampler's output near an edge depends on what is behind the edge.
 */

/** @typedef {import("../wav.js").Sound} Sound */

/**
 * @typedef {object} Piece
 * @property {Blob} body a WAV
 * @property {number} offset seconds of the recording where it begins
 * @property {number} from seconds of the recording; windows that start before are another piece's
 * @property {number} to as `from`, for windows that start there or later
 * @property {number | null} seconds its length; null: not known
 * @property {boolean} last
 */

/**
 * @param {Blob} file
 * @param {Sound} sound that was opened from it
 * @param {{sampleRate: number, window: number, overlap: number}} model Hz and seconds
 * @param {{bytes: number, seconds: number}} most of a piece
 * @returns {Piece[]}
 */
export function cutPieces(file, sound, { sampleRate, window, overlap }, most) {
  const hop = Math.round((window - overlap) * sampleRate); // samples of the model
  // Windows from one that begins at a sample of the file to the next one that does.
  const every = sampleRate / gcd(sampleRate, (sound.sampleRate * hop) % sampleRate);
  const step = (every * hop) / sampleRate; // seconds
  const margin = Math.ceil(window / step) * step;
  const longest = Math.min(most.seconds, most.bytes / (sound.layout.frameBytes * sound.sampleRate));
  const length = Math.max(1, Math.floor((longest - 2 * margin - window) / step)) * step;
  const pieces = [];
  for (let from = 0; from < sound.duration; from += length) {
    const last = from + length + window >= sound.duration;
    const to = last ? Infinity : from + length;
    const offset = Math.max(0, from - margin);
    const end = last ? sound.duration : Math.min(sound.duration, to + window + margin);
    pieces.push({ body: cut(file, sound, offset, end), offset, from, to, seconds: end - offset, last });
    if (last) {
      break;
    }
  }
  return pieces;
}

/**
 * @param {Blob} file
 * @param {Sound} sound
 * @param {number} start seconds
 * @param {number} end
 */
function cut(file, { layout, sampleRate }, start, end) {
  const { frameBytes, format } = layout;
  const from = layout.start + Math.round(start * sampleRate) * frameBytes;
  const to = layout.start + Math.round(end * sampleRate) * frameBytes;
  return wavOf(format, [], file.slice(from, to));
}

/**
 * A WAV from the contents of its chunk `fmt `, other chunks as they are, and samples.
 *
 * @param {ArrayBuffer} format
 * @param {Blob[]} others
 * @param {Blob} data
 */
export function wavOf(format, others, data) {
  const rest = others.reduce((sum, each) => sum + each.size, 0);
  const head = new DataView(new ArrayBuffer(20 + format.byteLength));
  const write = (/** @type {DataView} */ view, /** @type {number} */ at, /** @type {string} */ text) =>
    new Uint8Array(view.buffer).set(new TextEncoder().encode(text), at);
  write(head, 0, "RIFF");
  head.setUint32(4, head.byteLength + rest + data.size, true);
  write(head, 8, "WAVEfmt ");
  head.setUint32(16, format.byteLength, true);
  new Uint8Array(head.buffer).set(new Uint8Array(format), 20);
  const before = new DataView(new ArrayBuffer(8));
  write(before, 0, "data");
  before.setUint32(4, data.size, true);
  return new Blob([head, ...others, before, data]);
}

/**
 * @param {number} one
 * @param {number} other
 * @returns {number}
 */
function gcd(one, other) {
  return other === 0 ? one : gcd(other, one % other);
}
