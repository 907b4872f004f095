/** Elements of the page. What people and files say becomes text, never HTML. */

/**
 * An element with attributes, listeners and children.
 *
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, any>} properties a function is a listener of the event of its name; null and false leave an
 *   attribute out, true leaves it empty
 * @param {...(Node | string | null)} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") {
      element.addEventListener(name, value);
    } else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children.filter((each) => each !== null));
  return element;
}

/**
 * A labelled control: a choice, a number or a slider.
 *
 * @param {string} text
 * @param {HTMLElement} control
 */
export function labelled(text, control) {
  return make("label", { class: "field" }, make("span", {}, text), control);
}

/**
 * A choice from a list.
 *
 * @param {[value: string, text: string][]} options
 * @param {Record<string, any>} properties
 */
export function choice(options, properties = {}) {
  return make("select", properties, ...options.map(([value, text]) => make("option", { value }, text)));
}

/**
 * A small table, which is as it is.
 *
 * @param {string} caption
 * @param {string[]} names of the columns
 * @param {string[][]} rows the first cell of each is its name
 */
export function plainTable(caption, names, rows) {
  const heading = make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)));
  const body = rows.map(([first, ...others]) =>
    make("tr", {}, make("th", { scope: "row" }, first), ...others.map((each) => make("td", {}, each))),
  );
  const table = make("table", { class: "plain" }, make("caption", {}, caption), make("thead", {}, heading), make("tbody", {}, ...body));
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, table);
}

let lines = 0;

/**
 * A line that screen readers read out when its text changes.
 */
export function statusLine() {
  lines += 1;
  return make("p", { role: "status", class: "status", id: `status-${lines}` });
}

/**
 * Save bytes as a file of the browser's user.
 *
 * @param {Blob} content
 * @param {string} name
 */
export function save(content, name) {
  const address = URL.createObjectURL(content);
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}
