"""The checkpoint's file format: what is read is what was written, or it is refused; nothing is executed."""

import hashlib
import json
import logging
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.runtime import checkpoint
from upstep_fast.runtime.checkpoint import FORMAT, DamagedError

FILES = {"state.safetensors": bytes(range(256)), "adapter_config.json": b'{"r": 8}\n', "empty": b""}
MANIFEST = {"state": {"gate": {"reference": 0.1 + 0.2, "window": [1e-300, 0.5]}, "name": "\udcff é"}}


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def steps(folder):
    return sorted(p.name for p in folder.iterdir())


def test_what_is_saved_is_loaded(folder):
    path = checkpoint.save(folder, 7, FILES, MANIFEST)
    found = checkpoint.load(path)
    assert (found.path, found.step, found.files) == (folder / "step-00000007", 7, FILES)
    assert found.manifest["state"] == MANIFEST["state"] and found.manifest["format"] == FORMAT
    assert checkpoint.newest(folder) == found
    for name, data in FILES.items():
        facts = json.loads((path / "manifest.json").read_text())["files"][name]
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_two_are_kept_and_latest_names_the_newest(folder):
    for step in (1, 5, 9, 12):
        checkpoint.save(folder, step, FILES, MANIFEST)
        assert (folder / "latest").read_text() == f"step-{step:08d}\n"
    assert steps(folder) == ["latest", "step-00000009", "step-00000012"]
    checkpoint.save(folder, 13, FILES, MANIFEST, keep=3)
    assert steps(folder) == ["latest", "step-00000009", "step-00000012", "step-00000013"]


def test_nothing_to_resume(folder):
    assert checkpoint.newest(folder) is None and checkpoint.newest(folder / "none") is None
    (folder / "latest").write_text("step-00000009\n")
    (folder / "step-9").mkdir()
    (folder / ".tmp-9-1").mkdir()
    (folder / "step-00000003").write_text("a file, not a folder")
    assert checkpoint.newest(folder) is None


def test_a_link_in_place_of_a_checkpoint_is_no_checkpoint(folder, tmp_path_factory, caplog):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    checkpoint.save(elsewhere, 9, FILES, MANIFEST)
    checkpoint.save(folder, 3, FILES, MANIFEST)
    (folder / "step-00000009").symlink_to(elsewhere / "step-00000009")
    assert checkpoint.newest(folder).step == 3 and "a link, not a folder" in caplog.text
    checkpoint.save(folder, 12, FILES, MANIFEST, keep=1)  # deletes the link, not what it leads to
    assert steps(folder) == ["latest", "step-00000012"] and checkpoint.newest(elsewhere).step == 9


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_what_lies_in_the_place_of_a_new_checkpoint_is_replaced(folder, tmp_path_factory, kind):
    elsewhere, place = tmp_path_factory.mktemp("elsewhere"), folder / "step-00000005"
    (elsewhere / "mine").write_text("kept")
    if kind == "file":
        place.write_text("no checkpoint")
    else:
        place.symlink_to(elsewhere if kind == "link" else folder / "nothing")
    checkpoint.save(folder, 5, FILES, MANIFEST)
    assert checkpoint.newest(folder).step == 5 and (elsewhere / "mine").read_text() == "kept"


def test_a_folder_named_latest_stays(folder):
    (folder / "latest").mkdir()
    checkpoint.save(folder, 5, FILES, MANIFEST)
    assert (folder / "latest").is_dir() and steps(folder) == ["latest", "step-00000005"]


def test_the_same_step_is_replaced(folder):
    checkpoint.save(folder, 3, {"state": b"old"}, {})
    checkpoint.save(folder, 3, {"state": b"new"}, {})
    assert checkpoint.newest(folder).files == {"state": b"new"} and steps(folder) == ["latest", "step-00000003"]


def test_every_file_and_folder_is_on_disk_before_the_name_appears(folder, monkeypatch):
    """The order of the calls is the promise against power cuts, which no test can make."""
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real_fsync(descriptor)

    def replace(a, b):
        calls.append(("replace", Path(b).name))
        real_replace(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    checkpoint.save(folder, 4, FILES, MANIFEST)
    temporary = f".tmp-4-{os.getpid()}"
    order = [*FILES, "manifest.json", temporary]
    assert calls[: len(order)] == [("fsync", name) for name in order]
    assert calls[len(order) :] == [("replace", "step-00000004"), ("fsync", folder.name), ("replace", "latest")]


def test_a_damaged_checkpoint_falls_back_to_the_previous_one_with_a_warning(folder, caplog):
    for step in (1, 2):
        checkpoint.save(folder, step, {"state": b"%d" % step}, {})
    (folder / "step-00000002" / "state").write_bytes(b"x")
    with caplog.at_level(logging.WARNING, logger="upstep_fast"):
        assert checkpoint.newest(folder).step == 1
    assert "step-00000002 is damaged (state does not match its SHA-256)" in caplog.text


def test_what_was_gone_back_behind_does_not_count_among_those_kept(folder):
    for step in (2, 4, 8):
        checkpoint.save(folder, step, {"state": b"%d" % step}, {}, keep=3)
    for step in (4, 8):
        (folder / f"step-{step:08d}" / "state").write_bytes(b"x")
    assert checkpoint.newest(folder).step == 2
    checkpoint.save(folder, 3, {"state": b"3"}, {})
    assert steps(folder) == ["latest", "step-00000002", "step-00000003"]
    assert checkpoint.newest(folder).step == 3


def test_no_intact_checkpoint_is_an_error(folder):
    for step in (1, 2):
        checkpoint.save(folder, step, FILES, {})
        (folder / f"step-{step:08d}" / "state.safetensors").unlink()
    with pytest.raises(RunFailedError, match=r"every checkpoint in .* is damaged .*--overwrite") as error:
        checkpoint.newest(folder)
    assert "\n" not in str(error.value) and error.value.exit_code == 1


def rewrite(path, change):
    """The manifest changed, with a hash that is right again: what an attacker or another version would write."""
    body = json.loads((path / "manifest.json").read_text())
    del body["sha256"]
    change(body)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**body, "sha256": digest}))


def test_a_newer_format_is_refused_with_both_versions(folder):
    checkpoint.save(folder, 1, FILES, MANIFEST)
    path = checkpoint.save(folder, 2, FILES, MANIFEST)
    rewrite(path, lambda body: body.update(format=FORMAT + 6))
    with pytest.raises(ConfigError, match=rf"format {FORMAT + 6}, this version reads up to {FORMAT}"):
        checkpoint.newest(folder)


def test_the_first_format_is_still_read(folder):
    """A checkpoint as version 0.1.0 wrote it, byte for byte."""
    path = folder / "step-00000012"
    path.mkdir()
    (path / "state").write_bytes(b"weights")
    (path / "manifest.json").write_text(
        '{"state": {"loss": 0.30000000000000004}, "format": 1, "step": 12, "files": {"state": {"bytes": 7, '
        '"sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"}}, '
        '"sha256": "5dc6ce662fcec7427b7a6e27719e2c136fb113d73675fe98959d9251069576c6"}'
    )
    assert checkpoint.load(path).manifest["state"] == {"loss": 0.1 + 0.2}


class Boom:
    def __reduce__(self):
        return os.system, (f"touch {Boom.marker}",)


HOSTILE = {
    "a name that leads out": lambda body: body["files"].update({"../../secret": {"bytes": 6, "sha256": ""}}),
    "an absolute name": lambda body: body["files"].update({"/etc/passwd": {"bytes": 6, "sha256": ""}}),
    "a name of dots": lambda body: body["files"].update({"..": {"bytes": 6, "sha256": ""}}),
    "an empty name": lambda body: body["files"].update({"": {"bytes": 6, "sha256": ""}}),
    "the manifest itself": lambda body: body["files"].update({"manifest.json": {"bytes": 6, "sha256": ""}}),
    "a zero byte in a name": lambda body: body["files"].update({"a\0b": {"bytes": 6, "sha256": ""}}),
    "a size that is text": lambda body: body["files"]["empty"].update(bytes="0"),
    "a negative size": lambda body: body["files"]["empty"].update(bytes=-1),
    "a huge size": lambda body: body["files"]["empty"].update(bytes=1 << 60),
    "no size": lambda body: body["files"]["empty"].pop("bytes"),
    "no hash": lambda body: body["files"]["empty"].pop("sha256"),
    "facts that are a list": lambda body: body["files"].update(empty=[0]),
    "files that are a list": lambda body: body.update(files=["state"]),
    "no files": lambda body: body.pop("files"),
    "a format that is text": lambda body: body.update(format="1"),
    "format 0": lambda body: body.update(format=0),
    "no format": lambda body: body.pop("format"),
    "another step": lambda body: body.update(step=3),
    "a step that is text": lambda body: body.update(step="2"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_with_a_right_hash_is_refused(folder, name, record_property):
    path = checkpoint.save(folder, 2, FILES, MANIFEST)
    (folder.parent / "secret").write_text("secret")
    rewrite(path, HOSTILE[name])
    with pytest.raises(DamagedError) as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)
    record_property("hostile_files", 1)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"text"',
        b"\xff\xfe\x00",
        b"\x80\x04\x95",
        b"[" * 200_000,
        b'{"sha256": ' + b"9" * 10_000 + b"}",
        b'{"sha256": NaN}',
        b'{"sha256": null, "format": 1, "step": 2, "files": {}}',
        b" " * (checkpoint.MAX_MANIFEST_BYTES + 1),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_manifest_that_is_none_is_refused(folder, text, record_property):
    path = checkpoint.save(folder, 2, FILES, MANIFEST)
    (path / "manifest.json").write_bytes(text)
    with pytest.raises(DamagedError):
        checkpoint.load(path)
    record_property("hostile_files", 1)


@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "link", "dangling link", "device", "pickle"])
def test_what_is_not_a_regular_file_is_refused_and_no_pickle_runs(folder, name, kind, record_property):
    path = checkpoint.save(folder, 2, FILES, MANIFEST)
    target = path / name
    kept = folder / "kept"
    shutil.move(target, kept)
    Boom.marker = folder / "executed"
    if kind == "fifo":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    elif kind == "link":
        target.symlink_to(kept)
    elif kind == "dangling link":
        target.symlink_to(folder / "nowhere")
    elif kind == "device":
        target.symlink_to("/dev/zero")
    else:
        target.write_bytes(pickle.dumps(Boom()))
    with pytest.raises(DamagedError):
        checkpoint.load(path)
    assert not Boom.marker.exists()
    record_property("hostile_files", 1)


def loaded_or_refused(path, original):
    """True: refused. Fails if something else than the original is accepted."""
    try:
        found = checkpoint.load(path)
    except (DamagedError, ConfigError):
        return True
    assert (found.manifest, found.files) == (original.manifest, original.files)
    return False


def mutate(folder, name, bits, every):
    """Flips the chosen bits of every byte and cuts at every `every`-th; returns how many files were tried."""
    path = checkpoint.save(folder, 2, FILES, MANIFEST)
    original, data = checkpoint.load(path), (path / name).read_bytes()
    tried = refused = 0
    for position in range(len(data)):
        for bit in bits(position):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            (path / name).write_bytes(flipped)
            refused += loaded_or_refused(path, original)
            tried += 1
    for position in range(0, len(data), every):
        (path / name).write_bytes(data[:position])
        refused += loaded_or_refused(path, original)
        tried += 1
    (path / name).write_bytes(data + b"\0")
    assert loaded_or_refused(path, original)
    # in the manifest a flip may fall on white space or on the letters of an escape, and change nothing
    assert refused == tried or (name == "manifest.json" and refused > 0.98 * tried)
    return tried + 1


@pytest.mark.parametrize("name", ["manifest.json", *FILES])
def test_a_bit_flip_in_any_byte_and_truncations_are_refused(folder, name, record_property):
    record_property("mutated_files", mutate(folder, name, lambda position: [position % 8], every=9))


@pytest.mark.long
@pytest.mark.parametrize("name", ["manifest.json", *FILES])
def test_every_bit_flip_and_every_truncation_is_refused(folder, name, record_property):
    record_property("mutated_files", mutate(folder, name, lambda position: range(8), every=1))


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["manifest.json", *FILES]),
    edits=st.lists(
        st.tuples(st.integers(0, 2000), st.integers(0, 2000), st.binary(max_size=40)), min_size=1, max_size=3
    ),
)
def test_any_edit_is_refused_or_changes_nothing(tmp_path_factory, name, edits):
    folder = tmp_path_factory.mktemp("edits")
    path = checkpoint.save(folder, 2, FILES, MANIFEST)
    original, data = checkpoint.load(path), (path / name).read_bytes()
    for start, length, new in edits:
        data = data[:start] + new + data[start + length :]
    (path / name).write_bytes(data)
    loaded_or_refused(path, original)
    shutil.rmtree(folder)


@given(
    files=st.dictionaries(st.from_regex(r"[a-z][a-z0-9_.]{0,20}", fullmatch=True), st.binary(max_size=200), max_size=4),
    manifest=st.dictionaries(
        st.sampled_from(["state", "loader", "config"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=8,
        ),
    ),
)
@settings(max_examples=30, derandomize=True, deadline=None)
def test_load_of_save_is_the_same(tmp_path_factory, files, manifest):
    folder = tmp_path_factory.mktemp("round")
    found = checkpoint.load(checkpoint.save(folder, 3, files, manifest))
    assert found.files == files
    assert {name: found.manifest[name] for name in manifest} == manifest
    shutil.rmtree(folder)


class Killed(BaseException):
    pass


class Saves(RuleBasedStateMachine):
    """Saves, kills, damage and clean-ups in any order, against a dictionary of what must be there."""

    @initialize()
    def begin(self):
        import tempfile

        self.folder = Path(tempfile.mkdtemp(prefix="upstep-saves-"))
        self.whole, self.damaged, self.step = {}, set(), 0
        self.random = random.Random(0)

    def teardown(self):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def content(self, step):
        return {"state": b"state %d" % step}

    def saved(self, step):
        for old in [s for s in self.whole.keys() | self.damaged if s > step]:
            self.forget(old)
        self.damaged.discard(step)
        self.whole[step] = self.content(step)
        for old in sorted(self.whole.keys() | self.damaged)[:-2]:
            self.forget(old)

    def forget(self, step):
        self.whole.pop(step, None)
        self.damaged.discard(step)

    @rule(ahead=st.integers(1, 3))
    def save(self, ahead):
        self.step += ahead
        checkpoint.save(self.folder, self.step, self.content(self.step), {})
        self.saved(self.step)

    @rule(ahead=st.integers(1, 3), call=st.integers(0, 12))
    def killed_save(self, ahead, call):
        """A save that stops dead before its call-th change on disk: nothing is tidied up after it."""
        step, count = self.step + ahead, iter(range(1000))
        final = self.folder / f"step-{step:08d}"
        # a damaged one of this step may still lie there, which is not what is being saved
        before = final.stat().st_ino if final.is_dir() else None
        real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink", "rmdir")}
        real_rmtree = shutil.rmtree

        def dying(name):
            def call_or_die(*args, **kwargs):
                if next(count) == call:
                    shutil.rmtree = lambda *a, **k: None  # a dead process removes nothing
                    raise Killed
                return real[name](*args, **kwargs)

            return call_or_die

        for name in real:
            setattr(os, name, dying(name))
        try:
            checkpoint.save(self.folder, step, self.content(step), {})
            finished = True
        except Killed:
            finished = False
        finally:
            shutil.rmtree = real_rmtree
            for name, function in real.items():
                setattr(os, name, function)
        if final.is_dir() and final.stat().st_ino != before:
            self.damaged.discard(step)
            self.whole[step] = self.content(step)
        if finished:
            self.saved(step)
        else:  # which of the old ones were pruned before the kill is open, but never the last whole one
            listed = {int(p.name[5:]) for p in self.folder.glob("step-*")}
            assert not self.whole or max(self.whole) in listed
            for old in (self.whole.keys() | self.damaged) - listed:
                self.forget(old)
        self.resume()

    @precondition(lambda self: self.whole)
    @rule(newest=st.booleans(), how=st.sampled_from(["flip", "truncate", "unlink", "manifest"]))
    def damage(self, newest, how):
        step = max(self.whole) if newest else min(self.whole)
        path = self.folder / f"step-{step:08d}"
        target = path / ("manifest.json" if how == "manifest" else "state")
        data = target.read_bytes()
        if how == "unlink":
            target.unlink()
        else:
            target.write_bytes(data[:-1] if how == "truncate" else bytes([data[0] ^ 1]) + data[1:])
        del self.whole[step]
        self.damaged.add(step)

    @rule()
    def resume(self):
        checkpoint.clean(self.folder)
        assert not list(self.folder.glob("*.tmp-*"))
        if self.whole:
            found = checkpoint.newest(self.folder)
            assert found.step == max(self.whole) and found.files == self.whole[found.step]
            self.step = found.step
        elif self.damaged:
            with pytest.raises(RunFailedError):
                checkpoint.newest(self.folder)
            shutil.rmtree(self.folder)  # the cure that the message names
            self.folder.mkdir()
            self.damaged.clear()
            self.step = 0
        else:
            assert checkpoint.newest(self.folder) is None
            self.step = 0

    @invariant()
    def what_is_there_is_what_was_saved(self):
        if hasattr(self, "folder"):
            assert {int(p.name[5:]) for p in self.folder.glob("step-*")} == self.whole.keys() | self.damaged


TestSaves = Saves.TestCase
TestSaves.settings = settings(max_examples=20, stateful_step_count=12, derandomize=True, deadline=None)


@pytest.mark.long
def test_saves_in_many_more_orders():
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Saves, settings=settings(max_examples=2000, stateful_step_count=30, deadline=None))
