"""What a request may hold. What would change the answer and is not served is refused, not ignored."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

# field -> the values, beside null, that ask for nothing. Others are refused.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}},),
    "tool_choice": ("auto",),
    "functions": ([],),
    "function_call": ("auto",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "generation_config": (),
    "background": (False,),
    "previous_response_id": (),
    "prompt_template": (),
    "truncation": ("disabled",),
    "include": ([],),
    "reasoning": ({},),
    "reasoning_effort": (),
    "max_tool_calls": (),
}
Text = Annotated[str, Field(min_length=1, max_length=200)]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class Part(BaseModel):
    """A piece of a message: text only."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=100)]
    content: str | list[Part] | None = None


class Body(BaseModel):
    """What all requests share."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-0.9, le=2)] | None = None
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    max_output_tokens: Count | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None
    tools: list[dict[str, Any]] | None = None


class Chat(Body):
    messages: Annotated[list[Message], Field(min_length=1)]


class Completion(Body):
    prompt: str


class Item(BaseModel):
    """What an answer before consisted of, beside messages."""

    model_config = ConfigDict(extra="allow")

    type: Literal["reasoning", "function_call", "function_call_output"]
    output: str | list[Part] | None = None


class Response(Body):
    input: str | Annotated[list[Message | Item | Part], Field(min_length=1)]


@dataclass(frozen=True)
class Wanted:
    """What a request says of its answer; None: nothing."""

    tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...]
    bias: dict[int, float] | None = None


class Refused(Exception):
    """A request that is not served: the status of HTTP and what to say."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


def checked(kind: type[Body], body: Any, name: str, tokenizer: Any) -> tuple[dict[str, Any], Wanted]:
    """The body for transformers' handler, and what it wants. Raises Refused, with 404 for another model than `name`."""
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    body = {key: value for key, value in body.items() if value is not None}
    try:
        found = kind.model_validate(body)
    except ValidationError as error:
        found_wrong = error.errors(include_url=False, include_input=False)
        first = max(found_wrong, key=lambda one: len(one["loc"]))  # of the kinds that a value may have, the nearest
        where = ".".join([str(place) for place in first["loc"] if "[" not in str(place)][:4])
        raise Refused(400, f"{where}: {first['msg']}"[:500], "invalid_value") from error
    if found.model is not None and found.model != name:
        raise Refused(
            404, f"model must be {name!r}, the one that is loaded, got {found.model[:200]!r}", "model_not_found"
        )
    for field, neutral in UNSERVED.items():
        if field in body and body[field] not in neutral:
            raise Refused(400, f"{field} is not served: leave it out", "unsupported_parameter")
    if any(tool.get("type", "function") != "function" for tool in found.tools or ()):
        raise Refused(400, "tools must be of type function: others are not served", "unsupported_parameter")
    taken = inspect.signature(tokenizer.apply_chat_template).parameters
    for field in found.chat_template_kwargs or ():
        if field in taken or field in ("messages", "add_special_tokens", "text", "text_target", "text_pair"):
            raise Refused(400, f"chat_template_kwargs must not hold {field[:100]!r}", "invalid_value")
    stop = (found.stop,) if isinstance(found.stop, str) else tuple(found.stop or ())
    tokens = found.max_completion_tokens or found.max_tokens or found.max_output_tokens
    for field in ("stop", "seed", "logit_bias", *UNSERVED):  # those are ours, or ask for nothing
        body.pop(field, None)
    return body | {"model": name, "stream": bool(found.stream)}, Wanted(
        tokens, found.temperature, found.top_p, found.seed, stop, found.logit_bias
    )
