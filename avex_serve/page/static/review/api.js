/** Requests to the review application. */

/**
 * @param {string} path
 * @param {object | null} body with it, the request is a POST
 * @returns {Promise<any>} Error with the reason if it is refused
 */
export async function ask(path, body = null) {
  const question =
    body === null
      ? {}
      : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), keepalive: true };
  const response = await fetch(path, question);
  if (response.ok) {
    return response.json();
  }
  const text = await response.text();
  let reason = text;
  try {
    reason = JSON.parse(text).error;
  } catch {
    // an answer that is no JSON is the reason itself
  }
  throw new Error(reason || `${response.status}`);
}
