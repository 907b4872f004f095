/** The controls of a spectrogram and of a player. */

import { choice, labelled, make } from "./dom.js";
import { MAPS } from "./levels.js";
import { clock, say } from "./strings.js";

/** @typedef {import("./spectrogram.js").Spectrogram} Spectrogram */
/** @typedef {import("./player.js").Player} Player */

const FRAMES = ["0", "128", "256", "512", "1024", "2048", "4096"];
const SPEEDS = [1, 0.5, 0.25, 0.1, 0.05, 2];
const GAINS = [0, 6, 12, 18, 24, 30]; // dB

/**
 * Zoom, frequencies, levels and colours.
 *
 * @param {Spectrogram} spectrogram
 */
export function viewControls(spectrogram) {
  const { settings } = spectrogram;
  const low = number({ min: 0, step: "any" }, () => spectrogram.show({ low: Number(low.value) * 1000 }));
  const high = number({ min: 0, step: "any" }, () => spectrogram.show({ high: Number(high.value) * 1000 }));
  spectrogram.addEventListener("view", () => {
    low.value = String(Number((spectrogram.view.low / 1000).toFixed(3)));
    high.value = String(Number((spectrogram.view.high / 1000).toFixed(3)));
  });
  const scale = choice(
    ["linear", "mel"].map((each) => [each, say(`scale.${each}`)]),
    { change: () => spectrogram.set({ scale: scale.value }) },
  );
  const colours = choice(
    Object.keys(MAPS).map((each) => [each, say(`colours.${each}`)]),
    { change: () => spectrogram.set({ colours: colours.value }) },
  );
  const frame = choice(
    FRAMES.map((each) => [each, each === "0" ? say("frame.auto") : each]),
    { change: () => spectrogram.set({ frame: Number(frame.value) }) },
  );
  const decibels = { type: "range", min: -120, max: 0, step: 1 };
  const quietest = make("input", {
    ...decibels,
    value: settings.quietest,
    input: () => spectrogram.set({ quietest: Number(quietest.value) }),
  });
  const loudest = make("input", {
    ...decibels,
    value: settings.loudest,
    input: () => spectrogram.set({ loudest: Number(loudest.value) }),
  });
  const button = (/** @type {string} */ name, /** @type {() => void} */ act) =>
    make("button", { type: "button", click: act }, say(name));
  return make(
    "div",
    { class: "controls", role: "group", "aria-label": say("spectrogram") },
    button("zoom.in", () => spectrogram.zoom(0.5)),
    button("zoom.out", () => spectrogram.zoom(2)),
    button("zoom.all", () => spectrogram.showAll()),
    labelled(say("scale"), scale),
    labelled(say("low"), low),
    labelled(say("high"), high),
    labelled(say("quietest"), quietest),
    labelled(say("loudest"), loudest),
    labelled(say("colours"), colours),
    labelled(say("frame"), frame),
  );
}

/**
 * Play, loop, speed and volume. Space and L do so from the spectrogram.
 *
 * @param {Player} player
 * @param {Spectrogram} spectrogram
 */
export function playControls(player, spectrogram) {
  const start = () => {
    if (player.playing) {
      player.stop();
    } else {
      const [from, to] = playedSpan(spectrogram);
      player.play(from, to, spectrogram.position);
    }
  };
  const play = make("button", { type: "button", class: "play", click: start }, say("play"));
  const loop = make("input", { type: "checkbox", change: () => player.setLoop(loop.checked) });
  const speed = choice(
    SPEEDS.map((each) => [String(each), say("speed.times", { times: each })]),
    { change: () => player.setSpeed(Number(speed.value)) },
  );
  const gain = choice(
    GAINS.map((each) => [String(each), `${each > 0 ? "+" : ""}${each} dB`]),
    { change: () => player.setGain(10 ** (Number(gain.value) / 20)) },
  );
  const position = make("span", { class: "position" });
  const show = () => {
    position.textContent = say("position", { now: clock(spectrogram.position, 2), end: clock(spectrogram.duration) });
  };
  const follow = () => {
    if (player.playing) {
      spectrogram.setPosition(player.position);
      show();
      requestAnimationFrame(follow);
    }
  };
  player.addEventListener("change", () => {
    play.textContent = say(player.playing ? "pause" : "play");
    spectrogram.setPosition(player.position);
    show();
    follow();
  });
  spectrogram.addEventListener("view", show);
  spectrogram.addEventListener("seek", (event) => {
    const seconds = /** @type {CustomEvent<number>} */ (event).detail;
    player.seek(seconds);
    spectrogram.setPosition(seconds);
    show();
  });
  spectrogram.overlay.addEventListener("keydown", (event) => {
    if (event.key === " ") {
      event.preventDefault();
      start();
    } else if (event.key === "l") {
      loop.click();
    }
  });
  return make(
    "div",
    { class: "controls", role: "group", "aria-label": say("player") },
    play,
    make("label", { class: "check" }, loop, say("loop")),
    labelled(say("speed"), speed),
    labelled(say("gain"), gain),
    position,
  );
}

/**
 * What the button plays: the selected detection if the position is in it, or else what is shown.
 *
 * @param {Spectrogram} spectrogram
 * @returns {[from: number, to: number]}
 */
function playedSpan({ selected, position, view }) {
  if (selected !== null && position >= selected.start && position <= selected.end) {
    return [selected.start, selected.end];
  }
  return [view.start, view.end];
}

/**
 * A field for a number, which acts when it is left.
 *
 * @param {Record<string, any>} properties
 * @param {() => void} act
 */
export function number(properties, act) {
  return make("input", { type: "number", class: "number", ...properties, change: act });
}
