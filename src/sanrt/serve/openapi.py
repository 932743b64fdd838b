"""The description of the API (OpenAPI 3.1), its parameters read off the parser that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from sanrt.runtime.pictures.formats import Format
from sanrt.serve.parameters import options
from sanrt.version import __version__

BINARY = {"schema": {"type": "string", "format": "binary"}}
EXAMPLES: Mapping[str, Any] = {
    "scale": 4,
    "outscale": 3.5,
    "size": "3840x2160",
    "weights": "auto",
    "format": "png",
    "quality": 90,
    "lossless": True,
    "flatten": "white",
    "keep-hidden-colours": True,
    "self-ensemble": True,
    "tiling": "auto",
    "tile": 256,
    "overlap": 32,
    "regions": "auto",
}
"""A value of every parameter."""
JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
PROBLEM = {
    "type": "about:blank",
    "title": "Unprocessable Entity",
    "status": 422,
    "detail": "picture: damaged PNG file (pixels are missing)",
    "kind": "picture",
}
IDENTITY = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
JOB = {
    "id": "iPvpHNQ2lyMD3Sm0hFyFpw",
    "state": "done",
    "progress": 1.0,
    "width": 640,
    "height": 480,
    "result": {
        "name": "a_x4.png",
        "type": "image/png",
        "notes": [],
        "seconds": {"upscale": 2.1},
        "model": "san_x4.onnx",
        "bytes": 7340032,
    },
    "problem": None,
}
REFUSALS = {
    "400": "A parameter that `sanrt run` would refuse too.",
    "401": "The token is missing, or another one.",
    "403": "Another site's page asked.",
    "404": "There is no such job (any more).",
    "409": "The job is not done, or failed.",
    "408": "The picture did not arrive in time.",
    "413": "Too many bytes, or pixels.",
    "422": "No picture that sanrt reads, or a damaged one.",
    "503": "All places are taken; Retry-After says when to ask again.",
    "504": "The picture took too long.",
}


@cache
def description() -> dict[str, Any]:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "sanrt", "version": __version__, "description": "Pictures in, larger pictures out."},
        "paths": {
            "/v1/upscale": {"post": upscaling("A picture in, its result out.", {"200": result_response()})},
            "/v1/jobs": {
                "post": upscaling("A picture in, where to ask for its result out.", {"202": job("Location names it.")})
            },
            "/v1/jobs/{id}": {
                "parameters": [IDENTITY],
                "get": {
                    "summary": "How far it is; as server-sent events with `Accept: text/event-stream`, until it has ended.",
                    "responses": {"200": job("Its facts.", {"text/event-stream": BINARY}), "404": refusal("404")},
                },
                "delete": {
                    "summary": "End it, and remove what there is of it.",
                    "responses": {"204": {"description": "Done."}, "404": refusal("404")},
                },
            },
            "/v1/jobs/{id}/result": {
                "parameters": [IDENTITY],
                "get": {
                    "summary": "The result of a job that is done.",
                    "responses": {"200": result_response(), "404": refusal("404"), "409": refusal("409")},
                },
            },
            "/v1/about": {"get": plain("The version, the scale and weights to be had, the limits.")},
            "/": {"get": plain("The page for people.")},
            "/healthz": {"get": plain("Whether the process answers.")},
            "/readyz": {"get": plain("Whether a picture would be taken now.", {"503": refusal("503")})},
            "/metrics": {"get": plain("Counters, for Prometheus.")},
        },
        "components": {
            "schemas": {
                "Problem": {
                    "type": "object",
                    "description": "RFC 9457; `detail` is the one line that the command line would print.",
                    "properties": {
                        "type": {"type": "string"},
                        "title": {"type": "string"},
                        "status": {"type": "integer"},
                        "detail": {"type": "string"},
                        "kind": {"type": "string"},
                    },
                    "required": ["type", "title", "status", "detail", "kind"],
                }
            },
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def upscaling(summary: str, answers: Mapping[str, Any]) -> dict[str, Any]:
    """An operation that takes a picture and the parameters."""
    picture = {f"image/{form}": BINARY for form in Format} | {"application/octet-stream": BINARY}
    form = {"type": "object", "properties": {"picture": {"type": "string", "format": "binary"}}}
    return {
        "summary": summary,
        "parameters": [parameter(option) for option in options()],
        "requestBody": {"required": True, "content": {**picture, "multipart/form-data": {"schema": form}}},
        "responses": {**answers, **{status: refusal(status) for status in REFUSALS if status not in ("404", "409")}},
    }


def parameter(option: Any) -> dict[str, Any]:
    """A query parameter, from an option of the command line."""
    name = option.opts[0].lstrip("-")
    schema = {"type": JSON_TYPES[type(EXAMPLES[name])]}
    return {"name": name, "in": "query", "description": option.help, "schema": schema, "example": EXAMPLES[name]}


def result_response() -> dict[str, Any]:
    """A result's bytes."""
    headers = {
        "Sanrt-Note": "What was not taken over from the picture, or how it was made; one header for each note.",
        "Sanrt-Model": "The model that made it.",
        "Server-Timing": "Milliseconds of each step.",
    }
    return {
        "description": "The bytes that `sanrt run` writes.",
        "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in headers.items()},
        "content": {f"image/{form}": BINARY for form in Format if form.written_as is form},
    }


def job(description: str, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A job's facts."""
    return {"description": description, "content": {"application/json": {"example": JOB}, **(more or {})}}


def refusal(status: str) -> dict[str, Any]:
    """A problem document."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        "description": REFUSALS[status],
        "content": {"application/problem+json": {"schema": schema, "example": PROBLEM | {"status": int(status)}}},
    }


def plain(summary: str, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An operation without parameters."""
    return {"summary": summary, "responses": {"200": {"description": "Yes."}, **(more or {})}}
