"""Files of every kind to text: compression, encodings, folders, URLs, and what is refused or left out and counted."""

import base64
import bz2
import functools
import gzip
import http.server
import json
import lzma
import os
import random
import re
import sys
import threading
import tracemalloc

import pytest

from config import UserError
from test_prepare import DOCUMENTS, documents_of, refused, run, server, write_txt
from text import corpus, files, remote


def packed(packing, data):
    """Compressed bytes."""
    if packing == "zst":
        try:
            from compression import zstd
        except ImportError:
            zstd = pytest.importorskip("zstandard")
        return zstd.compress(data)
    return {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "": bytes}[packing](data)


PACKINGS = ["gz", "xz", "bz2", "zst"]


def lines(documents=DOCUMENTS):
    return "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()


def texts(folder):
    return sorted(documents_of(folder, "train") + documents_of(folder, "val"))


# ---- the kind of a file


@pytest.mark.parametrize("packing", ["", *PACKINGS])
@pytest.mark.parametrize("name", ["part-00000-of-00001.json", "x.JSONL", "x.ndjson"])
def test_objects_a_line_are_read_whatever_their_ending_and_packing(tmp_path, packing, name):
    path = tmp_path / f"{name}.{packing}".rstrip(".")
    path.write_bytes(packed(packing, lines()))
    run(tmp_path / "data", f"--input={path}", "--val_fraction=0.3")
    assert texts(tmp_path / "data") == sorted(DOCUMENTS)


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_text_is_unpacked_whatever_its_name(tmp_path, packing):
    (tmp_path / "in").mkdir()
    for name, document in zip((f"a.txt.{packing}", f"b.MD.{packing.upper()}", "c.txt", f"d.txt.{packing}"), DOCUMENTS):
        data = document.encode()
        (tmp_path / "in" / name).write_bytes(data if name[0] == "d" else packed(packing, data))
    run(tmp_path / "data", f"--input={tmp_path / 'in'}", "--val_fraction=0.3")
    assert texts(tmp_path / "data") == sorted(DOCUMENTS[:4])


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_parts_end_to_end_and_zeros_behind_them_are_one_file(tmp_path, packing):
    path = tmp_path / f"x.jsonl.{packing}"
    path.write_bytes(packed(packing, lines(DOCUMENTS[:20])) + packed(packing, lines(DOCUMENTS[20:])) + bytes(5000))
    run(tmp_path / "data", f"--input={path}", "--val_fraction=0.3")
    assert texts(tmp_path / "data") == sorted(DOCUMENTS)


@pytest.mark.parametrize("damage", ["cut", "changed"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_damaged_packed_file_is_counted_and_what_comes_before_the_damage_is_read(tmp_path, capsys, packing, damage):
    noise = ["".join(random.Random(i).choices("abcdefghij klmnop", k=2000)) for i in range(300)]
    write_txt(tmp_path / "in", DOCUMENTS[:7])
    data = bytearray(packed(packing, lines(noise)))
    middle = len(data) * 3 // 4
    if damage == "changed":
        data[middle : middle + 99] = bytes(99)
    (tmp_path / f"in/x.jsonl.{packing}").write_bytes(data[:middle] if damage == "cut" else data)
    (tmp_path / f"in/y.txt.{packing}").write_bytes(packed(packing, b"one text")[:-3])
    run(tmp_path / "data", f"--input={tmp_path / 'in'}", "--val_fraction=0.3")
    printed = capsys.readouterr().out
    for name in ("x.jsonl", "y.txt"):
        assert f"1 files cut short, damaged or unreadable: {tmp_path}/in/{name}.{packing}" in printed
    found = texts(tmp_path / "data")
    assert set(DOCUMENTS[:7]) <= set(found)
    if packing != "bz2":  # its blocks of 900 kB are lost whole
        assert len(set(noise) & set(found)) > 30


def test_zst_without_a_library_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(99))
    for module in ("compression", "compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    message = refused(tmp_path / "data", f"--input={tmp_path / 'x.jsonl.zst'}")
    assert "need zstandard; install it with: pip install zstandard" in message


@pytest.mark.parametrize("text", ['[{"text": "a"}, {"text": "b"}]', '{\n  "text": "a"\n}\n', "7"])
def test_json_file_of_one_value_is_counted_not_read_as_text(tmp_path, text, capsys):
    (tmp_path / "one.json").write_text(text)
    message = refused(tmp_path / "data", f"--input={tmp_path / 'one.json'}")
    assert "1 .json files of one value, where an object a line is read" in message
    write_txt(tmp_path, DOCUMENTS[:3])
    run(tmp_path / "data", f"--input={tmp_path}")
    assert texts(tmp_path / "data") == sorted(DOCUMENTS[:3])
    assert "1 .json files of one value" in capsys.readouterr().out


def test_files_that_are_no_text_are_counted_by_ending(tmp_path, capsys):
    write_txt(tmp_path / "in", DOCUMENTS[:5])
    noise = random.Random(0).randbytes(70_000)
    for name in ("a.png", "b.png", "c.pdf", "d.txt"):
        (tmp_path / "in" / name).write_bytes(noise)
    (tmp_path / "in/e.tar").write_bytes(b"name" + bytes(508) + b"text " * 99 + bytes(512))
    run(tmp_path / "data", f"--input={tmp_path}/in/*")
    printed = capsys.readouterr().out
    for line in ("2 .png files that are no text", "1 .pdf files", "1 .txt files that are no text", "1 .tar files"):
        assert line in printed, printed
    assert texts(tmp_path / "data") == sorted(DOCUMENTS[:5])


# ---- encodings

# A sentence or two of each language, and the encodings in which its files come.
SAMPLES = {
    ("gb18030", "gbk", "utf-16-le", "utf-16-be"): "今天的天气很好，我们一起去公园散步。他说这个地方以前是一个大工厂，后来就没有人来了。",
    ("big5", "utf-16-le"): "今天的天氣很好，我們一起去公園散步。他說這個地方以前是一個大工廠，後來就沒有人來了。",
    ("cp932", "euc-jp", "utf-16-le"): "今日はとても天気がいいので、みんなで公園へ散歩に行きました。そこには大きな木がありました。",
    ("cp949", "utf-16-be"): "오늘은 날씨가 아주 좋아서 우리는 함께 공원으로 산책을 갔다. 그곳에는 큰 나무가 있었다.",
    ("koi8-r", "cp1251", "utf-16-le"): "Сегодня была очень хорошая погода, и мы пошли гулять в парк. Там стояло дерево.",
    ("cp1252", "utf-16-le"): "Où est passé l’été ? Les élèves français sont allés à la forêt; die Bäume sind größer.",
    ("cp1250",): "Zażółć gęślą jaźń, powiedział król, gdzieś w środku dnia. Příliš žluťoučký kůň úpěl ďábelské ódy.",
    ("utf-16-le", "utf-16-be", "utf-32-le"): "The weather was fine, so all of us went for a walk in the park.",
}  # fmt: skip
CASES = [(encoding, text) for encodings, text in SAMPLES.items() for encoding in encodings]


@pytest.mark.parametrize(("encoding", "text"), CASES, ids=[f"{name}-{text[:3]}" for name, text in CASES])
def test_text_in_another_encoding_is_refused_with_its_name_which_then_reads_it(tmp_path, encoding, text):
    path, text = tmp_path / "x.txt", f"{text}\n" * 9
    path.write_bytes(text.encode(encoding))
    message = refused(tmp_path / "data", f"--input={path}")
    likely = "gb18030" if encoding == "gbk" else encoding
    assert "x.txt is not utf-8 text: " in message and f"it looks like {likely}: set --encoding={likely}" in message
    run(tmp_path / "data", f"--input={path}", f"--encoding={encoding}")
    assert "".join(documents_of(tmp_path / "data", "train") + documents_of(tmp_path / "data", "val")) == text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("given", ["utf-8", "cp1252"])
def test_a_mark_names_the_encoding_and_stays_out_of_the_text(tmp_path, encoding, given):
    write_txt(tmp_path / "in", DOCUMENTS[:1])
    (tmp_path / "in/b.txt").write_text(DOCUMENTS[1], encoding=encoding, newline="")
    (tmp_path / "in/c.jsonl").write_text(lines(DOCUMENTS[2:5]).decode(), encoding=encoding)
    (tmp_path / "in/d.txt").write_text("", encoding=encoding)
    (tmp_path / "in/e.txt.gz").write_bytes(gzip.compress(DOCUMENTS[5].encode(encoding)))
    (tmp_path / "in/000.txt").write_text(DOCUMENTS[0], encoding=given, errors="replace", newline="")
    run(tmp_path / "data", f"--input={tmp_path / 'in'}", f"--encoding={given}", "--val_fraction=0.3")
    first = DOCUMENTS[0].encode(given, "replace").decode(given)
    assert texts(tmp_path / "data") == sorted([first, *DOCUMENTS[1:6]])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "gb18030", "shift-jis"])
@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 1000])
def test_a_character_across_blocks_stays_whole(tmp_path, monkeypatch, encoding, piece_bytes):
    text = "日本語の文、そして 12 ab。\n" * 9
    (tmp_path / "x.txt").write_bytes(text.encode(encoding))
    monkeypatch.setattr(files, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(files, "HEAD_BYTES", 8)
    blocks = list(files.TextFile(tmp_path / "x.txt", encoding).blocks())
    assert b"".join(blocks) == text.encode() and all(block.decode() is not None for block in blocks)


def test_up_to_1_percent_of_invalid_text_is_replaced_and_counted_and_more_is_refused(tmp_path, capsys):
    for n_bad, path in ((10, tmp_path / "a.txt"), (11, tmp_path / "b.txt")):
        path.write_bytes(b"word " * 198 + b"\xff" * n_bad)
    run(tmp_path / "data", f"--input={tmp_path / 'a.txt'}")
    assert "pieces with bytes that are not UTF-8, replaced by U+FFFD" in capsys.readouterr().out
    message = refused(tmp_path / "other", f"--input={tmp_path / 'b.txt'}")
    assert "the text of all files is not utf-8 text: 1.1% of its bytes are invalid" in message


def test_many_short_files_of_another_encoding_are_refused_together(tmp_path):
    for i in range(50):
        (tmp_path / f"{i}.txt").write_bytes(f"天气很好{i}，我们去公园".encode("gbk"))
    message = refused(tmp_path / "data", f"--input={tmp_path}")
    assert "the text of all files is not utf-8 text: " in message and "--encoding=gb18030" in message


@pytest.mark.parametrize("name", ["utf-9", "hex", "rot13", "no such thing"])
def test_unknown_encoding_is_refused(tmp_path, name):
    write_txt(tmp_path / "in")
    assert f"encoding {name} is unknown" in refused(tmp_path / "data", f"--input={tmp_path}/in", f"--encoding={name}")


# ---- folders


def test_folder_takes_texts_of_all_cases_and_linked_folders_once_and_leaves_out_and_counts_the_rest(tmp_path, capsys):
    source, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for folder in (source, source / ".ipynb_checkpoints", source / "deep", elsewhere):
        folder.mkdir()
    kept = {source / "A.TXT": 0, source / "b.md": 1, source / "deep/c.Md": 2, elsewhere / "d.txt": 3}
    for path, i in kept.items():
        path.write_text(DOCUMENTS[i], newline="")
    (source / "linked").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(source)
    (source / "again").symlink_to(elsewhere)
    for name in ("._b.md", ".hidden.txt", ".ipynb_checkpoints/b-checkpoint.md", "x.pdf", "y.PDF", "make", "z.csv.gz"):
        (source / name).write_text("junk")
    (source / "gone.txt").symlink_to(source / "nothing")
    run(tmp_path / "data", f"--input={source}", "--val_fraction=0.3")
    printed = capsys.readouterr().out
    assert texts(tmp_path / "data") == sorted(DOCUMENTS[:4])
    for line in ("1 hidden folders, left out", "2 hidden files, left out", "2 .pdf files, left out", "1 .csv.gz files",
                 "1 files without an ending, left out", "1 links to nothing, or special files"):  # fmt: skip
        assert line in printed, printed


def test_file_whose_name_is_no_utf8_is_read_and_named(tmp_path, capsys):
    write_txt(tmp_path / "in", DOCUMENTS[:3])
    (tmp_path / "in" / os.fsdecode(b"odd\xff.txt")).write_text(DOCUMENTS[3], newline="")
    (tmp_path / "in" / os.fsdecode(b"cut\xff.txt.gz")).write_bytes(gzip.compress(b"x" * 99)[:-3])
    run(tmp_path / "data", f"--input={tmp_path / 'in'}", "--val_fraction=0.3")
    printed = capsys.readouterr().out
    assert set(DOCUMENTS[:4]) <= set(texts(tmp_path / "data"))
    assert r"damaged or unreadable: " in printed and r"cut\xff.txt.gz" in printed
    printed.encode()  # all of it can be encoded


# ---- large and deep documents


def test_documents_beyond_the_largest_size_are_counted_and_passed_over(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 64)
    long = "x" * 500
    documents = ["a" * 20, long, "b" * 20, long, long, "c" * 20]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines(documents)))
    (tmp_path / "x.txt").write_text("<sep>".join(documents))
    for name, argv in (("x.jsonl.gz", []), ("x.txt", ["--doc_separator=<sep>"])):
        run(tmp_path / name[2:5], f"--input={tmp_path / name}", "--max_document_bytes=200", *argv)
        assert texts(tmp_path / name[2:5]) == sorted(d for d in documents if d is not long)
        assert "3 documents of more than 200 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("block", [1, 2, 3, 5, 8, 64])
def test_documents_of_just_the_largest_size_are_kept_wherever_blocks_end(block):
    documents = [b"a" * 10, b"b" * 11, b"", b"c" * 10, b"d" * 300]
    text = b"<|>".join(documents)
    blocks = [text[i : i + block] for i in range(0, len(text), block)]
    found = list(corpus._split_file(blocks, b"<|>", 10))
    assert found == [b"a" * 10, None, b"", b"c" * 10, None]


def test_memory_does_not_grow_with_a_line_that_is_too_long():
    def blocks():
        for _ in range(200):
            yield bytes(1 << 20)
        yield b"\nlast"

    tracemalloc.start()
    assert list(corpus._split_file(blocks(), b"\n", 8 << 20)) == [None, b"last"]
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_packed_zeros_are_unpacked_in_little_memory(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(b" " * (1 << 20))
    tracemalloc.start()
    assert sum(map(len, files.TextFile(path).blocks())) == 100 << 20
    assert tracemalloc.get_traced_memory()[1] < 40 << 20
    tracemalloc.stop()


def test_line_that_is_nested_deeply_is_counted(tmp_path, capsys):
    deep = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    (tmp_path / "x.jsonl").write_bytes(lines(DOCUMENTS[:5]) + deep + lines(DOCUMENTS[5:9]))
    run(tmp_path / "data", f"--input={tmp_path / 'x.jsonl'}", "--val_fraction=0.3")
    assert "1 lines that are nested too deeply" in capsys.readouterr().out
    assert texts(tmp_path / "data") == sorted(DOCUMENTS[:9])


# ---- URLs

SECRET = "token=s3cr3tkey"


def everything_written(folder):
    """Names and content of all that a prepare leaves beside its tokens."""
    for path in folder.rglob("*"):
        yield str(path.relative_to(folder))
        if path.is_file() and path.suffix != ".bin":
            yield path.read_text()


def test_kind_of_a_url_is_its_paths_and_its_query_is_written_nowhere(tmp_path, capsys, monkeypatch):
    (tmp_path / "www").mkdir()
    (tmp_path / "www/x.jsonl").write_bytes(lines())
    with server(tmp_path / "www") as url:
        where = f"--input={url}/x.jsonl?{SECRET}"
        monkeypatch.setattr("sys.argv", ["prepare.py", where])
        meta = run(tmp_path / "data", where, "--val_fraction=0.3")
        with pytest.raises(UserError) as caught:
            run(tmp_path / "other", f"--input={url}/none.jsonl?{SECRET}")
        with pytest.raises(UserError) as other:
            run(tmp_path / "data", f"--input={url}/x.jsonl?token=another", "--val_fraction=0.3")
    assert texts(tmp_path / "data") == sorted(DOCUMENTS)
    assert f"{url}/x.jsonl?..." in meta["command"] and "404" in str(caught.value)
    assert "already holds data, made by" in str(other.value)
    assert re.search(r"\(here input (\S+\?\.\.\.\w{4}) -> \S+\?\.\.\.\w{4}\)", str(other.value)), "of another query"
    seen = [capsys.readouterr().out, str(caught.value), str(other.value), *everything_written(tmp_path / "data")]
    assert not [text for text in seen if "s3cr3t" in text]


def test_user_and_password_of_a_url_log_in_and_are_written_nowhere(tmp_path, capsys):
    (tmp_path / "www").mkdir()
    (tmp_path / "www/x.txt").write_text("a text " * 99)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            wanted = f"Basic {base64.b64encode(b'me:p@ss').decode()}"
            return super().do_GET() if self.headers["Authorization"] == wanted else self.send_error(401)

    handler = functools.partial(Handler, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}).start()
        host = f"127.0.0.1:{web.server_port}"
        meta = run(tmp_path / "data", f"--input=http://me:p%40ss@{host}/x.txt")
        with pytest.raises(UserError, match="401") as caught:
            run(tmp_path / "other", f"--input=http://me:wrong@{host}/x.txt")
        web.shutdown()
    assert meta["settings"]["input"] == f"http://{host}/x.txt"
    seen = [capsys.readouterr().out, str(caught.value), *everything_written(tmp_path / "data")]
    assert not [text for text in seen if "p%40ss" in text or "p@ss" in text or "wrong" in text]


def test_login_is_not_sent_to_where_a_host_redirects(tmp_path):
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            seen.append((self.path, self.headers["Authorization"]))
            self.send_response(302 if self.path == "/x.txt" else 200)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere.txt")
            self.end_headers()
            self.wfile.write(b"" if self.path == "/x.txt" else b"a text " * 99)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}).start()
        run(tmp_path / "data", f"--input=http://me:pass@127.0.0.1:{web.server_port}/x.txt")
        web.shutdown()
    assert {path: token is not None for path, token in seen} == {"/x.txt": True, "/elsewhere.txt": False}


def test_web_page_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "www").mkdir()
    (tmp_path / "www/index.html").write_text("<html>sign in</html>" * 9)
    with server(tmp_path / "www") as url:
        assert "it is a web page, not the file itself" in refused(tmp_path / "data", f"--input={url}/")
        run(tmp_path / "page", f"--input={url}/index.html")


@pytest.mark.parametrize(("url", "seen"), [
    ("http://h/a/x.txt", "http://h/a/x.txt"), ("https://u:p@h:8/x.txt#part", "https://h:8/x.txt"),
    ("http://u@h/x?a=1&b=2", "http://h/x?...8e85"), ("file:///a/x.txt", "file:///a/x.txt"),
    ("zip://*.txt::https://u:p@h/x.zip?a=1", "zip://*.txt::https://h/x.zip?...c22f"), ("s3://b/u@h/x", "s3://b/u@h/x"),
])  # fmt: skip
def test_url_is_shown_without_its_secrets(url, seen):
    assert remote.public(url) == seen
