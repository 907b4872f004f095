/** What the service serves, and its other pages. */

import { make } from "../dom.js";
import { say } from "../strings.js";

/** @param {any} served as GET / answers */
export function servedTable(served) {
  const names = Object.keys(served.models[0] ?? {});
  const cell = (/** @type {any} */ value) =>
    typeof value === "object" && value !== null
      ? Object.entries(value)
          .map(([name, count]) => `${name}: ${count}`)
          .join(", ")
      : String(value);
  const table = make(
    "table",
    {},
    make("caption", {}, say("served")),
    make("thead", {}, make("tr", {}, ...names.map((each) => make("th", { scope: "col" }, each)))),
    make(
      "tbody",
      {},
      ...served.models.map((/** @type {any} */ model) =>
        make("tr", {}, ...names.map((each) => make("td", {}, cell(model[each])))),
      ),
    ),
  );
  const address = `${location.hostname}:${served.grpc_port}`;
  const links = ["docs.json", "metrics", "readyz"].map((each) => make("a", { href: each }, each));
  return make(
    "details",
    {},
    make("summary", {}, say("served")),
    make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": say("served") }, table),
    make("p", {}, say("served.grpc", { address })),
    make("p", {}, ...links.flatMap((each) => [each, " "])),
  );
}
