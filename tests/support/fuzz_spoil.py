"""Spoils files by a seed: blindly, byte by byte, and with knowledge of their format, so that what is behind the first
check is met too."""

from __future__ import annotations

import io
import json
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from random import Random

NUMBERS = (0, -1, 1, 7, 255, 256, -100, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**8, 10**30)
ODD = (*NUMBERS, 0.5, 8.0, 1e308, float("nan"), float("inf"), None, True, False, "", "abc", "1", [], {}, [[]], [0] * 99)
BYTES = (b"\0", b"\xff", b"{", b"[", b'"', b",", b"\n", b"9", b"-", b"(", b".", b"\x80", b"PK\x05\x06", b"PK\x01\x02")


def spoil(good: bytes, name: str, seed: int) -> tuple[bytes, bool]:
    """(the file spoiled, whether only a checksum that is there can have noticed: bytes of an archive, blindly)."""
    rng = Random(seed)
    kind = name.rpartition(".")[2]
    knowing = _KINDS.get(kind)
    if knowing is None or rng.random() < 0.4:
        return _blindly(good, rng), kind in ("npz", "pt")
    return knowing(good, rng), False


def _blindly(good: bytes, rng: Random) -> bytes:
    found = bytearray(good)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(found)) if found else 0
        what = rng.randrange(8)
        if what == 0:
            found[at : at + 1] = bytes([found[at] ^ (1 << rng.randrange(8))]) if found else b""
        elif what == 1:
            found[at : at + 1] = bytes([rng.randrange(256)])
        elif what == 2:
            del found[at:]
        elif what == 3:
            del found[at : at + rng.choice((1, 2, 8, 100))]
        elif what == 4:
            found[at:at] = rng.choice(BYTES) * rng.choice((1, 1, 2, 1000))
        elif what == 5:
            found[at:at] = found[at : at + rng.choice((1, 8, 64, 1000))]
        elif what == 6 and len(found) > 8:
            at = rng.randrange(len(found) - 8)
            found[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS) % 2**64)
        elif what == 7 and len(found) > 4:
            at = rng.randrange(len(found) - 4)
            found[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
    return bytes(found)


def _text(good: bytes, rng: Random) -> bytes:
    """A number in a text becomes another."""
    text = good.decode()
    found = list(re.finditer(r"-?\d+(\.\d+)?", text))
    if not found:
        return _blindly(good, rng)
    for match in sorted(rng.sample(found, min(len(found), rng.choice((1, 1, 3)))), key=lambda m: -m.start()):
        text = text[: match.start()] + str(rng.choice(ODD)) + text[match.end() :]
    return text.encode()


def _json(good: bytes, rng: Random) -> bytes:
    """A value, or a name, somewhere in it becomes another; or it is nested without end."""
    if rng.random() < 0.02:
        return rng.choice((b"[", b'{"a":')) * 100_000
    lines = good.decode().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(_value(json.loads(lines[at]), rng))
    return "\n".join(lines).encode()


def _value(value: object, rng: Random) -> object:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        what = rng.random()
        if what < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if what < 0.2:
            return {(f"{k}x" if k == key else k): v for k, v in value.items()}
        return {**value, key: _value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        what = rng.random()
        if what < 0.1:
            return value[:at] + value[at + 1 :]
        if what < 0.2:
            return value[:at] + value[at:] + value[at:]
        return [*value[:at], _value(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


def _safetensors(good: bytes, rng: Random) -> bytes:
    """A value of the header, or a number of the text inside it, becomes another; the length fits."""
    size = int.from_bytes(good[:8], "little")
    header = (_json if rng.random() < 0.5 else _text)(good[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + good[8 + size :]


def _npy(good: bytes, rng: Random) -> bytes:
    """Another shape, type or order in the header, of the old length or not; numbers in the data."""
    size = int.from_bytes(good[8:10], "little")
    header, data = good[10 : 10 + size].decode("latin1"), good[10 + size :]
    what = rng.randrange(6)
    if what == 0:
        header = re.sub(r"'shape': \(.*?\)", f"'shape': {_shape(rng)}", header)
    elif what == 1:
        kind = rng.choice(
            ("<f8", ">f8", "|u1", "<i8", "<u8", "|O", "<U4", "|S9", "|V8", "<M8[s]", "<c16", "|b1", "<f2")
        )
        header = re.sub(r"'descr': '.*?'", f"'descr': '{kind}'", header)
    elif what == 2:
        header = header.replace("False", rng.choice(("True", "0", "None", "(")))
    elif what == 3:
        header = _text(header.encode("latin1"), rng).decode("latin1")
    elif what == 4:
        header = _blindly(header.encode("latin1"), rng).decode("latin1")
    else:
        data = _numbers(data, rng)
    if what < 4 and rng.random() < 0.7:
        header = header.rstrip()[: size - 1].ljust(size - 1) + "\n"
    if what < 2 and rng.random() < 0.3:
        data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.5 else data * 3
    text = header.encode("latin1")
    return good[:8] + len(text).to_bytes(2, "little") + text + data


def _numbers(data: bytes, rng: Random) -> bytes:
    if len(data) < 8:
        return data
    found = bytearray(data)
    width = rng.choice((1, 2, 4, 8))
    at = rng.randrange(0, len(found) - width + 1, width)
    found[at : at + width] = (rng.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(found)


def _shape(rng: Random) -> str:
    sizes = [rng.choice((0, 1, 2, 4, 24, -1, -8, 2**31, 2**62, 10**9, 8.0, True)) for _ in range(rng.randrange(5))]
    return f"({', '.join(map(str, sizes))}{',' if sizes else ''})"


def _zip(good: bytes, rng: Random) -> bytes:
    """An archive anew, with sums that fit: a member spoiled, gone, there twice, renamed, or compressed otherwise."""
    with zipfile.ZipFile(io.BytesIO(good)) as old:
        members = [(info.filename, old.read(info)) for info in old.infolist()]
    at = rng.randrange(len(members))
    name, data = members[at]
    what = rng.randrange(10)
    if what == 0:
        del members[at]
    elif what == 1:
        members[at] = rng.choice((f"x{name}", name.upper(), f"../{name}", "a" * 70, "y")), data
    elif what == 2:
        members.append((rng.choice(("extra.npy", "../../x", name)), data))
    elif what == 3:
        members[at] = name, bytes(rng.choice((0, 10, 3_000_000)))
    else:
        knowing = _npy if data[:6] == b"\x93NUMPY" else _numbers if "/data/" in name else _pickle
        members[at] = name, knowing(data, rng)
    how = rng.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)
    )
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name that stands twice
        with zipfile.ZipFile(out, "w", how if rng.random() < 0.5 else zipfile.ZIP_STORED) as new:
            for member, inside in members:
                new.writestr(member, inside)
    return out.getvalue()


def _pickle(good: bytes, rng: Random) -> bytes:
    """Other names to call, memo numbers, sizes; or bytes, blindly."""
    what = rng.randrange(6)
    if what == 0:
        return good.replace(b"collections\nOrderedDict", rng.choice((b"os\nsystem", b"builtins\neval", b"torch\nload")))
    if what == 1:  # a number of the memo
        return good.replace(b"q\x01", b"r" + struct.pack("<I", rng.choice((2**31 - 1, 2**28, 10**7))), 1)
    if what == 2:
        return good.replace(b"_rebuild_tensor_v2", rng.choice((b"_rebuild_tensor_v3", b"_rebuild_parameter", b"_x")))
    if what == 3:
        small = [i for i, byte in enumerate(good) if byte == ord("K") and i + 1 < len(good)]
        if small:
            at = rng.choice(small)
            number = struct.pack("<i", rng.choice((-1, 2**31 - 1, 10**6, 3)))
            return good[:at] + b"J" + number + good[at + 2 :]
    if what == 4:  # one object many times
        return good[:-1].replace(b"q\x01", b"q\x01" + b"h\x01" * rng.choice((3, 3000)), 1) + good[-1:]
    return _blindly(good, rng)


_KINDS: dict[str, Callable[[bytes, Random], bytes]] = {
    "json": _json, "jsonl": _json, "csv": _text, "txt": _text, "yaml": _text, "npy": _npy, "npz": _zip, "pt": _zip,
    "safetensors": _safetensors,
}  # fmt: skip
