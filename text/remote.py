"""Files at a URL: found, named without secrets, and read where they are."""

import base64
import contextlib
import glob
import hashlib
import io
import re
import time
import types
import urllib.parse
import urllib.request
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from config import UserError

WAITS = (1, 3, 10, 30)  # seconds before each new attempt at the byte where a connection broke
COPY = "copy it to this machine and give its path"
LONGEST_REASON = 300  # characters of a library's reason that are shown
READ_AHEAD = 16  # times the size of a caller's reads
VERSIONS = ("ETag", "etag", "blob_id", "LastModified", "last_modified", "mtime", "created")  # stores' words for it


# ---- URLs as text


def is_url(where):
    """Whether an input is a URL."""
    return re.match(r"\w+://", where) is not None


def is_web(url):
    """Whether a URL is read by HTTP."""
    return url.startswith(("http://", "https://"))


def bare_url(url):
    """A URL without user, password, query and fragment."""
    return re.sub(r"(?<=://)[^/]*@", "", re.split(r"[?#]", url)[0])


def public(where):
    """An input as it may be shown: a URL without user, password and query, but with 4 digits of the query's hash."""
    if not is_url(where):
        return where
    query = _parts(where).query
    return bare_url(where) + (f"?...{hashlib.sha256(query.encode()).hexdigest()[:4]}" if query else "")


def _parts(url):
    try:
        return urllib.parse.urlsplit(url)
    except ValueError as error:
        raise UserError(f"input is no URL ({error}); check it") from None  # the cause may show a secret


# ---- files


@dataclass(frozen=True)
class RemoteFile:
    """A file in a store. source: the URL that named it, with any secrets; path: its place in the store, without them.

    size: its bytes, None where the store does not tell; version: what marks its content, such as an etag.
    """

    source: str = field(repr=False)
    path: str
    size: int | None = None
    version: str = ""

    def __str__(self):
        return self.path if is_url(self.path) else f"{self.source.partition('://')[0]}://{self.path}"

    @property
    def place(self):
        """The path by which it is sorted and its documents are split."""
        return PurePosixPath(urllib.parse.unquote(str(self)) if is_web(self.path) else str(self))

    def stat(self):
        """Size, and 0 for the time, as of a local file."""
        return types.SimpleNamespace(st_size=self.size or 0, st_mtime=0)

    def open(self, size):
        """The file, open for reads of about size bytes; errors of the store are UserErrors."""
        return io.BufferedReader(_Stream(self, READ_AHEAD * size), 1 << 16)


def list_files(where):
    """([(RemoteFile, its path below the folder that was searched)] of a URL, whether that is a whole folder)."""
    try:
        return _listed(where)
    except UserError:
        raise
    except Exception as error:  # each store's library has its own
        raise _told(error, public(where), where) from None  # the cause may show a secret


def _listed(where):
    is_glob = re.search(r"[*[]", _parts(bare_url(where)).path) if is_web(where) else glob.has_magic(where)
    if is_web(where) and not is_glob:
        return [(_asked(RemoteFile(where, bare_url(where))), "")], False
    if is_web(where) and _parts(where).query:
        raise UserError(
            f"input {public(where)} is a glob with a query, or has a ? in it; name each file, or use * alone"
        )
    from fsspec.core import url_to_fs

    store, path = url_to_fs(where)
    store.invalidate_cache()
    info = {"type": "directory"} if is_glob else store.info(path)
    is_folder = info["type"] == "directory"
    infos = (store.glob if is_glob else store.find)(path, detail=True) if is_folder else {path: info}
    above = re.split(r"[*?[]", path)[0].rpartition("/")[0] if is_glob else path
    names = [name for name, info in infos.items() if info["type"] != "directory"]
    files = [(_file(where, name, infos[name]), name.removeprefix(above)) for name in names]
    return sorted(files, key=lambda pair: pair[0].place), is_folder and not is_glob


def _file(where, name, info):
    """A RemoteFile from what a store tells of it."""
    if is_web(name):
        return _asked(RemoteFile(where, bare_url(name)))
    return RemoteFile(where, name, info["size"], next((str(info[key]) for key in VERSIONS if info.get(key)), ""))


def _asked(file):
    """A file with what its web server tells; ValueError where the server answers by a page."""
    with _response(file) as response:
        is_page = response.headers.get_content_type() == "text/html"
        if is_page and not file.path.lower().endswith((".html", ".htm", ".xhtml")):
            raise ValueError("it is a web page, not the file itself")
        return replace(file, size=response.length, version=_version(response))


def _version(response):
    """What marks a file's content in a web server's answer, "" where it tells nothing."""
    return response.headers["ETag"] or response.headers["Last-Modified"] or ""


def _response(file, position=0):
    """A web server's answer, from a byte on where it knows ranges (status 206), else from the start."""
    parts = _parts(file.source)
    url = f"{file.path}?{parts.query}" if parts.query else file.path
    request = urllib.request.Request(url.replace(" ", "%20"))
    if position:
        request.add_header("Range", f"bytes={position}-")
    if login := parts.netloc.rpartition("@")[0]:  # for this host alone, wherever it redirects
        token = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return urllib.request.urlopen(request, timeout=60)


class _Stream(io.RawIOBase):
    """A file's bytes; where the connection breaks, the file is opened again at the byte that comes next."""

    def __init__(self, file, read_ahead):
        self.file, self.read_ahead, self.position, self.opened, self.is_random = file, read_ahead, 0, None, False
        self.sends_parts = True  # a server that does not is read from the start again

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=0):
        if whence == 2 and self.file.size is None:
            raise UserError(f"{self.file} can only be read with its size, which the server does not tell; {COPY}")
        position = offset + (0, self.position, self.file.size)[whence]
        if position != self.position:
            self.position, self.is_random = position, True
            if self.opened is not None and self.opened.seekable():
                self.opened.seek(position)
            else:
                self._drop()
        return position

    def readinto(self, buffer):
        waits = iter(WAITS)
        while self.file.size is None or self.position < self.file.size:
            try:
                self.opened = self.opened or self._open()
                data = self.opened.read(min(len(buffer), self.read_ahead))
                if not data and self.file.size is not None:
                    raise ConnectionError(f"the store sends {self.position:,} of {self.file.size:,} bytes")
                buffer[: len(data)] = data
                self.position += len(data)
                return len(data)
            except UserError:
                raise
            except Exception as error:  # each store's library has its own
                self._drop()
                wait = None if _remedy(error) else next(waits, None)
                how = "" if self.sends_parts else ", whose server sends it from its start alone,"
                if wait is None:
                    raise _told(error, f"{self.file}{how}", self.file.source) from None  # the cause may show a secret
                print(f"{self.file}{how} breaks off at byte {self.position:,}: opened again in {wait} s", flush=True)
                time.sleep(wait)
        return 0

    def _open(self):
        if not is_web(self.file.path):
            from fsspec.core import url_to_fs

            store = url_to_fs(self.file.source)[0]  # anew in a process that was forked: connections cannot be shared
            opened = store.open(self.file.path, "rb", block_size=self.read_ahead)
            opened.seek(self.position)
            return opened
        opened = _response(self.file, self.position)
        if (found := _version(opened)) and self.file.version and found != self.file.version:
            raise UserError(f"{self.file} has changed since it was found; repeat the command")
        self.sends_parts = not self.position or opened.status == 206
        if not self.sends_parts:
            if self.is_random:
                raise UserError(f"{self.file} can only be read in parts, which its server does not send; {COPY}")
            for start in range(0, self.position, 1 << 20):
                opened.read(min(1 << 20, self.position - start))
        return opened

    def _drop(self):
        opened, self.opened = self.opened, None
        if opened is not None:
            with contextlib.suppress(Exception):  # it is broken already
                opened.close()

    def close(self):
        self._drop()
        super().close()


# ---- errors


def _remedy(error):
    """What helps where another attempt does not; None where it may help."""
    response = getattr(error, "response", None)
    codes = [getattr(*place, None) for place in ((error, "code"), (error, "status"), (response, "status_code"))]
    code = next((code for code in codes if isinstance(code, int)), 0)
    if isinstance(error, FileNotFoundError) or code in (404, 410):
        return "check the name"
    if isinstance(error, PermissionError) or code in (401, 403) or "credentials" in str(error):
        return "log in, or set the credentials, as docs/data.md says"
    if str(error).startswith("Protocol not known"):
        return "use https, s3, gs, hf or another that fsspec knows"
    if isinstance(error, (ValueError, NotImplementedError)) or (400 <= code < 500 and code not in (408, 429)):
        return COPY
    return None


def _told(error, what, source):
    """A UserError in place of an error of a store's library. what: an input or file; source: its URL."""
    if isinstance(error, ImportError):
        package = getattr(error.__cause__ or error, "name", None) or error
        return UserError(f"{what} needs {package}; install it with: pip install {package}")
    parts = _parts(source)
    why = " ".join(str(error).split()) or type(error).__name__
    for secret in filter(None, (parts.query, parts.netloc.rpartition("@")[0], parts.password)):
        why = why.replace(secret, "...").replace(urllib.parse.unquote(secret), "...")
    why = re.sub(r"(?<=://)[^/\s]*@|(?<=\?)[^\s'\")]+", "...", why)  # in URLs that a library writes otherwise
    why = why if len(why) <= LONGEST_REASON else f"{why[:LONGEST_REASON]}..."
    rule = "names no file" if isinstance(error, FileNotFoundError) else "cannot be read"
    return UserError(f"{what} {rule} ({why}); {_remedy(error) or f'check the network, or {COPY}'}")
