/**
 * Plays a recording from its samples. A slower speed lowers the pitch, so that bats can be heard: the samples are
 * played at a lower rate, and no ultrasound is lost on the way.
 */

const RATES = [8000, 96000]; // Hz, that every browser plays
const FIRST_SECONDS = 1; // of sound that is read before it plays
const LATER_SECONDS = 10;
const AHEAD_SECONDS = 2; // of playing, before the end of which the next stretch is read

/**
 * @fires Player#change when it starts and stops
 */
export class Player extends EventTarget {
  constructor() {
    super();
    /** @type {AudioContext | null} */
    this.context = null;
    /** @type {GainNode | null} */
    this.output = null;
    /** @type {import("./wav.js").Sound | null} */
    this.sound = null;
    this.speed = 1;
    this.loop = false;
    this.gain = 1;
    this.span = [0, 0];
    this.playing = false;
    this.at = 0; // seconds of the recording, when it does not play
    /** @type {{node: AudioBufferSourceNode, begins: number, ends: number, from: number, to: number}[]} */
    this.pieces = [];
    this.session = 0;
    this.timer = 0;
  }

  /** @param {import("./wav.js").Sound | null} sound */
  load(sound) {
    this.stop();
    this.sound = sound;
    this.at = 0;
    this.span = [0, sound?.duration ?? 0];
  }

  /** Where it is, in seconds of the recording. */
  get position() {
    if (!this.playing || this.context === null) {
      return this.at;
    }
    const now = this.context.currentTime;
    const piece = this.pieces.findLast((each) => each.begins <= now) ?? this.pieces[0];
    return piece === undefined
      ? this.at
      : Math.min(piece.to, piece.from + Math.max(0, now - piece.begins) * this.speed);
  }

  /**
   * @param {number} from seconds
   * @param {number} to seconds
   * @param {number} at where to begin
   */
  async play(from, to, at = from) {
    if (this.sound === null) {
      return;
    }
    this.stop();
    this.context ??= new AudioContext();
    if (this.output === null) {
      this.output = this.context.createGain();
      this.output.connect(this.context.destination);
    }
    this.output.gain.value = this.gain;
    this.span = [Math.max(0, from), Math.min(to, this.sound.duration)];
    this.at = at >= this.span[0] && at < this.span[1] - 0.001 ? at : this.span[0];
    this.playing = true;
    const session = ++this.session;
    this.dispatchEvent(new Event("change"));
    await this.context.resume();
    if (session === this.session) {
      await this.queue(session, this.at, this.context.currentTime + 0.05, FIRST_SECONDS);
    }
  }

  /** Stop, and stay where it is. */
  stop() {
    this.at = this.position;
    this.session += 1;
    clearTimeout(this.timer);
    for (const { node } of this.pieces) {
      node.onended = null;
      node.stop();
    }
    this.pieces = [];
    if (this.playing) {
      this.playing = false;
      this.dispatchEvent(new Event("change"));
    }
  }

  /** @param {number} seconds of the recording */
  async seek(seconds) {
    const within = seconds >= this.span[0] && seconds < this.span[1];
    if (this.playing) {
      await this.play(within ? this.span[0] : seconds, within ? this.span[1] : this.sound?.duration ?? 0, seconds);
    } else {
      this.at = seconds;
    }
  }

  /** @param {number} speed 1: as recorded */
  async setSpeed(speed) {
    await this.set({ speed });
  }

  /** @param {boolean} loop whether it begins again where it ends */
  async setLoop(loop) {
    await this.set({ loop });
  }

  /** @param {{speed?: number, loop?: boolean}} changes which hold at once, for what is playing too */
  async set(changes) {
    const at = this.position;
    const playing = this.playing;
    this.stop();
    Object.assign(this, changes);
    if (playing) {
      await this.play(this.span[0], this.span[1], at);
    }
  }

  /** @param {number} gain 1: as recorded; recordings are often quiet */
  setGain(gain) {
    this.gain = gain;
    if (this.output !== null) {
      this.output.gain.value = gain;
    }
  }

  /**
   * Read the next stretch, play it after the one before, and come back before it ends.
   *
   * @param {number} session that asks
   * @param {number} from seconds of the recording
   * @param {number} begins when it is played, in the time of the context
   * @param {number} seconds of playing
   */
  async queue(session, from, begins, seconds) {
    const { sound, context, output } = this;
    if (sound === null || context === null || output === null) {
      return;
    }
    const to = Math.min(this.span[1], from + seconds * this.speed);
    const first = Math.round(from * sound.sampleRate);
    const wave = await sound.read(first, Math.max(1, Math.round(to * sound.sampleRate) - first));
    if (session !== this.session) {
      return;
    }
    const wanted = sound.sampleRate * this.speed;
    const rate = Math.min(RATES[1], Math.max(RATES[0], wanted));
    const buffer = context.createBuffer(1, wave.length, rate);
    buffer.copyToChannel(wave, 0);
    const node = new AudioBufferSourceNode(context, { buffer, playbackRate: wanted / rate });
    node.connect(output);
    const start = Math.max(begins, context.currentTime);
    node.start(start);
    const played = (to - from) / this.speed;
    const running = this.pieces.filter((each) => each.ends > context.currentTime);
    this.pieces = [...running, { node, begins: start, ends: start + played, from, to }];
    const atEnd = to >= this.span[1] - 1e-6;
    if (atEnd && !this.loop) {
      node.onended = () => {
        this.at = this.span[1];
        this.pieces = [];
        this.stop();
      };
      return;
    }
    const wait = Math.max(0, start + played - AHEAD_SECONDS - context.currentTime);
    this.timer = setTimeout(() => {
      const next = atEnd ? this.span[0] : to;
      this.queue(session, next, start + played, LATER_SECONDS).catch(() => this.stop());
    }, wait * 1000);
  }
}
