"""Files of labels, as users have them."""

import json
import logging

import pytest

from avex_serve.bundles.labels import read_label_file
from avex_serve.errors import InputError

THREE = ("bat", "bee", "bird")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.txt", "bat\nbee\nbird\n"),
        ("lines", "bat\r\nbee\r\nbird"),
        ("old.TXT", "bat\rbee\rbird"),
        ("blank.txt", "\n bat \n\nbee\nbird\n\n"),
        ("tabs.txt", "0\tbat\n1\tbee\n2\tbird\n"),
        ("commas.txt", "1,bee\n0,bat\n2,bird\n"),
        ("json.txt", '{"bee": 1, "bat": 0, "bird": 2}'),
        ("map.json", '{"bee": 1, "bat": 0, "bird": 2}'),
        ("map.JSON", '{"bee": 1, "bat": 0, "bird": 2}'),
        ("list.json", '["bat", "bee", "bird"]'),
        ("one.csv", "label\nbat\nbee\nbird\n"),
        ("table.csv", "2,bird\n0,bat\n1,bee\n"),
        ("titles.csv", "label,index\r\nbird,2\r\nbat,0\r\nbee,1\r\n"),
        ("semicolons.csv", "index;label\n0;bat\n1;bee\n2;bird\n"),
        ("quotes.csv", '0,"bat"\n1,"bee"\n2,"bird"\n'),
        ("table.tsv", "bat\t0\nbee\t1\nbird\t2\n"),
        ("pandas.csv", ",label\n0,bat\n1,bee\n2,bird\n"),
        ("id2label.json", '{"0": "bat", "2": "bird", "1": "bee"}'),
        ("id2label.yml", "0: bat\n2: bird\n1: bee\n"),
        ("list.yml", "- bat\n- bee\n- bird\n"),
        ("map.yaml", "bird: 2\nbat: 0\nbee: 1\n"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_labels_are_read(tmp_path, caplog, name, content, encoding):
    path = tmp_path / name
    path.write_bytes(content.encode(encoding))
    assert read_label_file(path) == THREE
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "content", "labels"),
    [
        ("names.txt", "Parus major, song\nParus major, call\n", ("Parus major, song", "Parus major, call")),
        ("brackets.txt", "[noise]\n[wind]\n", ("[noise]", "[wind]")),
        ("numbers.txt", "7-spotted\n2 kHz\n9 kHz\n", ("7-spotted", "2 kHz", "9 kHz")),
        ("words.yml", "- no\n- 1\n- ~\n", ("no", "1", "~")),
        ("digits.yml", "1: 0\n0: 1\n", ("1", "0")),
        ("commas.csv", '0,"Parus major, song"\n1,other\n', ("Parus major, song", "other")),
    ],
)
def test_labels_of_any_text(tmp_path, name, content, labels):
    path = tmp_path / name
    path.write_text(content)
    assert read_label_file(path) == labels


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("twice.txt", b"bat\nbat\nbee\n", "has labels more than once: 'bat'"),
        ("twice.csv", b"0,bat\n0,bee\n", "must hold the indices 0 to 1, each once"),
        ("twice.json", b'{"bat": 0, "bat": 1}', "a label is given more than once"),
        ("empty.txt", b"\n", "holds no labels"),
        ("empty.yml", b"", "is no list"),
        ("blank.csv", b"0,bat\n1,\n", "has an empty label"),
        ("latin.txt", "Zaunkönig".encode("latin-1"), "save it as UTF-8"),
        ("table.xlsx", b"PK\x03\x04\xff", "the ending .xlsx is not known"),
        ("index twice.json", b'{"0": "bat", "0": "bee"}', "a label is given more than once"),
        ("from one.json", b'{"1": "bat", "2": "bee"}', "must be one JSON object {label: index}"),
        ("two.txt", "bat\n\ufeffbee\n".encode(), "is not plain text"),
        ("wide.csv", b"0,bat,x\n1,bee,y\n", "have 3 columns"),
        ("ragged.csv", b"bat\n0,bee\n", "have 1 or 2 columns"),
        ("names.csv", b"bat,Chiroptera\nbee,Apis\n", "must hold the indices 0 to 1"),
        ("from one.csv", b"1,bat\n2,bee\n", "must hold the indices 0 to 1"),
        ("from one.txt", b"1. bat\n2. bee\n", "'1. bat' is not a label alone"),
        ("items.txt", b"- bat\n- bee\n", "'- bat' is not a label alone"),
        ("code.txt", b'"bat",\n"bee",\n', "is not a label alone"),
        ("tab.txt", b"bat\nbee\t1\n", "a line has a tab"),
        ("numbers.json", b"[1, 2]", "1 is no label"),
        ("nested.yml", b"names:\n- bat\n- bee\n", "its indices must be 0 to 0"),
        ("labels.xml", b"<label>bat</label>", "the ending .xml is not known"),
        ("broken.json", b"{", "is not JSON of labels"),
        ("broken.yml", b"- [", "expected"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=name.replace(".", r"\.")) as caught:
        read_label_file(path)
    assert message in str(caught.value)


def test_labels_that_look_alike_are_told(tmp_path, caplog):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(["Bat", "bee", "bat "]))
    with caplog.at_level(logging.WARNING):
        assert read_label_file(path) == ("Bat", "bee", "bat ")
    assert "'Bat' and 'bat ', which differ only by case or spaces" in caplog.text
