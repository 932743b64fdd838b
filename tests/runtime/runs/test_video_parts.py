"""Segments that are made on their own, in any order."""

from __future__ import annotations

from fractions import Fraction

import pytest

from sanrt.runtime.backends.protocol import RunOptions
from sanrt.runtime.backends.registry import load_backend
from sanrt.runtime.pictures.codec import Encoding
from sanrt.runtime.pictures.jobs import Job
from sanrt.runtime.runs.pipeline import Advanced, PipelineOptions, nobody
from sanrt.runtime.runs.results import Recipe
from sanrt.runtime.runs.video_parts import PartMaker, VideoPart
from sanrt.runtime.runs.videos import make_segments, settle
from sanrt.runtime.tiling.upscaling import NetworkRunner
from sanrt.runtime.video.segments import WorkFolder

pytest.importorskip("av")


def test_segments_made_in_any_order_are_those_of_a_run_from_the_beginning(tiny_model, tmp_path):
    from tests.clips import clip

    job = Job(clip(tmp_path / "in.mp4", range(10), rate=Fraction(1)), tmp_path / "out.mp4")
    in_order, apart = (WorkFolder(tmp_path / name) for name in ("in order", "apart"))
    heard = []
    with load_backend("onnxruntime", tiny_model(2), RunOptions(threads=1)) as network:
        runner = NetworkRunner(network)
        for work in in_order, apart:
            work.folder.mkdir()
        make_segments(runner, settle(job, job.source, 2, Encoding()), in_order, [], nobody)
        maker = PartMaker(runner, PipelineOptions(Recipe(2, "")))
        for number, there in ((1, True), (0, True), (2, True), (3, False)):
            part = VideoPart(job.source, job.destination, folder=apart.folder, number=number, share=0.1)
            assert maker.made(part, heard.append).there is there
    assert heard == [Advanced(job, 0.1)] * 10
    files = sorted(path.name for path in in_order.folder.iterdir())
    assert files == [f"{number:06}.{kind}" for number in range(3) for kind in ("json", "mkv")]
    for name in files:
        assert (apart.folder / name).read_bytes() == (in_order.folder / name).read_bytes()
