"""Missing packages: the command that is printed works as it stands, wherever this sanrt came from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from sanrt import extras
from sanrt.errors import MissingPackageError
from sanrt.extras import extra, install_command, tracker

CLONE = Path(extras.__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _fresh():
    for known in (extras.origin, extras.tracker):
        known.cache_clear()
    yield
    for known in (extras.origin, extras.tracker):
        known.cache_clear()


def installed_from(monkeypatch, facts: dict | None) -> None:
    class Distribution:
        def read_text(self, name):
            assert name == "direct_url.json"
            return None if facts is None else json.dumps(facts)

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Distribution())


def test_a_missing_module_is_told_by_the_name_that_pip_knows():
    with pytest.raises(MissingPackageError, match="reading BMP needs Pillow, which"), extra("formats", "a.bmp: reading BMP"):
        raise ModuleNotFoundError(name="PIL")


@pytest.mark.parametrize(
    ("facts", "command"),
    [
        ({"url": "file:///home/me/my%20clone", "dir_info": {}}, "pip install '/home/me/my clone[cpu]'"),
        ({"url": "file:///home/me/clone", "dir_info": {"editable": True}}, "pip install -e '/home/me/clone[cpu]'"),
        (
            {"url": "file:///home/me/sanrt-0.2.0-py3-none-any.whl"},
            "pip install '/home/me/sanrt-0.2.0-py3-none-any.whl[cpu]'",
        ),
        (
            {"url": "https://example.org/sanrt.git", "vcs_info": {"vcs": "git", "commit_id": "0" * 40}},
            "pip install 'sanrt[cpu] @ git+https://example.org/sanrt.git'",
        ),
        ({"url": "https://example.org/sanrt.whl"}, "pip install 'sanrt[cpu] @ https://example.org/sanrt.whl'"),
    ],
    ids=["clone", "editable", "wheel", "repository", "address"],
)
def test_an_extra_is_installed_from_where_sanrt_came_from(monkeypatch, facts, command):
    installed_from(monkeypatch, facts)
    assert install_command("cpu") == command


def test_in_the_clone_itself_the_command_names_the_working_folder(monkeypatch):
    installed_from(monkeypatch, {"url": CLONE.as_uri(), "dir_info": {"editable": True}})
    monkeypatch.chdir(CLONE)
    assert install_command("cpu") == "pip install -e '.[cpu]'"


def test_from_an_index_the_name_is_enough(monkeypatch):
    installed_from(monkeypatch, None)
    monkeypatch.setattr(extras, "__file__", "/usr/lib/python3/site-packages/sanrt/extras.py")
    assert install_command("cpu") == "pip install 'sanrt[cpu]'"


def test_a_clone_that_is_only_on_the_path_is_found(monkeypatch, tmp_path):
    installed_from(monkeypatch, None)
    monkeypatch.chdir(tmp_path)
    assert install_command("cpu") == f"pip install '{CLONE}[cpu]'"


def test_a_missing_package_is_told_with_the_command():
    with pytest.raises(extras.MissingPackageError) as raised, extra("cpu", "a test"):
        import nothing_of_that_name  # noqa: F401
    assert str(raised.value) == (f"a test needs nothing_of_that_name, which is not installed; {install_command('cpu')}")


def test_a_defect_is_reported_to_the_repository_that_sanrt_came_from(monkeypatch, tmp_path):
    facts = {"url": "https://example.org/me/sanrt.git", "vcs_info": {"vcs": "git", "commit_id": "0" * 40}}
    installed_from(monkeypatch, facts)
    assert tracker() == "at https://example.org/me/sanrt"


@pytest.mark.parametrize(
    ("remote", "told"),
    [
        ("https://me:secret@example.org/me/sanrt.git", "at https://example.org/me/sanrt"),
        ("/home/me/elsewhere", "where you have sanrt from"),
        (None, "where you have sanrt from"),
    ],
)
def test_a_defect_of_a_clone_is_reported_where_that_was_cloned_from_without_passwords(monkeypatch, tmp_path, remote, told):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    if remote:
        subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", remote], check=True)
    installed_from(monkeypatch, {"url": tmp_path.as_uri(), "dir_info": {"editable": True}})
    assert tracker() == told


def test_what_serve_lacks_is_named_as_pip_knows_it():
    told = r"sanrt serve needs python-multipart, .*\[serve\]"
    with pytest.raises(MissingPackageError, match=told), extra("serve", "sanrt serve"):
        raise ModuleNotFoundError("No module named 'python_multipart'", name="python_multipart")
