from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from swba_infer.errors import ConfigError
from swba_infer.files import replacing
from swba_infer.video import VideoWriter, contact_sheet, read_frames, resize_frames

pytest.importorskip("av")
pytest.importorskip("PIL")


@pytest.fixture
def frames() -> np.ndarray:
    y, x = np.mgrid[0:24, 0:32]
    shift = np.arange(7)[:, None, None]
    return np.stack([(x * 4 + shift * 8) % 256, (y * 6) + 0 * shift, 0 * x + 20 * shift], axis=-1).astype(np.uint8)


def write(path, frames, **options):
    with VideoWriter(path, **options) as video:
        for frame in frames:
            video.write(frame)


def test_video_reads_back_as_written(tmp_path, frames):
    write(tmp_path / "a.mp4", frames, fps=12.5, crf=2)
    back = read_frames(tmp_path / "a.mp4")
    assert back.shape == frames.shape
    assert back.dtype == np.uint8
    # 4:2:0 halves the colour resolution, so the edges of hue differ; the average must not.
    assert np.abs(back.astype(int) - frames).mean() < 6


def test_scale_enlarges_each_pixel(tmp_path, frames):
    write(tmp_path / "a.mp4", frames, scale=4)
    assert read_frames(tmp_path / "a.mp4").shape == (7, 96, 128, 3)


def test_same_frames_give_the_same_bytes(tmp_path, frames):
    random = np.random.default_rng(0)

    def encode() -> bytes:
        clutter = [random.integers(0, 255, random.integers(1000, 400_000), dtype=np.uint8) for _ in range(8)]
        del clutter  # an encoder that reads memory it has not written now reads this
        write(tmp_path / "a.mp4", frames)
        return (tmp_path / "a.mp4").read_bytes()

    files = {encode() for _ in range(40)}
    time.sleep(1.1)  # a time stamp in the file would count seconds
    assert files == {encode()}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_neither_file_nor_temporary(tmp_path, frames, error):
    def interrupted():
        with VideoWriter(tmp_path / "a.mp4") as video:
            video.write(frames[0])
            raise error

    with pytest.raises(error):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_older_file(tmp_path, frames):
    write(tmp_path / "a.mp4", frames)
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(ConfigError, match="at least one frame"):
        write(tmp_path / "a.mp4", [])
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_killed_process_leaves_nothing_under_the_final_name(tmp_path):
    code = (
        "import numpy as np, os, signal, sys\n"
        "from swba_infer.video import VideoWriter\n"
        "with VideoWriter(sys.argv[1]) as video:\n"
        "    for i in range(40):\n"
        "        video.write(np.random.randint(0, 255, (48, 64, 3), dtype=np.uint8))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.mp4")], env=os.environ, check=False)
    assert done.returncode == -9
    assert not (tmp_path / "a.mp4").exists()


def test_output_path_is_checked_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="writable"):
        VideoWriter(tmp_path / "file" / "a.mp4")
    with pytest.raises(ConfigError, match="directory"):
        VideoWriter(tmp_path)
    with pytest.raises(ConfigError, match=r"\.mp4"):
        VideoWriter(tmp_path / "a.gif")


@pytest.mark.parametrize(
    "options", [{"scale": 0}, {"scale": True}, {"fps": 0}, {"fps": float("nan")}, {"fps": float("inf")}]
)
def test_writer_rejects_bad_options(tmp_path, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        VideoWriter(tmp_path / "a.mp4", **options)


def test_writer_rejects_frames_that_do_not_fit(tmp_path, frames):
    for bad, message in [
        (frames[0].astype(np.float32), "uint8"),
        (frames[0, :, :, 0], "uint8"),
        (frames[0, :12], "expected"),
    ]:
        with pytest.raises(ConfigError, match=message):
            write(tmp_path / "a.mp4", [frames[0], bad])
    with pytest.raises(ConfigError, match="list"):
        write(tmp_path / "a.mp4", [[1, 2, 3]])
    with pytest.raises(ConfigError, match="with"):
        VideoWriter(tmp_path / "a.mp4").write(frames[0])
    with pytest.raises(ConfigError, match="even"):
        write(tmp_path / "a.mp4", frames[:, :23])


def test_images_and_directories_read_in_name_order(tmp_path, frames):
    for i in (2, 0, 1):
        contact_sheet(frames[i : i + 1], 1, tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    stack = read_frames(tmp_path)
    assert stack.shape[0] == 3
    for i in range(3):
        np.testing.assert_array_equal(stack[i], read_frames(tmp_path / f"{i}.png")[0])
    np.testing.assert_array_equal(read_frames(tmp_path, limit=2), stack[1:])
    np.testing.assert_array_equal(read_frames([tmp_path / "2.png", tmp_path / "0.png"]), stack[[2, 0]])


def test_the_last_frames_of_a_video_are_those_of_the_whole(tmp_path, frames):
    write(tmp_path / "a.mp4", frames)
    whole = read_frames(tmp_path / "a.mp4")
    np.testing.assert_array_equal(read_frames(tmp_path / "a.mp4", limit=3), whole[-3:])
    np.testing.assert_array_equal(read_frames(tmp_path / "a.mp4", limit=len(whole) + 1), whole)


def test_an_image_of_another_size_is_refused_among_those_that_are_not_needed(tmp_path, frames):
    contact_sheet(frames[:2], 2, tmp_path / "0.png")
    for i in (1, 2):
        contact_sheet(frames[:1], 1, tmp_path / f"{i}.png")
    with pytest.raises(ConfigError, match="one size"):
        read_frames(tmp_path, limit=2)


def test_unreadable_context_is_a_clear_error(tmp_path, frames):
    with pytest.raises(ConfigError, match="no such file"):
        read_frames(tmp_path / "none.mp4")
    with pytest.raises(ConfigError, match="at least one frame"):
        read_frames(tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    (tmp_path / "broken.png").write_bytes(b"no image at all")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name in ("broken.mp4", "broken.png", "empty.mp4"):
        with pytest.raises(ConfigError, match=name):
            read_frames(tmp_path / name)
    contact_sheet(frames[:1], 1, tmp_path / "a.png")
    contact_sheet(frames[:2], 2, tmp_path / "b.png")
    with pytest.raises(ConfigError, match="one size"):
        read_frames([tmp_path / "a.png", tmp_path / "b.png"])


def test_contact_sheet_lays_out_rows(tmp_path, frames):
    sheet = contact_sheet(frames, 3, tmp_path / "sheet.png")
    np.testing.assert_array_equal(read_frames(tmp_path / "sheet.png")[0], sheet)
    assert sheet.shape == (3 * 26 + 2, 3 * 34 + 2, 3)
    np.testing.assert_array_equal(sheet[2:26, 2:34], frames[0])
    np.testing.assert_array_equal(sheet[28:52, 36:68], frames[4])
    assert contact_sheet(frames, 3, labels=[str(i) for i in range(7)]).shape[0] > sheet.shape[0]


def test_resize_is_explicit_and_keeps_constant_images(frames):
    flat = np.full((2, 24, 32, 3), 77, np.uint8)
    for method in ("area", "nearest", "bicubic"):
        assert (resize_frames(flat, 12, 16, method) == 77).all()
    with pytest.raises(ConfigError, match="resize"):
        resize_frames(frames, 12, 16, "magic")


def test_replacing_renames_on_success_only(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with replacing(target) as temporary:
        temporary.write_text("done")
        assert not target.exists()
    assert target.read_text() == "done"
    assert [p.name for p in target.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_a_partial_file_plays_while_it_grows_and_takes_its_name_when_complete(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    frames = np.random.default_rng(0).integers(0, 256, (90, 16, 32, 3), np.uint8)
    with VideoWriter(path, fps=5, keep_partial=True) as video:
        for frame in frames:
            video.write(frame)
        assert not path.exists()
        assert video.partial is not None
        assert 20 <= len(read_frames(video.partial)) < 90
    assert read_frames(path).shape == frames.shape
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder.mp4", "expected a file name, got the directory .*folder.mp4"),
        ("a.mp4", "expected a file name, got the directory .*a.partial.mp4"),
        ("new/" + 250 * "x" + ".mp4", "expected a writable path.*File name too long"),
        ("new/" + 300 * "x" + ".mp4", "expected a writable path.*File name too long"),
    ],
)
def test_a_path_or_partial_path_that_cannot_be_a_file_is_refused_at_once(tmp_path, name, message):
    for folder in ("folder.mp4", "a.partial.mp4"):
        (tmp_path / folder).mkdir()
    with pytest.raises(ConfigError, match=message):
        VideoWriter(tmp_path / name, keep_partial=True)


@pytest.mark.parametrize("written", [0, 1, 7])
def test_a_failed_run_keeps_a_partial_file_if_it_has_frames(tmp_path, written):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"older")
    video = VideoWriter(path, keep_partial=True)

    def interrupted() -> None:
        with video:
            for _ in range(written):
                video.write(np.zeros((16, 32, 3), np.uint8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"older"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "a.partial.mp4"][: 2 if written else 1]
    if written:
        assert len(read_frames(video.partial)) == written
