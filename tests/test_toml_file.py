"""The files that users write: what they hold is plain values, or one line that names the file and the remedy."""

import os
from pathlib import Path

import pytest

from symdist.toml_file import read_toml

FAULTS: dict[str, tuple[str, bytes, str]] = {
    "not UTF-8": (".toml", b"name = '\xe9'", "is not UTF-8 at byte 8"),
    "no TOML": (".toml", b"name", "is not valid TOML"),
    "no JSON": (".json", b"{", "is not valid JSON"),
    "a list": (".json", b"[1]", "no table of settings"),
    "a NUL": (".toml", b"name = 'a\0'", "is not valid TOML"),
    "a NUL in a text": (".toml", rb'name = "\u0000"', "NUL, or that is no Unicode text, at name"),
    "a NUL in a key": (".toml", rb"[a]" + b"\n" + rb'"\u0000" = 1', "NUL or is no Unicode text, at a"),
    "half a character": (".json", rb'{"name": ["\ud800"]}', r"at name\[0\]"),
    "a date": (".toml", b"[a]\nb = 2026-01-01", "a date or time, which no setting is, at a.b"),
    "a large number": (".toml", b"steps = 0x" + b"f" * 9000, "more than 64 bits at steps"),
    "a number without end": (".toml", b"steps = " + b"1" * 9000, "is not valid TOML"),
    "deep lists": (".toml", b"a = " + b"[" * 5000 + b"]" * 5000, "nested too deep"),
    "deep tables": (".json", b'{"a":' * 100_000, "nested too deep"),
    "rather deep lists": (".toml", b"a = " + b"[" * 40 + b"]" * 40, "nested deeper than 32 levels at a"),
    "a dotted key": (".toml", b"a." * 150 + b"a = 1", "nested deeper than 32 levels at a;"),
    "a long dotted key": (".toml", b"a." * 300_000 + b"a = 1", "more than 200 dots"),
    "a large file": (".toml", b"#" * (2**20 + 1), "more than 1 MiB"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_setting_can_be_is_refused_by_one_line(tmp_path: Path, fault: str) -> None:
    suffix, content, message = FAULTS[fault]
    path = (tmp_path / "file").with_suffix(suffix)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_toml(path, what="recipe")
    assert str(caught.value).startswith(f"recipe {path} ")
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name, message in {
        "pipe": "cannot be read: it is no regular file",
        "zeros": "cannot be read: it is no regular file",
        "loop": "cannot be read: Too many levels of symbolic links",
        "": "cannot be read: Is a directory",
        "missing": "does not exist",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            read_toml(tmp_path / name, what="config")
        assert str(caught.value).startswith(f"config {tmp_path / name} ")


@pytest.mark.parametrize(
    ("suffix", "text"), [(".toml", "a = [1, inf]\r\nb = 'x'"), (".json", '{"a": [1, Infinity], "b": "x"}')]
)
def test_toml_and_json_are_read_alike(tmp_path: Path, suffix: str, text: str) -> None:
    path = (tmp_path / "file").with_suffix(suffix)
    path.write_text(text)
    assert read_toml(path, what="config") == {"a": [1, float("inf")], "b": "x"}
