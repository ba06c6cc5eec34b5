"""Records of a run: names and numbers, resumed without a trace of the dead timeline."""

import json
import math
import re
import struct
import subprocess
import sys
import types

import numpy as np
import pytest

from olmo_jax.config import costs
from olmo_jax.config.run import from_dict
from olmo_jax.config.text import to_dict
from olmo_jax.records import jsonl, speed, tensorboard
from olmo_jax.records.speed import Speed
from olmo_jax.records.writer import Writer
from olmo_jax.training import start

MODEL = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "d_ff": 128}
BATCH = 512  # tokens


class Clock:
    """Time that passes when told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def config(**log):
    return from_dict(
        {"name": "test", "model": MODEL, "data": {"seq_len": 128}, "log": {"interval": 1, **log}}
    )


def writer(
    folder, start_step=0, cfg=None, total_steps=20, n_devices=1, kind="TPU v4", process=0, **more
):
    cfg = cfg or config(tensorboard=False)
    peak = speed.peak_flops(cfg.log.device_peak_flops, "bfloat16", kind)
    return Writer(
        folder,
        cfg.log.interval,
        Speed(cfg.model, cfg.data.seq_len, peak, n_devices),
        start._sinks(cfg.log, cfg.name, to_dict(cfg)),
        start_step=start_step,
        start_tokens=start_step * BATCH,
        total_steps=total_steps,
        process_index=process,
        **more,
    )


def loss_at(step, timeline):
    return 5.0 - 0.01 * step + timeline


def train(folder, start, stop, timeline=0.0, cfg=None, kill=False, **options):
    """Steps start+1 .. stop of a run; `timeline` shifts its losses."""
    log = writer(folder, start, cfg, **options)
    if start:
        log.write(start, {"checkpoint/load_duration_s": 3.0})
    for step in range(start + 1, stop + 1):
        values = {"train/CE loss": loss_at(step, timeline), "optim/total grad norm": 1.0}
        log.step(
            step, values, lr=1e-3, tokens=step * BATCH, batch_tokens=BATCH, data_wait_s=0.0
        )  # fmt: skip
        if step % 5 == 0:
            log.write(step, {"eval/lm/valid/CE loss": loss_at(step, timeline)})
            log.sync()
    if kill:  # no word of farewell, but what is written may have reached the disk
        for sink in log._sinks:
            if isinstance(sink, tensorboard.TensorBoard):
                sink.close()
        log._folder.close()
    else:
        log.close()
    return log


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(rows):
    return [(r["step"], r["train/CE loss"]) for r in rows if "train/CE loss" in r]


# --- names and numbers ----------------------------------------------------------------------------


def test_every_step_is_one_line_with_olmo_core_names_and_exact_values(tmp_path, clock):
    log = writer(tmp_path, n_devices=2)
    for step in (1, 2):
        clock.sleep(0.5)
        device = {
            "train/CE loss": np.float32(2.3),
            "train/Z loss": np.float32(0.1),
            "train/Z loss unscaled": np.float32(10.0),
            "train/masked instances (%)": np.float32(0.25),
            "train/masked labels (%)": np.float32(0.5),
            "optim/total grad norm": np.float32(0.7),
            "optim/step skipped": np.float32(0.0),
        }
        log.step(
            step, device, lr=3e-4, tokens=step * BATCH, batch_tokens=BATCH, data_wait_s=0.125
        )  # fmt: skip
        assert len(lines(tmp_path)) == step  # on disk already
    log.close()
    first, second = lines(tmp_path)
    tps = BATCH / 0.5 / 2
    per_token, peak = costs.flops_per_token(config().model, 128), 275e12
    core2 = costs.flops_per_token_core2(config().model, 128)
    expected = {name: float(value) for name, value in device.items()} | {
        "train/PPL": math.exp(float(np.float32(2.3))),
        "train/global batch size": BATCH,
        "optim/LR (group 0)": 3e-4,
        "throughput/total tokens": 2 * BATCH,
        "throughput/total petaflops": per_token * 2 * BATCH / 1e15,
        "throughput/chinchilla multiple": 2 * BATCH
        / (20 * costs.n_params(config().model).non_embedding),
        "throughput/device/TPS": tps,
        "throughput/device/TPS (actual avg)": tps,
        "throughput/device/BPS": 2.0,
        "throughput/device/BPS (actual avg)": 2.0,
        "throughput/device/flopsPS": per_token * tps,
        "throughput/device/flopsPS (actual avg)": per_token * tps,
        "throughput/device/MFU": 100 * per_token * tps / peak,
        "throughput/device/MFU (actual avg)": 100 * per_token * tps / peak,
        "throughput/device/MFU (OLMo-core 2)": 100 * core2 * tps / peak,
        "throughput/device/data loading (s)": 0.125,
        "throughput/device/data loading (%)": 25.0,
    }  # fmt: skip
    assert {k: v for k, v in second.items() if k not in ("step", "tokens", "time")} == expected
    assert (second["step"], second["tokens"]) == (2, 2 * BATCH)
    # The first step compiles: it has no speed.
    assert not [k for k in first if "PS" in k or "MFU" in k or "loading (%)" in k]


def test_perplexity_is_only_for_losses_below_ten(tmp_path):
    log = writer(tmp_path)
    for step, loss in ((1, 10.5), (2, 9.5), (3, math.nan)):
        log.step(step, {"train/CE loss": loss}, lr=0.0, tokens=0, batch_tokens=1, data_wait_s=0)
    log.close()
    assert [r.get("train/PPL") for r in lines(tmp_path)] == [None, math.exp(9.5), None]


def test_values_that_are_not_finite_are_null_in_json_and_nan_when_read(tmp_path):
    log = writer(tmp_path)
    values = {"train/CE loss": math.nan, "optim/total grad norm": math.inf}
    log.step(1, values, lr=0.0, tokens=0, batch_tokens=1, data_wait_s=0)
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["train/CE loss"] is None
    assert record["optim/total grad norm"] is None
    assert math.isnan(jsonl.read(tmp_path)[1]["train/CE loss"])


def test_per_layer_arrays_become_one_metric_per_layer_on_the_line_of_their_step(tmp_path):
    log = writer(tmp_path)
    norms = {"norms/grad/layers/attn/wq": np.array([1.0, 2.0]), "norms/grad/embed": 3.0}
    for step in (1, 2):
        log.write(2, norms) if step == 1 else None  # before the metrics of the step before
        log.step(
            step, {}, lr=0.0, tokens=step * BATCH, batch_tokens=BATCH, data_wait_s=0
        )  # fmt: skip
    log.write(3, norms)  # of a step that is never finished
    log.close()
    first, second, third = lines(tmp_path)
    assert not [name for name in first if name.startswith("norms/")]
    assert [second[f"norms/grad/layers/attn/wq/{i}"] for i in (0, 1)] == [1.0, 2.0]
    assert (second["norms/grad/embed"], second["tokens"]) == (3.0, 2 * BATCH)
    assert (third["step"], third["norms/grad/embed"]) == (3, 3.0)


def test_pauses_count_in_the_averages_but_not_in_the_step(tmp_path, clock):
    log = writer(tmp_path)
    for step in range(1, 4):
        clock.sleep(0.5)
        log.step(step, {}, lr=0.0, tokens=step * BATCH, batch_tokens=BATCH, data_wait_s=0)
        with log.pause(step, "checkpoint/save_duration_s"):
            clock.sleep(1.5)
    log.close()
    steps = jsonl.read(tmp_path)
    assert steps[3]["throughput/device/TPS"] == pytest.approx(BATCH / 0.5)
    assert steps[3]["throughput/device/TPS (actual avg)"] == pytest.approx(BATCH / 2.0)
    assert steps[2]["checkpoint/save_duration_s"] == pytest.approx(1.5)


def test_waiting_for_data_is_never_more_than_all_of_the_time(tmp_path, clock, capsys):
    log = writer(tmp_path)
    for step in (1, 2):
        clock.sleep(0.1)
        log.step(step, {}, lr=0.0, tokens=step, batch_tokens=BATCH, data_wait_s=0.2)
    log.close()
    assert lines(tmp_path)[1]["throughput/device/data loading (%)"] == 100
    assert "data wait 100.0%" in capsys.readouterr().out


def test_a_step_with_another_batch_size_compiles_and_has_no_speed(tmp_path, clock):
    log = writer(tmp_path)
    for step, batch in enumerate((BATCH, BATCH, 2 * BATCH, 2 * BATCH), 1):
        clock.sleep(1.0)
        log.step(step, {}, lr=0.0, tokens=step, batch_tokens=batch, data_wait_s=0)
    log.close()
    speeds = [r.get("throughput/device/TPS") for r in lines(tmp_path)]
    assert speeds == [None, BATCH, None, 2 * BATCH]
    assert lines(tmp_path)[3]["throughput/device/TPS (actual avg)"] == 5 * BATCH / 3


@pytest.mark.parametrize(
    ("kind", "compute", "peak", "shown"),
    [
        ("TPU v4", "bfloat16", None, 275e12),
        ("NVIDIA L40S", "bfloat16", None, None),
        ("cpu", "bfloat16", None, None),
        ("TPU v4", "float32", None, None),  # the peak is bfloat16's
        ("cpu", "float32", 1e12, 1e12),
    ],
)
def test_mfu_needs_a_known_peak(kind, compute, peak, shown, clock):
    cfg = from_dict({"model": MODEL})
    found = speed.peak_flops(peak, compute, kind)
    timer = Speed(cfg.model, cfg.data.seq_len, found, 1)
    timer.step(BATCH, BATCH, 0.0)
    clock.sleep(1.0)
    values = timer.step(2 * BATCH, BATCH, 0.0)
    mfu = values.get("throughput/device/MFU")
    rate = costs.flops_per_token(cfg.model, cfg.data.seq_len) * BATCH
    assert mfu == (None if shown is None else pytest.approx(100 * rate / shown))
    assert ("throughput/device/MFU (OLMo-core 2)" in values) == (shown is not None)


def test_only_process_zero_writes(tmp_path):
    train(tmp_path / "run", 0, 3, process=1)
    assert not (tmp_path / "run").exists()


# --- console --------------------------------------------------------------------------------------


def test_console_line_tells_the_state_of_the_run(tmp_path, clock, capsys):
    log = writer(tmp_path, cfg=config(interval=10, tensorboard=False), total_steps=3000)
    values = {"train/CE loss": 3.25, "optim/total grad norm": 0.5}
    for step in range(1, 12):
        clock.sleep(0.5)
        log.step(
            step, values, lr=3e-4, tokens=step * BATCH, batch_tokens=BATCH, data_wait_s=0.005
        )  # fmt: skip
    log.write(11, {"eval/lm/valid/CE loss": 2.0, "eval/lm/valid/BPB": 1.25})
    log.close()
    out, err = capsys.readouterr()
    mfu = 100 * costs.flops_per_token(config().model, 128) * 1024 / 275e12
    assert out.splitlines() == [
        "step 1/3,000 | loss 3.2500 | lr 0.0003 | grad norm 0.5",
        "step 10/3,000 | loss 3.2500 | lr 0.0003 | grad norm 0.5 | 1.02K tokens/s"
        f" | MFU {mfu:.1f}% | data wait 1.0% | eta 24m55s",
        "step 11 | eval valid | loss 2.0000 | BPB 1.25",
    ]
    assert err == ""  # no bar where stderr is no terminal


def test_a_terminal_gets_a_bar_that_makes_room_for_lines(tmp_path, capsys, monkeypatch, clock):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    log = writer(tmp_path, cfg=config(interval=100, tensorboard=False), total_steps=4)
    for step in range(1, 5):
        clock.sleep(0.5)
        values = {"train/CE loss": 3.25}
        log.step(step, values, lr=0.0, tokens=0, batch_tokens=1, data_wait_s=0)
    log.close()
    err = capsys.readouterr().err
    drawings = [text for text in err.split("\r\x1b[K") if text]
    assert len(drawings) == 4
    assert drawings[1].endswith("░  50% | 2/4 | loss 3.250 | eta 0m01s")
    assert re.match("█+░+ ", drawings[1])
    assert all(len(text) < 60 for text in drawings)
    assert err.endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "0.123"), (999.4, "999"), (999.6, "1K"), (12345, "12.3K"), (4.2e9, "4.2G")],
)
def test_speeds_are_short(value, text):
    assert speed._short(value) == text


# --- resume ---------------------------------------------------------------------------------------


def test_a_resumed_run_has_one_record_per_step_of_the_new_timeline(tmp_path):
    train(tmp_path, 0, 13, kill=True)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 14, "train/CE lo')  # killed while it was writing
    train(tmp_path, 10, 20, timeline=1.0)
    expected = [(s, loss_at(s, 0.0 if s <= 10 else 1.0)) for s in range(1, 21)]
    assert losses(lines(tmp_path)) == expected
    steps = [record["step"] for record in lines(tmp_path)]
    assert steps == sorted(steps)
    evals = {s: r["eval/lm/valid/CE loss"] for s, r in jsonl.read(tmp_path).items() if s % 5 == 0}
    assert evals == {s: loss_at(s, 0.0 if s <= 10 else 1.0) for s in (5, 10, 15, 20)}


def test_trimming_leaves_the_old_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    train(tmp_path, 0, 13, kill=True)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=r"cannot write .*No space left.*config\.dir"):
        writer(tmp_path, 10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_full_disk_is_named_with_its_remedy(tmp_path):
    log = writer(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics.jsonl.*No space left.*free some space"):
        log.step(1, {}, lr=0.0, tokens=0, batch_tokens=1, data_wait_s=0)


def events(folder):
    """All events as TensorBoard keeps them: a START forgets what came before from its step on."""
    from tensorboardX.proto.event_pb2 import Event

    kept = []
    for path in sorted(folder.glob("events*")):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + length])
            start += 16 + length
            if event.HasField("session_log"):
                kept = [e for e in kept if e.step < event.step]
            kept += [event] if event.HasField("summary") else []
    return kept


def scalars(folder, tag):
    return [
        (e.step, pytest.approx(v.simple_value))
        for e in events(folder)
        for v in e.summary.value
        if v.tag == tag
    ]


def test_tensorboard_has_exact_names_and_no_zigzag_after_a_resume(tmp_path, capsys):
    cfg = config()
    train(tmp_path, 0, 13, cfg=cfg, kill=True)
    dead = next((tmp_path / "tensorboard").iterdir())
    with dead.open("r+b") as f:
        event = f.read(40)
        f.seek(0, 2)
        f.write(event[:-5])  # killed while it was writing
    train(tmp_path, 10, 20, timeline=1.0, cfg=cfg)
    assert "is damaged" not in capsys.readouterr().out
    folder = tmp_path / "tensorboard"
    assert len(list(folder.iterdir())) == 2  # though both began within the same second
    expected = [(s, loss_at(s, 0.0 if s <= 10 else 1.0)) for s in range(1, 21)]
    assert scalars(folder, "train/CE loss") == expected
    assert [s for s, _ in scalars(folder, "eval/lm/valid/CE loss")] == [5, 10, 15, 20]
    assert [s for s, _ in scalars(folder, "optim/LR (group 0)")] == list(range(1, 21))
    # Readers that know nothing of START see the same: the dead steps are gone from the files.
    steps = [e.step for e in events(folder) if any(v.tag == "train/PPL" for v in e.summary.value)]
    assert steps == list(range(1, 21))


@pytest.mark.parametrize(
    ("where", "left"),
    [
        ("length", [1, 2, 3]),  # nobody knows where the next event begins
        ("value", [1, 2, 3, 5, 6, 7, 8, 9, 10]),  # the protocol buffer can be read
        ("tag", [1, 2, 3, 5, 6, 7, 8, 9, 10]),  # and here it cannot
    ],
)
def test_a_damaged_event_file_is_kept_aside_and_the_run_goes_on(tmp_path, capsys, where, left):
    cfg = config()
    train(tmp_path, 0, 13, cfg=cfg, kill=True)
    folder = tmp_path / "tensorboard"
    (path,) = folder.iterdir()
    data, at = bytearray(path.read_bytes()), 0
    for _ in range(5):  # version, start and three steps; then step 4
        at += 16 + struct.unpack_from("<Q", data, at)[0]
    data[{"length": at, "value": data.index(b"PPL", at) + 5, "tag": at + 22}[where]] ^= 0x7F
    path.write_bytes(data)
    train(tmp_path, 10, 12, cfg=cfg)
    aside = path.name.replace("tfevents", "damaged")
    said = f"{path} is damaged and kept as {aside}; {{}} events of it are whole and stay"
    assert said.format(len(left) + 2 + 2 * (len(left) > 3)) in capsys.readouterr().out
    assert (folder / aside).read_bytes() == data
    (folder / aside).unlink()  # TensorBoard passes over that name
    assert [s for s, _ in scalars(folder, "train/PPL")] == [*left, 11, 12]
    assert losses(lines(tmp_path)) == [(s, loss_at(s, 0)) for s in range(1, 13)]


@pytest.mark.parametrize(
    ("hit", "missing"),
    [
        ([4], "step 4"),
        ([4, 8, 9], "step 4 and steps 8 to 9"),
        ([2, 4, 6, 8, 10], "step 2, step 4, step 6, step 8 and step 10"),
        (range(1, 11), "steps 1 to 10"),
    ],
)
def test_damaged_records_are_kept_aside_and_missing_ones_are_said(tmp_path, capsys, hit, missing):
    train(tmp_path, 0, 13)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    begins = [b'{"step": %d, ' % step for step in hit]
    is_hit = [line.startswith(tuple(begins)) and b"train/CE loss" in line for line in whole]
    hurt = [line.replace(b'"tokens"', b'"tok\xffns"') if yes else line
            for line, yes in zip(whole, is_hit, strict=True)]  # fmt: skip
    path.write_bytes(b"".join(hurt))
    train(tmp_path, 10, 11, is_resume=True)
    out = capsys.readouterr().out
    assert f"{path}: damaged lines ({len(hit)}); it is kept as metrics-damaged.jsonl, and" in out
    assert f"{path}: no record of {missing}; they are not made again\n" in out
    assert (tmp_path / "metrics-damaged.jsonl").read_bytes() == b"".join(hurt)
    assert [s for s, _ in losses(lines(tmp_path))] == sorted({*range(1, 12)} - {*hit})
    train(tmp_path, 11, 11, is_resume=True)  # later it is still true, but nothing new is damaged
    out = capsys.readouterr().out
    assert "damaged lines" not in out
    assert ("no record of" in out) == (len(hit) < 10)  # else it might have begun at 11


def test_a_last_record_whose_line_end_an_editor_took_is_kept(tmp_path, capsys):
    train(tmp_path, 0, 5)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    train(tmp_path, 5, 7, is_resume=True)
    assert [step for step, _ in losses(lines(tmp_path))] == [*range(1, 8)]
    assert "no record" not in capsys.readouterr().out


def test_records_that_are_gone_are_said_but_not_where_a_run_begins_late(tmp_path, capsys):
    train(tmp_path / "late", 10, 15)  # from another run's place in the data
    train(tmp_path / "late", 15, 16, is_resume=True)
    assert "no record" not in capsys.readouterr().out
    train(tmp_path / "gone", 10, 11, is_resume=True)
    path = tmp_path / "gone/metrics.jsonl"
    assert f"{path}: no record of steps 1 to 10; they" in capsys.readouterr().out
    with path.open("ab") as f:
        f.write(b"\0" * 100)  # what a machine that lost its power may leave
    train(tmp_path / "gone", 11, 12, is_resume=True)
    assert "damaged lines" not in capsys.readouterr().out  # a torn end


@pytest.mark.parametrize(
    "line",
    [b"", b"[]", b"5", b'{"step": true, "tokens": 1}', b'{"step": -1, "tokens": 1}', b'{"step": 1}',
     b'{"step": 1, "tokens": 1, "train/CE loss": "x"}', b"[" * 100_000, b"\xff", b"\0"],
)  # fmt: skip
def test_a_line_that_is_no_record_is_passed_over(tmp_path, line):
    good = b'{"step": 2, "tokens": 3, "train/CE loss": null}\n'
    (tmp_path / jsonl.NAME).write_bytes(line + b"\n" + good)
    assert [*jsonl.read(tmp_path)] == [2]


def test_many_gaps_are_counted():
    gaps = [(i, i + 1) for i in range(1, 40, 4)]
    assert jsonl.spans(gaps, most=2) == "steps 1 to 2, steps 5 to 6 and 16 more"


def test_two_set_asides_in_one_second_have_two_names(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl.time, "strftime", lambda *_: "records-1")
    for n in (1, 2, 3):
        train(tmp_path, 0, n)
        assert jsonl.set_aside(tmp_path) == ("records-1", "records-1-2", "records-1-3")[n - 1]
    assert [max(jsonl.read(tmp_path / f"records-1{end}")) for end in ("", "-2", "-3")] == [
        1,
        2,
        3,
    ]


def test_tensorboard_does_not_pull_in_torch(tmp_path):
    code = (
        "import sys, pathlib; from olmo_jax.records import tensorboard;"
        f"tensorboard.TensorBoard(pathlib.Path({str(tmp_path)!r}) / 'tb', 0).close();"
        "import sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- W&B ------------------------------------------------------------------------------------------


class Tracker:
    """A stand-in for wandb: drops lower steps as the real one does, and counts what it drops."""

    Error = type("Error", (Exception,), {})

    def __init__(self, rewinds=True, tells_step=True):
        self.rewinds, self.tells_step = rewinds, tells_step
        self.history, self.inits, self.dropped = {}, [], []

    def init(self, *, resume_from=None, id=None, resume=None, **common):
        self.inits.append({"resume_from": resume_from, "id": id, "resume": resume, **common})
        if resume_from is not None:
            if not self.rewinds:
                raise self.Error("rewind is not available on this server")
            id, step = resume_from.split("?_step=")
            rows = self.history[id]
            self.history[id] = {s: row for s, row in rows.items() if s <= int(step)}
        rows = self.history.setdefault(id, {})

        def log(values, step):
            if step < max(rows, default=0) or (resume_or_rewound and step < first):
                self.dropped.append((step, values))
            else:
                rows[step] = rows.get(step, {}) | values

        first = max(rows, default=-1) + 1
        resume_or_rewound = bool(rows)
        run = types.SimpleNamespace(id=id, log=log, finish=lambda: None)
        if self.tells_step:
            run.step = first
        return run


def wandb_run(monkeypatch, tmp_path, tracker):
    """Checkpoint at 10, killed after 13, resumed to 20; then resumed from 15 once more."""
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    cfg = config(wandb=True, tensorboard=False)
    train(tmp_path, 0, 13, cfg=cfg, kill=True)
    log = train(tmp_path, 10, 18, timeline=1.0, cfg=cfg, kill=True)
    log.write(15, {"checkpoint/save_async_duration_s": 2.0})  # arrives late
    train(tmp_path, 15, 15, cfg=cfg)  # ends before its first step
    train(tmp_path, 15, 20, timeline=2.0, cfg=cfg)
    (rows,) = tracker.history.values()  # one id in all four
    assert tracker.dropped == []
    assert sum("checkpoint/load_duration_s" in row for row in rows.values()) >= 2
    return rows


def expected_losses():
    return {s: loss_at(s, 0.0 if s <= 10 else 1.0 if s <= 15 else 2.0) for s in range(1, 21)}


def test_wandb_is_rewound_and_keeps_one_value_per_step(tmp_path, monkeypatch):
    tracker = Tracker()
    rows = wandb_run(monkeypatch, tmp_path, tracker)
    values = {s: row["train/CE loss"] for s, row in rows.items() if "train/CE loss" in row}
    assert values == expected_losses()
    assert all(row["step"] == s and row["segment"] == 0 for s, row in rows.items() if "step" in row)
    first = tracker.inits[0]
    assert first["resume"] == "allow"
    assert first["config"]["model"]["d_model"] == 64
    assert (first["project"], first["name"]) == ("olmo_jax", "test")
    assert tracker.inits[1]["resume_from"] == f"{first['id']}?_step=10"


@pytest.mark.parametrize("tells_step", [True, False])
def test_wandb_that_cannot_rewind_gets_marked_segments(tmp_path, monkeypatch, capsys, tells_step):
    rows = wandb_run(monkeypatch, tmp_path, Tracker(rewinds=False, tells_step=tells_step))
    last = {}  # of each step, the row of the highest segment
    for row in rows.values():
        if "train/CE loss" in row and row["segment"] >= last.get(row["step"], row)["segment"]:
            last[row["step"]] = row
    assert {s: row["train/CE loss"] for s, row in sorted(last.items())} == expected_losses()
    both = [row["segment"] for row in rows.values() if row.get("step") == 12]
    assert both == [0, 1]  # the dead value is still there, and can be told from the other
    assert "W&B cannot rewind" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [b"", b"[" * 100_000, b"[]", b'{"id": "a", "segment": "x"}', b'{"id": "a", "offset": null}'],
    ids=["empty", "deep", "list", "text", "null"],
)
def test_a_damaged_note_of_wandb_is_kept_aside_for_a_new_run(
    tmp_path, monkeypatch, capsys, content
):
    monkeypatch.setitem(sys.modules, "wandb", tracker := Tracker())
    (tmp_path / "wandb.json").write_bytes(content)
    train(tmp_path, 0, 2, cfg=config(wandb=True, tensorboard=False))
    said = f"{tmp_path}/wandb.json is damaged and kept as wandb-damaged.json; W&B gets a new run\n"
    assert said in capsys.readouterr().out
    assert (tmp_path / "wandb-damaged.json").read_bytes() == content
    ((id, rows),) = tracker.history.items()
    assert json.loads((tmp_path / "wandb.json").read_bytes())["id"] == id
    assert len(rows) == 2


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"^config\.log\.wandb: .*pip install wandb"):
        writer(tmp_path, cfg=config(wandb=True))


def test_wandb_that_does_not_start_is_named(tmp_path, monkeypatch):
    class NoLogin(Tracker):
        def init(self, **_):
            raise self.Error("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", NoLogin())
    with pytest.raises(ValueError, match=r"^config\.log\.wandb: .*api_key not configured"):
        writer(tmp_path, cfg=config(wandb=True))


# --- records at a URL -----------------------------------------------------------------------------


class Remote:
    """A path of an object store, where nothing can be appended."""

    def __init__(self, url, store):
        self.url, self.store = url, store

    def __truediv__(self, name):
        return Remote(f"{self.url}/{name}", self.store)

    def __fspath__(self):
        return self.url

    @property
    def parent(self):
        return Remote(self.url.rsplit("/", 1)[0], self.store)

    def exists(self):
        return self.url in self.store

    def mkdir(self, **_):
        pass

    def read_bytes(self):
        return self.store[self.url]

    def write_bytes(self, data):
        self.store[self.url] = data


def test_records_at_a_url_are_copied_and_resumed():
    run = Remote("gs://bucket/run", {})
    train(run, 0, 13, cfg=config(), kill=True)
    assert max(jsonl.read(run)) == 10  # the last sync
    train(run, 10, 20, timeline=1.0, cfg=config())
    steps = jsonl.read(run)
    assert {s: r["train/CE loss"] for s, r in steps.items()} == {
        s: loss_at(s, 0.0 if s <= 10 else 1.0) for s in range(1, 21)
    }
    assert sum("tensorboard/events" in url for url in run.store) == 2


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    damage = [b"[" * 100_000, b'{"step":' * 100_000, b"[1]", b'{"step": "1"}', b"\xff", b"null"]
    sound = b'{"step": 1, "tokens": 2, "time": 3}'
    (tmp_path / jsonl.NAME).write_bytes(b"\n".join([*damage, sound, b""]))
    assert jsonl.read(tmp_path) == {1: {"tokens": 2, "time": 3}}


def test_a_folder_without_records_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl: no such file"):
        jsonl.read(str(tmp_path))
