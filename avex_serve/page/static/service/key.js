/** The question for a key of the service. */

import { labelled, make } from "../dom.js";
import { say } from "../strings.js";

/**
 * A dialog of the page, as a function that asks.
 *
 * @returns {(reason: string) => Promise<string | null>} null: the user gives none
 */
export function keyDialog() {
  const field = make("input", { type: "password", autocomplete: "off", required: true });
  const reason = make("p", { class: "error" });
  const cancel = make("button", { type: "button", click: () => dialog.close() }, say("key.cancel"));
  const use = make("button", { class: "main", value: "use" }, say("key.use"));
  const form = make("form", { method: "dialog" }, labelled(say("key"), field), make("div", { class: "controls" }, use, cancel));
  const title = make("h2", { id: "key-title" }, say("key.title"));
  const dialog = make("dialog", { "aria-labelledby": "key-title" }, title, make("p", {}, say("key.help")), reason, form);
  document.body.append(dialog);
  return (why) =>
    new Promise((resolve) => {
      reason.textContent = why;
      field.value = "";
      dialog.returnValue = "";
      dialog.addEventListener(
        "close",
        () => resolve(dialog.returnValue === "use" && field.value !== "" ? field.value : null),
        { once: true },
      );
      dialog.showModal();
    });
}
