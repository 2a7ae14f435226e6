"""Plain lines for files, a bar for terminals."""

import io

import pytest

from moe.training import progress as progress_module
from moe.training.progress import Progress, duration

VALUES = {
    "loss/total": 1.2344,
    "bits_per_byte": 1.78,
    "speed/tokens_per_second": 12345.0,
    "speed/step_seconds": 0.4,
    "speed/mfu": 0.312,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    times = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: times[0])
    return times


def test_plain_lines_one_a_log_interval(clock):
    stream = io.StringIO()
    progress = Progress(400, start=90, stream=stream)
    progress.update(99)
    progress.update(100, VALUES)
    clock[0] += 60.0
    progress.update(200, VALUES | {"speed/mfu": None})
    progress.message("valid 200  bpb 1.700")
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 100/400  loss 1.234  bpb 1.780  12,345 tokens/s  0.40 s/step  mfu 31%  0 s left",
        "step 200/400  loss 1.234  bpb 1.780  12,345 tokens/s  0.40 s/step  2 min left",
        "valid 200  bpb 1.700",
    ]


def test_a_bar_on_a_terminal():
    stream = Terminal()
    progress = Progress(400, start=100, stream=stream)
    progress.update(101)
    progress.update(200, VALUES)
    progress.message("valid 200  bpb 1.700")
    progress.close()
    shown = stream.getvalue()
    assert "200/400" in shown
    assert "loss 1.234  bpb 1.780  12,345 tokens/s  0.40 s/step  mfu 31%" in shown
    assert " 50%|" in shown
    assert "valid 200  bpb 1.700\n" in shown


def test_other_processes_show_nothing():
    stream = Terminal()
    progress = Progress(400, visible=False, stream=stream)
    progress.update(100, VALUES)
    progress.message("valid")
    progress.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (45, "45 s"),
        (59.7, "1 min"),
        (120, "2 min"),
        (12000, "3 h 20 min"),
        (187200, "2 d 4 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_log_on_a_full_disk_stops_nothing(tmp_path):
    with open("/dev/full", "w") as stream:
        progress = Progress(10, stream=stream)
        progress.update(1, VALUES)
        progress.message("valid 1")
        progress.close()  # what never found room is let go: Python would end with code 120 for it


def test_lines_that_found_no_room_come_when_there_is_some():
    class Filling(io.StringIO):
        full = True

        def flush(self) -> None:
            if self.full:
                raise OSError(28, "No space left on device")

    stream = Filling()
    progress = Progress(10, stream=stream)
    progress.message("first")
    stream.full = False
    progress.message("second")
    progress.close()
    assert stream.getvalue() == "first\nsecond\n"


def test_a_bar_on_a_terminal_that_is_gone_stops_nothing():
    class Gone(Terminal):
        gone = False

        def write(self, text: str) -> int:
            if self.gone:
                raise OSError(5, "Input/output error")
            return super().write(text)

    stream = Gone()
    progress = Progress(10, stream=stream)
    stream.gone = True
    progress.update(1, VALUES)
    progress.message("valid 1")
    progress.close()
