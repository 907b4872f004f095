/** SHA-256 of a file that is read in pieces; browsers offer it for whole buffers and for pages of TLS alone. */

const PIECE = 2 ** 22; // bytes

/** The first 32 bits of the fractional parts of roots of the first 64 primes (FIPS 180-4). */
const CONSTANTS = Uint32Array.from(primes(64), (prime) => fraction(Math.cbrt(prime)));

/**
 * @param {Blob} file
 * @returns {Promise<string>} in hexadecimal digits
 */
export async function sha256(file) {
  const state = Uint32Array.from(primes(8), (prime) => fraction(Math.sqrt(prime)));
  const schedule = new Uint32Array(64);
  const whole = Math.floor(file.size / 64) * 64;
  for (let at = 0; at < whole; at += PIECE) {
    compress(state, schedule, await file.slice(at, Math.min(whole, at + PIECE)).arrayBuffer());
  }
  const rest = new Uint8Array(await file.slice(whole).arrayBuffer());
  const tail = new Uint8Array(rest.length < 56 ? 64 : 128);
  tail.set(rest);
  tail[rest.length] = 0x80;
  new DataView(tail.buffer).setBigUint64(tail.length - 8, BigInt(file.size) * 8n);
  compress(state, schedule, tail.buffer);
  return [...state].map((each) => each.toString(16).padStart(8, "0")).join("");
}

/**
 * @param {Uint32Array} state
 * @param {Uint32Array} schedule
 * @param {ArrayBuffer} data whole blocks of 64 bytes
 */
function compress(state, schedule, data) {
  const view = new DataView(data);
  for (let block = 0; block < data.byteLength; block += 64) {
    for (let i = 0; i < 16; i += 1) {
      schedule[i] = view.getUint32(block + 4 * i);
    }
    for (let i = 16; i < 64; i += 1) {
      const early = schedule[i - 15];
      const late = schedule[i - 2];
      const s0 = ((early >>> 7) | (early << 25)) ^ ((early >>> 18) | (early << 14)) ^ (early >>> 3);
      const s1 = ((late >>> 17) | (late << 15)) ^ ((late >>> 19) | (late << 13)) ^ (late >>> 10);
      schedule[i] = schedule[i - 16] + s0 + schedule[i - 7] + s1;
    }
    let [a, b, c, d, e, f, g, h] = state;
    for (let i = 0; i < 64; i += 1) {
      const s1 = ((e >>> 6) | (e << 26)) ^ ((e >>> 11) | (e << 21)) ^ ((e >>> 25) | (e << 7));
      const t1 = (h + s1 + ((e & f) ^ (~e & g)) + CONSTANTS[i] + schedule[i]) | 0;
      const s0 = ((a >>> 2) | (a << 30)) ^ ((a >>> 13) | (a << 19)) ^ ((a >>> 22) | (a << 10));
      const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      h = g;
      g = f;
      f = e;
      e = (d + t1) | 0;
      d = c;
      c = b;
      b = a;
      a = (t1 + t2) | 0;
    }
    for (const [index, value] of [a, b, c, d, e, f, g, h].entries()) {
      state[index] += value;
    }
  }
}

/** @param {number} count */
function primes(count) {
  const found = [2];
  for (let each = 3; found.length < count; each += 2) {
    if (found.every((prime) => each % prime !== 0)) {
      found.push(each);
    }
  }
  return found;
}

/** @param {number} root */
function fraction(root) {
  return Math.floor((root - Math.floor(root)) * 2 ** 32);
}
