"""Networks that cannot be loaded. A module of their own, as the processes that import it need not wait for torch."""

import os


def failing(model, threads):
    raise RuntimeError("no such instruction\nsecond line")


def dying(model, threads):
    os._exit(9)
