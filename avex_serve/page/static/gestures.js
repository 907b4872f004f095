/** What the pointer and the keys do to a spectrogram. */

/** @typedef {import("./spectrogram.js").Spectrogram} Spectrogram */

/**
 * Let the pointer and the keys of its overlay move, zoom and select.
 *
 * @param {Spectrogram} spectrogram
 */
export function listen(spectrogram) {
  const { overlay } = spectrogram;
  const place = (/** @type {MouseEvent} */ event) => {
    const { left, top } = overlay.getBoundingClientRect();
    return { x: event.clientX - left, y: event.clientY - top };
  };
  const tell = (/** @type {string} */ name, /** @type {any} */ detail) =>
    spectrogram.dispatchEvent(new CustomEvent(name, { detail }));
  /** @type {{x: number, y: number, view: import("./spectrogram.js").View, moved: boolean, region: boolean} | null} */
  let drag = null;
  overlay.addEventListener("pointerdown", (event) => {
    if (event.button === 0 && spectrogram.duration > 0) {
      drag = { ...place(event), view: { ...spectrogram.view }, moved: false, region: event.shiftKey };
      overlay.setPointerCapture(event.pointerId);
    }
  });
  overlay.addEventListener("pointermove", (event) => {
    const { x, y } = place(event);
    if (drag === null) {
      tell("hover", spectrogram.duration > 0 ? { time: spectrogram.timeAt(x), frequency: spectrogram.frequencyAt(y) } : null);
      return;
    }
    drag.moved ||= Math.hypot(x - drag.x, y - drag.y) > 4;
    if (drag.moved && !drag.region) {
      spectrogram.drag(drag.view, x - drag.x, y - drag.y);
    } else if (drag.moved) {
      spectrogram.drawOverlay();
      const context = overlay.getContext("2d");
      if (context !== null) {
        context.strokeStyle = "#fff";
        context.lineWidth = 2;
        context.strokeRect(Math.min(x, drag.x), Math.min(y, drag.y), Math.abs(x - drag.x), Math.abs(y - drag.y));
      }
    }
  });
  overlay.addEventListener("pointerup", (event) => {
    if (drag === null) {
      return;
    }
    const { x, y } = place(event);
    const begun = drag;
    drag = null;
    if (!begun.moved) {
      const mark = spectrogram.markAt(x, y);
      tell("seek", Math.min(Math.max(spectrogram.timeAt(x), 0), spectrogram.duration));
      if (mark !== null) {
        spectrogram.select(mark);
        tell("select", mark);
      }
    } else if (begun.region) {
      const times = [spectrogram.timeAt(begun.x), spectrogram.timeAt(x)].sort((one, other) => one - other);
      const hertz = [spectrogram.frequencyAt(begun.y), spectrogram.frequencyAt(y)].sort((one, other) => one - other);
      spectrogram.show({ start: times[0], end: times[1], low: hertz[0], high: hertz[1] });
    }
  });
  overlay.addEventListener("pointercancel", () => {
    drag = null;
  });
  overlay.addEventListener("pointerleave", () => tell("hover", null));
  overlay.addEventListener("dblclick", (event) => spectrogram.zoom(0.5, spectrogram.timeAt(place(event).x)));
  overlay.addEventListener(
    "wheel",
    (event) => {
      if (event.ctrlKey) {
        event.preventDefault();
        spectrogram.zoom(2 ** (event.deltaY / 200), spectrogram.timeAt(place(event).x));
      } else if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
        event.preventDefault();
        spectrogram.pan(event.deltaX / spectrogram.size.width);
      }
    },
    { passive: false },
  );
  const seconds = () => spectrogram.view.end - spectrogram.view.start;
  /** @type {Record<string, () => void>} */
  const keys = {
    ArrowLeft: () => spectrogram.pan(-0.25),
    ArrowRight: () => spectrogram.pan(0.25),
    ArrowUp: () => spectrogram.pan(0, 0.25),
    ArrowDown: () => spectrogram.pan(0, -0.25),
    "+": () => spectrogram.zoom(0.5),
    "=": () => spectrogram.zoom(0.5),
    "-": () => spectrogram.zoom(2),
    f: () => spectrogram.zoomFrequency(0.5),
    F: () => spectrogram.zoomFrequency(2),
    "0": () => spectrogram.showAll(),
    Home: () => spectrogram.show({ start: 0, end: seconds() }),
    End: () => spectrogram.show({ start: spectrogram.duration - seconds(), end: spectrogram.duration }),
    ",": () => step(-1),
    ".": () => step(1),
  };
  const step = (/** @type {number} */ by) => {
    const { marks, selected } = spectrogram;
    if (marks.length > 0) {
      const at = selected === null ? (by > 0 ? -1 : marks.length) : marks.indexOf(selected);
      const mark = marks[Math.min(marks.length - 1, Math.max(0, at + by))];
      spectrogram.select(mark);
      tell("select", mark);
    }
  };
  overlay.addEventListener("keydown", (event) => {
    const act = keys[event.key];
    if (act !== undefined && !event.ctrlKey && !event.metaKey && !event.altKey && spectrogram.duration > 0) {
      event.preventDefault();
      act();
    }
  });
}
