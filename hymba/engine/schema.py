"""Which JSON schemas can be followed. A grammar leaves out in silence what it cannot say, so an
answer would come that is not what was asked for: such a schema is refused. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hymba.errors import UserError

# What no grammar can say, or xgrammar 0.2.8 does not.
UNFOLLOWED = frozenset(
    "multipleOf not uniqueItems contains minContains maxContains if then else dependentRequired"
    " dependentSchemas dependencies unevaluatedItems unevaluatedProperties".split()
)
NAMED = ("properties", "patternProperties", "$defs", "definitions")  # schemas by name
LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLE = ("items", "additionalItems", "additionalProperties", "propertyNames")


def check_schema(schema: Any) -> None:
    """UserError, one line, for what would not be followed."""
    if isinstance(schema, Mapping) and schema.get("$ref") == "#":
        raise UserError("json_schema cannot be followed: it refers to itself and says nothing else")
    for part in _parts(schema):
        found = sorted(key for key in UNFOLLOWED & part.keys() if part[key] is not False)
        if found:
            raise UserError(f"json_schema cannot be followed: leave out {', '.join(found)}")
        if len(part.get("allOf", ())) > 1:
            raise UserError("json_schema cannot be followed: allOf of several; say them as one")


def _parts(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all schemas in it."""
    if not isinstance(schema, Mapping):
        return
    yield schema
    inner = [schema[key] for key in SINGLE if key in schema]
    inner += [x for key in LISTED if isinstance(schema.get(key), list) for x in schema[key]]
    for key in NAMED:
        if isinstance(schema.get(key), Mapping):
            inner += schema[key].values()
    for part in inner:
        yield from _parts(part)
