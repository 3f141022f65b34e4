import io

from mmrf_jax.io.progress import Progress


class Stream(io.StringIO):
    def __init__(self, tty):
        super().__init__()
        self.isatty = lambda: tty


def run(tty, seconds, total=100, done=0):
    """Progress of one unit a second."""
    now, stream = [0.0], Stream(tty)
    with Progress("collect", total, "users", done=done, stream=stream, clock=lambda: now[0]) as progress:
        for i in range(seconds):
            now[0] += 1.0
            progress.update(done + i + 1)
    return stream.getvalue()


def test_short_work_is_silent():
    assert run(tty=False, seconds=4) == ""


def test_a_line_each_ten_seconds_and_a_final_one_without_terminal():
    lines = run(tty=False, seconds=30).splitlines()
    assert lines == [
        "collect 5/100 users  5%  1.0/s  1 min 35 s left",
        "collect 15/100 users  15%  1.0/s  1 min 25 s left",
        "collect 25/100 users  25%  1.0/s  1 min 15 s left",
        "collect 30/100 users  30%  1.0/s  took 30 s",
    ]


def test_one_line_overwritten_on_a_terminal():
    text = run(tty=True, seconds=12)
    assert text.count("\r") == 5 and text.count("\n") == 1 and text.rstrip().endswith("took 12 s")


def test_the_time_left_follows_from_units_after_the_first_whose_time_is_compilation():
    now, stream = [0.0], Stream(tty=False)
    progress = Progress("train", 100, stream=stream, clock=lambda: now[0])
    for done, seconds in ((1, 60.0), (2, 10.0), (12, 10.0)):
        now[0] += seconds
        progress.update(done)
    progress.close()
    assert stream.getvalue().splitlines() == [
        "train 1/100 steps  1%",
        "train 2/100 steps  2%  0.1/s  16 min 20 s left",
        "train 12/100 steps  12%  0.6/s  2 min 40 s left",
        "train 12/100 steps  12%  0.6/s  took 1 min 20 s",
    ]


def test_rate_counts_only_this_run_and_total_may_be_unknown():
    assert "collect 65/100 users  65%  1.0/s  35 s left" in run(tty=False, seconds=6, done=60)
    assert run(tty=False, seconds=6, total=None).splitlines()[0] == "collect 5 users  1.0/s"
