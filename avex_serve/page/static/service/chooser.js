/** Recordings from the user: dropped, chosen or pasted, several at once. */

import { labelled, make } from "../dom.js";
import { say } from "../strings.js";

/**
 * @param {(files: File[]) => void} add
 * @param {(names: string[]) => void} refuse folders
 */
export function makeChooser(add, refuse) {
  const input = make("input", { type: "file", multiple: true, accept: "audio/*,.wav,.flac,.ogg,.opus,.mp3,.m4a,.w64,.aif,.aiff" });
  input.addEventListener("change", () => {
    add([...(input.files ?? [])]);
    input.value = "";
  });
  const area = make("div", { class: "drop" }, labelled(say("choose"), input), make("span", {}, say("choose.help")));
  // Anywhere on the page, so that a file that misses the area does not replace the page.
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    area.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) {
      area.classList.remove("over");
    }
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    area.classList.remove("over");
    const folders = [...(event.dataTransfer?.items ?? [])]
      .map((each) => each.webkitGetAsEntry())
      .flatMap((each) => (each?.isDirectory ? [each.name] : []));
    add([...(event.dataTransfer?.files ?? [])].filter((each) => !folders.includes(each.name)));
    if (folders.length > 0) {
      refuse(folders);
    }
  });
  document.addEventListener("paste", (event) => {
    add([...(event.clipboardData?.files ?? [])]);
  });
  return area;
}
