"""How files come to their places."""

from __future__ import annotations

import errno
import gc
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from fusecli.errors import OutputError
from fusecli.formats import open_sink, require_replaceable, write_whole
from tests.conftest import Run


def test_new_files_follow_the_umask_and_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "link.npy").symlink_to("real.npy")
    old = os.umask(0o027)
    try:
        with open_sink(str(tmp_path / "link.npy")) as sink:
            sink.put(0, b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "link.npy").is_symlink()
    assert stat.S_IMODE((tmp_path / "real.npy").stat().st_mode) == 0o640


@pytest.fixture(params=["unnamed", "unlinked", "refused", "unknown"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that has files without a name, that lets none be named, has none on this file system, has none."""

    def never(*args: object, **named: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if request.param == "unlinked":
        monkeypatch.setattr(os, "link", never)
    if request.param == "unknown":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    if request.param == "refused":
        real = os.open

        def refuse(path: str, flags: int, *rest: Any, **named: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            return real(path, flags, *rest, **named)

        monkeypatch.setattr(os, "open", refuse)


@pytest.mark.usefixtures("system")
def test_a_file_appears_whole_and_in_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    for data in (b"old", b"new"):
        with open_sink(str(path)) as sink:
            sink.put(0, data)
            assert not path.exists() or path.read_bytes() == b"old"
        assert path.read_bytes() == data
        assert os.listdir(tmp_path) == ["x.npy"]


@pytest.mark.usefixtures("system")
def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="No space left") as caught, open_sink(str(path)) as sink:  # noqa: PT012
        sink.put(0, b"new")
        raise OSError(28, "No space left on device")
    assert caught.value.hint == "free some space, or write elsewhere"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.npy"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_a_file_that_cannot_be_named_leaves_no_descriptor_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **named: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    def write() -> None:
        with pytest.raises(OutputError), open_sink(str(tmp_path / "x.npy")) as sink:
            sink.put(0, b"x")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "rename", refuse)  # where the system has no files without a name
    gc.collect()
    before = os.listdir("/proc/self/fd")
    write()
    assert os.listdir("/proc/self/fd") == before
    assert not os.listdir(tmp_path)


def test_a_file_that_is_written_anew_keeps_its_mode(run: Run, pair: Any, tmp_path: Path) -> None:
    (tmp_path / "o.npy").touch(0o600)
    run("fuse", "regions.npy", "txt.npy", "-o", "o.npy", "-q")
    assert (tmp_path / "o.npy").stat().st_mode & 0o777 == 0o600


def test_a_mode_that_cannot_be_kept_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchmod", refuse)
    for mode in (0o600, 0o666):  # the umask takes its share
        (tmp_path / f"{mode}").touch(mode)
        if mode == 0o600:
            with pytest.raises(OutputError, match="not permitted"):
                write_whole(str(tmp_path / f"{mode}"), b"secret")
        else:
            write_whole(str(tmp_path / f"{mode}"), b"news")
        assert (tmp_path / f"{mode}").read_bytes() == (b"" if mode == 0o600 else b"news")


def test_what_belongs_to_others_where_that_protects_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").touch()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    require_replaceable(str(tmp_path / "x"))
    tmp_path.chmod(0o1777)
    require_replaceable(str(tmp_path / "new"))
    with pytest.raises(OutputError, match="another user"):
        require_replaceable(str(tmp_path / "x"))
