"""Several processes: the roll call, what it says, and the end of one; then whole runs."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from experiments.config import ConfigError, TrainConfig
from experiments.processes.connections import call_roll
from experiments.processes.flags import ProcessFlags
from tests.experiments.runs import ROOT, TINY, finish, last_step, rows, start, wait_for

SIZES = ("--batch-size=8", "--num-heads=2", "--num-kv-heads=2", "--seq-len=16")
MESH = "--mesh=data=2,fsdp=2"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]


def roll(*flags: dict, digests=None) -> list[str]:
    """Calls the roll in a thread for each process; returns what each was told."""
    shared = {"coordinator": f"localhost:{free_port()}", "join_seconds": 10.0}
    told = [""] * len(flags)

    def one(place: int):
        digest = digests[place] if digests else "same"
        try:
            for connection in call_roll(ProcessFlags(**shared | flags[place]), digest).values():
                connection.close()
            told[place] = "here"
        except ConfigError as error:
            told[place] = str(error)

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(flags))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def of(*numbers: int, processes: int = 3, **more) -> list[dict]:
    return [{"process_id": number, "processes": processes, **more} for number in numbers]


def test_all_are_there():
    assert roll(*of(2, 0, 1)) == ["here"] * 3


def test_who_never_came_is_named_to_all():
    told = roll(*of(0, 2, processes=4, join_seconds=0.5))
    assert len(set(told)) == 1
    assert re.match(r"processes 1, 3 of 4 did not come to localhost:\d+ within 0.5 s", told[0])


def test_the_first_process_never_came():
    (told,) = roll(*of(1, join_seconds=0.3))
    assert re.match(r"process 0 of 3 did not come to localhost:\d+ within 0.3 s", told)


def test_processes_that_do_not_agree():
    told = roll(*of(0, processes=2), *of(1, processes=3, join_seconds=2.0))
    assert set(told) == {"process 1 was started as one of 3, process 0 as one of 2"}
    told = roll(*of(0, 1, processes=2), digests=["a", "b"])
    assert set(told) == {"process 1 was started with other settings or data than process 0"}
    # The first of the two has been counted in by then, and hears of it too.
    assert set(roll(*of(0, 1, 1))) == {"two processes were started with --process-id 1"}


def test_a_stranger_is_not_counted_in():
    port = free_port()
    flags = ProcessFlags(
        coordinator=f"localhost:{port}", processes=2, process_id=0, join_seconds=1.0
    )
    caught = []

    def lead():
        try:
            call_roll(flags, "")
        except ConfigError as error:
            caught.append(str(error))

    thread = threading.Thread(target=lead)
    thread.start()
    while thread.is_alive():
        try:
            with socket.create_connection(("localhost", port)) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\n")
            break
        except OSError:  # nobody listens yet
            time.sleep(0.01)
    thread.join()
    assert caught and caught[0].startswith("process 1 of 2 did not come")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"processes": 0}, "processes is 0; the least is 1"),
        ({"processes": 2}, "2 processes need --coordinator host:port and --process-id"),
        ({"processes": 2, "coordinator": "h:1", "process_id": 2}, "of 2 processes it is 0 to 1"),
        ({"processes": 2, "coordinator": "host", "process_id": 0}, "'host' is no host:port"),
        ({"join_seconds": 0.0}, "join_seconds is 0.0; it is above 0"),
    ],
)
def test_flags_that_are_refused(flags, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        ProcessFlags(**flags)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "2 processes share one --mesh, such as data=2"),
        ({"mesh": "data=2"}, "several processes need --out"),
        ({"mesh": "data=2", "out": ROOT, "sample": True}, "--sample is for one process"),
    ],
)
def test_settings_that_processes_cannot_share(settings, message):
    flags = ProcessFlags(processes=2, coordinator="h:1", process_id=0)
    with pytest.raises(ConfigError, match=re.escape(message)):
        flags.check(TrainConfig(**settings))


def test_a_process_that_never_comes_ends_the_command_line(tmp_path):
    """One line, code 2, nothing written; who it is comes from the environment."""
    (tmp_path / "text.txt").write_text("abc " * 100)
    flags = [*TINY, "--mesh=data=2", f"--out={tmp_path / 'run'}"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.train",
            *flags,
            "--join-seconds=0.3",
            f"--data={tmp_path / 'text.txt'}",
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": "0",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(
        r"error: process 1 of 2 did not come to localhost:\d+ within 0.3 s\n", done.stderr
    )
    assert not (tmp_path / "run").exists()


LIFELINE = """
import socket, sys, threading
from experiments.processes.connections import Lifelines
mine, theirs = socket.socketpair()
with Lifelines({3: mine}, grace_seconds=0.2):
    (watch,) = [thread for thread in threading.enumerate() if thread.daemon]
    if "done" in sys.argv:
        theirs.sendall(b"done\\n")
    theirs.close()
    watch.join()  # it has heard that the other ended, and what that means
print("went on")
"""


def test_the_end_of_one_process_ends_another():
    run = lambda *argv: subprocess.run(
        [sys.executable, "-c", LIFELINE, *argv], cwd=ROOT, capture_output=True, text=True
    )
    ended = run()
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "error: process 3 has ended; --resume goes on from the last checkpoint\n"
    )
    # The twin: a process whose work was done.
    assert run("done").stdout == "went on\n"


@pytest.fixture
def two(tmp_path):
    """Starts two processes of one run, which writes to `tmp_path / "run"`."""
    (tmp_path / "text.txt").write_text("".join(map(str, range(5000))))

    def both(*flags) -> list[subprocess.Popen]:
        address = f"localhost:{free_port()}"
        numbered = ("--processes=2", f"--coordinator={address}", f"--out={tmp_path / 'run'}")
        return [
            start(
                *SIZES,
                MESH,
                *numbered,
                f"--data={tmp_path / 'text.txt'}",
                f"--process-id={i}",
                *flags,
                cache=tmp_path / "cache",
                devices=2,
            )
            for i in range(2)
        ]

    return both


@pytest.mark.heavy
@pytest.mark.parametrize("stopped", [0, 1])
def test_two_processes_of_which_one_is_stopped(stopped, two, tmp_path):
    """Both save the same step, which is the last that is on record, and end alike."""
    run = tmp_path / "run"
    processes = two("--steps=100000", "--decay-steps=8", "--validate-every=3")
    wait_for(processes[0], lambda: last_step(run) >= 4)
    processes[stopped].send_signal(signal.SIGTERM)
    ended = [finish(process) for process in processes]
    assert [code for code, _, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    saved = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    assert saved == [last_step(run)]
    why = "another process was stopped" if stopped else "SIGTERM"
    assert f"{why}: saved step {saved[0]} in" in ended[0][1]


@pytest.mark.heavy
def test_two_processes_of_which_one_is_killed(two, tmp_path):
    """The run goes on, also on one device, as a run that was never ended."""
    cache, out = tmp_path / "cache", tmp_path / "run"
    alone = [*SIZES, f"--data={tmp_path / 'text.txt'}"]
    whole = tmp_path / "whole"
    code, _, err = finish(start(*alone, "--steps=8", f"--out={whole}", cache=cache))
    assert code == 0, err

    processes = two("--steps=3000", "--save-every=2", "--decay-steps=8")
    saved = lambda: [int(p.name) for p in (out / "checkpoints").glob("*") if p.name.isdigit()]
    wait_for(processes[0], lambda: last_step(out) >= 3 and saved())
    processes[1].send_signal(signal.SIGKILL)
    code, _, err = finish(processes[0])
    finish(processes[1])
    assert code == 1, err
    assert err.splitlines()[-1].startswith("error: process 1 has ended"), err

    step = max(saved())
    more = two(f"--steps={step + 2}", "--save-every=2", "--decay-steps=8", "--resume")
    for code, _, err in map(finish, more):
        assert code == 0, err
    code, _, err = finish(start(*alone, "--steps=8", "--resume", f"--out={out}", cache=cache))
    assert code == 0, err
    got, want = ({r["step"]: r["loss"] for r in rows(run) if "loss" in r} for run in (out, whole))
    assert len(want) == 8
    np.testing.assert_allclose([got[step] for step in want], list(want.values()), rtol=1e-5)
