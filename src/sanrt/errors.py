"""The errors that sanrt raises on purpose; their texts name the subject, what was found, what was expected, what to do."""


class SanrtError(Exception):
    """Base of every error that sanrt raises on purpose; its text is one line, fit for a terminal."""


class FileError(SanrtError):
    """A file that cannot be written: a full disk, a missing folder, no permission."""


class MissingPackageError(SanrtError):
    """An optional package that is not installed."""


class CheckpointError(SanrtError):
    """A weights file that cannot be read, or does not hold a SAN."""


class ModelError(SanrtError):
    """An exported model (ONNX, engine) that is missing, damaged, stale or not sanrt's."""


class BuildError(SanrtError):
    """An engine that could not be built, or is not what was asked for."""


class ParityError(SanrtError):
    """Two runs of the same network differ by more than the tolerance."""


class PictureError(SanrtError):
    """A picture that cannot be read, converted or written."""


class TooManyPixelsError(PictureError):
    """A picture whose header claims more pixels than are allowed."""


class LargeEnoughError(PictureError):
    """A picture that is as large already as was asked for."""


class BackendError(SanrtError):
    """A backend that is not installed, not usable here, or failed while running."""


class OutOfMemoryError(BackendError):
    """A backend ran out of (device or host) memory; smaller tiles may fit."""


class ScratchError(FileError):
    """A scratch file that cannot be made or written: a full or missing disk."""


class InterruptedRunError(SanrtError):
    """A run that an interrupt ended; its text is what is done so far."""


class UsageError(SanrtError):
    """Arguments that contradict each other or do not fit the model."""


def require_number(what: str, value: object, least: int, most: int | None = None) -> None:
    """Raise UsageError unless `value` is a whole number in a range, or None, which leaves the choice to sanrt."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (whole and least <= value and (most is None or value <= most)):  # type: ignore[operator]
        raise UsageError(f"{what} {value!r}; expected a whole number, {least} or more{f', up to {most}' if most else ''}")


def system_reason(error: OSError) -> str:
    """Why the system refused: its own words, or those of a library that raises OSError with others."""
    return error.strerror or first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
