/** The power spectrum of real samples, by a Fourier transform of half their number. */

export class Spectrum {
  /** @param {number} size samples of a frame, a power of 2 of at least 8 */
  constructor(size) {
    this.size = size;
    /** Bins, from 0 Hz to half the sample rate. */
    this.bins = size / 2 + 1;
    const half = size / 2;
    this.real = new Float32Array(half);
    this.imaginary = new Float32Array(half);
    this.window = Float32Array.from({ length: size }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / size));
    this.cosine = Float32Array.from({ length: half }, (_, i) => Math.cos((2 * Math.PI * i) / size));
    this.sine = Float32Array.from({ length: half }, (_, i) => -Math.sin((2 * Math.PI * i) / size));
    const bits = Math.log2(half);
    this.reversed = Uint32Array.from({ length: half }, (_, i) => {
      let result = 0;
      for (let bit = 0; bit < bits; bit += 1) {
        result |= ((i >> bit) & 1) << (bits - 1 - bit);
      }
      return result;
    });
    // Relative to a sine at full scale.
    this.scale = 4 / this.window.reduce((sum, each) => sum + each, 0) ** 2;
  }

  /**
   * Raise powers to those of a frame.
   *
   * @param {Float32Array} wave
   * @param {number} first where the frame begins in it
   * @param {Float32Array} powers one for each bin; the larger value stays
   */
  keepLargest(wave, first, powers) {
    const { real, imaginary, window, reversed } = this;
    const half = real.length;
    for (let i = 0; i < half; i += 1) {
      const to = reversed[i];
      real[to] = wave[first + 2 * i] * window[2 * i];
      imaginary[to] = wave[first + 2 * i + 1] * window[2 * i + 1];
    }
    this.transform();
    for (let bin = 0; bin <= half; bin += 1) {
      // Even and odd samples were transformed as one complex sequence.
      const i = bin % half;
      const j = (half - bin) % half;
      const evenReal = (real[i] + real[j]) / 2;
      const evenImaginary = (imaginary[i] - imaginary[j]) / 2;
      const oddReal = (imaginary[i] + imaginary[j]) / 2;
      const oddImaginary = (real[j] - real[i]) / 2;
      const c = bin === half ? -1 : this.cosine[bin];
      const s = bin === half ? 0 : this.sine[bin];
      const a = evenReal + oddReal * c - oddImaginary * s;
      const b = evenImaginary + oddReal * s + oddImaginary * c;
      powers[bin] = Math.max(powers[bin], (a * a + b * b) * this.scale);
    }
  }

  /** The complex transform of `real` and `imaginary`, in place. */
  transform() {
    const { real, imaginary, cosine, sine } = this;
    const count = real.length;
    for (let span = 1; span < count; span *= 2) {
      const step = count / span; // of the table, which has the angles of twice as many samples
      for (let start = 0; start < count; start += 2 * span) {
        for (let k = 0; k < span; k += 1) {
          const c = cosine[k * step];
          const s = sine[k * step];
          const i = start + k;
          const j = i + span;
          const a = real[j] * c - imaginary[j] * s;
          const b = real[j] * s + imaginary[j] * c;
          real[j] = real[i] - a;
          imaginary[j] = imaginary[i] - b;
          real[i] += a;
          imaginary[i] += b;
        }
      }
    }
  }
}
