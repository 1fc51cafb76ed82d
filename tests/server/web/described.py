"""Whether answers are as `/openapi.json` says: every field is described, of its type, and none is missing."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

Json = dict[str, Any]
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
OF_ALL = {
    "date",
    "server",
    "content-type",
    "content-length",
    "connection",
    "x-accel-buffering",
}  # headers that no description needs


class Description:
    """An OpenAPI document."""

    def __init__(self, document: Json) -> None:
        self.document = document
        self.seen = set[tuple[str, str, int, str]]()  # operations, statuses and media types that were compared

    def follow(self, said: Json) -> Json:
        """What a reference stands for; anything else as it is."""
        if "$ref" not in said:
            return said
        found = self.document
        for name in said["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return self.follow(found)

    def operations(self) -> Iterator[tuple[str, str, Json]]:
        """Path, method and description of each."""
        for path, methods in self.document["paths"].items():
            for method, operation in methods.items():
                yield path, method, operation

    def wrong(self, schema: Json | bool, value: Any, place: str = "") -> list[str]:
        """Where a value is not what a schema says. Objects have no other fields than those that are named."""
        if isinstance(schema, bool):  # of additional properties: anything may be there
            return [] if schema else [f"{place} is not described"]
        schema = self.follow(schema)
        if kinds := schema.get("anyOf", schema.get("oneOf")):
            found = [self.wrong(kind, value, place) for kind in kinds]
            return [] if [] in found else min(found, key=len)
        allowed = [schema["const"]] if "const" in schema else schema.get("enum", [value])
        if not isinstance(value, TYPES[schema["type"]]) or (type(value) is bool and schema["type"] != "boolean"):
            return [f"{place} is no {schema['type']}"]
        if value not in allowed or not re.search(schema.get("pattern", ""), str(value)):
            return [f"{place} is not one of {allowed} or of its pattern"]
        if isinstance(value, list):
            return [each for i, item in enumerate(value) for each in self.wrong(schema["items"], item, f"{place}/{i}")]
        if not isinstance(value, dict):
            return []
        fields: Json = (
            schema["properties"] if "properties" in schema else dict.fromkeys(value, schema["additionalProperties"])
        )
        missing = [f"{place}/{name} is missing" for name in schema.get("required", []) if name not in value]
        more = [f"{place}/{name} is not described" for name in value if name not in fields]
        known = [name for name in value if name in fields]
        return (
            missing
            + more
            + [each for name in known for each in self.wrong(fields[name], value[name], f"{place}/{name}")]
        )

    def check(self, method: str, path: str, status: int, headers: Mapping[str, str], body: Any) -> None:
        """Asserts that this is an answer that the operation is said to give."""
        media = headers.get("content-type", "").partition(";")[0]
        self.seen.add((method, path, status, media))
        answers = self.document["paths"][path][method]["responses"]
        assert str(status) in answers, (method, path, status)
        answer = self.follow(answers[str(status)])
        said = {name.lower(): header for name, header in answer["headers"].items()}
        assert {name for name in said if said[name]["required"]} - {*headers} == set(), (method, path, status)
        assert {*headers} - {*said} - OF_ALL == set(), (method, path, status)
        for name in said.keys() & {*headers}:
            assert self.wrong(said[name]["schema"], headers[name], name) == []
        content = answer.get("content", {})
        assert media in content if media else not content, (method, path, status, media)
        if media.endswith("json"):
            assert self.wrong(content[media]["schema"], body) == [], (method, path, status)
