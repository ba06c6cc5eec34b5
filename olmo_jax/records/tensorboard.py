"""TensorBoard's event files: curves for people, which a run can do without."""

import pathlib
import struct
import sys
import time

import numpy as np

from olmo_jax import files
from olmo_jax.records import jsonl

FLUSH_PERIOD = 10.0  # seconds that TensorBoard may lag behind
_FRAME = 16  # bytes of an event beside itself: its length, a CRC of that; behind it its own CRC


class TensorBoard:
    """Event files, one for each time that the run was started, all metrics of a step in one event.

    (`SummaryWriter.add_scalar` would rename "train/CE loss" to "train/CE_loss".) Events of steps
    after `last_step` are removed from older files. A damaged file is set aside; what is whole in
    it stays.
    """

    def __init__(self, folder: pathlib.Path, last_step: int):
        hide = "torch" not in sys.modules
        if hide:  # tensorboardX imports it where it can: 1.5 s for what is not used here
            sys.modules["torch"] = None  # type: ignore[assignment]
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
            from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
        finally:
            if hide:
                del sys.modules["torch"]
        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        for path in folder.glob("events.out.tfevents.*"):
            self._trim(path, last_step)
        # The name holds the seconds; without their fraction a quick restart would overwrite.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns() % 10**9:09}")
        # Tells a TensorBoard that has read the steps that were trimmed to forget them.
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(
            Event(wall_time=time.time(), step=last_step + 1, session_log=start)
        )
        self.flush()

    def _trim(self, path: pathlib.Path, last_step: int) -> None:
        data = path.read_bytes()
        events, is_damaged = _whole(data)
        kept = [e for e in events if self._event.FromString(e[12:-4]).step <= last_step]
        if is_damaged:
            aside = jsonl.free(path.with_name(path.name.replace("tfevents", "damaged")))
            print(f"{path} is damaged and kept as {aside.name}; {len(kept):,} events of it are"
                  " whole and stay", flush=True)  # fmt: skip
            with files.whole(aside) as file:
                file.write(data)
        if sum(map(len, kept)) < len(data):
            with files.whole(path) as file:
                file.writelines(kept)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add an event."""
        scalars = [self._summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        now = time.time()
        event = self._event(wall_time=now, step=step, summary=self._summary(value=scalars))
        self._writer.write_event(event)
        if now - self._flushed > FLUSH_PERIOD:
            self.flush()

    def flush(self) -> None:
        """Bring all events to the file."""
        self._writer.flush()
        self._flushed = time.time()

    def close(self) -> None:
        """End the file."""
        self._writer.close()


def _whole(data: bytes) -> tuple[list[bytes], bool]:
    """The whole events of a file, framed as they are, and whether another one is damaged.

    An end that was torn when a process was killed is no damage.
    """
    starts, at = [], 0
    while at + 12 <= len(data):
        starts.append(at)
        at += _FRAME + struct.unpack_from("<Q", data, at)[0]
    has_length = _are_whole(data, np.array(starts, np.int64), np.full(len(starts), 8))
    n = len(starts) if has_length.all() else int(has_length.argmin())  # no way on behind that
    ends = [*starts[1:], at][:n]
    if n and ends[-1] > len(data):  # torn
        del ends[-1]
    begins = np.array(starts[: len(ends)], np.int64) + 12
    are_whole = _are_whole(data, begins, np.array(ends, np.int64) - 4 - begins)
    found = [data[i:j] for i, j, yes in zip(starts, ends, are_whole, strict=False) if yes]
    return found, n < len(starts) or not are_whole.all()


def _are_whole(data: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Which stretches `[n]` have the CRC that stands behind them: CRC-32C, masked as TensorFlow's.

    All at once, since a byte takes a moment in Python.
    """
    from tensorboardX.crc32c import CRC_TABLE

    table, values = np.array(CRC_TABLE, np.uint32), np.frombuffer(data, np.uint8)
    order = np.argsort(-lengths, kind="stable")
    at, sizes = starts[order], lengths[order]
    crc = np.full(len(order), 0xFFFFFFFF, np.uint32)
    for i in range(int(sizes[0]) if len(order) else 0):
        n = np.searchsorted(-sizes, -i)  # of those that have a byte i
        crc[:n] = table[(crc[:n] ^ values[at[:n] + i]) & 0xFF] ^ (crc[:n] >> 8)
    crc = ~crc
    crc = ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
    behind = (at + sizes)[:, None] + np.arange(4)
    stored = values[behind].astype(np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)
    found = np.empty(len(order), bool)
    found[order] = crc == stored.sum(1, dtype=np.uint32)
    return found
