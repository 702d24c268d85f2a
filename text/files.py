"""Files of any kind to blocks of UTF-8 text: found, decompressed, decoded."""

import bz2
import codecs
import collections
import glob
import io
import json
import lzma
import os
import re
import sys
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

from config import UserError
from text.remote import RemoteFile, is_url, list_files, public

PIECE_BYTES = 1 << 20  # files are read in blocks of about this size
TEXT_BYTES = 1 << 30  # most text of a setting's file: /dev/zero has no end
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
    return os.fsencode(str(path)).decode("utf-8", errors="backslashreplace")


def open_file(path, size=PIECE_BYTES):
    """A local or remote file, open for reads of about size bytes."""
    return path.open(size) if isinstance(path, RemoteFile) else open(path, "rb")


def unescaped(text):
    """A setting's text with its line breaks, written as \\n."""
    return text.replace("\\n", "\n")


def texts_of(setting, name):
    """The texts of a setting that is one text, or a JSON list of texts; UserError where it is another list."""
    try:
        texts = json.loads(setting) if setting.startswith("[") else [unescaped(setting)]
    except ValueError:  # text that begins as JSON does, such as [INST]
        texts = [unescaped(setting)]
    if not (texts and all(isinstance(text, str) and text for text in texts)):
        example = f"""--{name}='["User:", "Bot:"]'"""
        raise UserError(f"{name} is {setting}; it must be text, or a JSON list of texts, as in {example}")
    return texts


def read_text(setting, name):
    """The text that a setting gives, or reads from FILE:path or, as -, from stdin; UserError where it has none.

    name: the setting's name.
    """
    where = f"{name} file {setting[5:]}" if setting.startswith("FILE:") else "stdin" if setting == "-" else name
    try:
        if setting.startswith("FILE:"):
            with open(setting[5:], "rb") as file:
                data = file.read(TEXT_BYTES + 1)
            if len(data) > TEXT_BYTES:
                raise UserError(f"{where} has more than {TEXT_BYTES:,} bytes; give less text")
            text = data.decode("utf-8")  # keeps line ends
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

    folder: is not searched; endings: of the files that a folder is searched for. Remote files are not read yet.
    """
    if is_url(where):  # schemes are the same in capitals
        where = re.sub(r"^\w+", lambda scheme: scheme[0].lower(), where)
    if where.startswith("file://"):
        where = urllib.request.url2pathname(re.sub("^file://(localhost(?=/))?", "", where))
    is_folder = os.path.isdir(where)
    if is_url(where):
        listed, is_folder = list_files(where)
        reasons = {file: _why_left_out(below.strip("/"), endings if is_folder else None) for file, below in listed}
        found = [file for file in reasons if not reasons[file]]
        left_out = collections.Counter(reasons.values()) if is_folder else {}  # a glob does not count them anywhere
    elif is_folder:
        found, left_out = _files_of_folder(where, folder, endings)
    else:
        paths = {Path(path) for path in [where, *glob.glob(where, recursive=True)] if os.path.isfile(path)}
        found, left_out = sorted(paths), {}
    if not found:
        where, what, remedy = public(where), "names no file", "check the path, and put a glob in quotes"
        if is_folder:
            what = "holds no file of text"
            remedy = f"it must hold {', '.join(endings)}; for other text, give a glob such as --input='{where}/**/*'"
        raise UserError(f"input {where} {what}; {remedy}")
    left_out = {f"{why}, left out": count for why, count in left_out.items() if why and count}
    return found, left_out


def _why_left_out(path, endings):
    """Why a file below a folder is left out; None where it is not. endings: those that are read, None for any."""
    ending, packing = ending_of(path)
    if any(part.startswith(".") for part in path.split("/")):
        return "hidden files"
    if endings and ending not in endings:
        return f"{ending}{packing} files" if ending or packing else "files without an ending"
    return None


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
            if why := _why_left_out(name, endings):
                left_out[why] += 1
            elif os.path.isfile(path := os.path.join(here, name)):
                found.append(Path(path))
            else:
                left_out["links to nothing, or special files"] += 1
    return sorted(found), left_out


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
        with open_file(path, HEAD_BYTES) as file:
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
        with io.BytesIO(self.content) if self.content is not None else open_file(self.path, size) as file:
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
        data = rest + chunk
        end, bad = _whole_characters(data)
        data, rest = data[:end], data[end:]
        yield chunk, data, bad + chunk.count(0)
    if rest:
        yield b"", rest, len(rest)


def _whole_characters(data):
    """(where the last whole UTF-8 character ends, how many bytes before it are invalid).

    Slice by slice: a decoded text takes up to four bytes a character, and of large ones much memory stays in use.
    """
    end, bad, n = 0, 0, 1
    while n and end < len(data):
        part = data[end : end + (1 << 16)]
        try:
            n = len(part) if part.isascii() else codecs.utf_8_decode(part, "strict", False)[1]
        except UnicodeDecodeError:
            text, n = codecs.utf_8_decode(part, "ignore", False)
            bad += n - len(text.encode())
        end += n
    return end, bad


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
