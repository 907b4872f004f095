/** Levels of a spectrogram as colours, and frequencies as heights. */

/** The lowest level in dB; what is quieter is shown as silence. */
export const FLOOR = -120;

/**
 * Colour maps whose lightness rises evenly, so that they can be read in grey and with any colour vision. Each is a
 * list of colours at equal distances; those of matplotlib are in the public domain (CC0).
 *
 * @type {Record<string, string>}
 */
export const MAPS = {
  magma:
    "000004 0a0822 1d1147 36106b 51127c 6a1c81 832681 9c2e7f b73779 " +
    "cf4070 e55064 f4695c fb8761 fea571 fec287 fde0a1 fcfdbf",
  viridis:
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c " +
    "1f9f88 27ad81 3dbc74 5cc863 81d34d aadc32 d5e21a fde725",
  cividis:
    "00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 " +
    "8b8778 9a9376 aaa073 bbad6d ccba64 ddc858 efd748 fee838",
  grey: "000000 ffffff",
  paper: "ffffff 000000",
};

/**
 * @param {string} name of a colour map
 * @returns {Uint32Array} 256 colours, as the pixels of ImageData
 */
export function makePalette(name) {
  const colours = MAPS[name].split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Uint32Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (colours.length - 1);
    const before = Math.min(Math.floor(place), colours.length - 2);
    const [red, green, blue] = colours[before].map((value, part) =>
      Math.round(value + (colours[before + 1][part] - value) * (place - before)),
    );
    return (255 << 24) | (blue << 16) | (green << 8) | red; // browsers run on little-endian machines
  });
}

/**
 * @param {number} hertz
 * @returns {number} mel, by O'Shaughnessy's formula
 */
export function toMel(hertz) {
  return 2595 * Math.log10(1 + hertz / 700);
}

/**
 * @param {number} mel
 * @returns {number} Hz
 */
export function fromMel(mel) {
  return 700 * (10 ** (mel / 2595) - 1);
}

/**
 * Colours for labels that people with any colour vision tell apart (Okabe and Ito).
 */
const LABEL_COLOURS = ["#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#7fb8ff", "#ffffff"];

/**
 * @param {string} label
 * @returns {string} always the same colour for the same label
 */
export function labelColour(label) {
  let hash = 0;
  for (const each of label) {
    hash = (hash * 31 + (each.codePointAt(0) ?? 0)) >>> 0;
  }
  return LABEL_COLOURS[hash % LABEL_COLOURS.length];
}
