"""Input at a URL: equal to local files to the bit, broken connections, refusals, secrets; real servers throughout."""

import contextlib
import gzip
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import tracemalloc
import urllib.parse

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from fsspec.registry import known_implementations

import clean
import config
import prepare
from config import UserError
from conftest import ROOT
from pages import document, page
from ranks import without_matplotlib
from test_prepare import DOCUMENTS, refused, run, write_jsonl, write_parquet, write_txt
from text import files, remote

SECRET = "sig=s3cr3t%2Fkey"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `contents`, {path: bytes}, by HTTP, with index pages, and as an S3 bucket and a dataset of the hub."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        address = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(address.path).lstrip("/"), dict(urllib.parse.parse_qsl(address.query))
        self.server.seen.append((self.command, self.path, self.headers["Range"]))
        if status := self.server.status(path, self):
            return self.send(status, b"")
        if path.startswith("api/datasets/org/name"):
            return self.send(200, json.dumps(self.hub_tree(path)).encode(), "application/json")
        if query.get("list-type"):
            return self.send(200, self.bucket_list(path.strip("/"), query), "application/xml")
        path = path.replace("datasets/org/name/resolve/main/", "hub/")
        if path in self.server.contents:
            return self.send_file(path, self.server.contents[path])
        names = {p.removeprefix(path).partition("/")[0] for p in self.server.contents if path and p.startswith(path)}
        if self.command == "HEAD" and names == {""}:
            return self.send(200, b"")  # a bucket
        if not names or not path.endswith("/"):
            return self.send(404, b"")
        links = "".join(f'<a href="{urllib.parse.quote(name)}">{name}</a>' for name in sorted(names))
        return self.send(200, links.encode(), "text/html")

    def send(self, status, body, kind="application/octet-stream", **headers):
        self.send_response(status)
        for name, value in {"Content_Type": kind, "Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):  # the client may have enough
                self.wfile.write(body)

    def send_file(self, path, body):
        """Sends a file, or a range, up to the byte at which the connection shall break."""
        first, last, tag = 0, len(body) - 1, f'"{hashlib.md5(body).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked and self.server.ranges:
            first, last = int(asked[1]), min(int(asked[2] or last), last)
        self.server.count += self.command == "GET"
        cut = self.server.cut(first, self.server.count)
        sent = body[first : last + 1 if cut is None else max(first, min(cut, last + 1))]
        ranged = {"Content_Range": f"bytes {first}-{last}/{len(body)}"} if asked and self.server.ranges else {}
        self.send(206 if ranged else 200, sent, Content_Length=last + 1 - first, ETag=tag, **ranged)

    def hub_tree(self, path):
        """What the hub answers: a repository, or the files and folders of one of its folders."""
        _, is_tree, folder = path.partition("/tree/main")
        if not is_tree:
            return {"id": "org/name", "sha": "0" * 40}
        folder = f"hub{folder}/"
        paths = [path for path in self.server.contents if path.startswith(folder)]
        folders = {path[: path.index("/", len(folder))] for path in paths if "/" in path[len(folder) :]}
        recursive = "recursive=true" in self.path
        tree = [{"type": "directory", "oid": "0", "size": 0, "path": path.removeprefix("hub/")} for path in folders]
        for path in paths:
            if recursive or "/" not in path[len(folder) :]:
                body = self.server.contents[path]
                entry = {"type": "file", "oid": hashlib.sha1(body).hexdigest(), "size": len(body)}
                tree.append(entry | {"path": path.removeprefix("hub/")})
        return tree

    def bucket_list(self, bucket, query):
        """S3's ListObjectsV2."""
        prefix, delimiter, out, folders = query.get("prefix", ""), query.get("delimiter"), "", set()
        for path, body in self.server.contents.items():
            here, _, key = path.partition("/")
            if here != bucket or not key.startswith(prefix):
                continue
            if delimiter and delimiter in key[len(prefix) :]:
                folders.add(key[: key.index(delimiter, len(prefix)) + 1])
                continue
            mark = hashlib.md5(body).hexdigest()
            when = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            out += f'<Contents><Key>{key}</Key>{when}<ETag>"{mark}"</ETag><Size>{len(body)}</Size></Contents>'
        out += "".join(f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>" for folder in folders)
        head = f"<Name>{bucket}</Name><Prefix>{prefix}</Prefix><IsTruncated>false</IsTruncated>"
        return (
            f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{head}{out}</ListBucketResult>'.encode()
        )


@contextlib.contextmanager
def serving(contents, ranges=True, cut=lambda first, count: None, status=lambda path, request: None):
    """A server's URL, and the (method, path, range) of the requests that it has seen.

    cut: the byte at which the count-th answer, from the first byte on, breaks off.
    """
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.contents, server.ranges, server.cut, server.status = contents, ranges, cut, status
        server.seen, server.count = [], 0
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server.seen
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0, 0))


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def contents_of(folder, root):
    return {f"{root}/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- the same as local files


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_txt(folder / "deep/er", DOCUMENTS[:10])
    write_jsonl(folder / "a.jsonl", DOCUMENTS[10:20])
    write_jsonl(folder / "b c.jsonl.gz", DOCUMENTS[20:30])
    write_parquet(folder / "c.parquet", DOCUMENTS[30:])
    for i in range(9):
        (folder / f"text {i}.txt").write_text(f"another document {i}")
    for name in ("x.csv", ".hidden.txt", "deep/.hidden.txt"):
        (folder / name).write_text("left out")
    return folder


@contextlib.contextmanager
def stored(protocol, source, monkeypatch):
    """The URL of a folder's copy in a store."""
    if protocol == "local":
        yield f"local://{source}"
    elif protocol == "file":
        yield source.as_uri()
    elif protocol == "memory":
        store = fsspec.filesystem("memory")
        for path, data in contents_of(source, "bucket").items():
            store.pipe(f"/{path}", data)
        yield "memory://bucket"
    elif protocol == "s3":
        pytest.importorskip("s3fs", reason="s3fs is absent: pip install s3fs")
        with serving(contents_of(source, "bucket")) as (url, _):
            options = {"endpoint_url": url, "key": "k", "secret": "s"}
            monkeypatch.setitem(fsspec.config.conf, "s3", options)
            yield "s3://bucket"
    elif protocol == "hf":
        with serving(contents_of(source, "hub")) as (url, _):
            monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": url, "token": False})
            yield "hf://datasets/org/name"


@pytest.mark.parametrize("protocol", ["memory", "local", "file", "s3", "hf"])
@pytest.mark.parametrize("where", ["", "/**/*.txt", "/*.parquet", "/b c.jsonl.gz", "/deep/er/003.txt"])
def test_tokens_of_a_url_equal_those_of_local_files(tmp_path, source, monkeypatch, capsys, protocol, where):
    run(tmp_path / "local", f"--input={source}{where}", "--val_fraction=0.3")
    expected = capsys.readouterr().out.replace("local", "remote").splitlines()
    with stored(protocol, source, monkeypatch) as url:
        meta = run(tmp_path / "remote", f"--input={url}{where}", "--val_fraction=0.3", workers=2)
        assert sorted(capsys.readouterr().out.splitlines()) == sorted(expected)
        assert run(tmp_path / "remote", f"--input={url}{where}", "--val_fraction=0.3") == meta
    out = capsys.readouterr().out
    assert "is already prepared" in out and "its input has changed" not in out
    assert shards(tmp_path / "remote") == shards(tmp_path / "local")


def test_index_page_of_a_web_server_answers_a_glob(tmp_path, source):
    pytest.importorskip("aiohttp", reason="aiohttp is absent: pip install 'fsspec[http]'")
    run(tmp_path / "local", f"--input={source}/*.*", "--val_fraction=0.3")
    with serving(contents_of(source, "www")) as (url, _):
        run(tmp_path / "remote", f"--input={url}/www/*.*", "--val_fraction=0.3")
    assert shards(tmp_path / "remote") == shards(tmp_path / "local")


# ---- web servers


@pytest.fixture(scope="module")
def long_text():
    """About 3 MB in lines that differ, which take several blocks."""
    return "".join(f"line {i} of a text, {i * i}\n" for i in range(90_000)).encode()


def texts_of(url, size=files.PIECE_BYTES):
    [file], _ = files.find_files(url, None)
    return b"".join(files.TextFile(file).blocks())


def test_file_is_read_on_at_the_byte_where_its_connection_broke(long_text, capsys):
    cuts = (600_000, 1_000_001, 2_500_000)
    with serving({"x.txt": long_text}, cut=lambda first, _: next((c for c in cuts if c > first), None)) as (url, seen):
        assert texts_of(f"{url}/x.txt") == long_text
    assert [asked for *_, asked in seen if asked] == [f"bytes={cut}-" for cut in cuts]
    assert "x.txt breaks off at byte 1,000,001" in capsys.readouterr().out


def test_file_of_a_server_without_ranges_is_read_anew_up_to_the_byte_where_its_connection_broke(long_text):
    cuts = {3: 600_000, 4: 600_000, 5: 1_000_001, 6: 2_500_000}  # the first two answers tell size and kind
    with serving({"x.txt": long_text}, False, lambda _, count: cuts.get(count)) as (url, seen):
        assert texts_of(f"{url}/x.txt") == long_text
    assert len(seen) == 7


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("ranges", [True, False])
def test_file_that_always_breaks_off_ends_in_a_line_and_leaves_no_data(tmp_path, kind, ranges):
    path = tmp_path / f"x.{kind}"
    write = {"parquet": write_parquet, "txt": lambda path, texts: path.write_text("".join(texts))}
    write.get(kind, write_jsonl)(path, DOCUMENTS * 300)
    body, half = path.read_bytes(), path.stat().st_size // 2
    with serving({path.name: body}, ranges, lambda first, _: half if first <= half else None) as (url, seen):
        message = refused(tmp_path / "data", f"--input={url}/{path.name}", tokenizer="bpe" if kind == "txt" else "byte")
    no_ranges = kind == "parquet" and not ranges
    how = {(True, True): " cannot be read", (False, True): " can only be read in parts"}
    how = how.get((ranges, kind == "parquet" or ranges), ", whose server sends it from its start alone, cannot be read")
    assert message.startswith(f"{url}/{path.name}{how}")
    assert no_ranges or f"{half:,} of {len(body):,} bytes" in message
    assert {path.name for path in tmp_path.rglob("*.bin")} == set()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_is_another_one_where_it_is_read_on_ends_in_a_line(tmp_path, ranges):
    """Else its shards would hold the start of one and the rest of the other."""
    contents = {"x.txt": b"a line of the first\n" * 300_000}

    def cut(first, count):
        if first or count < 3:  # the file is asked for, then its head is read
            return None
        contents["x.txt"] = b"a line of another\n" * 400_000
        return 3_000_000

    with serving(contents, ranges, cut) as (url, _):
        message = refused(tmp_path / "data", f"--input={url}/x.txt", tokenizer="byte")
    assert message == f"{url}/x.txt has changed since it was found; repeat the command"
    assert not list((tmp_path / "data").glob("*.bin"))


def test_parquet_is_read_in_parts(tmp_path):
    others = [os.urandom(30_000).hex() for _ in DOCUMENTS]
    table = pyarrow.table({"a": others, "text": DOCUMENTS, "z": others})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", compression="none")
    body = (tmp_path / "x.parquet").read_bytes()
    with serving({"x.parquet": body}) as (url, seen):
        run(tmp_path / "data", f"--input={url}/x.parquet", "--val_fraction=0.3")
    starts = sorted(int(asked[6:-1]) for *_, asked in seen if asked)
    assert (
        starts[0] > 60_000 * len(DOCUMENTS) and starts[-1] > len(body) - 100_000
    )  # the text's column, and the file's end


@pytest.mark.parametrize(("status", "words"), [
    (404, "404"), (403, "set the credentials"), (401, "set the credentials"), (500, "check the network"),
])  # fmt: skip
def test_refusal_of_a_web_server_ends_in_a_line_and_leaves_no_folder(tmp_path, status, words):
    with serving({"x.txt": b"a text"}, status=lambda *_: status) as (url, seen):
        message = refused(tmp_path / "data", f"--input={url}/x.txt?{SECRET}")
    assert words in message and str(status) in message and "s3cr3t" not in message
    assert len(seen) == 1 and not (tmp_path / "data").exists()


def test_server_that_fails_for_a_while_is_asked_again_and_one_that_refuses_is_not(tmp_path, long_text):
    for status, n_asked in ((503, 5), (403, 3)):
        answers = iter([None, None, status, status])
        with serving({"x.txt": long_text}, status=lambda *_, answers=answers: next(answers, None)) as (url, seen):
            if status == 503:
                assert texts_of(f"{url}/x.txt") == long_text
            else:
                with pytest.raises(UserError, match="403"):
                    texts_of(f"{url}/x.txt")
        assert len(seen) == n_asked


@pytest.mark.parametrize(("where", "words"), [
    ("odd://x/y.txt", "Protocol not known: odd); use https, s3"), ("memory://none/x.txt", "names no file (/none/x.txt); check the name"),
    ("memory://none/*.txt", "names no file"), ("http://127.0.0.1:9/x.txt", "check the network"),
    ("https://[x/y.txt", "is no URL"), ("nostore://bucket/x.txt", "needs nosuchpackage; install it with: pip install"),
])  # fmt: skip
def test_url_that_cannot_be_read_ends_in_a_line(tmp_path, monkeypatch, where, words):
    monkeypatch.setitem(known_implementations, "nostore", {"class": "nosuchpackage.X", "err": "?"})
    assert words in refused(tmp_path / "data", f"--input={where}")
    assert not (tmp_path / "data").exists()


def test_reason_of_a_library_is_one_bounded_line(tmp_path):
    told = str(remote._told(ValueError("odd\nwords " * 999), "x", "zip://x"))
    assert "\n" not in told and "odd words" in told and len(told) < 400 and told.endswith(remote.COPY)


def test_scheme_of_a_url_may_be_in_capitals_and_a_file_on_localhost(tmp_path):
    (path := tmp_path / "a b.txt").write_text("text")
    for url in (f"file://{path}", f"FILE://{path}", f"file://localhost{path}", f"file://{str(path).replace(' ', '%20')}"):
        assert files.find_files(url, tmp_path / "data")[0] == [path]
    with serving({"x.txt": b"a text"}) as (url, _):
        found = files.find_files(f"{url.replace('http', 'HTTP')}/x.txt", tmp_path / "data")[0]
        assert [str(file) for file in found] == [f"{url}/x.txt"]


def test_glob_of_a_web_server_takes_no_query():
    with pytest.raises(UserError, match=r"^input http://h/\*.txt\?\.\.\.\w{4} is a glob with a query, .*; name each file") as error:
        files.find_files(f"http://h/*.txt?{SECRET}", "none")
    assert "s3cr3t" not in str(error.value)


def test_a_url_may_have_a_space():
    with serving({"a b.txt": b"a text"}) as (url, _):
        assert texts_of(f"{url}/a b.txt") == texts_of(f"{url}/a%20b.txt") == b"a text"


# ---- the same input again


def test_second_run_names_a_file_that_was_replaced_by_one_of_the_same_size(tmp_path, capsys):
    contents = {"x.txt": b"a text " * 99}
    with serving(contents) as (url, _):
        for change, words in (
            (b"a text ", None),
            (b"b text ", "names or sizes of files, or etags"),
            (b"text ", "bytes 693"),
        ):
            contents["x.txt"] = change * 99
            run(tmp_path / "data", f"--input={url}/x.txt")
            printed = capsys.readouterr().out
            assert ("its input has changed since: " in printed) == (words is not None) and (words or "") in printed
    run(tmp_path / "data", f"--input={url}/x.txt")  # the server is gone
    printed = capsys.readouterr().out
    assert "is already prepared" in printed and printed.count("whether its input has changed is unknown: ") == 1


def test_remote_file_that_changes_while_it_is_read_is_told(tmp_path, capsys, monkeypatch):
    contents, encoded = {"x.txt": b"a text " * 99}, prepare.encoded

    def changing(*args):
        yield from encoded(*args)
        contents["x.txt"] = b"b text " * 99

    monkeypatch.setattr(prepare, "encoded", changing)
    with serving(contents) as (url, _):
        run(tmp_path / "data", f"--input={url}/x.txt")
    assert "1 change of the input while it was read (names or sizes of files, or etags)" in capsys.readouterr().out


# ---- secrets, memory, processes


def test_secrets_of_a_url_are_in_no_file_and_no_message(tmp_path, long_text, capsys, monkeypatch):
    with serving({"x.txt": long_text}, cut=lambda first, _: 9999 if first < 9999 else None) as (url, seen):
        where = f"--input={url.replace('//', '//me:p%40ss@')}/x.txt?{SECRET}"
        monkeypatch.setattr("sys.argv", ["prepare.py", where])
        run(tmp_path / "data", where)
    with pytest.raises(UserError) as gone:
        run(tmp_path / "other", where)
    run(tmp_path / "data", where)
    out = capsys.readouterr().out
    assert "breaks off" in out and "is unknown" in out and all(path.endswith(SECRET) for _, path, _ in seen)
    written = [
        text for p in tmp_path.rglob("*") for text in (str(p), p.read_bytes().decode() if p.suffix == ".json" else "")
    ]
    for secret in ("s3cr3t", "p%40ss", "p@ss"):
        assert not [text for text in (out, str(gone.value), *written) if secret in text]


def test_memory_does_not_grow_with_a_remote_file():
    text = b"a line of text\n" * 6_000_000
    with serving({"x.txt": text}) as (url, _):
        [file], _ = files.find_files(f"{url}/x.txt", None)
        tracemalloc.start()
        assert sum(map(len, files.TextFile(file).blocks())) == len(text)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
        tracemalloc.stop()


def test_command_ends_with_exit_code_2_and_one_line_where_its_connection_breaks_for_good(tmp_path, long_text):
    code = "import runpy, text.remote as r; r.WAITS = (0,); runpy.run_path('prepare.py', run_name='__main__')"
    with serving({"x.txt": long_text}, cut=lambda *_: 2_000_000) as (url, _):
        argv = [f"--input={url}/x.txt", f"--data_dir={tmp_path}/data", "--tokenizer=byte", "--workers=2"]
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("cannot be read") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "data/meta.json").exists()


# ---- clean.py


@pytest.fixture
def no_picture():
    with without_matplotlib():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("no_picture")
def test_cleaning_reads_a_url_in_its_processes_and_writes_no_secret(tmp_path):
    pytest.importorskip("datatrove", reason="datatrove is absent: pip install '.[clean]'")
    pages = {"page.html": page(document("page"))}
    for name in "abc":
        pages[f"{name}.jsonl"] = "".join(json.dumps({"text": document(f"{name}{i}")}) + "\n" for i in range(3))
    for name, text in pages.items():
        (tmp_path / "www").mkdir(exist_ok=True)
        (tmp_path / "www" / name).write_text(text)
    found, local = {}, tmp_path / "www"
    with serving(contents_of(local, "www"), cut=lambda first, _: 500 if first < 500 else None) as (url, _):
        secret = url.replace("//", "//me:pass@")
        inputs = {"local": local, "remote": f"{secret}/www/*.*", "one": f"{url}/www/a.jsonl?{SECRET}"}
        for out, where in inputs.items():
            clean_up(tmp_path / out, where, "--steps=html,fix,exact", "--parts=2")
            paths = sorted((tmp_path / out / "text").iterdir())
            found[out] = [json.loads(line)["text"] for path in paths for line in gzip.open(path, "rt")]
    assert len(found["local"]) == 10 and found["remote"] == found["local"] and len(found["one"]) == 3
    written = [path.read_bytes() for out in ("remote", "one") for path in (tmp_path / out).rglob("*") if path.is_file()]
    assert not [data for data in written if b"me:pass" in data or b"s3cr3t" in data]


def clean_up(folder, where, *argv):
    clean.main(config.load(clean.Settings, [f"--input={where}", f"--clean_dir={folder}", "--workers=2", *argv]))


@pytest.mark.usefixtures("no_picture")
def test_cleaning_reads_a_remote_file_by_one_task_unless_told_otherwise(tmp_path, monkeypatch):
    pytest.importorskip("datatrove", reason="datatrove is absent: pip install '.[clean]'")
    monkeypatch.setattr(clean, "TASK_BYTES", 100)
    with serving({"x.txt": document("a").encode() * 9}) as (url, seen):
        clean_up(tmp_path / "out", f"{url}/x.txt", "--steps=length")
    assert len(seen) == 2  # for its size and its text


def test_cleaning_over_a_connection_that_breaks_for_good_ends_in_a_line(tmp_path):
    pytest.importorskip("datatrove", reason="datatrove is absent: pip install '.[clean]'")
    with serving({"x.txt": document("a").encode() * 9}, cut=lambda *_: 500) as (url, _):
        with pytest.raises(UserError, match="x.txt cannot be read .*500 of") as caught:
            clean_up(tmp_path / "out", f"{url}/x.txt", "--steps=exact", "--parts=2")
    assert "\n" not in str(caught.value) and not (tmp_path / "out/text").exists()


def test_slurm_is_not_given_a_secret():
    argv = [f"--input=https://host/x.jsonl?{SECRET}", "--executor=slurm", "--slurm_partition=p"]
    with pytest.raises(UserError, match="has a password or query, which Slurm's jobs would find in a file"):
        config.load(clean.Settings, argv)
