"""Who has which fields of an object: whether somebody else has changed what the operator made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esper_operator.digests import digest_of_object
from esper_operator.kinds import MANAGER


def ownership(data: Mapping[str, Any]) -> tuple[str, bool]:
    """A mark of who has which fields of an object, and whether others have any of its content.

    Whoever changes a field takes it over from the operator, and whoever removes one takes it away:
    the mark is then another one. Statuses and metadata are everybody's. Who scales to zero has
    nothing afterwards, for a zero is not among the fields of a Scale; but the operator has not
    either what it always says.
    """
    own: object = None
    others: list[object] = []
    for item in data["metadata"].get("managedFields") or ():
        fields = item.get("fieldsV1") or {}
        if item.get("manager") == MANAGER and item.get("operation") == "Apply":
            own = fields if not item.get("subresource") else own
        elif item.get("subresource") != "status":
            content = {name: fields[name] for name in ("f:spec", "f:data") if name in fields}
            others += [content] if content else []
    spec: Any = own.get("f:spec") if isinstance(own, dict) else None
    scaled = bool(spec) and "f:template" in spec and "f:replicas" not in spec
    return digest_of_object({"own": own, "others": others}), bool(others) or scaled
