"""Token shards on disk, and meta.json, which describes them.

A shard is a 24-byte header and its tokens, uint16 or uint32. nanoGPT's raw train.bin, llm.c's and modded-nanogpt's
files are read as they are.
"""

import contextlib
import errno
import functools
import json
import os
import re
import struct
import threading
import zlib
from pathlib import Path

import numpy as np

from config import UserError
from foreign import COPY_AGAIN, check, is_regular, read_json

try:
    import resource
except ImportError:  # Windows
    resource = None

HEADER = struct.Struct("<8sIIQ")  # magic, version, bytes a token, tokens
MAGIC, VERSION = b"flatlm\0\0", 1
LLMC = {20240520: np.uint16, 20240801: np.uint32}  # magic of llm.c's GPT-2 and Llama 3 files, 256 int32 of header
BLOCK = 1 << 20  # tokens that one checksum covers
META_BYTES = 1 << 24  # largest meta.json that is read: checksums of 10**12 tokens fit
LARGEST_VOCABULARY = 1 << 24


class ShardWriter:
    """Writes a split as shards of shard_tokens tokens, under temporary names until finish().

    counts: {shard's name: tokens}; checksums: {shard's name: CRC-32 of each BLOCK of its tokens}.
    """

    def __init__(self, folder, split, dtype, shard_tokens):
        self.folder, self.split, self.dtype, self.shard_tokens = Path(folder), split, np.dtype(dtype), shard_tokens
        self.counts, self.checksums = {}, {}

    def write(self, tokens):
        """Appends an array of tokens."""
        with writing_to(self.folder):
            self._write(tokens)

    def _write(self, tokens):
        while len(tokens):
            if not self.counts or self.counts[self.name] == self.shard_tokens:
                self.name = f"{self.split}_{len(self.counts):06d}.bin"
                self.counts[self.name], self.checksums[self.name] = 0, []
                (self.folder / f"{self.name}.part").write_bytes(bytes(HEADER.size))
            count, sums = self.counts[self.name], self.checksums[self.name]
            part, tokens = np.split(tokens, [min(self.shard_tokens - count, BLOCK - count % BLOCK)])
            data = part.astype(self.dtype).tobytes()
            with open(self.folder / f"{self.name}.part", "ab") as file:
                file.write(data)
            if count % BLOCK == 0:
                sums.append(0)
            sums[-1] = zlib.crc32(data, sums[-1])
            self.counts[self.name] += len(part)

    def finish(self):
        """Writes the headers and renames the shards; returns {name: tokens}."""
        with writing_to(self.folder):
            for name, count in self.counts.items():
                partial = self.folder / f"{name}.part"
                with open(partial, "r+b", buffering=0) as file:
                    file.write(HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, count))
                    os.fsync(file.fileno())
                    if file.seek(0, os.SEEK_END) != HEADER.size + count * self.dtype.itemsize:
                        raise OSError(f"{partial} was changed by another program")
                os.replace(partial, self.folder / name)
        return self.counts


@contextlib.contextmanager
def refusing_system_errors(rule, remedy):
    """Turns the system's errors into a UserError: rule (error); remedy. With too many open files it has its own."""
    try:
        yield
    except OSError as error:
        remedy = "raise ulimit -n" if error.errno == errno.EMFILE else remedy
        raise UserError(f"{rule} ({error}); {remedy}") from error


def writing_to(folder):
    """A context for writing into a data folder, whose system errors become a UserError that names it."""
    remedy = "use another --data_dir, or make room and repeat the command"
    return refusing_system_errors(f"data_dir {folder} cannot be made or written to", remedy)


class Shard:
    """The tokens of a shard file, read anew by each slice.

    Not a memory map: where a mapped file is cut short, the system kills the process without a word. checksums: those of
    meta.json, where it has some.
    """

    def __init__(self, path, dtype, start, count, state, opened):
        """start: the first token's place in bytes; state: state_of the file; opened: a function that opens a path."""
        self.path, self.dtype, self.start, self.count = path, np.dtype(dtype), start, count
        self.checksums, self._state, self._opened = None, state, opened

    def __len__(self):
        return self.count

    def __getitem__(self, part):
        first, last, _ = part.indices(self.count)
        tokens = np.empty(max(0, last - first), self.dtype)
        self.read(first, tokens)
        return tokens

    def __array__(self, dtype=None, copy=None):
        return self[:].astype(dtype or self.dtype, copy=False)

    def prefetch(self, first, count):
        """Lets the system read tokens without waiting for them: a batch's windows then come from the disk together."""
        if hasattr(os, "posix_fadvise"):
            place, size = self.start + first * self.dtype.itemsize, count * self.dtype.itemsize
            file = self._open()
            os.posix_fadvise(file.fileno(), place, size, os.POSIX_FADV_WILLNEED)

    def read(self, first, out):
        """Fills an array of the shard's dtype with the tokens from index first on; UserError where the file changed."""
        place = self.start + first * self.dtype.itemsize
        file = self._open()  # held by a name here, else another thread might close it
        try:
            n_read = read_at(file, out, place)
            while n_read < out.nbytes and (more := read_at(file, out.view("u1")[n_read:], place + n_read)):
                n_read += more
            state = state_of(file)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if state != self._state:
            self._check_content(state)
        if n_read < out.nbytes:
            raise UserError(f"{self.path} cannot be read: {n_read} of {out.nbytes} bytes came; repeat the command")

    def _open(self):
        try:
            return self._opened(self.path)
        except OSError as error:
            raise unreadable(self.path, error) from error

    def _check_content(self, state):
        """UserError unless a file that was written to, or touched, still holds what its checksums say."""
        (size, _), self._state = self._state, state
        if state[0] != size or not self.checksums or checksums(self) != self.checksums:
            rule = f"{self.path} has changed while it was in use, from {size} to {state[0]} bytes"
            raise UserError(f"{rule}; restore it and repeat the command, or make the data again with prepare.py")


def unreadable(path, error):
    """The UserError for the system's error at reading a shard."""
    remedy = "raise ulimit -n" if error.errno == errno.EMFILE else "make it readable and repeat the command"
    return UserError(f"{path} cannot be read ({error.strerror}); {remedy}")


def state_of(file):
    """(size in bytes, time of the last change in ns) of an open file."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


if hasattr(os, "preadv"):

    def read_at(file, out, place):
        """Reads from a place of a file into an array; returns the number of bytes read."""
        return os.preadv(file.fileno(), [out], place)

else:  # Windows
    SEEKING = threading.Lock()  # threads share the files, and so where they are read

    def read_at(file, out, place):
        """Reads from a place of a file into an array; returns the number of bytes read."""
        with SEEKING:
            file.seek(place)
            return file.readinto(out)


def unbuffered(path):
    """A file opened for reading."""
    return open(path, "rb", buffering=0)


def files_cache():
    """A function as unbuffered, which keeps files open, at most a quarter of what the system allows a process."""
    if resource is None:
        return functools.lru_cache(128)(unbuffered)  # Windows' C library opens 512
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return functools.lru_cache(None if limit == resource.RLIM_INFINITY else max(1, limit // 4))(unbuffered)


def checksums(shard):
    """The CRC-32 of each BLOCK of a shard's tokens."""
    return [zlib.crc32(shard[start : start + BLOCK]) for start in range(0, len(shard), BLOCK)]


def open_shard(path, vocab_size=None, opened=unbuffered):
    """The Shard of a file, whose format its first bytes tell. opened: see Shard.

    A file without a header has the width that its tokens and vocab_size allow; UserError where both or neither fit.
    """
    path = Path(path)
    if not is_regular(path):  # such as a pipe, at which to read is to wait
        raise UserError(f"{path} is no regular file; make the data again with prepare.py")
    try:
        with open(path, "rb") as file:
            head, (size, _) = file.read(1024), (state := state_of(file))
    except OSError as error:
        raise unreadable(path, error) from error
    if head.startswith(MAGIC):
        _, version, token_bytes, count = HEADER.unpack(head[: HEADER.size].ljust(HEADER.size, b"\0"))
        dtype, start = {2: np.uint16, 4: np.uint32}.get(token_bytes), HEADER.size
        if version != VERSION or dtype is None:
            known = f"this code reads version {VERSION} with 2 or 4"
            raise UserError(f"{path} has version {version} and {token_bytes} bytes a token; {known}")
    elif len(head) == 1024 and (magic := int.from_bytes(head[:4], "little")) in LLMC:
        dtype, start, count = LLMC[magic], 1024, int.from_bytes(head[8:12], "little")
    elif path.name in ("train.bin", "val.bin") and size % 2 == 0 and vocab_size:  # nanoGPT's have no header
        halves = Shard(path, np.uint16, 0, size // 2, state, opened)
        dtype, start = _width_without_header(halves, size, vocab_size), 0
        count = size // np.dtype(dtype).itemsize
    else:
        raise UserError(f"{path} is not a token shard of flatlm's or llm.c's; make the data again with prepare.py")
    if size != (promised := start + count * np.dtype(dtype).itemsize):
        sizes = f"it has {size} bytes, and its header promises {promised}"
        raise UserError(f"{path} is damaged: {sizes}; make the data again with prepare.py")
    return Shard(path, dtype, start, count, state, opened)


def _width_without_header(halves, size, vocab_size):
    """The dtype of a file that holds tokens alone, judged by 64 samples over its length.

    halves: the file read as uint16, which are its tokens, or the lower and upper halves of tokens.
    """
    if not size:
        return np.uint16
    path = halves.path
    starts = np.linspace(0, max(0, len(halves) - 8192) // 2, 64, dtype=np.int64) * 2
    sample = np.concatenate([halves[start : start + 8192] for start in dict.fromkeys(starts.tolist())])
    narrow, wide = int(sample.max()), int(sample.view("<u4").max()) if size % 4 == 0 else vocab_size
    if wide < vocab_size:  # as uint16, every second token would be almost 0
        if narrow or vocab_size > 2**16:
            return np.uint32
        raise UserError(f"{path} holds token 0 alone and no header, so its width is unknown; make it with prepare.py")
    if narrow < vocab_size <= 2**16:
        return np.uint16
    if narrow < vocab_size:
        rule = f"vocab_size {vocab_size} needs uint32 tokens, and those of {path}, read so, are not below it"
        raise UserError(f"{rule}; set vocab_size to the data's, for uint16 at most 65536")
    rule = f"{path} holds token {narrow}, but vocab_size is {vocab_size}"
    raise UserError(f"{rule}; set vocab_size to the tokenizer's or make the data again")


def is_own_shard(path):
    """Whether prepare.py wrote a file, judged by its first bytes."""
    return _head(path, len(MAGIC)) == MAGIC


def unfinished(folder):
    """{path: whether prepare.py wrote it, judged by its first bytes} of files named like an unfinished prepare's."""
    found = {}
    for path in Path(folder).glob("*.part"):
        if shard := re.fullmatch(r"(fineweb_)?(train|val)_\d{6}\.bin\.part", path.name):
            head, magic = _head(path, HEADER.size), int.from_bytes(_head(path, 4), "little")
            is_own = head == bytes(len(head)) or head.startswith(MAGIC)  # the header comes last
            found[path] = magic in LLMC or len(head) < 4 if shard[1] else is_own
        elif path.name == "meta.json.part":
            found[path] = b'{\n "'.startswith(_head(path, 4))
    return found


def _head(path, size):
    if not is_regular(path):
        return b"\xff" * size  # nothing that prepare.py writes begins so
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise unreadable(path, error) from error


# ---- meta.json

COUNT = range(2**63)
SPLIT = dict.fromkeys(("tokens", "documents", "bytes"), COUNT) | {
    "shards": {"*": COUNT}, "checksums": {"*": [range(2**32)]},
}  # fmt: skip
# Kinds of the values that prepare.py writes (see foreign.check)
META = {
    "vocab_size!": range(1, LARGEST_VOCABULARY + 1), "splits!": {"train!": SPLIT, "val!": SPLIT, "*": SPLIT},
    "tokenizer": str, "tokenizer_sha256": str, "command": str, "notes": {"*": COUNT}, "settings": dict,
    "input_files": dict, "token_bytes": [COUNT],
}  # fmt: skip


# Names of the token that ends a document; where a tokenizer has several, the first one counts.
END_OF_TEXT = ("<|endoftext|>", "[SEP]", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>")


def end_of_text(specials):
    """The id of the token that ends documents, for BERT [SEP]; None where there is none. specials: {name: id}."""
    return next((specials[name] for name in END_OF_TEXT if name in specials), None)


def read_meta(data_dir):
    """The content of a data folder's meta.json; {} where there is none, as with other projects' files.

    UserError where it is no regular file, is too large, or holds a value of another kind than prepare.py writes.
    """
    path = Path(data_dir) / "meta.json"
    if not os.path.lexists(path):
        return {}
    try:
        if not is_regular(path):  # such as a link to nothing
            raise UserError("it is no regular file")
        meta = read_json(path, META, largest=META_BYTES, has_paths=True)
        token_id = range(meta["vocab_size"])
        check(meta, {"specials": {"*": token_id}, "continuations": [token_id]}, path)
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise unreadable(path, error.__cause__) from error
        why = str(error).removesuffix(f"; {COPY_AGAIN}")
        raise UserError(f"{path} is damaged ({why}); remove it and make the data again with prepare.py") from error
    return meta | {"splits": {name: {"shards": {}} | split for name, split in meta["splits"].items()}}


def write_meta(data_dir, meta):
    """Writes meta.json last and atomically: data without it is unfinished."""
    partial = Path(data_dir) / "meta.json.part"
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in meta.items()]
    with writing_to(data_dir):
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        os.replace(partial, partial.with_suffix(""))
