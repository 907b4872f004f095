"""What the engine answers as the JSON that clients get."""

import json
from dataclasses import asdict
from typing import Any


def as_json(answer: Any) -> Any:
    """By the standard library, not by what the service writes it with."""
    return json.loads(json.dumps(asdict(answer)))
