/** Every text of the pages, in one table. A name in braces is replaced by a value. */

/** @type {Record<string, string>} */
const STRINGS = {
  // The spectrogram and the player.
  "spectrogram": "Spectrogram",
  "spectrogram.help":
    "Spectrogram. Left and right move in time, plus and minus zoom in time, up and down move in frequency, " +
    "F and Shift+F zoom in frequency, 0 shows all, Space plays, L loops, comma and full stop step through " +
    "detections.",
  "spectrogram.failed": "The spectrogram can't be drawn: {reason}",
  "spectrogram.none": "No recording is open.",
  "spectrogram.region": "From {start} to {end}, {low} to {high} kHz",
  "zoom.in": "Zoom in",
  "zoom.out": "Zoom out",
  "zoom.all": "Show all",
  "zoom.selection": "Show the selection",
  "scale": "Frequencies",
  "scale.linear": "linear",
  "scale.mel": "mel",
  "low": "From (kHz)",
  "high": "To (kHz)",
  "quietest": "Darkest (dB)",
  "loudest": "Brightest (dB)",
  "colours": "Colours",
  "colours.magma": "magma",
  "colours.viridis": "viridis",
  "colours.cividis": "cividis",
  "colours.grey": "grey",
  "colours.paper": "grey on white",
  "frame": "Frame (samples)",
  "frame.auto": "automatic",
  "play": "Play",
  "pause": "Pause",
  "loop": "Loop",
  "speed": "Speed",
  "speed.times": "×{times}",
  "gain": "Volume",
  "player": "Player",
  "position": "{now} of {end}",
  // Tables.
  "table.page": "Rows {first} to {last} of {count}",
  "table.none": "No rows",
  "table.previous": "Previous rows",
  "table.next": "Next rows",
  // The page of the service.
  "service.sending": "sending",
  "service.computing": "computing",
  "service.pieces": "piece {piece} of {pieces}",
  "service.waiting": "waiting",
  "service.found": "{count} scores, {length} long. {warnings}",
  "service.refused": "The service refused the request with status {status}.",
  "service.unreachable": "The service can't be reached. Is it running?",
  "service.unreadable": "The recording can't be read.",
  "service.empty": "No bundle is served.",
  "choose": "Choose recordings",
  "choose.help": "Choose files, drop them anywhere on this page, or paste them. They stay with you: the service keeps nothing.",
  "recordings": "Recordings",
  "progress": "Progress of {name}",
  "remove": "Remove",
  "remove.name": "Remove {name}",
  "bundle": "Bundle",
  "bundle.version": "{name}, version {version}",
  "probe": "Probe",
  "options": "Options",
  "overlap": "Overlap (s)",
  "final": "Short end",
  "final.remainder": "as it is",
  "final.extend": "padded with silence",
  "final.full": "last window moved back",
  "final.none": "left out",
  "channel": "Channel (empty: mean of all)",
  "lowest": "Lowest score to fetch",
  "key": "Key",
  "key.title": "The service wants a key",
  "key.help": "It is kept until you close this tab.",
  "key.use": "Use it",
  "key.cancel": "Cancel",
  "threshold": "Threshold",
  "threshold.exact": "Exactly",
  "threshold.count": "{passing} of {all} scores are detections",
  "threshold.of": "{passing} of {all}",
  "threshold.labels": "Thresholds of single labels",
  "threshold.search": "Find labels",
  "threshold.own": "Threshold of {label}",
  "threshold.more": "{count} more labels; find them by name.",
  "detections": "Detections",
  "start": "Start (s)",
  "end": "End (s)",
  "label": "Label",
  "score": "Score",
  "hover": "{time} s, {frequency} kHz: {labels}",
  "downloads": "Download",
  "format": "Table",
  "format.csv": "CSV",
  "format.ndjson": "NDJSON",
  "format.parquet": "Parquet",
  "format.raven": "Raven",
  "format.audacity": "Audacity",
  "format.birdnet": "BirdNET",
  "format.kaleidoscope": "Kaleidoscope",
  "format.aoef": "AOEF (soundevent)",
  "format.camtrap-dp": "Camtrap DP",
  "folder": "Folder of the recordings, for the table",
  "download.one": "Table of this recording",
  "download.all": "Table of all recordings",
  "download.none": "There is no recording with detections yet.",
  "download.working": "computing",
  "download.done": "saved",
  "embedding": "Embedding",
  "embeddings.json": "Embeddings as JSON",
  "embeddings.csv": "Embeddings as CSV",
  "command": "The same from a command line",
  "command.copy": "Copy",
  "command.copied": "copied",
  "served": "What is served",
  "served.grpc": "gRPC (Open Inference Protocol): {address}",
};

/**
 * The text of that name.
 *
 * @param {string} name
 * @param {Record<string, string | number>} values
 */
export function say(name, values = {}) {
  const text = STRINGS[name];
  if (text === undefined) {
    throw new Error(`no text ${name}`);
  }
  return text.replace(/\{(\w+)\}/g, (_, each) => String(values[each]));
}

/**
 * Seconds as h:mm:ss, with digits after the point.
 *
 * @param {number} seconds
 * @param {number} digits
 */
export function clock(seconds, digits = 1) {
  const whole = Math.max(0, Math.round(seconds * 10 ** digits)) / 10 ** digits;
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor((whole % 3600) / 60);
  const rest = (whole % 60).toFixed(digits).padStart(digits > 0 ? 3 + digits : 2, "0");
  return hours > 0 ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}
