"""Files of strangers are bounded and regular; their text cannot steer a terminal."""

from __future__ import annotations

import os

import pytest

from upstep_fast import input_files
from upstep_fast.errors import ConfigError, printable


def test_reads_through_a_link_to_a_regular_file(tmp_path):
    (tmp_path / "blob").write_text('{"a": [1, 2.5]}')
    (tmp_path / "link.json").symlink_to(tmp_path / "blob")
    assert input_files.read_json(tmp_path / "link.json", "adapter") == {"a": [1, 2.5]}


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling", "loop", "null byte"])
def test_refuses_what_is_not_a_regular_file_without_waiting(tmp_path, kind):
    path = tmp_path / "x.json"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "dangling":
            path.symlink_to(tmp_path / "gone")
        case "loop":
            path.symlink_to(path)
        case "null byte":
            path = tmp_path / "a\0b"
    with pytest.raises(ConfigError, match=r"^adapter: (.* not a regular file|cannot read)"):
        input_files.read_json(path, "adapter")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": NaN}', "NaN is not finite"),
        ('{"a": -Infinity}', "not finite"),
        ('{"a": 1e999}', "not finite"),
        ("{", "not valid JSON"),
        ('{"a": [1, {"b": -99999999999999999999999}]}', "an integer has 77 bits"),
        ("1" * 5000, "not valid JSON"),  # Python refuses to convert more than 4,300 digits
    ],
)
def test_refuses_json_that_no_tool_writes(tmp_path, text, reason):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        input_files.read_json(path, "adapter")


def test_refuses_toml_with_infinity_and_depth(tmp_path):
    path = tmp_path / "a.toml"
    for text in ("a = inf", "a = nan", "a = 1e999", "a = " + "[" * 100_000, "[a]\nb = [0x" + "F" * 9000 + "]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not valid TOML"):
            input_files.read_toml(path, "config")


def test_refuses_more_bytes_than_the_limit_and_other_encodings(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1, 2, 3]")
    with pytest.raises(ConfigError, match="more than 5 bytes"):
        input_files.read_json(path, "adapter", limit=5)
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        input_files.read_json(path, "adapter")


def test_printable_escapes_what_steers_a_terminal():
    assert printable("a\x1b]0;title\x07b\nc\rd\x9b2J") == "a\\x1b]0;title\\x07b\\nc\\rd\\x9b2J"
    assert printable("\u202e\u2028\ud800") == "\\u202e\\u2028\\ud800"
    assert printable("naïve 画像 \u00a0 .jpg") == "naïve 画像 \u00a0 .jpg"
    assert printable("x" * 5000, limit=100) == "x" * 50 + " ... " + "x" * 50
