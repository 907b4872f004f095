/** Requests to the service. Its key is asked for when the service wants one, and kept until the tab is closed. */

import { say } from "../strings.js";

const KEY = "avex-serve-key";

/** The service refused, or can't be reached. */
export class ServiceError extends Error {
  /**
   * @param {string} message
   * @param {number} status 0: no answer
   */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/**
 * @typedef {object} Question
 * @property {Blob | string | null} [body] with it, the request is a POST
 * @property {Record<string, string>} [headers]
 * @property {XMLHttpRequestResponseType} [kind] of the answer; by default json
 * @property {(part: number) => void} [progress] called with the part of the body that is sent, 0 to 1
 * @property {(text: string) => void} [received] called with what has arrived of an answer of text
 * @property {AbortSignal} [signal]
 */

export class Api {
  /** @param {(reason: string) => Promise<string | null>} askKey asks the user for a key; null: none is given */
  constructor(askKey) {
    this.askKey = askKey;
    /** @type {Promise<boolean> | null} */
    this.asking = null;
  }

  /**
   * The headers that a program sends with each request.
   *
   * @returns {Record<string, string>}
   */
  get headers() {
    const key = sessionStorage.getItem(KEY);
    return key === null ? {} : { Authorization: `Bearer ${key}` };
  }

  /**
   * The answer to a request; ServiceError if it is refused.
   *
   * @param {string} path relative to the page, since a proxy may add to the path
   * @param {Question} question
   * @returns {Promise<any>}
   */
  async ask(path, question = {}) {
    for (;;) {
      const sent = sessionStorage.getItem(KEY);
      const { status, answer, error } = await send(path, { ...question, headers: { ...question.headers, ...this.headers } });
      if (status >= 200 && status < 300) {
        return answer;
      }
      const again = status === 401 && (sessionStorage.getItem(KEY) !== sent || (await this.renewKey(error)));
      if (!again) {
        throw new ServiceError(error, status);
      }
    }
  }

  /**
   * Ask for a key once, however many requests want one.
   *
   * @param {string} reason
   */
  async renewKey(reason) {
    this.asking ??= this.askKey(reason).then((key) => {
      this.asking = null;
      if (key !== null) {
        sessionStorage.setItem(KEY, key);
      }
      return key !== null;
    });
    return this.asking;
  }
}

/**
 * One request. XMLHttpRequest alone reports how much of a body is sent.
 *
 * @param {string} path
 * @param {Question} question
 * @returns {Promise<{status: number, answer: any, error: string}>}
 */
function send(path, { body = null, headers = {}, kind = "json", progress, received, signal }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open(body === null ? "GET" : "POST", path);
    request.responseType = kind === "json" ? "text" : kind;
    for (const [name, value] of Object.entries({ Accept: "application/json", ...headers })) {
      request.setRequestHeader(name, value);
    }
    // Each of these listeners makes the browser report more often.
    if (progress !== undefined) {
      request.upload.addEventListener("progress", (event) => progress(event.loaded / event.total));
    }
    if (received !== undefined) {
      request.addEventListener("progress", () => request.status === 200 && received(request.responseText));
    }
    request.addEventListener("load", async () => {
      const { status, response } = request;
      if (status >= 200 && status < 300) {
        const answer = kind === "json" ? JSON.parse(response) : kind === "blob" ? named(request, response) : response;
        resolve({ status, answer, error: "" });
        return;
      }
      const text = typeof response === "string" ? response : await new Response(response).text();
      resolve({ status, answer: null, error: reasonIn(text) || say("service.refused", { status }) });
    });
    request.addEventListener("error", () => reject(new ServiceError(say("service.unreachable"), 0)));
    request.addEventListener("abort", () => reject(new DOMException("aborted", "AbortError")));
    signal?.addEventListener("abort", () => request.abort());
    request.send(body);
  });
}

/**
 * The content as a file of the name that the service gives it.
 *
 * @param {XMLHttpRequest} request
 * @param {Blob} content
 */
function named(request, content) {
  const found = /filename\*=UTF-8''([^;]+)/.exec(request.getResponseHeader("Content-Disposition") ?? "");
  return new File([content], found === null ? "" : decodeURIComponent(found[1]), { type: content.type });
}

/** @param {string} text of an answer that is no success */
function reasonIn(text) {
  try {
    return String(JSON.parse(text).error ?? "");
  } catch {
    return "";
  }
}
