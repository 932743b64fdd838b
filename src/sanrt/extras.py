"""Optional packages: what is missing is told as the command that installs it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from shlex import quote
from urllib.parse import urlsplit

from sanrt.errors import MissingPackageError, first_line

DISTRIBUTIONS = {"PIL": "Pillow", "pillow_heif": "pillow-heif", "python_multipart": "python-multipart"}
"""What modules are called by people and pip, where that is another name."""


@contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
    """Around imports that need an extra: a missing package becomes one line with the pip command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = DISTRIBUTIONS.get(str(error.name), error.name)
        raise MissingPackageError(f"{purpose} needs {package}, which is not installed; {install_command(name)}") from error


@contextmanager
def required(library: str) -> Iterator[None]:
    """Around imports of what every install brings: what is missing, or does not load on this system, becomes one line."""
    try:
        yield
    except (ImportError, OSError) as error:
        raise MissingPackageError(
            f"{library} does not load here ({first_line(error)}); pip install --force-reinstall {quote(library)}, "
            "which has ready-made files for the systems named in docs/systems.md"
        ) from error


def install_command(extra_name: str) -> str:
    """The pip command that installs an extra from where this sanrt came from: a clone, a repository, or an index."""
    source, editable = origin()
    if isinstance(source, Path):
        place = "." if source == Path.cwd() else str(source)
        return f"pip install {'-e ' * editable}{quote(f'{place}[{extra_name}]')}"
    return f"pip install 'sanrt[{extra_name}]{f' @ {source}' if source else ''}'"


@cache
def tracker() -> str:
    """Where to report a defect, for people: at the repository that this sanrt came from, if that is on the web."""
    source, _ = origin()
    if isinstance(source, Path):
        command = ["git", "-C", str(source), "config", "--get", "remote.origin.url"]
        with suppress(OSError):
            source = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    url = urlsplit(str(source).removeprefix("git+"))
    if url.scheme in ("http", "https") and url.hostname:  # not what may stand before the host: a password
        return f"at {url.scheme}://{url.hostname}{url.path.removesuffix('.git')}"
    return "where you have sanrt from"


@cache
def origin() -> tuple[Path | str, bool]:
    """What sanrt was installed from, a folder or file, a URL, or nothing for an index; and whether it runs from there.

    pip writes it down (PEP 610). A clone that is merely on the path is found by its place.
    """
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.request import url2pathname

    with suppress(PackageNotFoundError, ValueError, KeyError):
        if text := distribution("sanrt").read_text("direct_url.json"):
            facts = json.loads(text)
            if "vcs_info" in facts:
                return f"{facts['vcs_info']['vcs']}+{facts['url']}", False
            url = urlsplit(facts["url"])
            if url.scheme != "file":
                return str(facts["url"]), False
            return Path(url2pathname(url.path)), bool(facts.get("dir_info", {}).get("editable"))
    clone = Path(__file__).resolve().parents[2]
    return (clone if (clone / "pyproject.toml").is_file() else ""), False
