"""Wrong arguments in words: what typer's parser says, and how sanrt says it."""

from __future__ import annotations

import re
from typing import Any

USAGE_WORDS = (
    (r"^Invalid value for '(?:-\w / |-\w, )?(--[\w-]+)[^']*': ", r"\1: "),
    (r"^Invalid value for '\W*(\w+)[^']*': ", r"\1: "),
    (r"^Invalid value: ", ""),
    (r"^Missing (?:argument|parameter) '?\W*(\w+)[^']*'?", r"\1 is missing"),
    (r"^No such option:? '?(--?[\w-]+)'?\W*", r"there is no option \1; "),
    (r"^No such command '([^']*)'\W*", r"there is no command \1; "),
    (r"Did you mean", "did you mean"),
    (r"Value error, ", ""),
    (r"Input should be (?:greater than or equal to (\S+)|less than or equal to (\S+))", r"expected \1\2 or @\1"),
    (r"or @$", "or less"),
    (r"or @\S+$", "or more"),
    (r"Input should be a valid integer.*", "expected a whole number"),
    (r"Input should be a valid number.*", "expected a number"),
    (r"'(.*)' is not one of (.*)", r"\1: expected one of \2"),
    (r"\(?Possible options: (.*)\)", r"did you mean \1"),
    (r"^(--precision: (int8|fp8)): .*", r"\1: made by `sanrt build --\2`, which --model then names"),
    (r"^Option '(--?[\w-]+)' requires an argument", r"\1: expected a value after it"),
    (r"^Got unexpected extra arguments?\S* \((.*)\)", r"\1: one argument too many"),
)
"""What typer's parser says, and how sanrt says it."""


def usage_context(error: Any) -> str:
    """` run` for an error in the arguments of `sanrt run`."""
    context = getattr(error, "ctx", None)
    return f" {context.info_name}" if context is not None and context.parent is not None else ""


def usage_words(error: Any) -> str:
    """What is wrong with the arguments, what was expected and where to read on, in one line."""
    return f"{usage_text(error)}; see `sanrt{usage_context(error)} --help`"


def usage_text(error: Any) -> str:
    """The same without where to read on."""
    text = " ".join(error.format_message().split())
    for pattern, words in USAGE_WORDS:
        text = re.sub(pattern, words, text)
    return text.rstrip(" .;")
