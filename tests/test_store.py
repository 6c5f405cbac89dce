"""The store: what is in it, that it is whole or absent, and that no file and no dying decoder takes a run with it."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from kladi.config import Data, Intensity
from kladi.data.decoded import building, content, decoder, store
from kladi.data.decoded.store import Store
from kladi.data.pixels import images
from kladi.data.pixels.frame import Limits
from kladi.errors import RunStopped

SMALL = Intensity(size=28)
SOURCE = Path(__file__).parents[1] / "src"


def picture(seed=0, height=20, width=30, dtype=np.uint8, channels=None):
    shape = (height, width) if channels is None else (height, width, channels)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


@pytest.fixture
def data(tmp_path):
    """A folder of five readable images and four faults; returns (folder, paths)."""
    folder = tmp_path / "data"
    folder.mkdir()
    for seed in range(4):
        Image.fromarray(picture(seed)).save(folder / f"{seed}.png")
    Image.fromarray(picture(9, channels=3)).save(folder / "colour.jpg", quality=95)
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.png").write_text("<html>not found</html>")
    names = ["0.png", "cut.png", "1.png", "missing.png", "2.png", "empty.png", "colour.jpg", "page.png", "3.png"]
    return folder, [folder / name for name in names]


def made(data, tmp_path, pipeline=SMALL, **options):
    _, paths = data
    return store.build(paths, [-1] * len(paths), pipeline, tmp_path / "store", **{"workers": 1, **options})


def test_squares_are_those_of_the_pipeline(data, tmp_path):
    _, paths = data
    built, _ = made(data, tmp_path)
    assert built.source.tolist() == [0, 2, 4, 6, 8]
    assert built.images.shape == (5, 1, 32, 32)
    assert built.images.dtype == np.uint8
    for row, position in enumerate(built.source):
        square, extent = images.fit(images.decode(paths[position], -1, SMALL).pixels, 32)
        np.testing.assert_array_equal(built.images[row], square)
        np.testing.assert_array_equal(built.extent[row], extent)


def test_what_was_left_out_is_said_with_its_rows(data, tmp_path):
    _, findings = made(data, tmp_path, rows=list(range(11, 20)))
    told = {(f.code, f.severity, f.rows) for f in findings}
    assert told == {
        ("I2", "left out", (12,)),
        ("M5", "left out", (14,)),
        ("I1", "left out", (16,)),
        ("I3", "left out", (18,)),
        ("I16", "warning", (17,)),
    }
    text = " ".join(f.message for f in findings)
    assert "truncated PNG" in text
    assert "content is HTML" in text
    assert "1 image colour, 4 grey" in text


def test_one_line_for_many_files_of_one_fault(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(b"")
    paths = sorted(tmp_path.glob("*.png"))
    built, findings = store.build(paths, [-1] * 6, SMALL, tmp_path / "store")
    assert len(built) == 0
    assert built.gather(np.zeros(0, np.int64)).shape == (0, 1, 32, 32)
    assert [(f.message, f.rows) for f in findings] == [("empty file", (1, 2, 3, 4, 5, 6))]


def test_row_id_is_the_content_and_the_frame(data, tmp_path):
    _, paths = data
    built, _ = made(data, tmp_path)
    digest = hashlib.sha256(paths[0].read_bytes() + (-1).to_bytes(8, "little", signed=True))
    assert int(built.row_id[0]) == int.from_bytes(digest.digest()[:8], "big")
    renamed = tmp_path / "elsewhere.png"
    shutil.copy(paths[0], renamed)
    again, _ = store.build([paths[2], renamed], [-1, -1], SMALL, tmp_path / "other")
    assert again.row_id[1] == built.row_id[0]  # survives renaming and reordering
    assert again.row_id[0] == built.row_id[1]


def test_equal_content_gets_ids_in_the_order_of_the_paths(tmp_path):
    for name in "abc":
        Image.fromarray(picture()).save(tmp_path / f"{name}.png")
    first, _ = store.build([tmp_path / f"{n}.png" for n in "abc"], [-1] * 3, SMALL, tmp_path / "s1")
    assert len(set(first.row_id.tolist())) == 3
    assert len(set(first.pixel_digest.tolist())) == 1
    turned, _ = store.build([tmp_path / f"{n}.png" for n in "cab"], [-1] * 3, SMALL, tmp_path / "s2")
    assert turned.row_id.tolist() == first.row_id[[2, 0, 1]].tolist()
    alone, _ = store.build([tmp_path / "a.png"], [-1], SMALL, tmp_path / "s3")
    assert alone.row_id[0] == first.row_id[0]


def test_pixel_digest_finds_copies_in_other_files(tmp_path):
    pixels = picture()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.bmp")
    np.save(tmp_path / "c.npy", pixels)
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(tmp_path / "d.png")
    built, _ = store.build(
        [tmp_path / n for n in ("a.png", "b.bmp", "c.npy", "d.png")], [-1] * 4, SMALL, tmp_path / "s"
    )
    a, b, c, d = built.pixel_digest.tolist()
    assert a == b == c != d
    assert len(set(built.row_id.tolist())) == 4


def test_i9_blank_images_are_no_copies_of_each_other(tmp_path):
    for name, value in (("a", 0), ("b", 0), ("c", 7)):
        Image.fromarray(np.full((20, 20), value, np.uint8)).save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{n}.png" for n in "abc"]
    built, findings = store.build(paths, [-1] * 3, SMALL, tmp_path / "s")
    assert len(set(built.pixel_digest.tolist())) == 3
    assert [(f.code, f.severity, f.rows) for f in findings] == [("I9", "warning", (1, 2, 3))]
    dropped, findings = store.build(paths, [-1] * 3, SMALL, tmp_path / "s", config=Data(drop_blank=True))
    assert len(dropped) == 0
    assert [(f.code, f.severity, f.rows) for f in findings] == [("I9", "left out", (1, 2, 3))]


@pytest.mark.parametrize("order", ["8 first", "16 first"])
def test_i7_one_image_of_sixteen_bits_makes_all_sixteen(tmp_path, order):
    narrow, wide = picture(1, 32, 32), picture(2, 32, 32, np.uint16)
    Image.fromarray(narrow).save(tmp_path / "narrow.png")
    Image.fromarray(wide).save(tmp_path / "wide.png")
    names = ["narrow.png", "wide.png"] if order == "8 first" else ["wide.png", "narrow.png"]
    built, _ = store.build([tmp_path / n for n in names], [-1, -1], SMALL, tmp_path / "s", workers=1)
    assert built.images.dtype == np.uint16
    at = names.index("narrow.png")
    np.testing.assert_array_equal(built.images[at, 0], narrow.astype(np.uint16) * 257)
    np.testing.assert_array_equal(built.images[1 - at, 0], wide)


def test_frames_of_one_file(tmp_path):
    pages = [picture(s, 32, 32) for s in range(6)]
    tifffile.imwrite(tmp_path / "a.tif", np.stack(pages), photometric="minisblack")
    Image.fromarray(pages[5]).save(tmp_path / "b.png")
    paths = [tmp_path / "a.tif", tmp_path / "b.png", tmp_path / "a.tif", tmp_path / "a.tif"]
    built, findings = store.build(paths, [4, -1, 0, 9], SMALL, tmp_path / "s", workers=2)
    assert built.source.tolist() == [0, 1, 2]
    for row, page in enumerate((4, 5, 0)):
        np.testing.assert_array_equal(built.images[row, 0], pages[page])
    assert len(set(built.row_id.tolist())) == 3
    assert [(f.severity, f.message, f.rows) for f in findings] == [
        ("left out", "frame 9 does not exist: the file has 6", (4,))
    ]


def test_i16_the_mix_is_counted(data, tmp_path):
    built, findings = made(data, tmp_path, replace(SMALL, channels=3))
    assert built.images.shape == (5, 3, 32, 32)
    assert built.facts == {
        "format": {"JPEG": 1, "PNG": 4},
        "bits": {"8-bit": 5},
        "window": {"full range": 5},
        "channels": {"colour": 1, "grey": 4},
    }
    assert [f.message for f in findings if f.code == "I16"] == [
        "1 image colour, 4 grey; --intensity.channels 3: grey is repeated"
    ]
    grey = built.images[built.source == 0][0]
    np.testing.assert_array_equal(grey[0], grey[2])


# Made once, whole or not at all ---------------------------------------------------------------------------------------


def nothing_is_decoded(*_args, **_options):
    raise AssertionError("decoded again")


def test_the_second_call_decodes_nothing(data, tmp_path, monkeypatch):
    first, findings = made(data, tmp_path)
    monkeypatch.setattr(building, "decode_all", nothing_is_decoded)
    again, told = made(data, tmp_path)
    assert again.digest == first.digest
    assert told == findings
    np.testing.assert_array_equal(again.images, first.images)
    np.testing.assert_array_equal(again.source, first.source)
    other_norm, _ = made(data, tmp_path, replace(SMALL, mean=(0.1,), std=(0.9,)))  # applied later, not stored
    assert other_norm.folder == first.folder


@pytest.mark.parametrize(
    "change", [{"size": 56}, {"channels": 3}, {"low": 1.0}, {"window": "percentile"}], ids=lambda c: next(iter(c))
)
def test_another_pipeline_is_another_store(data, tmp_path, change):
    first, _ = made(data, tmp_path)
    other, _ = made(data, tmp_path, replace(SMALL, **change))
    assert other.digest != first.digest
    assert other.folder != first.folder


def test_a_changed_file_is_another_store_and_other_limits_too(data, tmp_path):
    folder, paths = data
    first, _ = made(data, tmp_path)
    limited, findings = made(data, tmp_path, config=Data(max_pixels=599))
    assert len(limited) == 0
    assert "--data.max_pixels 599" in findings[0].message
    Image.fromarray(picture(77)).save(folder / "0.png")
    changed, _ = made(data, tmp_path)
    assert changed.digest != first.digest
    assert (changed.row_id != first.row_id).tolist() == [True, False, False, False, False]
    os.utime(paths[2])  # time stamps do not count
    assert made(data, tmp_path)[0].folder == changed.folder


def test_a_new_decoder_is_tried_on_what_was_left_out(data, tmp_path, monkeypatch):
    first, _ = made(data, tmp_path)
    monkeypatch.setattr(content, "_decoders", lambda: {"pillow": "99"})
    again, _ = made(data, tmp_path)
    assert again.folder != first.folder
    assert again.digest == first.digest  # same images, same pipeline


@pytest.mark.parametrize("damage", ["no meta", "half meta", "short pixels", "other rows", "another format"])
def test_half_a_store_is_never_taken_for_whole(data, tmp_path, damage):
    first, _ = made(data, tmp_path)
    pixels = np.array(first.images)
    meta = first.folder / "meta.json"
    if damage == "no meta":
        meta.unlink()
    elif damage == "half meta":
        meta.write_text(meta.read_text()[:40])
    elif damage == "short pixels":
        with (first.folder / "pixels.bin").open("r+b") as file:
            file.truncate(1000)
    elif damage == "other rows":
        with (first.folder / "rows.npz").open("r+b") as file:
            file.seek(60)
            file.write(b"\0\1\2")
    else:
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 99}))
    with pytest.raises(RunStopped, match="no whole store"):
        Store.open(first.folder)
    again, _ = made(data, tmp_path)
    np.testing.assert_array_equal(again.images, pixels)
    np.testing.assert_array_equal(Store.open(first.folder).images, pixels)


def test_killed_while_building_leaves_nothing_that_counts(data, tmp_path):
    """SIGKILL in the middle: the next build finds no store, sweeps the remains, and builds."""
    folder, _ = data
    for number in range(200):
        Image.fromarray(picture(number, 300, 300)).save(folder / f"x{number}.png")
    code = f"""
        import sys; sys.path.insert(0, {str(SOURCE)!r})
        from pathlib import Path
        from kladi.config import Intensity
        from kladi.data.decoded import store
        paths = sorted(Path({str(folder)!r}).glob("x*.png"))
        done = lambda n, of: print(n, flush=True)
        store.build(paths, [-1] * len(paths), Intensity(size=28), {str(tmp_path / "store")!r}, workers=1, progress=done)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    while int(child.stdout.readline()) < 20:
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    left = [p.name for p in (tmp_path / "store").iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".tmp-")
    built, _ = made(data, tmp_path)
    assert [p.name for p in (tmp_path / "store").iterdir()] == [built.folder.name]


def test_a_script_without_main_guard_works(data, tmp_path):
    """Children do not run the user's script again, as those of multiprocessing would."""
    folder, _ = data
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(SOURCE)!r})
        from kladi.config import Intensity
        from kladi.data.decoded import store
        built, _ = store.build([{str(folder / "0.png")!r}], [-1], Intensity(size=28), {str(tmp_path / "store")!r})
        print(len(built))
    """)
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "1\n"


def test_a_module_beside_the_script_shadows_no_library(data, tmp_path):
    folder, _ = data
    (tmp_path / "PIL.py").write_text("raise SystemExit('not this one')")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys; here = sys.path.pop(0); sys.path.insert(0, {str(SOURCE)!r})
        from kladi.config import Intensity
        from kladi.data.decoded import store
        sys.path.insert(0, here)
        built, _ = store.build([{str(folder / "0.png")!r}], [-1], Intensity(size=28), {str(tmp_path / "store")!r})
        print(len(built))
    """)
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "1\n"


def test_any_number_of_workers_gives_the_same_bits(data, tmp_path):
    _, paths = data
    one, _ = store.build(paths, [-1] * len(paths), SMALL, tmp_path / "one", workers=1)
    four, _ = store.build(paths, [-1] * len(paths), SMALL, tmp_path / "four", workers=4)
    for name in ("pixels.bin", "rows.npz", "meta.json"):
        assert (one.folder / name).read_bytes() == (four.folder / name).read_bytes(), name


def test_progress_counts_every_row(data, tmp_path):
    seen = []
    made(data, tmp_path, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (9, 9)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# Privacy and manners --------------------------------------------------------------------------------------------------


def test_m20_nothing_is_written_beside_the_data(data, tmp_path):
    folder, _ = data
    before = sorted((p.name, p.stat().st_mtime_ns) for p in folder.iterdir())
    folder.chmod(0o500)
    try:
        made(data, tmp_path)
    finally:
        folder.chmod(0o700)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in folder.iterdir()) == before


def test_s2_no_path_and_no_content_of_a_header_in_the_store(tmp_path):
    folder = tmp_path / "Xylander_Theodora"
    folder.mkdir()
    Image.fromarray(picture()).save(folder / "Xylander-1961.png")
    (folder / "Xylander2.png").write_text("<html>Xylander</html>")
    Image.fromarray(picture()).save(folder / "Xylander3.jpg", format="PNG")
    built, findings = store.build(sorted(folder.iterdir()), [-1] * 3, SMALL, tmp_path / "store")
    kept = b"".join(p.read_bytes() for p in built.folder.rglob("*") if p.is_file())
    assert b"ylander" not in kept + str(built.folder.relative_to(tmp_path)).encode()
    assert "ylander" not in " ".join(f.message for f in findings)


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_s6_the_store_is_its_owners_alone(data, tmp_path):
    built, _ = made(data, tmp_path)
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700
    assert built.folder.stat().st_mode & 0o777 == 0o700
    for path in built.folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_i14_originals_may_vanish_once_it_is_built(data, tmp_path):
    folder, _ = data
    built, _ = made(data, tmp_path)
    expected = np.array(built.images)
    shutil.rmtree(folder)
    np.testing.assert_array_equal(Store.open(built.folder).gather(np.arange(5)), expected)


def test_r5_no_space_is_said_with_the_bytes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(building.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9, 100))
    with pytest.raises(RunStopped, match=r"needs 9,216 bytes; 100 are free"):
        made(data, tmp_path)
    assert list((tmp_path / "store").iterdir()) == []


def test_r5_a_full_disk_leaves_nothing_behind(data, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(building._Pixels, "write", full)
    with pytest.raises(RunStopped, match="No space left on device"):
        made(data, tmp_path)
    assert list((tmp_path / "store").iterdir()) == []


# Reading --------------------------------------------------------------------------------------------------------------


def test_gather_in_order_and_with_repetition(data, tmp_path):
    built, _ = made(data, tmp_path)
    index = np.array([4, 0, 0, 3])
    np.testing.assert_array_equal(built.gather(index), built.images[index])
    assert built.gather(index).flags.writeable
    for bad in (5, -1):
        with pytest.raises(IndexError, match=f"row {bad} of a store of 5"):
            built.gather(np.array([0, bad]))


def test_i14_a_store_that_cannot_be_read_is_tried_three_times(data, tmp_path, monkeypatch):
    built, _ = made(data, tmp_path)
    tries = []
    honest = Store._read

    def failing(self, index, out, times=[0]):  # noqa: B006 - the count is meant to last
        times[0] += 1
        tries.append(times[0])
        if times[0] < 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        honest(self, index, out)

    monkeypatch.setattr(Store, "_read", failing)
    np.testing.assert_array_equal(built.gather(np.array([2])), built.images[[2]])
    assert tries == [1, 2, 3]
    monkeypatch.setattr(Store, "_read", honest)
    with (built.folder / "pixels.bin").open("r+b") as file:
        file.truncate(2 * 32 * 32)
    with pytest.raises(RunStopped, match="cannot be read"):
        built.gather(np.array([3]))
    (built.folder / "pixels.bin").unlink()
    with pytest.raises(RunStopped, match="No such file"):
        built.gather(np.array([0]))


# Decoders that die ----------------------------------------------------------------------------------------------------

DEADLY = """
import os, signal, sys, time
sys.path[:0] = {path!r}
from kladi.data.pixels import decode
from kladi.data.decoded import decoder
honest = decode.open_bytes
def open_bytes(data, *rest, **options):
    if data.startswith(b"segfault"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.startswith(b"exit"):
        os._exit(7)
    if data.startswith(b"hang"):
        time.sleep(600)
    if data.startswith(b"once"):
        flag = data[5:].decode()
        if not os.path.exists(flag):
            open(flag, "w").close()
            os._exit(1)
        data = open(flag[:-5] + ".png", "rb").read()
    return honest(data, *rest, **options)
decode.open_bytes = open_bytes
decoder.serve()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_d15_a_file_that_kills_its_decoder_is_left_out_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "_START", DEADLY)
    paths = []
    for number in range(24):
        paths.append(tmp_path / f"{number:02}.png")
        if number in (3, 4, 17):
            paths[-1].write_bytes([b"segfault", b"exit", b"segfault again"][(3, 4, 17).index(number)])
        else:
            Image.fromarray(picture(number, 32, 32)).save(paths[-1])
    built, findings = store.build(paths, [-1] * 24, SMALL, tmp_path / "store", workers=2)
    assert [(f.severity, f.code, f.message, f.rows) for f in findings] == [
        ("left out", "D15", "the decoder died on it (signal 11)", (4, 18)),
        ("left out", "D15", "the decoder died on it (exit 7)", (5,)),
    ]
    assert built.source.tolist() == [n for n in range(24) if n not in (3, 4, 17)]
    for row, number in enumerate(built.source):
        np.testing.assert_array_equal(built.images[row, 0], picture(int(number), 32, 32))


def test_d15_a_death_by_another_cause_costs_no_image(tmp_path, monkeypatch):
    """The kernel may have needed the memory: a second child gets the file before it is given up."""
    monkeypatch.setattr(decoder, "_START", DEADLY)
    Image.fromarray(picture(5, 32, 32)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"once " + str(tmp_path / "a.flag").encode())
    built, findings = store.build([tmp_path / "b.png"], [-1], SMALL, tmp_path / "store")
    assert findings == []
    np.testing.assert_array_equal(built.images[0, 0], picture(5, 32, 32))


def test_d15_a_decoder_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "_START", DEADLY)
    Image.fromarray(picture(1, 32, 32)).save(tmp_path / "a.png")
    Image.fromarray(picture(2, 32, 32)).save(tmp_path / "c.png")
    (tmp_path / "b.png").write_bytes(b"hang")
    jobs = [decoder.Job(k, str(tmp_path / f"{n}.png"), -1) for k, n in enumerate("abc")]
    start = time.monotonic()
    answers = {a.key: a for a in decoder.decode_all(jobs, SMALL, Limits(), workers=1, patience=4.0)}
    assert time.monotonic() - start < 60
    assert answers[1].fault.reason == "the decoder gave no answer in 4 s and was ended"
    np.testing.assert_array_equal(answers[2].square[0], picture(2, 32, 32))


def test_giving_up_early_ends_the_children(tmp_path):
    Image.fromarray(picture(1, 32, 32)).save(tmp_path / "a.png")
    jobs = [decoder.Job(k, str(tmp_path / "a.png"), -1) for k in range(500)]
    answers = decoder.decode_all(jobs, SMALL, Limits(), workers=2)
    next(answers)
    answers.close()  # returns only when every lane's thread is done
    assert not [t for t in __import__("threading").enumerate() if "run" in t.name and t.is_alive()]


def test_no_decoder_process_at_all(data, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "_START", "raise SystemExit('{path[0]}'[:0] + 'no numpy here')")
    with pytest.raises(RunStopped, match="cannot be started: no numpy here"):
        made(data, tmp_path)
    assert list((tmp_path / "store").iterdir()) == []


def test_children_start_without_torch():
    code = "import sys, kladi.data.decoded.decoder\n"
    code += "print(sorted({'torch', 'polars', 'pydicom', 'scipy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "[]\n"
