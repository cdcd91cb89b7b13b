"""Registers the decoder that docs/decoders.md describes, by running the document's own block."""

import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "decoders.md"
blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
exec(next(block for block in blocks if "class Phi3Decoder" in block))
