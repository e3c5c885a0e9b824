"""The description of the routes as a page, made from what FastAPI says of them; it loads nothing and runs no script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

TEMPLATE = Path(__file__).parent / "page" / "docs.html"
Schema = Mapping[str, Any]


def docs_page(described: Schema) -> str:
    """The page of an OpenAPI description."""
    schemas = described["components"]["schemas"]
    routes = []
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            content = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            body = schemas[content["$ref"].rpartition("/")[2]] if content else {}
            fields = [
                (name, _type(field, schemas), name in body.get("required", ()), field.get("default"))
                for name, field in body.get("properties", {}).items()
            ]
            examples = [json.dumps(example, ensure_ascii=False) for example in body.get("examples", ())]
            routes.append((method.upper(), path, route.get("description", ""), fields, examples))
    errors = next(iter(described["paths"]["/predict"].values()))["responses"]
    page = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, undefined=jinja2.StrictUndefined)
    statuses = {status: error["description"] for status, error in errors.items() if status != "200"}
    html: str = page.render(version=described["info"]["version"], routes=routes, errors=statuses)
    return html


def _type(schema: Schema, schemas: Schema) -> str:
    """What a value may be, in words."""
    if "$ref" in schema:
        inner = schemas[schema["$ref"].rpartition("/")[2]].get("properties", {})
        return f"{{{', '.join(f'{name}: {_type(field, schemas)}' for name, field in inner.items())}}}"
    if "anyOf" in schema:
        return " or ".join(_type(one, schemas) for one in schema["anyOf"] if one.get("type") != "null")
    if "const" in schema or "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"[{_type(schema['items'], schemas)}, ...]" if schema.get("items") else "[...]"
    kind: str = schema.get("type", "any")
    return "{...}" if kind == "object" else kind
