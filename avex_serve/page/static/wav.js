/**
 * WAV files, read a stretch at a time at their own rate: ultrasound stays, and an hour opens at once.
 *
 * PCM of 8 to 32 bits and floats, in RIFF, RF64 and BW64. What this module does not read, the service turns into WAV.
 */

/** @typedef {import("./bytes.js").Bytes} Bytes */

/**
 * A recording whose samples can be read.
 *
 * @typedef {object} Sound
 * @property {number} sampleRate Hz
 * @property {number} frames samples of each channel
 * @property {number} channels
 * @property {number} duration seconds
 * @property {(first: number, count: number) => Promise<Float32Array<ArrayBuffer>>} read samples of the channel that was chosen;
 *   zeros before the start and after the end
 * @property {Layout} layout
 */

/**
 * Where the samples are in the file, and its other chunks.
 *
 * @typedef {object} Layout
 * @property {number} start position of the first sample
 * @property {number} frameBytes bytes of a sample of all channels
 * @property {number} bits
 * @property {boolean} float
 * @property {ArrayBuffer} format content of the chunk `fmt `
 * @property {{name: string, from: number, to: number}[]} chunks all but the samples, with their heads
 */

const PCM = 1;
const FLOAT = 3;
const EXTENSIBLE = 0xfffe;
const MOST_CHUNKS = 1000;

/** The channel that is the mean of all. */
export const MIX = "mix";

/**
 * @param {Bytes} bytes
 * @param {number | "mix"} channel from 1, or the mean of all
 * @returns {Promise<Sound | null>} null: not a WAV file that this module reads
 */
export async function openWav(bytes, channel = MIX) {
  const found = await findChunks(bytes);
  if (found === null || found.format.byteLength < 16) {
    return null;
  }
  const view = new DataView(found.format);
  const channels = view.getUint16(2, true);
  const sampleRate = view.getUint32(4, true);
  const frameBytes = view.getUint16(12, true);
  const bits = view.getUint16(14, true);
  let tag = view.getUint16(0, true);
  if (tag === EXTENSIBLE && found.format.byteLength >= 26) {
    tag = view.getUint16(24, true);
  }
  const decode = decoder(tag, bits);
  if (decode === null || sampleRate === 0 || channels === 0 || frameBytes !== (channels * bits) / 8) {
    return null;
  }
  if (channel !== MIX && !(channel >= 1 && channel <= channels)) {
    return null;
  }
  const frames = Math.floor((found.to - found.from) / frameBytes);
  const layout = {
    start: found.from,
    frameBytes,
    bits,
    float: tag === FLOAT,
    format: found.format,
    chunks: found.chunks,
  };
  /** @type {Sound["read"]} */
  const read = async (first, count) => {
    const wave = new Float32Array(count);
    const from = Math.max(0, first);
    const to = Math.min(frames, first + count);
    if (to > from) {
      const data = await bytes.read(found.from + from * frameBytes, found.from + to * frameBytes);
      mix(decode(data), channels, channel, wave, from - first);
    }
    return wave;
  };
  return { sampleRate, frames, channels, duration: frames / sampleRate, read, layout };
}

/**
 * @param {Bytes} bytes
 * @returns {Promise<{format: ArrayBuffer, from: number, to: number, chunks: Layout["chunks"]} | null>}
 */
async function findChunks(bytes) {
  const head = new DataView(await bytes.read(0, Math.min(12, bytes.size)));
  if (head.byteLength < 12 || !["RIFF", "RF64", "BW64"].includes(name(head, 0)) || name(head, 8) !== "WAVE") {
    return null;
  }
  /** @type {Layout["chunks"]} */
  const chunks = [];
  let format = new ArrayBuffer(0);
  let data = null;
  let size64 = -1;
  let position = 12;
  for (let count = 0; position + 8 <= bytes.size && count < MOST_CHUNKS; count += 1) {
    const chunk = new DataView(await bytes.read(position, Math.min(position + 36, bytes.size)));
    const id = name(chunk, 0);
    let size = chunk.getUint32(4, true);
    if (id === "data") {
      if (size === 0xffffffff || size === 0) {
        size = size64 >= 0 ? size64 : bytes.size; // the recorder did not know, or lost power
      }
      data = { from: position + 8, to: Math.min(position + 8 + size, bytes.size) };
    } else {
      chunks.push({ name: id, from: position, to: Math.min(position + 8 + size + (size % 2), bytes.size) });
      if (id === "fmt ") {
        format = await bytes.read(position + 8, position + 8 + Math.min(size, 64));
      } else if (id === "ds64" && chunk.byteLength >= 24) {
        size64 = Number(chunk.getBigUint64(16, true));
      }
    }
    position += 8 + size + (size % 2);
  }
  return data === null ? null : { format, chunks, ...data };
}

/**
 * @param {DataView} view
 * @param {number} at
 */
function name(view, at) {
  return String.fromCharCode(...[0, 1, 2, 3].map((each) => view.getUint8(at + each)));
}

/**
 * What turns the bytes of samples into numbers from -1 to 1.
 *
 * @param {number} tag
 * @param {number} bits
 * @returns {((data: ArrayBuffer) => Float32Array) | null}
 */
function decoder(tag, bits) {
  if (tag === FLOAT && bits === 32) {
    return (data) => new Float32Array(data);
  }
  if (tag === FLOAT && bits === 64) {
    return (data) => Float32Array.from(new Float64Array(data));
  }
  if (tag === PCM && bits === 16) {
    return (data) => scaled(new Int16Array(data), 2 ** -15);
  }
  if (tag === PCM && bits === 32) {
    return (data) => scaled(new Int32Array(data), 2 ** -31);
  }
  if (tag === PCM && bits === 8) {
    return (data) => Float32Array.from(new Uint8Array(data), (value) => (value - 128) / 128);
  }
  return tag === PCM && bits === 24 ? of24Bits : null;
}

/**
 * @param {Int16Array | Int32Array} values
 * @param {number} factor
 */
function scaled(values, factor) {
  const wave = new Float32Array(values.length);
  for (let i = 0; i < wave.length; i += 1) {
    wave[i] = values[i] * factor;
  }
  return wave;
}

/** @param {ArrayBuffer} data */
function of24Bits(data) {
  const bytes = new Uint8Array(data);
  const wave = new Float32Array(bytes.length / 3);
  for (let i = 0, at = 0; i < wave.length; i += 1, at += 3) {
    wave[i] = ((bytes[at] << 8) | (bytes[at + 1] << 16) | (bytes[at + 2] << 24)) * 2 ** -31;
  }
  return wave;
}

/**
 * @param {Float32Array} samples of all channels, interleaved
 * @param {number} channels
 * @param {number | "mix"} channel
 * @param {Float32Array} wave where the result goes
 * @param {number} at where in it
 */
function mix(samples, channels, channel, wave, at) {
  const count = samples.length / channels;
  if (channels === 1) {
    wave.set(samples, at);
    return;
  }
  for (let i = 0; i < count; i += 1) {
    let value = 0;
    if (channel === MIX) {
      for (let each = 0; each < channels; each += 1) {
        value += samples[i * channels + each];
      }
      value /= channels;
    } else {
      value = samples[i * channels + channel - 1];
    }
    wave[at + i] = value;
  }
}
