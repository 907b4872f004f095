"""Tables of annotations in the formats that people label in."""

import math

import pytest

from avex_serve.annotations.reading import TableRow, read_annotations, recording_of
from avex_serve.errors import InputError, NotFoundError

RAVEN = (
    "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)\tBegin File\t"
    "File Offset (s)\tSpecies\n"
    "1\tWaveform 1\t1\t61.5\t62.25\t0\t8000\tb.wav\t1.5\trobin\n"
    "1\tSpectrogram 1\t1\t61.5\t62.25\t0\t8000\tb.wav\t1.5\trobin\n"
    "2\tSpectrogram 1\t1\t3\t4\t0\t8000\ta.wav\t3\twren\n"
)


def read(tmp_path, text, name="table.csv", **options):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    return read_annotations(path, **options)


def rows(annotations):
    return [annotation[:4] for annotation in annotations]


def test_raven_counts_in_the_file_and_a_selection_once(tmp_path):
    found = rows(read(tmp_path, RAVEN, "x.txt"))
    assert found == [("b.wav", 1.5, 2.25, "robin"), ("a.wav", 3, 4, "wren")]


def test_raven_without_files_is_about_the_recording_of_its_name(tmp_path):
    text = "Selection\tBegin Time (s)\tEnd Time (s)\tAnnotation\n1\t0.5\t1.5\trobin\n"
    assert rows(read(tmp_path, text, "x.txt")) == [(None, 0.5, 1.5, "robin")]
    for name in ("dawn.Table.1.selections.txt", "dawn.selections.txt", "dawn.txt"):
        assert recording_of(tmp_path / name) == "dawn"


def test_raven_of_several_files_without_offsets_is_refused(tmp_path):
    text = "Begin Time (s)\tEnd Time (s)\tBegin File\tLabel\n1\t2\ta.wav\tx\n61\t62\tb.wav\tx\n"
    with pytest.raises(InputError, match="File Offset"):
        read(tmp_path, text)


@pytest.mark.parametrize("hint", ["sep=;\n", "sep=;\r\n", '"sep=;"\n', "SEP=;\n"])
def test_a_first_line_for_excel_is_no_header(tmp_path, hint):
    text = f"{hint}file;start;end;label\na.wav;0,5;2;robin, sings\n"
    assert rows(read(tmp_path, text)) == [("a.wav", 0.5, 2, "robin, sings")]
    with pytest.raises(InputError, match="line 3: 'x' is not a time"):
        read(tmp_path, f"{hint}file;start;end;label\na.wav;x;2;robin\n")


def test_audacity(tmp_path):
    text = "0.500000\t1.250000\trobin\n\\\t3000\t5000\n2\t2\tcall note\n"
    assert rows(read(tmp_path, text, "dawn.txt")) == [(None, 0.5, 1.25, "robin"), (None, 2, 2, "call note")]


@pytest.mark.parametrize("name", ["a\u2028b.wav", "a\x85b.wav", "a\x0cb.wav", '"a\nb.wav"'])
def test_names_with_line_breaks_of_other_kinds_are_one_cell(tmp_path, name):
    assert rows(read(tmp_path, f"file,start,end,label\n{name},0,1,wren\n")) == [(name.strip('"'), 0, 1, "wren")]
    with pytest.raises(InputError, match=f"line {3 + name.count(chr(10))}: 'x' is not a time"):
        read(tmp_path, f"file,start,end,label\n{name},0,1,wren\nb.wav,x,1,wren\n")


@pytest.mark.parametrize(
    "header",
    ["file,start,end,label", "audiofilename,start,end,label:species", "File;Start (s);End (s);Common name"],
)
def test_csv_with_the_columns_of_several_programs(tmp_path, header):
    separator = ";" if ";" in header else ","
    text = f"\ufeff{header}\n" + separator.join(["a.wav", "0", "2.5", "Zaunkönig"]) + "\n\n"
    assert rows(read(tmp_path, text)) == [("a.wav", 0, 2.5, "Zaunkönig")]


def test_csv_of_whole_recordings_keeps_other_columns(tmp_path):
    (found,) = read(tmp_path, "file,label,site,split\na.wav,robin,north,test\n")
    assert found == TableRow("a.wav", 0, math.inf, "robin", found.fields)
    assert (found.fields["site"], found.fields["split"]) == ("north", "test")


def test_a_table_may_describe_recordings_only(tmp_path):
    (found,) = read(tmp_path, "file,site\na.wav,north\n")
    assert (found.label, found.fields["site"]) == ("", "north")


def test_another_column_of_labels(tmp_path):
    text = "file,start,end,label,call\na.wav,0,1,robin,song\n"
    assert read(tmp_path, text, label_column="Call")[0].label == "song"
    with pytest.raises(InputError, match=r"no column calls; it has file, start, end, label, call"):
        read(tmp_path, text, label_column="calls")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file,start,end,label\na.wav,1;5,2,x\n", "line 2: '1;5' is not a time"),
        ("file,start,end,label\na.wav,3,2,x\n", "line 2: from 3.0 to 2.0 s"),
        ("file,start,end,label\na.wav,-1,2,x\n", "line 2: from -1.0"),
        ("file,start,label\na.wav,1,x\n", "none for the other end"),
        ("name,value\na,1\n", "no table of annotations"),
        ("", "no table of annotations"),
        ("file,start,end,label\na.wav,nan,2,x\n", "'nan' is not a time"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, text, reason):
    with pytest.raises(InputError) as error:
        read(tmp_path, text)
    assert reason in str(error.value)


def test_a_file_that_is_absent_or_no_text(tmp_path):
    with pytest.raises(NotFoundError):
        read_annotations(tmp_path / "none.csv")
    (tmp_path / "x.csv").write_bytes(b"PK\x03\x04\x14\0\x06\0")  # a workbook of Excel
    with pytest.raises(InputError, match="it isn't text; expected CSV"):
        read_annotations(tmp_path / "x.csv")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [";", "\t"])
def test_what_excel_saves(tmp_path, encoding, separator):
    rows = "file;start;end;label;site;score\r\na b.wav;0,5;2;Zaunkönig;Nord, 1;0,91\r\nb.wav;0;2;1,5;2,b;1\r\n"
    (tmp_path / "x.csv").write_bytes(rows.replace(";", separator).encode(encoding))
    found, other = read_annotations(tmp_path / "x.csv")
    assert found[:4] == ("a b.wav", 0.5, 2.0, "Zaunkönig")
    assert (found.fields["site"], found.fields["score"]) == ("Nord, 1", "0.91")
    assert (other.label, other.fields["site"]) == ("1,5", "2,b")


def test_a_row_that_ends_before_its_start_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("file,label,end,start\na.wav,robin,5\n")
    with pytest.raises(InputError, match="line 2: '' is not a time"):
        read_annotations(tmp_path / "x.csv")


def test_letters_of_another_code_page_are_refused(tmp_path):
    (tmp_path / "x.csv").write_bytes("file;start;end;label\r\na.wav;0;2;Zaunkönig\r\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"x\.csv is not in UTF-8.*in Excel: CSV UTF-8"):
        read_annotations(tmp_path / "x.csv")
