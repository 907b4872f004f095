"""The page of the service, used in chromium as people use it."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
import soundfile

from avex_serve.annotations.formats import FORMATS
from avex_serve.cli import main
from tests.browsing import check_accessible, check_preloaded, check_width, opened, wait_until
from tests.bundles import calibrated_copy, make_audio_bundle
from tests.service.conftest import encode, running_server

KEY = "page-key"
HOSTILE = ("<img src=x onerror=alert(1)>", "a & b \"c\" 'd'", "{score}</td>")
NAME = "SITE_20240501_053000.wav"  # as recorders name their files
BYTES = 200_000  # that the service accepts at once
MODES = {"light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
         "dark, narrow": {"viewport": {"width": 360, "height": 640}, "color_scheme": "dark"},
         "4K": {"viewport": {"width": 3840, "height": 2160}, "color_scheme": "light"}}  # fmt: skip


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    plain = make_audio_bundle(tmp_path_factory.mktemp("plain") / "calibrated", "calibrated")
    return [
        make_audio_bundle(folder / "tiny"),
        make_audio_bundle(folder / "hostile", "hostile", labels=HOSTILE),
        calibrated_copy(plain, folder / "calibrated", version="1"),
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory, bundles):
    variables = {
        "AVEX_BUNDLE": ":".join(map(str, bundles)),
        "AVEX_API_KEYS": f"people:{KEY}",
        "AVEX_MAX_BODY_BYTES": str(BYTES),
    }
    with running_server(tmp_path_factory.mktemp("page"), **variables) as server:
        yield server


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("recordings") / NAME
    path.write_bytes(encode(2.05, 16000, 2, "WAV"))
    return path


@pytest.fixture
def page(browser, server):
    """The page, which has the key."""
    with opened(browser) as page:
        with_key(page)
        visit(page, server)
        yield page


def with_key(page):
    page.add_init_script(f"sessionStorage.setItem('avex-serve-key', '{KEY}')")


def visit(page, server, bundle="tiny"):
    page.goto(server.url)
    wait_until(page, "document.querySelector('select').options.length > 0")
    page.get_by_label("Bundle").select_option(label=f"{bundle}, version 1")
    wait_until(page, f"document.querySelector('pre code').textContent.includes('model={bundle}&')")


def send(page, *files):
    """Choose files, and wait until each is answered."""
    page.get_by_label("Choose recordings").set_input_files(files)
    wait_until(page, f"document.querySelectorAll('.recordings li').length >= {len(files)}")
    wait_until(
        page,
        "[...document.querySelectorAll('.recordings .status')].every(each => !/^(sending|comput|waiting)/"
        ".test(each.textContent))",
    )


def rows(page):
    return page.evaluate(
        "[...document.querySelectorAll('.results tbody tr')].map("
        "row => [...row.cells].filter(cell => !cell.hidden).map(cell => cell.innerText))"
    )


def set_threshold(page, value):
    page.get_by_label("Exactly").fill(str(value))
    page.keyboard.press("Tab")


def from_command_line(capsys, bundle, recording, *options):
    assert main(["predict", str(bundle), str(recording), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)["detections"]


def shown_as(detections):
    calibrated = any("probability" in d for d in detections)
    return [
        [f"{d['start']:.2f}", f"{d['end']:.2f}", d["label"], f"{d['score']:.3f}"]
        + ([f"{d['probability']:.3f}" if "probability" in d else ""] if calibrated else [])
        for d in detections
    ]


def test_modules_load_at_once(page):
    check_preloaded(page)


def test_detections_are_those_of_the_command_line(page, bundles, recording, capsys):
    send(page, recording)
    detections = from_command_line(capsys, bundles[0], recording)
    assert len(detections) > 10
    assert rows(page) == shown_as(detections)


def test_thresholds_count_at_once(page, bundles, recording, capsys):
    send(page, recording)
    detections = from_command_line(capsys, bundles[0], recording, "--threshold", "0.05")
    label = detections[0]["label"]
    count = page.locator(".threshold > .status").first
    for threshold in (0.05, 0.62):
        set_threshold(page, threshold)
        passing = [each for each in detections if each["score"] >= threshold]
        assert count.inner_text() == f"{len(passing)} of {len(detections)} scores are detections"
    page.get_by_label(f"Threshold of {label}").fill("2")
    page.keyboard.press("Tab")
    passing = [each for each in detections if each["score"] >= 0.62 and each["label"] != label]
    assert count.inner_text() == f"{len(passing)} of {len(detections)} scores are detections"
    slider = page.get_by_role("slider", name="Threshold")
    slider.focus()
    page.keyboard.press("End")
    assert count.inner_text().startswith("0 of")


def test_thresholds_begin_with_those_of_the_calibration(page, server, bundles, recording, capsys):
    visit(page, server, "calibrated")
    send(page, recording)
    detections = from_command_line(capsys, bundles[2], recording)
    assert shown_as(detections) != shown_as(from_command_line(capsys, bundles[2], recording, "--threshold", "0.5"))
    assert rows(page) == shown_as(detections)
    url = re.search(r"'(http[^']+)'$", page.locator("pre code").inner_text())[1]
    answer = server.post(url, content=recording.read_bytes(), headers={"Authorization": f"Bearer {KEY}"}).json()
    assert shown_as(answer["detections"]) == rows(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Table of this recording").click()
    assert len(download.value.path().read_text().splitlines()) == 1 + len(detections)
    set_threshold(page, 0.62)
    assert rows(page) == shown_as(from_command_line(capsys, bundles[2], recording, "--threshold", "0.62"))


def test_the_table_is_sorted_by_its_headings(page, bundles, recording, capsys):
    send(page, recording)
    scores = [float(row[3]) for row in shown_as(from_command_line(capsys, bundles[0], recording))]
    page.get_by_role("button", name="Score").click()
    assert [float(row[3]) for row in rows(page)] == sorted(scores, reverse=True)
    page.get_by_role("button", name="Score").click()
    assert [float(row[3]) for row in rows(page)] == sorted(scores)
    page.get_by_role("button", name="Label").click()
    labels = [row[2] for row in rows(page)]
    assert labels == sorted(labels)


def test_probabilities_are_a_column_where_there_are_any(page, server, bundles, recording, capsys):
    heading = page.get_by_role("columnheader", name="Probability")
    send(page, recording)
    assert heading.count() == 0
    visit(page, server, "calibrated")
    send(page, recording)
    set_threshold(page, 0.05)
    detections = from_command_line(capsys, bundles[2], recording, "--threshold", "0.05")
    known = [f"{each['probability']:.3f}" for each in detections if "probability" in each]
    assert 0 < len(known) < len(detections)
    assert rows(page) == shown_as(detections)
    page.get_by_role("button", name="Probability").click()
    assert heading.get_attribute("aria-sort") == "descending"
    unknown = [""] * (len(detections) - len(known))
    assert [row[4] for row in rows(page)] == sorted(known, reverse=True) + unknown
    visit(page, server)
    send(page, recording)
    assert heading.count() == 0


def test_tables_have_the_bytes_of_the_command_line(page, bundles, recording, tmp_path, capsys):
    folder = tmp_path / "archive"
    folder.mkdir()
    second = folder / "dusk.flac"
    second.write_bytes(encode(0.731, 44100, 1, "FLAC", seed=3))
    first = folder / recording.name
    first.write_bytes(recording.read_bytes())
    assert main(["run", str(bundles[0]), str(folder), "--out", str(tmp_path / "store"), "--progress", "none"]) == 0
    send(page, first, second)
    set_threshold(page, 0.52)
    page.get_by_label("Folder of the recordings, for the table").fill(str(folder))
    for name in FORMATS:
        target = tmp_path / name
        options = ["--format", name, "--threshold", "0.52", "--output", str(target)]
        assert main(["tables", str(tmp_path / "store"), *options]) == 0
        page.get_by_role("combobox", name="Table").select_option(name)
        with page.expect_download() as download:
            page.get_by_role("button", name="Table of all recordings").click()
        content = download.value.path().read_bytes()
        if target.is_dir():
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                assert {each: archive.read(each) for each in archive.namelist()} == {
                    each.name: each.read_bytes() for each in target.iterdir()
                }, name
        else:
            assert content == target.read_bytes(), name
    capsys.readouterr()


def test_tables_of_one_recording_without_its_folder(page, server, recording):
    send(page, recording)
    key = {"Authorization": f"Bearer {KEY}"}
    for name, form in FORMATS.items():
        page.get_by_role("combobox", name="Table").select_option(name)
        with page.expect_download() as download:
            page.get_by_role("button", name="Table of this recording").click()
        content = download.value.path().read_bytes()
        if form.media_type is None:
            assert content.startswith(b"PK"), name
        else:
            query = f"model=tiny&threshold=0.5&format={name}&file={NAME}"
            answer = server.post(f"/predict?{query}", content=recording.read_bytes(), headers=key)
            assert content == answer.content, name
    assert download.value.suggested_filename == "camtrap-dp.zip"


def test_embeddings(page, server, recording):
    send(page, recording)
    key = {"Authorization": f"Bearer {KEY}"}
    answer = server.post("/embed?model=tiny", content=recording.read_bytes(), headers=key).json()
    with page.expect_download() as download:
        page.get_by_role("button", name="Embeddings as JSON").click()
    assert json.loads(download.value.path().read_bytes()) == answer
    with page.expect_download() as download:
        page.get_by_role("button", name="Embeddings as CSV").click()
    lines = download.value.path().read_text().splitlines()
    assert lines[0].startswith("start,end,e0,e1")
    numbers = np.array([line.split(",") for line in lines[1:]], float)
    np.testing.assert_array_equal(numbers[:, :2], answer["spans"])
    np.testing.assert_array_equal(numbers[:, 2:], answer["embeddings"])


def test_a_detection_is_played_where_it_is(page, recording):
    send(page, recording)
    wait_until(page, "document.querySelector('.spectrogram').getAttribute('aria-busy') === 'false'")
    page.get_by_label("Speed").select_option("0.1")
    page.get_by_role("checkbox", name="Loop").check()
    start = float(page.locator(".results tbody button").nth(5).inner_text())
    page.locator(".results tbody button").nth(5).click()
    page.get_by_role("button", name="Pause").wait_for()
    positions = []
    for _ in range(4):
        page.wait_for_timeout(100)
        positions.append(float(page.locator(".position").inner_text().split(" ")[0].split(":")[1]))
    assert all(start <= each <= start + 0.1 for each in positions)
    assert len(set(positions)) > 1
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Play").wait_for()


def test_loop_holds_for_what_is_playing(page, recording):
    send(page, recording)
    page.get_by_label("Speed").select_option("0.1")
    page.locator(".results tbody button").first.click()
    page.get_by_role("button", name="Pause").wait_for()
    page.get_by_role("checkbox", name="Loop").check()
    row = page.locator(".results tbody tr").first.locator("td, th")
    seconds = 10 * (float(row.nth(1).inner_text()) - float(row.nth(0).inner_text()))
    page.wait_for_timeout(1000 * (3 * seconds + 1))
    assert page.get_by_role("button", name="Pause").is_visible()
    page.get_by_role("checkbox", name="Loop").uncheck()
    page.get_by_role("button", name="Play", exact=True).wait_for(timeout=1000 * (seconds + 1))


@pytest.mark.parametrize("scale", ["linear", "mel"])
def test_the_pointer_moves_the_picture_in_frequency(page, recording, scale):
    send(page, recording)
    page.get_by_label("Frequencies").select_option(scale)
    low, high = page.get_by_label("From (kHz)"), page.get_by_label("To (kHz)")
    for field, value in ((low, "2"), (high, "5")):
        field.fill(value)
        page.keyboard.press("Tab")
    picture = page.locator(".spectrogram")
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    height = box["height"] - 20  # without the axis of time
    x, y = box["x"] + 300, box["y"] + 60

    def drag(by):
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x, y + by, steps=4)
        page.mouse.up()
        return float(low.input_value()), float(high.input_value())

    def scaled(kilohertz):
        return np.log10(1 + kilohertz / 0.7) if scale == "mel" else kilohertz

    up = 50 / height * (scaled(5) - scaled(2))
    bottom, top = drag(50)
    assert scaled(bottom) == pytest.approx(scaled(2) + up, abs=0.002)
    assert scaled(top) == pytest.approx(scaled(5) + up, abs=0.002)
    assert drag(-50) == pytest.approx((2, 5), abs=0.002)
    assert drag(height * 3)[1] == 8


def test_ultrasound_is_seen_up_to_half_the_rate(page, tmp_path):
    path = tmp_path / "bat.wav"
    time = np.arange(25_600) / 256_000
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 100_000 * time), 256_000)
    send(page, path)
    wait_until(page, "document.querySelector('.spectrogram').getAttribute('aria-busy') === 'false'")
    assert page.get_by_label("To (kHz)").input_value() == "128"
    assert brightest(page) == pytest.approx(100_000, abs=1500)


def test_other_formats_are_decoded_by_the_service(page, tmp_path):
    path = tmp_path / "bat.flac"
    time = np.arange(9_600) / 96_000
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 40_000 * time), 96_000)
    send(page, path)
    wait_until(page, "document.querySelector('.spectrogram').getAttribute('aria-busy') === 'false'")
    assert page.get_by_label("To (kHz)").input_value() == "48"
    assert brightest(page) == pytest.approx(40_000, abs=700)


def brightest(page):
    """Hz of the brightest row of the picture, from its pixels."""
    return page.evaluate("""() => {
      const canvas = document.querySelector('.spectrogram canvas');
      const ratio = canvas.width / canvas.clientWidth;
      const [left, height] = [Math.ceil(46 * ratio) + 20, canvas.height - Math.round(20 * ratio)];
      const { data } = canvas.getContext('2d').getImageData(left, 0, 1, height);
      const sums = Array.from({ length: height }, (_, y) => data[4 * y] + data[4 * y + 1] + data[4 * y + 2]);
      const most = Math.max(...sums);
      const rows = sums.flatMap((sum, y) => (sum === most ? [y] : []));
      const middle = (rows[0] + rows.at(-1) + 1) / 2;
      return (1 - middle / height) * 1000 * Number([...document.querySelectorAll('.controls .field')]
        .find((each) => each.innerText.startsWith('To')).querySelector('input').value);
    }""")


def test_a_recording_larger_than_the_service_accepts(page, bundles, tmp_path, capsys):
    path = tmp_path / "long.wav"
    path.write_bytes(encode(6.43, 44100, 1, "WAV", seed=5))
    assert path.stat().st_size > 2 * BYTES
    send(page, path)
    set_threshold(page, 0.7)
    expected = shown_as(from_command_line(capsys, bundles[0], path, "--threshold", "0.7"))
    assert len(expected) < 100  # rows on the first page of the table
    found = rows(page)
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    np.testing.assert_allclose([float(row[3]) for row in found], [float(row[3]) for row in expected], atol=0.002)


def test_what_is_no_recording_is_told(browser, server, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no sound")
    with opened(browser, expected=["400"]) as page:
        with_key(page)
        visit(page, server)
        send(page, path)
        assert "can't be decoded" in page.locator(".recordings .status").inner_text()


def test_files_are_dropped_and_pasted(page, recording):
    content = list(recording.read_bytes())
    page.evaluate(
        """([bytes]) => {
      const transfer = () => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], 'one.wav'));
        data.items.add(new File([new Uint8Array(bytes)], 'two.wav'));
        return data;
      };
      document.body.dispatchEvent(new DragEvent('drop', { dataTransfer: transfer(), bubbles: true }));
      const data = transfer();
      document.dispatchEvent(Object.assign(new ClipboardEvent('paste', { clipboardData: data })));
    }""",
        [content],
    )
    wait_until(
        page,
        "[...document.querySelectorAll('.recordings .status')].filter(each => /scores/.test(each.textContent))"
        ".length === 4",
    )


def test_a_folder_is_refused_by_name(page, tmp_path):
    folder = tmp_path / "season"
    folder.mkdir()
    (tmp_path / "one.wav").write_bytes(encode(0.5, 16000, 1, "WAV"))
    devtools = page.context.new_cdp_session(page)
    files = {"items": [], "files": [str(folder), str(tmp_path / "one.wav")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": files})
    page.get_by_text("season: a folder can't be read. Drop the recordings in it.").wait_for()
    assert page.locator(".recordings .name").all_inner_texts() == ["one.wav"]
    wait_until(page, "/scores/.test(document.querySelector('.recordings .status').textContent)")


def test_hostile_labels_and_names_are_text(page, server, tmp_path):
    visit(page, server, "hostile")
    path = tmp_path / "<b onclick=alert(1)>&amp; $(x) 'y'.wav"
    path.write_bytes(encode(0.5, 16000, 1, "WAV"))
    send(page, path)
    set_threshold(page, 0.05)
    assert {row[2] for row in rows(page)} == set(HOSTILE)
    assert page.locator(".recordings .name").inner_text() == path.name
    assert page.locator("main img, main b").count() == 0
    command = page.locator("pre code").inner_text()
    assert "--data-binary @'<b onclick=alert(1)>&amp; $(x) '\\''y'\\''.wav' " in command


def test_the_command_asks_the_same(page, server, recording, tmp_path):
    send(page, recording)
    command = page.locator("pre code").inner_text()
    assert command.startswith('curl -H "Authorization: Bearer $AVEX_KEY" --data-binary ')
    url = re.search(r"'(http[^']+)'$", command)[1]
    assert url.startswith(f"{server.url}/predict?")
    answer = server.post(url, content=recording.read_bytes(), headers={"Authorization": f"Bearer {KEY}"}).json()
    assert shown_as(answer["detections"]) == rows(page)


@pytest.mark.parametrize("bundle", ["tiny", "calibrated"])
def test_the_command_has_the_thresholds_of_single_labels(page, server, recording, bundle):
    visit(page, server, bundle)
    send(page, recording)
    usual = rows(page)
    set_threshold(page, 0)
    scores = sorted(float(row[3]) for row in rows(page))
    visit(page, server, bundle)
    send(page, recording)
    assert rows(page) == usual
    for threshold in (None, scores[len(scores) // 2], scores[len(scores) // 4]):
        if threshold is not None:
            set_threshold(page, threshold)
        before = rows(page)
        label = before[0][2]
        highest = max(float(row[3]) for row in before if row[2] == label)
        page.get_by_label(f"Threshold of {label}").fill(f"{highest - 0.001:.4f}")
        page.keyboard.press("Tab")
        shown = rows(page)
        assert 0 < len(shown) < len(before)
        url = re.search(r"'(http[^']+)'$", page.locator("pre code").inner_text())[1]
        answer = server.post(url, content=recording.read_bytes(), headers={"Authorization": f"Bearer {KEY}"}).json()
        assert shown_as(answer["detections"]) == shown
        page.get_by_label(f"Threshold of {label}").fill("")
        page.keyboard.press("Tab")


def test_the_key_is_asked_for_and_kept(browser, server):
    with opened(browser, expected=["401"]) as page:
        page.goto(server.url)
        dialog = page.get_by_role("dialog")
        dialog.wait_for()
        check_accessible(page)
        for key in ("wrong", KEY):
            assert "key" in dialog.locator(".error").inner_text()
            dialog.get_by_label("Key").fill(key)
            page.keyboard.press("Enter")
            page.wait_for_timeout(200)
        wait_until(page, "document.querySelector('select').options.length > 0")
        page.reload()
        wait_until(page, "document.querySelector('select').options.length > 0")
        assert not page.get_by_role("dialog").is_visible()


def test_the_keyboard_suffices(page, recording):
    send(page, recording)
    wait_until(page, "document.querySelector('.spectrogram').getAttribute('aria-busy') === 'false'")
    page.evaluate("document.activeElement.blur()")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "CANVAS":
            break
    for keys, low, high in (("f", 2, 6), ("ArrowUp", 3, 7), ("0", 0, 8)):
        page.keyboard.press(keys)
        assert page.get_by_label("From (kHz)").input_value() == str(low)
        assert page.get_by_label("To (kHz)").input_value() == str(high)
    for keys in ("+", "l", "."):
        page.keyboard.press(keys)
    page.locator("tr[aria-current]").wait_for()
    page.get_by_role("button", name="Pause").wait_for()


@pytest.mark.parametrize("mode", MODES)
def test_every_view_is_accessible(browser, server, recording, mode):
    with opened(browser, **MODES[mode]) as page:
        with_key(page)
        visit(page, server)
        check_accessible(page)
        send(page, recording)
        page.locator(".results tbody button").first.click()
        for details in page.locator("details").all():
            details.evaluate("each => each.open = true")
        check_accessible(page)
        check_width(page)


def test_the_files_need_no_key_and_hold_no_data(server):
    html = server.client.get("/", headers={"Accept": "text/html"})
    assert html.status_code == 200
    assert "tiny" not in html.text
    assert "default-src 'none'" in html.headers["content-security-policy"]
    assert "unsafe" not in html.headers["content-security-policy"]
    assert "<script>" not in html.text
    assert "style=" not in html.text
    script = server.get("/page/service/main.js")
    assert script.headers["content-type"].startswith("text/javascript")
    again = server.client.get("/page/service/main.js", headers={"If-None-Match": script.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for path in ("/", "/models/tiny", "/tables", "/wav"):
        assert server.get(path).status_code == 401, path


@pytest.mark.parametrize(
    "path",
    ["../assets.py", "..%2fassets.py", "%2e%2e/__init__.py", "/etc/passwd", "service", "", "x.js", "main.js%00"],
)
def test_no_other_file_is_read(server, path):
    assert server.get(f"/page/{path}").status_code in (401, 404)


def test_without_the_page(tmp_path, audio_bundle):
    with running_server(tmp_path, AVEX_BUNDLE=str(audio_bundle), AVEX_PAGE="off") as server:
        assert server.client.get("/", headers={"Accept": "text/html"}).json()["name"] == "avex-serve"
        assert server.get("/page/page.css").status_code == 404


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"format": "excel"}, "format is 'excel'; expected one of csv"),
        ({"model": "other"}, "other"),
        ({"recordings": []}, "recordings"),
        ({"probe": "other"}, "other"),
        ({"label": [0, 1]}, "different lengths"),
        ({"label": [7]}, "label 7 is not one of 1 labels"),
        ({"digest": "abc"}, "digest"),
        ({"name": "../../x.wav"}, "name"),
        ({"name": "x" * 300}, "name"),
        ({"score": [1e400]}, "score"),
    ],
)
def test_tables_that_can_not_be(audio_server, change, fault):
    recording = {"name": "a.wav", "digest": "0" * 64, "duration": 1.0, "labels": ["x"],
                 "label": [0], "start": [0.0], "end": [1.0], "score": [0.5]}  # fmt: skip
    body = {"format": "csv", "model": "tiny", "recordings": [recording]}
    assert audio_server.post("/tables", json=body).status_code == 200
    target = recording if next(iter(change)) in recording else body
    target.update(change)
    answer = audio_server.post("/tables", content=json.dumps(body).replace("Infinity", "1e400"))
    assert answer.status_code in (400, 404), answer.text
    assert fault in answer.json()["error"]


def test_a_name_that_no_file_can_have(audio_server):
    """Audacity's tables are files that are named after the recordings."""
    recording = {"digest": "0" * 64, "duration": 1.0, "labels": ["x"], "label": [0], "start": [0.0], "end": [1.0],
                 "score": [0.5]}  # fmt: skip
    recordings = [recording | {"name": name} for name in ("é" * 200, "b.wav")]
    answer = audio_server.post("/tables", json={"format": "audacity", "model": "tiny", "recordings": recordings})
    assert answer.status_code == 400, answer.text
    assert "too long" in answer.json()["error"]


def test_a_recording_as_wav(audio_server):
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, (6000, 2), np.int16)
    flac = io.BytesIO()
    soundfile.write(flac, samples, 192_000, format="FLAC")
    answer = audio_server.post("/wav?channel=2", content=flac.getvalue())
    assert answer.headers["content-type"] == "audio/wav"
    read, rate = soundfile.read(io.BytesIO(answer.content), dtype="int16")
    assert rate == 192_000
    np.testing.assert_array_equal(read, samples[:, 1])
    assert audio_server.post("/wav", content=b"no sound").status_code == 400
