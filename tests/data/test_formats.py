"""Every kind of file gives its texts at random access; bad ones give one sentence with file and place."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.formats import DOCUMENT_BYTES, DataError, PlainText, open_texts

TEXTS = ["first\nline two", "zweiter: äöü 日本", "", "  spaces \t and \x01"]


def read(path, field="text", errors="strict"):
    texts = open_texts(str(path), field, errors)
    # Backwards, since access is random.
    return [texts[index] for index in reversed(range(len(texts)))][::-1]


def json_lines(texts, field="text"):
    return "".join(json.dumps({"n": 1, field: text}) + "\n" for text in texts).encode()


def test_plain_text_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\ntwo é".encode())
    assert read(tmp_path / "a.txt") == ["one\r\ntwo é"]


def test_a_long_text_is_cut_at_line_ends_and_joins_to_the_file(tmp_path):
    text = "".join(f"line {number} é\n" for number in range(9000)) + "x" * (3 * DOCUMENT_BYTES) + "\nend"
    (tmp_path / "a").write_text(text)
    found = read(tmp_path / "a")
    assert "".join(found) == text
    assert len(found) > 5
    assert all(part.endswith("\n") for part in found[:-1])
    assert all(len(part.encode()) <= DOCUMENT_BYTES + 20 for part in found[:-2])


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines(["hello", "you"]))
    assert read(tmp_path / "a.txt") == ["hello"]
    assert read(tmp_path / "a.jsonl") == ["hello", "you"]


@given(st.lists(st.text(max_size=40), min_size=1, max_size=8), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
@settings(max_examples=60, deadline=None)
def test_json_lines_round_trip(tmp_path_factory, texts, last_newline, newline):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_bytes((newline.join(lines) + newline * last_newline).encode())
    assert read(path) == texts


def test_compressed_text_and_json_lines(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS)))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(json_lines(TEXTS)))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXTS[1].encode()))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(TEXTS[0].encode()))
    assert read(tmp_path / "a.jsonl.gz") == TEXTS
    assert read(tmp_path / "a.jsonl.zst") == TEXTS
    assert read(tmp_path / "a.txt.gz") == [TEXTS[1]]
    assert read(tmp_path / "b.txt.zst") == [TEXTS[0]]


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for kind in (arrow.string(), arrow.large_string()):
        table = arrow.table({"id": range(4), "body": arrow.array(TEXTS, kind)})
        parquet.write_table(table, tmp_path / f"{kind}.parquet", row_group_size=3)
        assert read(tmp_path / f"{kind}.parquet", "body") == TEXTS
    with pytest.raises(DataError, match=r"no column 'text' \(it has id, body\).*text_field"):
        read(tmp_path / "string.parquet")
    parquet.write_table(arrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(DataError, match="row 1 of column 'text' is null"):
        read(tmp_path / "null.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"bad\.parquet cannot be read as Parquet"):
        read(tmp_path / "bad.parquet")


def test_array_record(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    for name, records in {"a": [t.encode() for t in TEXTS if t], "b.jsonl": json_lines(TEXTS).splitlines()}.items():
        writer = module.ArrayRecordWriter(str(tmp_path / f"{name}.array_record"), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
    assert read(tmp_path / "a.array_record") == [text for text in TEXTS if text]
    assert read(tmp_path / "b.jsonl.array_record") == TEXTS
    (tmp_path / "c.array_record").write_bytes(b"no such thing")
    with pytest.raises(DataError, match=r"c\.array_record is damaged"):
        read(tmp_path / "c.array_record")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good \xff bad", r"a\.txt is not valid UTF-8 at byte 5 \(0xff\).*errors='replace'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl is not valid UTF-8 at byte 24 \(0xe9\)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl:3 is not valid JSON"),
        ("a.jsonl", b"[" * 100000, r"a\.jsonl:1 is not valid JSON"),
        ("a.jsonl", b'{"body": "a", "id": 3}\n', r"a\.jsonl:1 has no field 'text' \(it has body, id\): set text_field"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1: field 'text' is not a string, it is a NoneType"),
        ("a.jsonl", b'"text"\n', r"a\.jsonl:1 is not a JSON object, it is a str"),
        ("a.jsonl", b'{"text": "ab\\ud800"}\n', r"a\.jsonl:1: character 2 of 'text' is a lone surrogate"),
        ("a.bin", b"\x7fELF\0\0\0", r"a\.bin looks like a binary file"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz is damaged or not a \.gz file"),
        ("a.txt.gz", gzip.compress(b"text " * 1000)[:-20], r"a\.txt\.gz is damaged"),
        ("a.txt.zst", b"not zst at all", r"a\.txt\.zst is damaged or not a \.zst file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_empty_one(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read(tmp_path / "none.txt")
    for name in ("a.txt", "a.jsonl", "a.txt.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
        assert read(tmp_path / name) == []


def test_replacing_bad_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff bad")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ab\\ud800"}\n')
    assert read(tmp_path / "a.txt", errors="replace") == ["good \ufffd bad"]
    assert read(tmp_path / "a.jsonl", errors="replace") == ["ab?"]


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    assert read(path) == ["one"]
    path.write_text("three")
    assert read(path) == ["three"]


def test_more_files_than_a_process_may_open(tmp_path):
    import resource

    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(200, limit), hard))
    try:
        for number in range(300):
            path = tmp_path / (f"{number}.txt.gz" if number % 2 else f"{number}.txt")
            path.write_bytes(gzip.compress(b"%d" % number) if number % 2 else b"%d" % number)
            opened.append(open_texts(str(path), "text", "strict"))
        assert [texts[0] for texts in opened] == [str(number) for number in range(300)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def test_document_bytes_is_a_bound_from_below(tmp_path):
    (tmp_path / "a").write_bytes(b"ab\ncd\nef\n")
    texts = PlainText(str(tmp_path / "a"), "strict", document_bytes=3)
    assert [texts[number] for number in range(len(texts))] == ["ab\n", "cd\n", "ef\n"]
