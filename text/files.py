"""Files of any kind to blocks of UTF-8 text: found, fetched, decompressed, decoded."""

import base64
import bz2
import codecs
import collections
import glob
import hashlib
import http.client
import io
import lzma
import os
import re
import shutil
import sys
import urllib.parse
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

from config import UserError

PIECE_BYTES = 1 << 20  # files are read in blocks of about this size
HEAD_BYTES = 1 << 14  # a file's kind shows in them
JSON_LINES, TEXTS = (".jsonl", ".ndjson", ".json"), (".txt", ".md")
PACKED = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ\0", ".bz2": b"BZh", ".zst": b"\x28\xb5\x2f\xfd"}  # by first bytes
MARKS = {
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip
ENCODINGS = (
    "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "gb18030", "big5", "cp932", "euc-jp", "cp949", "koi8-r",
    "cp1251", "cp1252", "cp1250",
)  # fmt: skip
# Frequent characters beyond ASCII of Chinese, Japanese, Korean, Russian, and western and central European languages.
FREQUENT = set(
    "的一是不了在人有我他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后"
    "這來國個說們為時會過學對後裡還從，。、のにはをたがでてとしれさるいあなもこまっすらんーアインスト"
    "이다는에의을가고를하한로지도서은어사리자기나라大人一日年中"
    "оеаинтсрвлкмдпуяыьгзбчй"
    "éèàçêâîôûëïäöüßñóíáúãõåøæ’“”–—«»ąęłśżćńźčšžřěůýőű"
)  # fmt: skip
CONTROL = bytes([*range(8), *range(14, 27)])  # characters that text does not have


# ---- files by name


def ending_of(name):
    """(the ending of a file's name in small letters, without its packing; the packing's ending, or "")."""
    stem, ending = os.path.splitext(os.path.basename(name).lower())
    return (os.path.splitext(stem)[1], ending) if ending in PACKED else (ending, "")


def shown(path):
    """A path as text that can be printed whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def read_text(setting, name):
    """The text that a setting gives, or reads from FILE:path or, as -, from stdin; UserError where it has none.

    name: the setting's name.
    """
    where = f"{name} file {setting[5:]}" if setting.startswith("FILE:") else "stdin" if setting == "-" else name
    try:
        if setting.startswith("FILE:"):
            text = Path(setting[5:]).read_bytes().decode("utf-8")  # keeps line ends
        else:
            # Python keeps bytes that it cannot decode, in the C locale all but ASCII, as halves of surrogate pairs.
            text = sys.stdin.read() if setting == "-" else setting
            text = text.encode("utf-8", "surrogateescape").decode("utf-8")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{where} cannot be read as UTF-8 text ({error})") from error
    if setting and not text:
        raise UserError(f"{where} is empty; leave --{name} out")
    return text


def find_files(where, folder, endings=(*TEXTS, *JSON_LINES, ".parquet")):
    """(the files that a path, folder, glob or URL names, sorted; {what a folder holds besides: how many}).

    endings: of the files that a folder is searched for. A URL is fetched below the folder that is given.
    """
    if is_url(where):
        return [download(where, folder / "download")], {}
    if os.path.isdir(where):
        found, left_out = _files_of_folder(where, folder, endings)
        remedy = f"it must hold {', '.join(endings)}; for other text, give a glob such as --input='{where}/**/*'"
    else:
        found, left_out = {Path(p) for p in [where, *glob.glob(where, recursive=True)] if os.path.isfile(p)}, {}
        remedy = "check the path, and put a glob in quotes"
    if not found:
        what = "holds no file of text" if os.path.isdir(where) else "names no file"
        raise UserError(f"input {where} {what}; {remedy}")
    return sorted(found), left_out


def _files_of_folder(where, data_dir, endings):
    """A folder's files of these endings, without hidden ones and data_dir; linked folders are followed, each once."""
    found, left_out, visited = [], collections.Counter(), {os.path.realpath(where), os.path.realpath(data_dir)}

    def count_error(_):
        left_out["folders that cannot be read"] += 1

    for here, folders, names in os.walk(where, onerror=count_error, followlinks=True):
        visible = sorted(name for name in folders if not name.startswith("."))
        left_out["hidden folders"] += len(folders) - len(visible)
        folders[:] = []
        for name in visible:
            if (real := os.path.realpath(os.path.join(here, name))) not in visited:
                visited.add(real)
                folders.append(name)
        for name in names:
            ending, packing = ending_of(name)
            if name.startswith("."):
                left_out["hidden files"] += 1
            elif ending not in endings:
                left_out[f"{ending}{packing} files" if ending or packing else "files without an ending"] += 1
            elif os.path.isfile(path := os.path.join(here, name)):
                found.append(Path(path))
            else:
                left_out["links to nothing, or special files"] += 1
    return found, {f"{what}, left out": count for what, count in left_out.items() if count}


# ---- URLs


def is_url(where):
    """Whether an input is a URL."""
    return re.match(r"\w+://", where) is not None


def bare_url(url):
    """A URL without user, password, query and fragment."""
    scheme, _, rest = re.split(r"[?#]", url)[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def public(where):
    """An input as it may be shown: a URL without user, password and query, but with 4 digits of the query's hash."""
    if not is_url(where):
        return where
    try:
        parts = urllib.parse.urlsplit(where)
    except ValueError as error:
        raise UserError(f"input is no URL ({error}); check it") from None  # the cause may show a secret
    mark = f"?...{hashlib.sha256(parts.query.encode()).hexdigest()[:4]}" if parts.query else ""
    return bare_url(where) + mark


def download(url, folder):
    """The path of a URL's file, which is fetched into a folder unless it is there."""
    shown_url, parts = public(url), urllib.parse.urlsplit(url)
    name = parts.path.rstrip("/").rpartition("/")[2]
    name = name if name.strip(".") else "download.txt"
    path = folder / hashlib.sha256(shown_url.encode()).hexdigest()[:8] / name
    if path.exists():
        return path
    print(f"fetching {shown_url}", flush=True)
    partial, (login, _, host) = path.with_name(name + ".part"), parts.netloc.rpartition("@")
    logs_in = login and parts.scheme in ("http", "https")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        request = urllib.request.Request(parts._replace(netloc=host).geturl() if logs_in else url)
        if logs_in:  # at this host alone, wherever it redirects
            token = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        with urllib.request.urlopen(request, timeout=60) as response, open(partial, "wb") as file:
            if response.headers.get_content_type() == "text/html" and ending_of(name)[0] not in (".html", ".htm"):
                raise ValueError("it is a web page, not the file itself")
            shutil.copyfileobj(response, file)
            if getattr(response, "length", None):  # bytes that the server promised and did not send
                raise ConnectionError(f"cut short {response.length:,} bytes before its end")
    except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        why = str(error).replace(parts.query, "...") if parts.query else str(error)
        rule = f"{shown_url} could not be fetched ({why})"
        raise UserError(f"{rule}; get it by hand and set --input= to it") from None  # the cause may show a secret
    os.replace(partial, path)
    return path


# ---- content


@dataclass
class Tally:
    """The bytes that were read, those of them that are no text in their encoding, and a sample with some of these."""

    seen: int = 0
    bad: int = 0
    sample: bytes = b""

    def add(self, chunk, bad):
        """Counts a chunk that has so many bad bytes."""
        self.seen += len(chunk)
        self.bad += bad
        if bad and not self.sample:
            self.sample = chunk

    def check(self, what, encoding, slack=0):
        """UserError, with the likely encoding, where more than slack bytes and 1 % of the text are bad."""
        if self.bad > max(slack, 0.01 * self.seen):
            likely = likely_encoding(self.sample)
            remedy = f"it looks like {likely}: set --encoding={likely}" if likely else "name its --encoding="
            rule = f"{what} is not {encoding} text: {self.bad / self.seen:.1%} of its bytes are invalid"
            raise UserError(f"{rule}; {remedy}, or leave it out")


class TextFile:
    """A file's text, whose kind its first bytes and its name's ending tell.

    is_parquet: for pyarrow to read; is_json: an object a line; is_binary: no text; is_empty. total: a Tally of several.
    """

    def __init__(self, path, encoding=None, total=None):
        self.path, self.total = path, total or Tally()
        ending = ending_of(str(path))[0]
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
        self.packing = next((packing for packing, magic in PACKED.items() if head.startswith(magic)), None)
        self.is_parquet = ending == ".parquet" or head.startswith(b"PAR1")
        self.content = head if len(head) < HEAD_BYTES and not self.packing else None  # a small file is opened once
        head = next(self.chunks(HEAD_BYTES), b"") if self.packing else head
        self.mark = next((mark for mark in MARKS if head.startswith(mark)), b"")
        self.encoding = MARKS.get(self.mark) or encoding or "utf-8"
        self.is_empty = not self.is_parquet and head == self.mark
        self.is_json = ending in JSON_LINES
        n_control = len(head) - len(head.translate(None, CONTROL))
        is_wide = self.encoding.lower().startswith(("utf-16", "utf16", "utf-32", "utf32"))
        self.is_binary = n_control > 0.01 * len(head) and not is_wide and likely_encoding(head) is None

    def blocks(self):
        """Yields the text as UTF-8 bytes, a character never cut; UserError where over 1 % is invalid."""
        tally, chunks = Tally(), self.chunks(PIECE_BYTES, len(self.mark))
        decode = _utf8_blocks if codecs.lookup(self.encoding).name == "utf-8" else _decoded_blocks
        for chunk, block, n_bad in decode(chunks, self.encoding):
            tally.add(chunk, n_bad)
            self.total.add(chunk, n_bad)
            if tally.seen > 16 << 20:
                tally.check(shown(self.path), self.encoding)
            yield block
        tally.check(shown(self.path), self.encoding, slack=32)

    def chunks(self, size, skip=0):
        """Yields the file's bytes, decompressed, in chunks of at least size, without the first skip; EOFError if damaged."""
        with io.BytesIO(self.content) if self.content is not None else open(self.path, "rb") as file:
            read = iter(lambda: file.read(size), b"") if self.packing is None else _unpacked(file, self.packing, size)
            for chunk in read:
                if kept := chunk[skip:]:
                    yield kept
                skip = max(0, skip - len(chunk))


def likely_encoding(sample):
    """The name of the encoding in which some bytes, not ASCII or UTF-8, are the most plausible text, or None."""
    best, likely = 0.2, None
    for encoding in ENCODINGS:
        try:
            text = codecs.getincrementaldecoder(encoding)("strict").decode(sample[:PIECE_BYTES])
        except UnicodeDecodeError:
            continue
        wide = encoding.startswith("utf")
        others = text if wide else re.sub("[\0-\x7f]", "", text)
        n_good = sum(c in FREQUENT or (wide and (c.isalpha() or c == " ") and c.isascii()) for c in others)
        if len(others) >= 8 and n_good / len(others) > best:
            best, likely = n_good / len(others), encoding
    return likely


def _utf8_blocks(chunks, _):
    """Yields (chunk, the UTF-8 bytes of its whole characters, how many of its bytes are invalid or NUL)."""
    rest = b""  # the start of a character that the next chunk completes
    for chunk in chunks:
        data, bad = rest + chunk, chunk.count(0)
        if not data.isascii():
            try:
                end = codecs.utf_8_decode(data, "strict", False)[1]
            except UnicodeDecodeError:
                text, end = codecs.utf_8_decode(data, "ignore", False)
                bad += end - len(text.encode())
            data, rest = data[:end], data[end:]
        yield chunk, data, bad
    if rest:
        yield b"", rest, len(rest)


def _decoded_blocks(chunks, encoding):
    """The same for a text in another encoding."""
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    for chunk in chunks:
        text = decoder.decode(chunk)
        yield chunk, text.encode("utf-8", errors="replace"), text.count("\ufffd") + text.count("\0")
    if text := decoder.decode(b"", True):
        yield b"", text.encode("utf-8", errors="replace"), len(text)


def _unpacked(file, packing, size):
    """The decompressed bytes of an open file, in chunks of at least size; EOFError, at last, where it is damaged."""
    make, damage = _decompressor(packing)
    decompressor, parts, held = make(), [], 0
    try:
        while data := file.read(4096):  # little at once: what it becomes may be thousands of times larger
            while data:
                if decompressor.eof:  # files may be several compressed ones, end to end, and end in zeros
                    if not (data := data.lstrip(b"\0")):
                        break
                    decompressor = make()
                parts.append(decompressor.decompress(data))
                held += len(parts[-1])
                data = decompressor.unused_data if decompressor.eof else b""
            if held >= size:
                yield b"".join(parts)
                parts, held = [], 0
        error = None if decompressor.eof else EOFError("cut short")
    except damage as cause:
        error = EOFError(str(cause))
    if parts:
        yield b"".join(parts)
    if error:
        raise error


def _decompressor(packing):
    """(a function that makes a decompressor, the exception that it raises)."""
    if packing == ".zst":
        try:
            from compression import zstd  # Python 3.14
        except ImportError:
            try:
                import zstandard
            except ImportError as error:
                raise UserError("files in .zst need zstandard; install it with: pip install zstandard") from error
            return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj, zstandard.ZstdError
        option = {zstd.DecompressionParameter.window_log_max: 31}
        return lambda: zstd.ZstdDecompressor(options=option), zstd.ZstdError
    return {
        ".gz": (lambda: zlib.decompressobj(31), zlib.error),
        ".xz": (lambda: lzma.LZMADecompressor(memlimit=1 << 30), lzma.LZMAError),
        ".bz2": (bz2.BZ2Decompressor, OSError),
    }[packing]
