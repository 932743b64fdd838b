"""The folders of segments belong to one result, and to one run at a time."""

from __future__ import annotations

import pytest

from sanrt.errors import PictureError
from sanrt.runtime.pictures.provenance import Provenance, SourceIdentity
from sanrt.runtime.video import segments
from sanrt.runtime.video.segments import Segment, WorkFolder, folder_of, remove_others, work_folder

MADE = Provenance(SourceIdentity("0" * 64, 1, "etag"), 2, "model", "options")


@pytest.fixture(autouse=True)
def _any_maker(monkeypatch):
    monkeypatch.setattr(segments, "makers", dict)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a" * 60 + "1.mp4", "a" * 60 + "2.mp4"),
        ("\N{HIRAGANA LETTER A}" * 80, "\N{HIRAGANA LETTER A}" * 79),
        ("a", "a.sanrt-b"),
    ],
)
def test_segments_of_a_result_with_a_similar_name_stay(tmp_path, one, other):
    folder = folder_of(tmp_path / other, MADE)
    folder.mkdir()
    (folder / "000000.mkv").touch()
    remove_others(tmp_path / one)
    assert [path.name for path in folder.iterdir()] == ["000000.mkv"]
    remove_others(tmp_path / other)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_refused_leaves_the_folder_to_the_one_that_has_it(tmp_path):
    result = tmp_path / "a.mp4"
    with work_folder(result, MADE) as work:
        for _ in range(2):
            remove_others(result)
            with pytest.raises(PictureError, match="another run makes it"), work_folder(result, MADE):
                pass
        assert [path.name for path in work.folder.iterdir()] == ["lock"]
    assert list(tmp_path.iterdir()) == []


def test_a_finished_segment_leaves_alone_what_others_write_beside_it(tmp_path):
    others = tmp_path / ".000001.mkv.sanrt-0123456789abcdef.partial"
    others.touch()  # unlocked, as another node's are where locks do not reach across
    work = WorkFolder(tmp_path)
    work.path(0).touch()
    segment = Segment(work.path(0), ((0, 1),), (0,), 0)
    assert work.finished(segment) == work.found(0) == segment
    assert others.exists()
