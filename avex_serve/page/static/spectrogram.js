/**
 * A spectrogram with detections over it, which can be zoomed and panned in time and frequency.
 *
 * A worker computes columns for what is shown. Until they arrive, the columns at hand are drawn where they belong.
 * Colours, dB range and frequency scale are applied here, so that changing them computes nothing again.
 */

import { listen } from "./gestures.js";
import { FLOOR, fromMel, labelColour, makePalette, toMel } from "./levels.js";
import { clock, say } from "./strings.js";

/**
 * A labelled span.
 *
 * @typedef {object} Mark
 * @property {number} start seconds
 * @property {number} end
 * @property {string} label
 * @property {number | null} score null: it has none
 * @property {number} [probability] of a calibrated label
 * @property {number} [low] Hz
 * @property {number} [high] Hz
 */

/** @typedef {{start: number, end: number, low: number, high: number}} View seconds and Hz */
/** @typedef {{start: number, end: number, columns: number, bins: number, levels: Uint8Array, complete: boolean}} Columns */

const LEFT = 46; // CSS pixels of the axis of frequencies
const BOTTOM = 20; // and of that of time
const MOST_PIXELS = 3840; // in a row
const FRAME_SECONDS = 0.02;
const FRAMES = [128, 4096]; // samples of an automatic frame
const FINEST = 16; // columns of a frame at most
const SHORTEST = 0.005; // seconds that can be shown
const NARROWEST = 100; // Hz that can be shown
const CHIP = 16; // CSS pixels of a line with a label
const MOST_CHIPS = 4; // labels of a window that are written

/**
 * Events: `view` when what is shown changes; `seek` with a time; `select` with a mark; `hover` with time and
 * frequency, or null.
 */
export class Spectrogram extends EventTarget {
  /**
   * @param {HTMLElement} container
   * @param {URL | string} worker address of spectrogram-worker.js
   */
  constructor(container, worker = new URL("spectrogram-worker.js", import.meta.url)) {
    super();
    this.container = container;
    container.classList.add("spectrogram");
    this.levels = document.createElement("canvas");
    this.overlay = document.createElement("canvas");
    this.overlay.tabIndex = 0;
    this.overlay.setAttribute("role", "application");
    this.overlay.setAttribute("aria-label", say("spectrogram.help"));
    container.append(this.levels, this.overlay);
    /** @type {View} */
    this.view = { start: 0, end: 1, low: 0, high: 1 };
    this.settings = { scale: "linear", quietest: -90, loudest: -20, colours: "magma", frame: 0 };
    this.duration = 0;
    this.sampleRate = 0;
    /** @type {Mark[]} */
    this.marks = [];
    /** @type {Mark | null} */
    this.selected = null;
    this.position = 0;
    /** @type {Columns | null} */
    this.drawn = null;
    /** @type {(Columns & {id: number}) | null} */
    this.coming = null;
    /** @type {{left: number, top: number, right: number, bottom: number, mark: Mark}[]} */
    this.chips = [];
    this.question = 0;
    this.wanted = false;
    this.worker = new Worker(worker, { type: "module" });
    this.worker.addEventListener("message", ({ data }) => this.receive(data));
    new ResizeObserver(() => this.refresh()).observe(container);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    listen(this);
  }

  /**
   * Show another recording.
   *
   * @param {import("./bytes.js").Place} place of a WAV file
   * @param {import("./wav.js").Sound} sound that was opened from it
   * @param {number | "mix"} channel
   */
  open(place, sound, channel = "mix") {
    this.worker.postMessage({ place, channel });
    this.duration = sound.duration;
    this.sampleRate = sound.sampleRate;
    this.drawn = null;
    this.coming = null;
    this.selected = null;
    this.position = 0;
    this.show({ start: 0, end: sound.duration, low: 0, high: sound.sampleRate / 2 });
  }

  /**
   * Make a recording ready that is likely to be opened next.
   *
   * @param {string} url
   */
  prepare(url) {
    this.worker.postMessage({ prepare: url });
  }

  /** Show nothing. */
  close() {
    this.duration = 0;
    this.drawn = null;
    this.coming = null;
    this.marks = [];
    this.draw();
  }

  /**
   * Show a part of the recording.
   *
   * @param {Partial<View>} part
   */
  show(part) {
    const { start, end, low, high } = { ...this.view, ...part };
    const seconds = Math.min(Math.max(end - start, SHORTEST), Math.max(this.duration, SHORTEST));
    const from = Math.min(Math.max(0, start), Math.max(0, this.duration - seconds));
    const nyquist = this.sampleRate / 2;
    const hertz = Math.min(Math.max(high - low, Math.min(NARROWEST, nyquist)), nyquist);
    const bottom = Math.min(Math.max(0, low), nyquist - hertz);
    this.view = { start: from, end: from + seconds, low: bottom, high: bottom + hertz };
    this.refresh();
    this.dispatchEvent(new Event("view"));
  }

  /**
   * Zoom in time or frequency.
   *
   * @param {number} factor below 1 zooms in
   * @param {number} [middle] seconds that stay where they are; by default the middle
   */
  zoom(factor, middle = (this.view.start + this.view.end) / 2) {
    const { start, end } = this.view;
    this.show({ start: middle - (middle - start) * factor, end: middle + (end - middle) * factor });
  }

  /** @param {number} factor below 1 zooms in */
  zoomFrequency(factor) {
    const { low, high } = this.view;
    const middle = (low + high) / 2;
    this.show({ low: middle - (middle - low) * factor, high: middle + (high - middle) * factor });
  }

  /**
   * Move by parts of what is shown.
   *
   * @param {number} time to the right
   * @param {number} frequency up
   */
  pan(time, frequency = 0) {
    const { start, end, low, high } = this.view;
    const seconds = time * (end - start);
    const hertz = frequency * (high - low);
    this.show({ start: start + seconds, end: end + seconds, low: low + hertz, high: high + hertz });
  }

  /**
   * Move what was shown with the pointer.
   *
   * @param {View} view where the pointer was pressed
   * @param {number} x CSS pixels from there to the right
   * @param {number} y and down
   */
  drag({ start, end, low, high }, x, y) {
    const seconds = (x / this.size.width) * (end - start);
    const [bottom, top, most] = [low, high, this.sampleRate / 2].map((each) => this.scaled(each));
    const wanted = (y / this.size.height) * (top - bottom);
    const up = Math.min(Math.max(wanted, -bottom), most - top);
    this.show({
      start: start - seconds,
      end: end - seconds,
      low: this.hertz(bottom + up),
      high: this.hertz(top + up),
    });
  }

  /** Show the whole recording. */
  showAll() {
    this.show({ start: 0, end: this.duration, low: 0, high: this.sampleRate / 2 });
  }

  /**
   * Change how it is drawn.
   *
   * @param {Partial<Spectrogram["settings"]>} changes
   */
  set(changes) {
    Object.assign(this.settings, changes);
    this.refresh();
  }

  /** @param {Mark[]} marks */
  setMarks(marks) {
    this.marks = marks;
    if (this.selected !== null && !marks.includes(this.selected)) {
      this.selected = null;
    }
    this.drawOverlay();
  }

  /**
   * Select a mark, and show it if it is out of sight.
   *
   * @param {Mark | null} mark
   */
  select(mark) {
    this.selected = mark;
    const { start, end } = this.view;
    if (mark !== null && (mark.end <= start || mark.start >= end)) {
      const middle = (mark.start + mark.end) / 2;
      this.show({ start: middle - (end - start) / 2, end: middle + (end - start) / 2 });
    }
    this.drawOverlay();
  }

  /** @param {number} seconds where the player is; the view follows it out at the right */
  setPosition(seconds) {
    const { start, end } = this.view;
    const before = this.position;
    this.position = seconds;
    if (before <= end && seconds > end && seconds < this.duration && before >= start) {
      this.show({ start: end, end: end + (end - start) });
    }
    this.drawOverlay();
  }

  // -- places -------------------------------------------------------------------------------------------------------

  /** The size of the picture without its axes, in CSS pixels. */
  get size() {
    const { clientWidth, clientHeight } = this.container;
    return { width: Math.max(1, clientWidth - LEFT), height: Math.max(1, clientHeight - BOTTOM) };
  }

  /** @param {number} seconds */
  xOf(seconds) {
    return LEFT + ((seconds - this.view.start) / (this.view.end - this.view.start)) * this.size.width;
  }

  /** @param {number} x CSS pixels from the left of the container */
  timeAt(x) {
    return this.view.start + ((x - LEFT) / this.size.width) * (this.view.end - this.view.start);
  }

  /** @param {number} hertz */
  yOf(hertz) {
    const [low, high, at] = [this.view.low, this.view.high, hertz].map((each) => this.scaled(each));
    return (1 - (at - low) / (high - low)) * this.size.height;
  }

  /** @param {number} y CSS pixels from the top of the container */
  frequencyAt(y) {
    const [low, high] = [this.view.low, this.view.high].map((each) => this.scaled(each));
    const at = low + (1 - y / this.size.height) * (high - low);
    return this.hertz(at);
  }

  /** @param {number} hertz */
  scaled(hertz) {
    return this.settings.scale === "mel" ? toMel(hertz) : hertz;
  }

  /** @param {number} scaled */
  hertz(scaled) {
    return this.settings.scale === "mel" ? fromMel(scaled) : scaled;
  }

  // -- computing ----------------------------------------------------------------------------------------------------

  /** Draw what is at hand, and ask for what is shown. */
  refresh() {
    this.draw();
    if (this.wanted || this.duration === 0) {
      return;
    }
    this.wanted = true;
    requestAnimationFrame(() => {
      this.wanted = false;
      this.ask();
    });
  }

  ask() {
    const { start, end } = this.view;
    const size = this.settings.frame || automaticFrame(this.sampleRate);
    const pixels = Math.min(MOST_PIXELS, Math.round(this.size.width * devicePixelRatio));
    const useful = Math.ceil(((end - start) * this.sampleRate * FINEST) / size);
    const columns = Math.max(1, Math.min(pixels, useful));
    const bins = size / 2 + 1;
    const fits = (/** @type {Columns | null} */ each) =>
      each !== null && each.start === start && each.end === end && each.columns === columns && each.bins === bins;
    if (fits(this.coming)) {
      return;
    }
    this.question += 1;
    if (this.drawn?.complete && fits(this.drawn)) {
      this.coming = null;
      this.container.setAttribute("aria-busy", "false");
      return;
    }
    const levels = new Uint8Array(columns * bins);
    this.coming = { id: this.question, start, end, columns, bins, levels, complete: false };
    this.container.setAttribute("aria-busy", "true");
    this.worker.postMessage({ id: this.question, start, end, columns, size });
  }

  /** @param {any} data see spectrogram-worker.js */
  receive(data) {
    if (this.coming === null || data.id !== this.coming.id) {
      return;
    }
    if ("levels" in data) {
      this.coming.levels.set(data.levels, data.first * this.coming.bins);
      return;
    }
    this.container.setAttribute("aria-busy", String(data.done === false));
    if ("error" in data) {
      this.coming = null;
      this.dispatchEvent(new CustomEvent("failed", { detail: say("spectrogram.failed", { reason: data.error }) }));
      return;
    }
    this.drawn = this.coming;
    this.drawn.complete = data.done;
    if (data.done) {
      this.coming = null;
    }
    this.draw();
    this.dispatchEvent(new Event("drawn"));
  }

  // -- drawing ------------------------------------------------------------------------------------------------------

  draw() {
    const scale = Math.min(devicePixelRatio, MOST_PIXELS / Math.max(1, this.container.clientWidth));
    for (const canvas of [this.levels, this.overlay]) {
      const width = Math.round(this.container.clientWidth * scale);
      const height = Math.round(this.container.clientHeight * scale);
      if (canvas.width !== width || canvas.height !== height) {
        canvas.width = width;
        canvas.height = height;
      }
    }
    const context = this.levels.getContext("2d");
    if (context === null || this.levels.width === 0 || this.levels.height === 0) {
      return;
    }
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.levels.width, this.levels.height);
    if (this.drawn !== null && this.duration > 0) {
      const { width, height } = this.size;
      const image = this.paint(this.drawn, Math.round(width * scale), Math.round(height * scale));
      context.putImageData(image, Math.round(LEFT * scale), 0);
    }
    context.setTransform(scale, 0, 0, scale, 0, 0);
    if (this.duration > 0) {
      this.drawAxes(context);
    }
    this.drawOverlay();
  }

  /**
   * @param {Columns} drawn
   * @param {number} width
   * @param {number} height
   */
  paint({ start, end, columns, bins, levels }, width, height) {
    const image = new ImageData(Math.max(1, width), Math.max(1, height));
    const pixels = new Uint32Array(image.data.buffer);
    const colours = this.colours();
    const { view } = this;
    const place = Int32Array.from({ length: width }, (_, x) => {
      const seconds = view.start + ((x + 0.5) / width) * (view.end - view.start);
      const column = Math.floor(((seconds - start) / (end - start)) * columns);
      return column >= 0 && column < columns ? column * bins : -1;
    });
    const binOf = (/** @type {number} */ row) => {
      const hertz = this.frequencyAt((row / height) * this.size.height);
      return (hertz / (this.sampleRate / 2)) * (bins - 1);
    };
    for (let y = 0; y < height; y += 1) {
      const low = Math.min(bins - 1, Math.max(0, Math.round(binOf(y + 1))));
      const high = Math.min(bins, Math.max(low + 1, Math.round(binOf(y))));
      for (let x = 0; x < width; x += 1) {
        if (place[x] >= 0) {
          let level = 0;
          for (let bin = place[x] + low; bin < place[x] + high; bin += 1) {
            level = Math.max(levels[bin], level);
          }
          pixels[y * width + x] = colours[level];
        }
      }
    }
    return image;
  }

  /** The colour of each level. */
  colours() {
    const { quietest, loudest, colours } = this.settings;
    const palette = makePalette(colours);
    return palette.map((_, level) => {
      const decibels = FLOOR * (1 - level / 255);
      const part = (decibels - quietest) / Math.max(1, loudest - quietest);
      return palette[Math.min(255, Math.max(0, Math.round(part * 255)))];
    });
  }

  /** @param {CanvasRenderingContext2D} context */
  drawAxes(context) {
    const { width, height } = this.size;
    const style = getComputedStyle(this.container);
    context.fillStyle = style.color;
    context.font = `11px ${style.fontFamily}`;
    const step = niceStep((this.view.end - this.view.start) / Math.max(2, width / 90), [1, 2, 5, 10, 15, 30, 60]);
    const digits = step >= 1 ? 0 : Math.ceil(-Math.log10(step));
    context.textBaseline = "top";
    for (let at = Math.ceil(this.view.start / step) * step; at <= this.view.end; at += step) {
      const x = this.xOf(at);
      context.fillRect(x, height, 1, 4);
      context.textAlign = x > LEFT + width - 30 ? "right" : x < LEFT + 15 ? "left" : "center";
      context.fillText(clock(at, digits), x, height + 6);
    }
    context.textAlign = "right";
    context.textBaseline = "middle";
    let last = Infinity;
    const space = niceStep((this.view.high - this.view.low) / 1000 / Math.max(2, height / 40), [1, 2, 5]);
    const decimals = space >= 1 ? 0 : Math.ceil(-Math.log10(space));
    for (let at = Math.ceil(this.view.low / 1000 / space) * space; at * 1000 <= this.view.high; at += space) {
      const y = this.yOf(at * 1000);
      if (last - y >= 14) {
        last = y;
        context.fillRect(LEFT - 4, y, 4, 1);
        context.fillText(at.toFixed(decimals), LEFT - 6, Math.min(Math.max(y, 6), height - 6));
      }
    }
    context.save();
    context.translate(8, height / 2);
    context.rotate(-Math.PI / 2);
    context.textAlign = "center";
    context.fillText("kHz", 0, 0);
    context.restore();
  }

  drawOverlay() {
    const context = this.overlay.getContext("2d");
    if (context === null || this.overlay.width === 0) {
      return;
    }
    const scale = this.overlay.width / this.container.clientWidth;
    const { width, height } = this.size;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, LEFT + width, height + BOTTOM);
    this.chips = [];
    if (this.duration === 0) {
      return;
    }
    context.save();
    context.beginPath();
    context.rect(LEFT, 0, width, height);
    context.clip();
    for (const group of this.groups()) {
      this.drawGroup(context, group);
    }
    const x = this.xOf(this.position);
    context.fillStyle = "#000";
    context.fillRect(x - 1, 0, 3, height);
    context.fillStyle = "#fff";
    context.fillRect(x, 0, 1, height);
    context.restore();
  }

  /** The marks in sight, those of the same span together, the highest score first. */
  groups() {
    /** @type {Map<string, Mark[]>} */
    const groups = new Map();
    for (const mark of this.marks) {
      if (mark.end > this.view.start && mark.start < this.view.end) {
        const key = `${mark.start} ${mark.end} ${mark.low ?? ""} ${mark.high ?? ""}`;
        groups.set(key, [...(groups.get(key) ?? []), mark]);
      }
    }
    return [...groups.values()].map((each) => each.sort((one, other) => (other.score ?? 1) - (one.score ?? 1)));
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {Mark[]} group
   */
  drawGroup(context, group) {
    const [best] = group;
    const { height } = this.size;
    const left = this.xOf(best.start);
    const right = this.xOf(best.end);
    const top = best.high === undefined ? 0 : Math.max(0, this.yOf(best.high));
    const bottom = best.low === undefined ? height : Math.min(height, this.yOf(best.low));
    const chosen = this.selected !== null && group.includes(this.selected);
    context.lineWidth = chosen ? 5 : 3;
    context.strokeStyle = "#000";
    context.strokeRect(left + 1, top + 1, right - left - 2, bottom - top - 2);
    context.lineWidth = chosen ? 3 : 1;
    context.strokeStyle = labelColour(best.label);
    context.strokeRect(left + 1, top + 1, right - left - 2, bottom - top - 2);
    const space = right - left - 4;
    context.font = `12px ${getComputedStyle(this.container).fontFamily}`;
    context.textAlign = "left";
    context.textBaseline = "middle";
    const written = group.length > MOST_CHIPS ? group.slice(0, MOST_CHIPS - 1) : group;
    const texts = written.map((mark) => `${mark.label}${mark.score === null ? "" : ` ${mark.score.toFixed(2)}`}`);
    if (written.length < group.length) {
      texts.push(`+${group.length - written.length}`);
    }
    texts.forEach((text, line) => {
      const y = top + 3 + line * CHIP;
      const wide = Math.min(space, context.measureText(text).width + 6);
      if (wide < 20) {
        return;
      }
      const mark = written[line] ?? best;
      context.save();
      context.beginPath();
      context.rect(left + 2, y, wide, CHIP - 1);
      context.clip();
      context.fillStyle = mark === this.selected ? "#fff" : "#000c";
      context.fillRect(left + 2, y, wide, CHIP - 1);
      context.fillStyle = mark === this.selected ? "#000" : "#fff";
      context.fillText(text, left + 5, y + CHIP / 2);
      context.restore();
      this.chips.push({ left: left + 2, top: y, right: left + 2 + wide, bottom: y + CHIP, mark });
    });
  }

  /**
   * The mark at a place: the one whose label is there, or else the best of those whose span is there.
   *
   * @param {number} x CSS pixels
   * @param {number} y
   * @returns {Mark | null}
   */
  markAt(x, y) {
    const chip = this.chips.find((each) => x >= each.left && x < each.right && y >= each.top && y < each.bottom);
    if (chip !== undefined) {
      return chip.mark;
    }
    const seconds = this.timeAt(x);
    const hertz = this.frequencyAt(y);
    const here = this.marks.filter(
      (each) =>
        each.start <= seconds && seconds < each.end && (each.low ?? 0) <= hertz && hertz <= (each.high ?? Infinity),
    );
    return here.reduce(
      (/** @type {Mark | null} */ best, each) => (best === null || (each.score ?? 1) > (best.score ?? 1) ? each : best),
      null,
    );
  }
}

/** @param {number} sampleRate */
function automaticFrame(sampleRate) {
  const size = 2 ** Math.round(Math.log2(sampleRate * FRAME_SECONDS));
  return Math.min(FRAMES[1], Math.max(FRAMES[0], size));
}

/**
 * The step of an axis: the smallest nice number that is not below `least`.
 *
 * @param {number} least
 * @param {number[]} steps nice numbers from 1 on
 */
function niceStep(least, steps) {
  if (least < 1 || steps.length < 4) {
    const power = 10 ** Math.floor(Math.log10(least));
    return [1, 2, 5, 10].map((each) => each * power).find((each) => each >= least * 0.999) ?? 10 * power;
  }
  for (let unit = 1; ; unit *= 60) {
    const step = steps.map((each) => each * unit).find((each) => each >= least);
    if (step !== undefined) {
      return step;
    }
  }
}
