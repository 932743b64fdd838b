"""Planning: which files are read, where results go, and which plans are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sanrt.errors import PictureError, UsageError
from sanrt.runtime.pictures import jobs
from sanrt.runtime.pictures.formats import Format
from sanrt.runtime.pictures.jobs import Naming, find_pictures, output_beside, passed_over

GIF = b"GIF89a"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, with a small tree of (empty) pictures in `in`."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.jpg", "a.PNG", "sub/c.tiff", "sub/deep/d.webp"):
        touch(f"in/{name}")
    return tmp_path


def touch(name: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def plan(*inputs: str, output: str = "out", **options: object) -> dict[str, str]:
    jobs = find_pictures([Path(name) for name in inputs], Path(output), **options)
    return {str(job.source): str(job.destination) for job in jobs}


def test_a_folders_tree_is_kept_under_the_output_in_order(folder):
    assert list(plan("in").items()) == [
        ("in/a.PNG", "out/a.PNG"),
        ("in/b.jpg", "out/b.jpg"),
        ("in/sub/c.tiff", "out/sub/c.tiff"),
        ("in/sub/deep/d.webp", "out/sub/deep/d.webp"),
    ]


def test_without_recursion_only_the_folder_itself_is_read(folder):
    assert set(plan("in", recursive=False)) == {"in/a.PNG", "in/b.jpg"}


def test_other_hidden_and_half_written_files_are_passed_over(folder):
    for name in ("notes.txt", ".hidden.png", ".cache/x.png", ".a.png.sanrt-0123.partial", "noending"):
        touch(f"in/{name}")
    assert len(plan("in")) == 4


@pytest.mark.parametrize("name", ["a.ts", "a.mts"])
def test_text_that_is_named_like_a_video_is_passed_over_in_folders(folder, name):
    touch(f"in/{name}").write_text("export const café = 1;\n" * 99)
    touch("in/sub/b.TS").write_bytes(b"\x47\x1f\xff\x10" + b"\xff" * 2000)
    assert set(plan("in")) - {"in/a.PNG", "in/b.jpg", "in/sub/c.tiff", "in/sub/deep/d.webp"} <= {"in/sub/b.TS"}
    passed = [line for line in passed_over([Path("in")], Path("out")) if name in line]
    assert not passed
    assert (not jobs.is_text(Path("in/sub/b.TS")), jobs.is_text(Path(f"in/{name}"))) == (True, True)


def test_what_jobs_are_is_said_of_all_of_them():
    picture, video = (jobs.Job(Path(name), Path(name)) for name in ("a.png", "b.mkv"))
    assert jobs.called([picture]) == "pictures"
    assert jobs.called([video, video]) == "videos"
    assert jobs.called([video, picture]) == "pictures and videos"


def test_a_named_file_counts_whatever_its_name(folder):
    touch("odd.dat").write_bytes(GIF)
    assert plan("odd.dat") == {"odd.dat": "out/odd.png"}
    assert plan("missing.jpg", "in/b.jpg") == {"missing.jpg": "out/missing.jpg", "in/b.jpg": "out/b.jpg"}


def test_one_file_may_be_given_its_very_name(folder):
    assert plan("in/b.jpg", output="x/y.png") == {"in/b.jpg": "x/y.png"}
    Path("folder.png").mkdir()
    assert plan("in/b.jpg", output="folder.png") == {"in/b.jpg": "folder.png/b.jpg"}


@pytest.mark.parametrize(
    ("naming", "source", "result"),
    [
        (Naming(), "a.jpeg", "a.jpeg"),
        (Naming(), "a.gif", "a.png"),
        (Naming("_x4"), "a.b.JPG", "a.b_x4.JPG"),
        (Naming("_x4"), "a.gif", "a_x4.png"),
        (Naming("", Format.JPEG), "a.png", "a.jpg"),
        (Naming("", Format.TIFF), "a.tiff", "a.tif"),
    ],
)
def test_results_are_named_after_their_sources(naming, source, result):
    assert naming.of(Path(source)) == result


def test_two_sources_of_one_result_are_refused(folder):
    touch("in/b.png")
    with pytest.raises(UsageError, match=r"in/b\.jpg and in/b\.png would both become out/b\.webp"):
        plan("in", naming=Naming(format=Format.WEBP))
    touch("other/a.PNG")
    with pytest.raises(UsageError, match="both become"):
        plan("in", "other")


def test_the_same_file_given_twice_is_done_once(folder):
    assert plan("in/b.jpg", "in/../in/b.jpg") == {"in/b.jpg": "out/b.jpg"}
    assert plan("in/sub/c.tiff", "in")["in/sub/c.tiff"] == "out/c.tiff"
    assert len(plan("in/b.jpg", "in", "in")) == 4


@pytest.mark.parametrize("name", ["result.bmp", "result.jxl", "result.pngg", "result.gif", "there.bmp", "there"])
def test_one_picture_to_a_file_that_sanrt_does_not_write_is_refused_by_its_name(folder, name):
    touch("there.bmp"), touch("there")
    with pytest.raises(UsageError, match=f"{name}: sanrt writes no such files; expected .*png.*jpg") as told:
        plan("in/b.jpg", output=name)
    assert "several" not in str(told.value)


@pytest.mark.parametrize("name", ["one.png", "one.bmp", "in/a.PNG"])
def test_several_pictures_to_what_is_or_looks_like_one_are_refused(folder, name):
    for inputs in (["in/b.jpg", "in/a.PNG"], ["in"]):
        with pytest.raises(UsageError, match="no folder for the results of several pictures"):
            plan(*inputs, output=name)


def test_a_folder_may_have_any_name_if_it_is_there_or_said_to_be_one(folder):
    Path("there.bmp").mkdir()
    assert plan("in/b.jpg", output="there.bmp") == {"in/b.jpg": "there.bmp/b.jpg"}
    assert plan("in/b.jpg", output="new.bmp", into_folder=True) == {"in/b.jpg": "new.bmp/b.jpg"}
    assert plan("in/b.jpg", output="v1.2") == {"in/b.jpg": "v1.2/b.jpg"}
    assert plan("in", output="2024.old")["in/b.jpg"] == "2024.old/b.jpg"


def test_without_an_output_results_lie_beside_their_sources(folder, monkeypatch):
    touch("in/g.gif")
    for given, suffix, expected in (
        ("in/b.jpg", "", "in/b_x4.jpg"),
        ("in/b.jpg", "_big", "in/b_big.jpg"),
        ("in/g.gif", "", "in/g_x4.png"),
        ("in", "", "in_x4"),
        ("in/sub/", "_big", "in/sub_x4"),
    ):
        assert output_beside(Path(given), "x4", Naming(suffix)) == Path(expected)
    monkeypatch.chdir("in/sub")
    assert output_beside(Path(), "x4", Naming()) == folder / "in" / "sub_x4"
    assert output_beside(Path(".."), "x2", Naming()) == folder / "in_x2"
    with pytest.raises(UsageError, match="name OUTPUT"):
        output_beside(Path("/"), "x4", Naming())


def test_a_suffix_that_names_a_folder_is_refused():
    with pytest.raises(UsageError, match="`suffix` 'x/y'"):
        Naming("x/y")


def test_a_result_that_would_replace_its_source_is_refused(folder):
    with pytest.raises(UsageError, match="would replace it"):
        plan("in", output="in")
    with pytest.raises(UsageError, match="would replace it"):
        plan("in/b.jpg", output="./in/b.jpg")


def test_results_inside_the_input_folder_are_not_read_again(folder):
    first = plan("in", output="in/big")
    for result in first.values():
        touch(result)
    assert plan("in", output="in/big") == first


def test_results_beside_their_sources_are_not_read_again(folder, monkeypatch):
    naming = Naming("_x4")
    first = plan("in", output="in", naming=naming)
    for result in first.values():
        touch(result)
    results = {Path(result).name for result in first.values()}
    monkeypatch.setattr("sanrt.runtime.pictures.jobs.is_result", lambda path: path.name in results)
    assert plan("in", output="in", naming=naming) == first


def test_a_source_is_never_taken_for_a_result_and_replaced(folder):
    touch("in/b.png")
    with pytest.raises(UsageError, match=r"in/b\.png"):
        plan("in", output="in", naming=Naming(format=Format.PNG))


def test_several_pictures_into_a_file_are_refused(folder):
    touch("out")
    with pytest.raises(UsageError, match="no folder for the results"):
        plan("in")


def test_the_last_of_all_that_a_shell_names_is_no_output_if_it_holds_pictures_of_the_users_own(folder, monkeypatch):
    monkeypatch.chdir("in")
    everything = sorted(path.name for path in Path().iterdir() if not path.name.startswith("."))
    *inputs, last = sorted(everything, key=lambda name: name == "sub")
    assert last == "sub"
    with pytest.raises(UsageError, match=r"sub: is the last of all that lies there.*c\.tiff.*or sub/$"):
        plan(*inputs, output=last)
    assert plan(*inputs, output=last, into_folder=True)
    assert plan(*inputs[1:], output=last)
    Path("sub/c.tiff").unlink()
    assert plan(*inputs, output=last)


def test_a_folder_without_pictures_is_told(folder):
    touch("none/readme.txt")
    with pytest.raises(PictureError, match="none: no pictures found"):
        plan("none")


def test_a_named_file_of_another_format_than_asked_for_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="format='webp'"):
        find_pictures([tmp_path / "a.png"], tmp_path / "b.png", Naming(format=Format.WEBP))


def test_pictures_that_are_not_read_are_told_by_kind_with_the_first_names_and_what_to_do(tmp_path):
    for name in ("a.png", "b.PSD", "c.psd", "sub/d.cr2", "sub/e.DNG", "f.jxl", ".g.psd", "out/h.psd", "i.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder = tmp_path / "in"
    assert passed_over([folder], folder / "out") == [
        f"passed over: 2 Photoshop file ({folder}/b.PSD, {folder}/c.psd); convert them to PNG, TIFF or JPEG",
        f"passed over: 2 raw photograph ({folder}/sub/d.cr2, {folder}/sub/e.DNG); develop them, to 16-bit TIFFs",
        f"passed over: 1 JPEG XL ({folder}/f.jxl); convert them to PNG, TIFF or JPEG",
    ]
    assert passed_over([folder / "b.PSD"], folder / "out") == []
    (folder / "a.png").unlink()
    with pytest.raises(PictureError, match="only 2 Photoshop file, 2 raw"):
        find_pictures([folder], folder / "out")


def test_pictures_of_one_stem_whose_formats_are_not_written_keep_their_endings(tmp_path):
    for name in ("a.gif", "a.png", "b.gif", "b.jpg", "c.bmp", "c.tga"):
        (tmp_path / name).touch()
    jobs = find_pictures([tmp_path], tmp_path / "out")
    names = {job.source.name: job.destination.name for job in jobs}
    assert names["a.gif"] == "a.gif.png"
    assert names["a.png"] == "a.png"
    assert (names["b.gif"], names["b.jpg"]) == ("b.png", "b.jpg")
    if "c.bmp" in names:
        assert (names["c.bmp"], names["c.tga"]) == ("c.bmp.png", "c.tga.png")


def test_a_source_that_is_a_link_to_the_results_place_is_refused(tmp_path):
    for folder in ("links", "originals"):
        (tmp_path / folder).mkdir()
    (tmp_path / "originals" / "a.png").write_bytes(b"somebody's")
    (tmp_path / "links" / "a.png").symlink_to("../originals/a.png")
    with pytest.raises(UsageError, match="would replace it"):
        find_pictures([tmp_path / "links"], tmp_path / "originals")


def test_a_named_picture_with_a_results_name_is_neither_left_out_nor_replaced(tmp_path):
    for name in ("a.png", "a_x2.png"):
        (tmp_path / name).write_bytes(b"somebody's")
    with pytest.raises(UsageError, match=r"a_x2\.png: is to be upscaled, and the result of .*a\.png would replace it"):
        find_pictures([tmp_path / "a.png", tmp_path / "a_x2.png"], tmp_path, Naming("_x2"), into_folder=True)
    with pytest.raises(UsageError, match="would replace it"):
        find_pictures([tmp_path], tmp_path, Naming("_x2"))


def test_results_whose_names_differ_in_case_alone_are_refused_where_the_file_system_takes_them_for_one(folder, monkeypatch):
    touch("other/A.png")
    assert len(plan("in/a.PNG", "other/A.png")) == 2
    monkeypatch.setattr(jobs, "_ignores_case", lambda _: True)
    with pytest.raises(UsageError, match=r"in/a\.PNG and other/A\.png would both become out/A\.png"):
        plan("in/a.PNG", "other/A.png")
    with pytest.raises(UsageError, match=r"in/a\.PNG: the result would replace it"):
        plan("in/a.PNG", output="in/A.png")


def test_a_file_system_that_ignores_case_is_known_by_the_names_in_it(tmp_path):
    for folder in ("exact", "either"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").touch()
    (tmp_path / "either" / "A.PNG").symlink_to("a.png")  # as such a file system finds it
    assert not jobs._ignores_case(tmp_path / "exact" / "new" / "folder")
    assert jobs._ignores_case(tmp_path / "either" / "new" / "folder")


@pytest.mark.parametrize("name", ["aux.png", "COM1.jpg", "a:b.png", "what?.png", "a\\b.png"])
def test_names_that_windows_does_not_have_are_refused_there(name, monkeypatch):
    monkeypatch.setattr(jobs.sys, "platform", "linux")
    assert Naming().of(Path(name)) == name
    monkeypatch.setattr(jobs.sys, "platform", "win32")
    with pytest.raises(UsageError, match="which is no file's name on Windows"):
        Naming().of(Path(name))
    assert Naming().of(Path("auxiliary.png")) == "auxiliary.png"
