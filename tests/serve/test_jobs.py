"""Jobs: progress polled and as events, results that are kept for a while, bounded, and nobody else's."""

from __future__ import annotations

import http.client
import json
import socket
import threading

import pytest

from sanrt.serve import jobs as jobs_module
from sanrt.serve import queue as queue_module
from tests.serve.conftest import encoded, until

PICTURE = encoded(".png")


def start(running, picture=PICTURE, query=""):
    answer = running.ask("POST", f"/v1/jobs?{query}", picture)
    assert answer.status == 202, answer.body
    assert answer.headers["location"] == f"/v1/jobs/{answer.json['id']}"
    return answer.headers["location"]


def ended(running, place):
    until(lambda: running.ask("GET", place).json["state"] in ("done", "failed"))
    return running.ask("GET", place).json


def followed(running, place, facts=None):
    """Every event's facts, until the last; in the list as they come."""
    facts = [] if facts is None else facts
    connection = http.client.HTTPConnection(running.host, running.port, timeout=60)
    connection.request("GET", place, headers={"Accept": "text/event-stream"})
    answer = connection.getresponse()
    assert answer.headers["content-type"].startswith("text/event-stream")
    for line in answer:
        if line.startswith(b"data: "):
            facts.append(json.loads(line[6:]))
    connection.close()
    return facts


@pytest.fixture
def gate(monkeypatch):
    """Holds every picture before the network until it is set."""
    opened, enlarge = threading.Event(), queue_module.enlarge
    monkeypatch.setattr(queue_module, "enlarge", lambda *rest: (opened.wait(60), enlarge(*rest))[1])
    return opened


def test_a_job_s_result_is_that_of_an_upscale_and_its_facts_are_told(running):
    place = start(running, query="format=webp")
    facts = ended(running, place)
    assert (facts["state"], facts["progress"], facts["width"], facts["height"]) == ("done", 1.0, 30, 20)
    result = running.ask("GET", f"{place}/result")
    assert (result.status, result.headers["content-type"]) == (200, "image/webp")
    assert result.body == running.upscale(PICTURE, "format=webp").body
    assert facts["result"]["bytes"] == len(result.body)
    assert facts["result"]["type"] == "image/webp"
    assert running.ask("DELETE", place).status == 204
    for path in (place, f"{place}/result"):
        assert running.ask("GET", path).status == 404
    assert running.ask("DELETE", place).status == 404


def test_progress_comes_as_events_until_the_end(running):
    place = start(running, encoded(".png", width=90, height=90), "tiling=exact&tile=32")
    facts = followed(running, place)
    assert facts[-1]["state"] == "done"
    progress = [each["progress"] for each in facts]
    assert progress == sorted(progress)
    assert len(set(progress)) > 3
    assert followed(running, place) == facts[-1:]


def test_progress_moves_within_a_picture_that_goes_through_the_network_whole(serving):
    with serving(backend="native") as running:
        place = start(running, encoded(".png", width=200, height=150), "tiling=whole")
        progress = [each["progress"] for each in followed(running, place)]
        assert progress == sorted(progress)
        assert progress[-1] == 1.0
        assert any(0 < share < 1 for share in progress)


def test_what_cannot_be_done_is_told_at_once_or_as_the_job_s_problem(running, monkeypatch):
    assert running.ask("POST", "/v1/jobs", b"hello").status == 422
    assert running.ask("POST", "/v1/jobs?scale=7", PICTURE).status == 400
    place = start(running, PICTURE[: len(PICTURE) // 2])
    facts = ended(running, place)
    assert (facts["state"], facts["problem"]["status"], facts["result"]) == ("failed", 422, None)
    assert facts["problem"]["detail"].startswith("picture: damaged PNG file")
    answer = running.ask("GET", f"{place}/result")
    assert (answer.status, "the job failed: picture: damaged" in answer.json["detail"]) == (409, True)


def test_a_deleted_job_ends_and_frees_its_place(serving, gate):
    with serving(queue=3) as running:
        places = [start(running) for _ in range(3)]
        assert running.ask("POST", "/v1/jobs", PICTURE).status == 503
        assert running.ask("GET", f"{places[0]}/result").status == 409
        followers = []
        follower = threading.Thread(target=followed, args=(running, places[2], followers))
        follower.start()
        until(lambda: bool(followers))
        for place in places[1:]:
            assert running.ask("DELETE", place).status == 204
        follower.join()
        assert followers[-1]["problem"]["kind"] == "gone"
        until(lambda: running.queue.pictures == 1)
        gate.set()
        assert ended(running, places[0])["state"] == "done"
        assert ended(running, start(running))["state"] == "done"


def test_a_job_whose_place_was_taken_while_it_was_sent_leaves_nothing_behind(serving, gate):
    with serving(queue=1) as running:
        with socket.create_connection((running.host, running.port), timeout=60) as slow:
            head = f"POST /v1/jobs HTTP/1.1\r\nHost: {running.host}\r\nContent-Length: {len(PICTURE)}\r\n\r\n"
            slow.sendall(head.encode() + PICTURE[:9])
            until(lambda: running.app.state.uploads.open == 1)
            place = start(running)
            slow.sendall(PICTURE[9:])
            assert slow.recv(12) == b"HTTP/1.1 503"
        gate.set()
        ended(running, place)
        until(lambda: len(list(running.app.state.uploads.folder.iterdir())) == 1)


def test_a_deleted_job_that_is_streamed_ends_between_two_tiles(serving):
    with serving() as running:
        place = start(running, encoded(".png", width=300, height=300), "tiling=exact&tile=16")
        until(lambda: running.ask("GET", place).json["progress"] > 0)
        assert running.ask("DELETE", place).status == 204
        until(lambda: running.queue.pictures == 0)
        assert running.metric("sanrt_pictures_total") == 0
        assert ended(running, start(running))["state"] == "done"


def test_results_are_kept_for_a_while_and_no_more_than_there_is_room_for(serving):
    with serving(keep=1.0, results=1) as running:
        place = start(running)
        until(lambda: running.ask("GET", place).json.get("state") == "done")
        answer = running.ask("POST", "/v1/jobs", PICTURE)
        assert (answer.status, "bytes of results are kept" in answer.json["detail"]) == (503, True)
        assert running.upscale(PICTURE).status == 200
        until(lambda: running.ask("GET", place).status == 404)
        start(running)


def test_a_number_of_jobs_is_known_at_most(serving, monkeypatch):
    monkeypatch.setattr(jobs_module, "MOST_JOBS", 2)
    with serving() as running:
        for _ in range(2):
            ended(running, start(running))
        assert running.ask("POST", "/v1/jobs", PICTURE).status == 503


def test_jobs_cannot_be_found_without_their_identity(running):
    start(running)
    for path in ("/v1/jobs", "/v1/jobs/", "/v1/jobs/..", "/v1/jobs/%2e%2e/result", "/v1/jobs/a"):
        assert running.ask("GET", path).status in (404, 405), path


def test_a_server_that_stops_ends_its_jobs_and_their_followers(serving, gate):
    followers = []
    with serving() as running:
        place = start(running)
        follower = threading.Thread(target=followed, args=(running, place, followers))
        follower.start()
        until(lambda: bool(followers))
        threading.Timer(1.0, gate.set).start()
    follower.join()
    assert followers[-1]["state"] == "failed"


def test_what_can_be_asked_for_is_told(running, models):
    about = running.ask("GET", "/v1/about").json
    assert about["scale"] == 2
    assert about["weights"]["2"][:2] == ["auto", "clean"]
    assert about["limits"]["queue"] == 8
