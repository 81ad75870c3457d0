"""What a request may say: JSON schemas that check it and describe it in the OpenAPI document, so that both agree."""

import math
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from swamla.data.chat import ROLES

Schema = Mapping[str, Any]

MAX_STOPS, MAX_STOP_LENGTH = 16, 200
MAX_ALTERNATIVES = 20
MAX_ANSWERS = 64
MAX_EXPLAINED = 512  # tokens of a text whose attention is told: weights take memory by their square
MAX_SEED = 2**63 - 1 - MAX_ANSWERS


class Invalid(ValueError):
    """A value that its schema refuses. where: of the body, e.g. "messages[0].role"; "" for the body itself."""

    def __init__(self, where: str, message: str) -> None:
        self.where = where
        super().__init__(f"{where}: {message}" if where else message)


def _nothing(name: str, value: Any = None) -> Schema:
    """A setting of OpenAI's that is not there: only its neutral value is taken."""
    neutral = [None] if value is None else [None, value]
    return {"enum": neutral, "description": f"Not supported: {name} may only be {neutral[-1]!r}."}


_TEXT = {"type": "string"}
_STOP = {
    "anyOf": [
        {"type": "null"},
        {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
        {
            "type": "array",
            "maxItems": MAX_STOPS,
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
        },
    ],
    "description": "Strings that end an answer, and are left out.",
}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 2**31}}
_SHARED: dict[str, Any] = {
    "model": {"type": ["string", "null"], "description": "One of /v1/models; the first if it is left out."},
    "n": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_ANSWERS, "description": "Answers to each prompt."},
    "temperature": {
        "type": ["number", "null"],
        "minimum": 0,
        "maximum": 2,
        "description": "0 is greedy; 1 if not given.",
    },
    "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": ["integer", "null"], "minimum": 0, "maximum": 2**31, "description": "0: all tokens."},
    "seed": {
        "type": ["integer", "null"],
        "minimum": 0,
        "maximum": MAX_SEED,
        "description": "The same seed gives the same answers; a random one if it is left out.",
    },
    "stop": _STOP,
    "stream": {"type": ["boolean", "null"]},
    "stream_options": {
        "anyOf": [
            {"type": "null"},
            {
                "type": "object",
                "properties": {"include_usage": {"type": "boolean"}, "include_obfuscation": {"enum": [False]}},
                "additionalProperties": False,
            },
        ]
    },
    "return_token_ids": {
        "type": ["boolean", "null"],
        "description": "Whether choices have prompt_token_ids and token_ids, the ids of the prompt and of the answer.",
    },
    "user": {"type": ["string", "null"], "description": "Not used."},
    "presence_penalty": _nothing("presence_penalty", 0),
    "frequency_penalty": _nothing("frequency_penalty", 0),
    "logit_bias": _nothing("logit_bias"),
}
COMPLETION: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "prompt": {
            "anyOf": [
                {"type": "null"},
                _TEXT,
                {"type": "array", "minItems": 1, "maxItems": 256, "items": _TEXT},
                _IDS,
                {"type": "array", "minItems": 1, "maxItems": 256, "items": _IDS},
            ],
            "description": "A text, which begins a document, or ids, which are taken as they are; or several.",
        },
        "max_tokens": {"type": ["integer", "null"], "minimum": 0, "maximum": 2**31, "description": "16 if not given."},
        "echo": {"type": ["boolean", "null"], "description": "Whether an answer begins with the prompt."},
        "logprobs": {
            "type": ["integer", "null"],
            "minimum": 0,
            "maximum": MAX_ALTERNATIVES,
            "description": "How many of the likeliest tokens are told with each token's log p.",
        },
        "best_of": _nothing("best_of", 1),
        "suffix": _nothing("suffix"),
        **_SHARED,
    },
}
CHAT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["messages"],
    "properties": {
        "messages": {
            "type": "array",
            "minItems": 1,
            "maxItems": 1000,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["role", "content"],
                "properties": {
                    "role": {"enum": list(ROLES)},
                    "tool_call_id": {**_TEXT, "description": "Taken, and not told to the model: ChatML has no ids."},
                    "content": {
                        "anyOf": [
                            _TEXT,
                            {
                                "type": "array",
                                "items": {
                                    "type": "object",
                                    "additionalProperties": False,
                                    "required": ["type", "text"],
                                    "properties": {"type": {"enum": ["text"]}, "text": _TEXT},
                                },
                            },
                        ]
                    },
                },
            },
        },
        "max_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": 2**31, "description": "256 if not given."},
        "max_completion_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": 2**31},
        "logprobs": {"type": ["boolean", "null"]},
        "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_ALTERNATIVES},
        "tools": _nothing("tools"),
        **_SHARED,
    },
}
EXPLANATION: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["prompt"],
    "properties": {
        "model": _SHARED["model"],
        "prompt": {
            "anyOf": [_TEXT, _IDS],
            "description": f"A text, which begins a document, or ids; {MAX_EXPLAINED} tokens at most.",
        },
        "token": {
            "type": ["integer", "null"],
            "minimum": 0,
            "maximum": MAX_EXPLAINED - 1,
            "description": "The token that reads, counted from 0, the document's start included; the last by default.",
        },
    },
}
_EXPLAINED: dict[str, Any] = {
    "type": "object",
    "required": ["object", "model", "tokens", "token", "layers"],
    "properties": {
        "object": {"enum": ["explanation"]},
        "model": _TEXT,
        "tokens": {"type": "array", "items": _TEXT, "description": "The text, token by token."},
        "token": {"type": "integer", "description": "The token that reads."},
        "layers": {
            "type": "array",
            "description": "Bottom first.",
            "items": {
                "type": "object",
                "required": ["block", "mixer", "signed", "heads"],
                "properties": {
                    "block": _TEXT,
                    "mixer": _TEXT,
                    "signed": {
                        "type": "boolean",
                        "description": "Whether a weight of the text is below 0, as those of linear mixers may be.",
                    },
                    "heads": {
                        "type": "array",
                        "description": "Of each head the weights of tokens 0 … token, of six digits.",
                        "items": {"type": "array", "items": {"type": ["number", "null"]}},
                    },
                },
            },
        },
    },
}
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def check(value: Any, schema: Schema, where: str = "") -> None:
    """Raise `Invalid` unless `value`, from JSON, fits the schema."""
    if "anyOf" in schema:
        return _check_any(value, schema["anyOf"], where)
    if "enum" in schema:
        if not any(
            value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in schema["enum"]
        ):
            raise Invalid(where, f"{_shown(value)} must be {' or '.join(map(_shown, schema['enum']))}")
        return None
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(_is(value, kind) for kind in kinds):
        raise Invalid(where, f"{_shown(value)} must be {' or '.join(kinds)}")
    for message in _out_of_range(value, schema):
        raise Invalid(where, f"{_shown(value)} {message}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            check(item, schema["items"], f"{where}[{index}]")
    if isinstance(value, dict):
        _check_fields(value, schema, where)
    return None


def _check_fields(value: Mapping[str, Any], schema: Schema, where: str) -> None:
    known = schema["properties"]
    for name in value:
        if name not in known:
            close = get_close_matches(name[:80], known, n=1)
            mean = f"; did you mean {close[0]!r}?" if close else ""
            raise Invalid(_at(where, name[:80]), f"there is no such setting{mean}")
    for name in schema.get("required", ()):
        if name not in value:
            raise Invalid(_at(where, name), "is missing")
    for name, each in value.items():
        check(each, known[name], _at(where, name))


def _check_any(value: Any, schemas: list[Schema], where: str) -> None:
    """The value fits one of the schemas; otherwise the message is of the one that it comes nearest to."""
    errors = []
    for schema in schemas:
        try:
            return check(value, schema, where)
        except Invalid as error:
            errors.append(error)
    if deeper := [error for error in errors if error.where != where]:
        raise max(deeper, key=lambda error: len(error.where))
    same = [error for error, schema in zip(errors, schemas, strict=True) if _is(value, schema["type"])]
    if same:
        raise same[0]
    raise Invalid(where, f"{_shown(value)} must be {' or '.join(dict.fromkeys(schema['type'] for schema in schemas))}")


def _out_of_range(value: Any, schema: Schema) -> Iterator[str]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            yield "must be finite"
        if "minimum" in schema and value < schema["minimum"]:
            yield f"must be >= {schema['minimum']}"
        if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
            yield f"must be > {schema['exclusiveMinimum']}"
        if "maximum" in schema and value > schema["maximum"]:
            yield f"must be <= {schema['maximum']}"
    for kind, unit, size in ((str, "characters", "Length"), (list, "items", "Items")):
        if isinstance(value, kind):
            if len(value) < schema.get(f"min{size}", 0):
                yield f"must have {schema[f'min{size}']} {unit} at least"
            if len(value) > schema.get(f"max{size}", math.inf):
                yield f"must have {schema[f'max{size}']} {unit} at most"


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()  # 1.0 is an integer of JSON
    return isinstance(value, _TYPES[kind])


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _shown(value: Any) -> str:
    shown = (
        repr(value) if not isinstance(value, dict | list) else "an object" if isinstance(value, dict) else "an array"
    )
    return shown if len(shown) <= 60 else f"{shown[:57]}…"


_EVENT: dict[str, Any] = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": _TEXT},
    "description": "Each event of the stream: its data is a piece of the answers in JSON, an error, or [DONE].",
}
_NAME: dict[str, Any] = {"name": "name", "in": "path", "required": True, "schema": {**_TEXT, "minLength": 1}}


def openapi(version: str, *, key: bool) -> dict[str, Any]:
    """The OpenAPI document of the server. key: whether requests need one."""
    error = {"description": "An error, in OpenAI's shape.", "content": {"application/json": {"schema": ERROR}}}
    errors = dict.fromkeys(("400", "401", "403", "404", "408", "413", "415", "429", "500", "503", "504"), error)

    streamed = {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": _EVENT}}

    def posted(summary: str, schema: Schema, answer: Mapping[str, Any] = streamed) -> dict[str, Any]:
        return {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": {"200": {"description": "The answers.", "content": answer}, **errors},
            }
        }

    def got(summary: str, kind: str, *parameters: Mapping[str, Any]) -> dict[str, Any]:
        schema = {"type": "object"} if kind == "application/json" else _TEXT
        done = {"description": summary, "content": {kind: {"schema": schema}}}
        return {"get": {"summary": summary, "parameters": list(parameters), "responses": {"200": done, **errors}}}

    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "swamla serve", "version": version},
        "paths": {
            "/v1/models": got("The models that are served.", "application/json"),
            "/v1/models/{name}": got("One of them.", "application/json", _NAME),
            "/v1/completions": posted("Texts continued.", COMPLETION),
            "/v1/chat/completions": posted("The next message of a conversation.", CHAT),
            "/v1/explain": posted(
                "The attention of a text: what one of its tokens reads of every earlier one, in every layer and head.",
                EXPLANATION,
                {"application/json": {"schema": _EXPLAINED}},
            ),
            "/health": got("Whether requests are answered.", "application/json"),
            "/metrics": got("Counters and gauges for Prometheus.", "text/plain"),
        },
    }
    if key:
        document["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        document["security"] = [{"key": []}]
    return document


ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
