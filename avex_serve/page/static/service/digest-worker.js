/** A worker that computes SHA-256. In: {id, file}; out: {id, digest}, or {id, error}. */

import { sha256 } from "./sha256.js";

self.addEventListener("message", async ({ data: { id, file } }) => {
  try {
    self.postMessage({ id, digest: await sha256(file) });
  } catch (error) {
    self.postMessage({ id, error: String(error) });
  }
});
