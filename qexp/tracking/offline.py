"""Records that W&B keeps on disk until they are uploaded."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

HEADER, BLOCK = 7, 32 * 1024  # bytes before the first block of a .wandb file, and bytes of a block
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
STAGED = "/wandb/data/"  # where files of artifacts wait, below outputs


def forget(folder: Path, run_id: str) -> None:
    """Delete what earlier attempts at a run have left in outputs/wandb, unless it has been uploaded.

    Otherwise one upload would make one run of all of them, with the history of each.
    """
    for old in folder.glob(f"offline-run-????????_??????-{run_id}"):
        if not list(old.glob("*.synced")):
            shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(folder / "data" / run_id, ignore_errors=True)


def relocate(record: Path, outputs: Path) -> list[Path]:
    """Let a .wandb file name the files of its artifacts where they are after `outputs` was copied or moved.

    Returns those that are missing.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content = record.read_bytes()
    messages, moved, missing = [], False, []
    for message in _messages(content):
        told = Record.FromString(message)
        for entry in told.artifact.manifest.contents if told.HasField("artifact") else ():
            _, staged, rest = entry.local_path.rpartition(STAGED)
            if not staged:
                continue
            here = outputs.resolve() / STAGED.strip("/") / rest
            moved, entry.local_path = moved or entry.local_path != str(here), str(here)
            missing += [] if here.exists() else [here]
        messages.append(told.SerializeToString())
    if moved:
        new = record.with_suffix(".new")
        new.write_bytes(content[:HEADER] + _framed(messages))
        os.replace(new, record)
    return missing


def _messages(content: bytes) -> Iterator[bytes]:
    """The messages of a .wandb file, which is a log of LevelDB: blocks of chunks with a checksum, a length and a kind.

    What a killed run has not written whole is left out.
    """
    message, place = b"", HEADER
    while place + 7 <= len(content):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, place)
        data = content[place + 7 : place + 7 + length]
        if zlib.crc32(bytes([kind]) + data) != checksum:
            return
        message = data if kind in (FULL, FIRST) else message + data
        if kind in (FULL, LAST):
            yield message
        place += 7 + length


def _framed(messages: list[bytes]) -> bytes:
    """The reverse."""
    log = bytearray(HEADER)
    for message in messages:
        start, first = 0, True
        while first or start < len(message):
            left = BLOCK - len(log) % BLOCK
            if left < 7:
                log += bytes(left)
                continue
            data = message[start : start + left - 7]
            last = start + len(data) == len(message)
            kind = (FULL if last else FIRST) if first else (LAST if last else MIDDLE)
            log += struct.pack("<IHB", zlib.crc32(bytes([kind]) + data), len(data), kind) + data
            start, first = start + len(data), False
    return bytes(log[HEADER:])
