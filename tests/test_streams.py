"""Pipes, terminals, and signals."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as load_bytes
from safetensors.numpy import save_file

from fusecli import fuse, init
from tests.conftest import FUSECLI, Run

TTY = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"


def test_two_arrays_one_after_the_other_on_stdin(run: Run, pair: tuple[Any, Any], tmp_path: Path) -> None:
    run("fuse", "regions.npy", "txt.npy", "-o", "out.npy", "-q")
    both = (tmp_path / "regions.npy").read_bytes() + (tmp_path / "txt.npy").read_bytes()
    done = run("fuse", "-", "-", "-o", "-", input=both)
    assert done.stdout == (tmp_path / "out.npy").read_bytes()
    save_file({"text": pair[1]}, tmp_path / "t.safetensors")
    both = (tmp_path / "t.safetensors").read_bytes()
    done = run("fuse", "regions.npy", "-", "-o", "-", "--format", "safetensors", input=both)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), load_bytes(done.stdout)["fused"])


def test_process_substitution_and_a_closed_pipe(pair: tuple[Any, Any], tmp_path: Path) -> None:
    command = " ".join(FUSECLI)
    shell = f"set -o pipefail; {command} fuse <(cat regions.npy) txt.npy -q -o - | head -c 10; echo $?"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, check=True, timeout=60)
    assert done.stdout == b"\x93NUMPY\x01\x00v\x00" + b"0\n"
    assert done.stderr == b""


def test_a_closed_pipe_ends_a_long_run_quietly(pair: tuple[Any, Any], tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", np.ones((5000, 768), np.float32))
    command = " ".join(FUSECLI)
    shell = f"set -o pipefail; {command} fuse img.npy long.npy -q -o - | head -c 10 > /dev/null"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_fifo_is_written_and_not_replaced(pair: tuple[Any, Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    child = subprocess.Popen([*FUSECLI, "fuse", "img.npy", "txt.npy", "-qo", "pipe.npy"], cwd=tmp_path)
    fused = np.load(io.BytesIO((tmp_path / "pipe.npy").read_bytes()))
    assert child.wait(timeout=60) == 0
    assert fused.shape == (5, 768)
    assert (tmp_path / "pipe.npy").is_fifo()


@pytest.mark.parametrize("places", [("-o", "-"), ("-o", "out.npy", "-a", "-")])
def test_nothing_goes_into_a_pipe_when_the_last_row_is_bad(
    run: Run, pair: tuple[Any, Any], tmp_path: Path, places: tuple[str, ...]
) -> None:
    text = np.ones((20_000, 768), np.float32)
    text[-1, -1] = np.inf
    np.save(tmp_path / "long.npy", text)
    done = run("fuse", "regions.npy", "long.npy", *places, code=3)
    assert done.stdout == b""
    assert b"row 19999, column 767" in done.stderr
    assert not (tmp_path / "out.npy").exists()


def test_two_results_do_not_share_a_pipe(run: Run, pair: tuple[Any, Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "both")
    for one, other in (("-", "/dev/stdout"), ("both", "both")):
        assert b"another output" in run("fuse", "img.npy", "txt.npy", "-o", one, "-a", other, code=2).stderr
    run("fuse", "img.npy", "txt.npy", "-o", "/dev/null", "-a", "/dev/null")


def test_attention_of_many_blocks_goes_through_a_pipe(
    run: Run, pair: tuple[Any, Any], tmp_path: Path, rng: np.random.Generator
) -> None:
    np.save(tmp_path / "long.npy", rng.standard_normal((20_000, 768), dtype=np.float32))
    piped = run("fuse", "regions.npy", "long.npy", "-o", "out.npy", "-a", "-").stdout
    run("fuse", "regions.npy", "long.npy", "-o", "out.npy", "-a", "att.npy")
    assert piped == (tmp_path / "att.npy").read_bytes()


def test_binary_data_are_kept_off_a_terminal(pair: tuple[Any, Any], tmp_path: Path) -> None:
    command = [sys.executable, "-c", TTY, *FUSECLI, "fuse", "img.npy", "txt.npy", "-o", "-"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, stdin=subprocess.DEVNULL, check=False, timeout=60)
    assert done.returncode == 2
    assert b"terminal" in done.stdout


def test_a_file_on_stdin_is_read_one_array_after_the_other(run: Run, pair: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "both.npy").write_bytes((tmp_path / "regions.npy").read_bytes() + (tmp_path / "txt.npy").read_bytes())
    with open(tmp_path / "both.npy", "rb") as both:
        run("fuse", "-", "-", "-o", "out.npy", stdin=both)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), fuse(init(), *pair))
    with open(tmp_path / "txt.npy", "rb") as text:
        run("fuse", "regions.npy", "-", "-o", "txt.npy", stdin=text, code=2)


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", "2> >(true)"])
def test_words_that_nobody_hears_do_not_touch_the_result(pair: tuple[Any, Any], tmp_path: Path, closed: str) -> None:
    def shell(command: str) -> Any:
        command = f"{' '.join(FUSECLI)} {command} {closed}"
        return subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, check=False, timeout=60)

    done = shell("fuse img.npy txt.npy -o -")
    assert np.load(io.BytesIO(done.stdout)).shape == (5, 768)
    wanted = {"fuse img.npy none.npy -o -": 3, "fuse img.npy txt.npy -o none/x.npy": 1, "fuse --none": 2}
    assert done.returncode == 0
    assert {command: shell(command).returncode for command in wanted} == wanted


COMMANDS = [
    ("--version",),
    ("--help",),
    ("fuse", "-h"),
    ("inspect", "img.npy"),
    ("fuse", "img.npy", "txt.npy", "-o", "o.npy", "--json"),
]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_standard_output_is_told_and_a_closed_one_is_none(
    run: Run, pair: tuple[Any, Any], command: tuple[str, ...], unbuffered: str
) -> None:
    env = {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        told = run(*command, code=1, env=env, stdout=full).stderr
    error = b"error: <stdout>: cannot be written: found No space left on device"
    assert told.splitlines()[-2:] == [error, b"hint: free some space, or write elsewhere"]
    reader, writer = os.pipe()
    os.close(reader)
    assert b"error" not in run(*command, code=0, env=env, stdout=writer).stderr
    os.close(writer)


def test_a_pipe_that_does_not_wait(pair: tuple[Any, Any], tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", np.ones((200, 768), np.float32))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    command = [*FUSECLI, "fuse", "img.npy", "long.npy", "-o", "-", "-q"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=writer) as child, open(reader, "rb") as pipe:
        os.close(writer)
        time.sleep(0.5)  # so that it is full
        assert np.load(io.BytesIO(pipe.read())).shape == (200, 768)
        assert child.wait(60) == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_words_for_a_pipe_that_does_not_wait_come_through(tmp_path: Path, unbuffered: str) -> None:
    save_file({f"{k:05}": np.ones((1, 2), np.float32) for k in range(2000)}, tmp_path / "many.safetensors")
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen([*FUSECLI, "inspect", "many.safetensors"], cwd=tmp_path, stdout=writer, env=env) as child:
        os.close(writer)
        time.sleep(1)  # so that it is full
        with open(reader, "rb") as pipe:
            assert pipe.read().count(b"\n") == 2002
        assert child.wait(60) == 0


def test_help_fits_the_terminal() -> None:
    shell = f"stty cols 60; exec {' '.join(FUSECLI)} fuse --help"
    command = [sys.executable, "-c", TTY, "sh", "-c", shell]
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(command, env=env, capture_output=True, stdin=subprocess.DEVNULL, check=True, timeout=60)
    assert max(map(len, done.stdout.decode().splitlines())) <= 60


def test_whoever_calls_the_command_keeps_its_streams(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3), np.float32))
    code = """
import contextlib, io, logging, sys
from fusecli.cli import main
handler, told = logging.StreamHandler(), io.StringIO()
sys.argv[1:] = ["inspect", "a.npy"]
for stream in (told, sys.stdout, sys.stdout):
    with contextlib.redirect_stdout(stream), contextlib.suppress(SystemExit):
        main()
logging.getLogger().addHandler(handler)
logging.error("still here")
assert "features" in told.getvalue()
"""
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, check=True)
    assert (done.stdout.count(b"features"), done.stderr) == (2, b"still here\n")


def test_a_folder_that_is_gone_is_told(run: Run, pair: tuple[Any, Any], tmp_path: Path) -> None:
    shell = f"mkdir gone; cd gone; rmdir ../gone; {' '.join(FUSECLI)} fuse img.npy txt.npy -o o.npy"
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, env=env, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (1, b"error: the current folder: No such file or directory\n")


def test_a_terminal_of_no_width_is_shown_something(pair: tuple[Any, Any], tmp_path: Path) -> None:
    command = [sys.executable, "-c", TTY, *FUSECLI, "inspect", "img.npy"]
    env = os.environ | {"COLUMNS": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, stdin=subprocess.DEVNULL, check=True)
    assert b"[1, 768]" in done.stdout


def test_which_reader_has_gone_is_told(run: Run, pair: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npy")
    np.save(tmp_path / "long.npy", np.ones((4000, 768), np.float32))
    command = [*FUSECLI, "fuse", "img.npy", "long.npy", "-o", "-", "-a", "a.npy", "-q"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        (tmp_path / "a.npy").open("rb").close()
        assert child.stderr
        assert b"error: a.npy: its reader has gone" in child.stderr.read()
        assert child.wait(60) == 1


@pytest.mark.parametrize(
    "command",
    [
        ("fuse", "-", "txt.npy", "-o", "o.npy", "-a", "a.safetensors"),
        ("batch", "--manifest", "-", "-o", "out", "-a", "a.safetensors"),
        ("show", "-"),
    ],
)
def test_standard_input_brings_one_thing(run: Run, pair: Any, command: tuple[str, ...]) -> None:
    assert b"--tokens -: standard input" in run(*command, "--tokens", "-", code=2, input=b"").stderr


def test_standard_output_by_its_other_name(run: Run, pair: Any, tmp_path: Path) -> None:
    command = ("fuse", "regions.npy", "txt.npy", "-q", "-o", "/dev/stdout")
    assert b"--json" in run(*command, "--json", code=2).stderr
    with (tmp_path / "log").open("wb") as log:
        log.write(b"before")
        log.flush()
        run(*command, stdout=log)
        assert (tmp_path / "log").read_bytes().startswith(b"before\x93NUMPY")


def test_ctrl_c_while_waiting_for_a_pipe(pair: tuple[Any, Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never.npy")  # whoever reads it waits
    command = [*FUSECLI, "fuse", "img.npy", "never.npy", "-o", "out.npy"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) as child, open(tmp_path / "never.npy", "wb"):
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=60) == 130
        assert child.stderr
        assert b"Traceback" not in child.stderr.read()


def _writes_in(pid: int, folder: Path) -> bool:
    try:
        return any(os.readlink(file).startswith(f"{folder}/") for file in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:  # closed meanwhile
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_stopped_run_leaves_no_litter(pair: tuple[Any, Any], tmp_path: Path, number: int) -> None:
    (tmp_path / "out").mkdir()
    np.lib.format.open_memmap(tmp_path / "long.npy", "w+", np.float32, (400_000, 768)).flush()
    child = subprocess.Popen([*FUSECLI, "fuse", "regions.npy", "long.npy", "-qo", "out/out.npy"], cwd=tmp_path)
    while not _writes_in(child.pid, tmp_path / "out"):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(number)
    assert child.wait(timeout=60) == (-number if number == signal.SIGKILL else 128 + number)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_ignored(pair: tuple[Any, Any], tmp_path: Path, number: int) -> None:
    os.mkfifo(tmp_path / "late.npy")
    command = [*FUSECLI, "fuse", "img.npy", "late.npy", "-o", "out.npy", "-q"]
    before = signal.signal(number, signal.SIG_IGN)  # as nohup does, and a shell for what it starts with &
    try:
        child = subprocess.Popen(command, cwd=tmp_path)
    finally:
        signal.signal(number, before)
    with open(tmp_path / "late.npy", "wb") as late:
        child.send_signal(number)
        late.write((tmp_path / "txt.npy").read_bytes())
    assert child.wait(timeout=60) == 0
