/** The share of windows with the sound by score: reviewed windows, the fitted curve, and the threshold. */

import { make, plainTable } from "../dom.js";
import { say } from "../strings.js";

const WIDTH = 320;
const HEIGHT = 200;
const LEFT = 34;
const BOTTOM = 32;
const TOP = 8;

/**
 * The share of windows with a sound, with its interval.
 *
 * @typedef {{value: number, low: number, high: number, windows: number, reviewed: number}} Density
 */

/**
 * @typedef {object} Found
 * @property {{low: number, high: number, windows: number, present: number, share: number, share_low: number, share_high: number}[]} bins
 * @property {[score: number, probability: number][]} curve
 * @property {{score: number, low: number, high: number, precision: number} | null} threshold
 * @property {string | null} reason
 * @property {Density & {sites: (Density & {site: string})[], notes: string[]} | null} density
 * @property {string | null} density_reason
 */

/** @param {Found} found */
export function drawChart({ bins, curve, threshold }) {
  const scores = [0, 1, ...bins.flatMap((each) => [each.low, each.high]), ...curve.map(([score]) => score)];
  const low = Math.min(...scores);
  const high = Math.max(...scores);
  const x = (/** @type {number} */ score) =>
    LEFT + ((Math.min(Math.max(score, low), high) - low) / (high - low)) * (WIDTH - LEFT - 8);
  const y = (/** @type {number} */ share) => TOP + (1 - share) * (HEIGHT - TOP - BOTTOM);
  const parts = [
    shape("path", { class: "axis", d: `M${LEFT} ${TOP}V${y(0)}H${WIDTH - 8}` }),
    ...[0, 0.5, 1].map((share) => text(4, y(share) + 4, String(share))),
    ...[low, (low + high) / 2, high].map((score) => text(x(score) - 8, y(0) + 14, String(Number(score.toFixed(1))))),
    text(LEFT + 90, HEIGHT - 4, say("review.chart.score")),
  ];
  if (threshold !== null) {
    const from = x(threshold.low);
    parts.push(
      shape("rect", { class: "range", x: from, y: TOP, width: Math.max(1, x(threshold.high) - from), height: y(0) - TOP }),
      shape("path", { class: "cut", d: `M${x(threshold.score)} ${TOP}V${y(0)}` }),
    );
  }
  for (const each of bins) {
    const middle = x((each.low + each.high) / 2);
    parts.push(
      shape("path", { class: "bin", d: `M${middle} ${y(each.share_low)}V${y(each.share_high)}` }),
      shape("circle", { class: "bin", cx: middle, cy: y(each.share), r: Math.min(6, 2 + Math.sqrt(each.windows) / 2) }),
    );
  }
  if (curve.length > 0) {
    const line = curve.map(([score, share]) => `${x(score).toFixed(1)} ${y(share).toFixed(1)}`).join("L");
    parts.push(shape("path", { class: "curve", d: `M${line}` }));
  }
  const chart = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "chart", role: "img" });
  chart.setAttribute("aria-label", say("review.chart", { bins: bins.length }));
  chart.append(...parts);
  return chart;
}

/**
 * The figures in words.
 *
 * @param {Found} found
 * @param {number} target precision
 */
export function describeFound({ threshold, reason }, target) {
  const lines = [];
  if (threshold !== null) {
    const [score, low, high] = [threshold.score, threshold.low, threshold.high].map((each) => each.toFixed(3));
    lines.push(say("review.threshold", { precision: target, score, low, high }));
  } else if (reason !== null) {
    lines.push(reason);
  }
  return facts(lines);
}

/**
 * The share of windows with the sound, in all and at each site.
 *
 * @param {Found} found
 */
export function describeDensity({ density, density_reason: reason }) {
  if (density === null) {
    return facts(reason === null ? [] : [reason]);
  }
  const found = facts([say("review.density", shares(density)), ...density.notes]);
  if (density.sites.length > 0) {
    const names = ["site", "density.share", "density.reviewed"].map((each) => say(`review.${each}`));
    const rows = density.sites.map((each) => [
      each.site,
      say("review.density.site", shares(each)),
      say("review.density.windows", { reviewed: each.reviewed, windows: each.windows }),
    ]);
    found.append(plainTable(say("review.density.sites"), names, rows));
  }
  return found;
}

/** @param {Density} density */
function shares({ value, low, high }) {
  const [share, least, most] = [value, low, high].map((each) => (100 * each).toFixed(1));
  return { share, low: least, high: most };
}

/** @param {string[]} lines */
function facts(lines) {
  return make("div", { class: "facts" }, ...lines.map((line) => make("p", {}, line)));
}

/**
 * @param {string} tag
 * @param {Record<string, string | number>} properties
 */
function shape(tag, properties) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) {
    element.setAttribute(name, String(value));
  }
  return element;
}

/**
 * @param {number} x
 * @param {number} y
 * @param {string} content
 */
function text(x, y, content) {
  const element = shape("text", { x, y });
  element.textContent = content;
  return element;
}
