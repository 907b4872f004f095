"""The page of `avex-serve review` in chromium, by its keys alone."""

import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from avex_serve.annotations.reviews import read_reviews
from tests.browsing import check_accessible, check_preloaded, check_width, opened

RATE = 32000
CLIPS = 30
HOSTILE = '<img src=x onerror="console.error(1)">'


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of other program's detections: 30 of a label in two recordings, and one of a label like HTML."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    rows = ["file,start,end,label,score"]
    for name in ("dawn.wav", '"><b>dusk.flac'):
        noise = rng.uniform(-0.05, 0.05, 60 * RATE)
        soundfile.write(folder / name, noise + 0.3 * np.sin(2 * np.pi * 4000 * np.arange(60 * RATE) / RATE), RATE)
        quoted = '"' + str(folder / name).replace('"', '""') + '"'
        scores = rng.random(CLIPS // 2) / 2 + (0.5 if "dusk" in name else 0)
        rows += [f"{quoted},{4 * i},{4 * i + 3},wren,{score:.3f}" for i, score in enumerate(scores)]
    rows.append(f'dawn.wav,1,2,"{HOSTILE.replace(chr(34), chr(34) * 2)}",0.5')
    (folder / "found.csv").write_text("\n".join(rows) + "\n", "utf-8")
    return folder / "found.csv"


@pytest.fixture
def served(table, tmp_path):
    """The address of a review of the table; its decisions are in `tmp_path / "reviews"`."""
    command = [sys.executable, "-m", "avex_serve", "review", "--table", str(table), "--port", "0"]
    command += ["--reviews", str(tmp_path / "reviews")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://\S+", process.stdout.readline())[0]
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def wait(page, window=None):
    """Wait until a window other than this one is drawn; returns it."""
    page.wait_for_function(
        """before => {
            const shown = document.querySelector("[data-window]")?.dataset.window;
            const busy = document.querySelector(".spectrogram")?.getAttribute("aria-busy");
            return shown !== undefined && shown !== before && (shown === "" || busy === "false");
        }""",
        arg=window,
    )
    return page.get_attribute("[data-window]", "data-window")


def settle(page):
    """Wait until every decision is on disk."""
    page.wait_for_function("() => !document.querySelector('[data-saving]')")


def decisions(tmp_path):
    reviews = read_reviews(tmp_path / "reviews")
    return [(review.annotator, review.label, review.decision) for review in reviews]


def test_thirty_clips_by_keyboard(browser, served, tmp_path):
    with opened(browser) as page:
        page.goto(f"{served}&label=wren")
        page.wait_for_selector("input:focus")  # it asks for the name first
        page.keyboard.type("Åsa")
        page.keyboard.press("Enter")  # the keys answer from here on
        window = wait(page)
        assert page.text_content("[role=status]") == ""
        seen = [window]
        for key in "yn" * 7:
            page.keyboard.press(key)
            seen.append(window := wait(page, window))
        settle(page)
        page.reload()
        assert wait(page) == window, "a reload in the middle loses nothing"
        for key in "u" * 16:
            page.keyboard.press(key)
            seen.append(window := wait(page, window))
        assert window == ""
        assert len(set(seen)) == CLIPS + 1
        settle(page)
        found = decisions(tmp_path)
        assert [decision for _, _, decision in found] == ["present", "absent"] * 7 + ["unsure"] * 16
        assert {(annotator, label) for annotator, label, _ in found} == {("Åsa", "wren")}
        page.keyboard.press("z")
        assert wait(page, "") == seen[-2]
        assert "Withdrawn: wren: Unsure" in page.text_content("[role=status]")
        assert len(decisions(tmp_path)) == CLIPS - 1


def test_the_keys_answer_while_a_list_has_the_focus(browser, served, tmp_path):
    with opened(browser) as page:
        page.goto(f"{served}&annotator=bo&label=wren")
        window = wait(page)
        lists = page.locator("select:visible")
        chosen = lists.evaluate_all("all => all.map(one => one.value)")
        for key in "yn":
            lists.first.focus()
            page.keyboard.press(key)
            window = wait(page, window)
        settle(page)
        assert [decision for _, _, decision in decisions(tmp_path)] == ["present", "absent"]
        assert lists.evaluate_all("all => all.map(one => one.value)") == chosen


def test_another_label_comment_and_later(browser, served, tmp_path):
    with opened(browser) as page:
        page.goto(f"{served}&annotator=bo&label=wren")
        first = wait(page)
        page.keyboard.press("s")
        second = wait(page, first)
        page.keyboard.press("c")
        page.keyboard.type("far away, with y and n")
        page.keyboard.press("Enter")
        page.keyboard.press("o")
        page.keyboard.type("robin")
        page.keyboard.press("Enter")
        third = wait(page, second)
        page.keyboard.press("1")
        wait(page, third)
        settle(page)
        assert decisions(tmp_path) == [
            ("bo", "wren", "absent"),
            ("bo", "robin", "present"),
            ("bo", "wren", "absent"),
            ("bo", HOSTILE, "present"),
        ]
        assert read_reviews(tmp_path / "reviews")[0].comment == "far away, with y and n"


def test_two_annotators_and_what_they_agree_on(browser, served, tmp_path):
    for name, keys in (("al", "yynn"), ("bo", "ynyn")):
        with opened(browser) as page:
            page.goto(f"{served}&annotator={name}&label=wren")
            window = wait(page)
            for key in keys:
                page.keyboard.press(key)
                window = wait(page, window)
            settle(page)
            if name == "bo":
                page.wait_for_selector("text=al and bo: κ 0.00, 2 of 4 alike")
                page.wait_for_selector("text=wren: 1 yes, 1 no, 2 unsure")
    assert len(decisions(tmp_path)) == 8


def test_a_decision_that_cannot_be_saved_comes_back(browser, served, tmp_path):
    with opened(browser, expected=("507", "500")) as page:
        page.goto(f"{served}&annotator=bo&label=wren")
        window = wait(page)
        (tmp_path / "reviews").write_text("no folder can be made here")
        page.keyboard.press("y")
        page.wait_for_selector("[role=alert]:not(:empty)")
        assert page.get_attribute("[data-window]", "data-window") == window
        (tmp_path / "reviews").unlink()
        page.keyboard.press("n")
        wait(page, window)
        settle(page)
        assert decisions(tmp_path) == [("bo", "wren", "absent")]


def test_labels_and_names_are_text(browser, served):
    with opened(browser) as page:
        page.goto(f"{served}&annotator=bo")
        wait(page)
        assert page.text_content("h2.question") == f"Is {HOSTILE} in the marked window?"
        page.select_option("label:has-text('Label') select", "wren")
        page.wait_for_selector("text=dusk.flac")
        assert page.query_selector("main b, main img") is None


def test_modules_load_at_once(browser, served):
    with opened(browser) as page:
        page.goto(f"{served}&annotator=bo&label=wren")
        wait(page)
        check_preloaded(page)


def test_a_link_to_one_window(browser, served, table):
    with opened(browser) as page:
        page.goto(f"{served}&label=wren&start=8.5&file={table.parent}/dawn.wav")
        page.wait_for_selector("input:focus")  # the window stays in the address until the name is known
        page.keyboard.type("bo")
        page.keyboard.press("Tab")
        wait(page)
        assert "file=" not in page.url
        assert "dawn.wav, 0:08.0 to 0:11.0" in page.text_content(".facts")


@pytest.mark.parametrize(
    ("scheme", "sizes"), [("light", [(360, 740), (3840, 2160)]), ("dark", [(1280, 900)])], ids=["light", "dark"]
)
def test_everyone_can_use_it(browser, served, scheme, sizes):
    with opened(browser, color_scheme=scheme) as page:
        for width, height in sizes:
            page.set_viewport_size({"width": width, "height": height})
            page.goto(f"{served}&annotator=bo&label=wren")
            wait(page)
            for details in page.query_selector_all("details:not([open]) > summary"):
                details.click()
            check_accessible(page)
            check_width(page)
