/** Bytes that are read a stretch at a time: of a file on this computer, or of an address that answers ranges. */

/**
 * @typedef {object} Bytes
 * @property {number} size
 * @property {(from: number, to: number) => Promise<ArrayBuffer>} read the bytes from `from` to before `to`
 */

/**
 * Where bytes come from, in a form that can be sent to a worker.
 *
 * @typedef {{blob: Blob} | {url: string, headers?: Record<string, string>}} Place
 */

const HEAD = 4096; // bytes at the start of an address that are read once and kept: headers are read in many small parts

/**
 * @param {Place} place
 * @returns {Promise<Bytes>}
 */
export async function openBytes(place) {
  return "blob" in place ? ofBlob(place.blob) : ofAddress(place.url, place.headers ?? {});
}

/**
 * @param {Blob} blob
 * @returns {Bytes}
 */
function ofBlob(blob) {
  return { size: blob.size, read: (from, to) => blob.slice(from, to).arrayBuffer() };
}

/**
 * @param {string} url
 * @param {Record<string, string>} headers
 * @returns {Promise<Bytes>}
 */
async function ofAddress(url, headers) {
  /** @param {number} from @param {number} to */
  const ask = async (from, to) => {
    const response = await fetch(url, { headers: { ...headers, Range: `bytes=${from}-${to - 1}` } });
    if (response.status !== 206) {
      throw new Error(`${response.status} ${response.statusText}`);
    }
    return response;
  };
  const first = await ask(0, HEAD);
  const size = Number((first.headers.get("Content-Range") ?? "").split("/")[1]);
  const head = await first.arrayBuffer();
  return {
    size,
    read: async (from, to) =>
      to <= head.byteLength ? head.slice(from, to) : (await ask(from, Math.min(to, size))).arrayBuffer(),
  };
}
