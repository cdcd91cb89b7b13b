"""The page of a circuit: one HTML file that needs no network and no server.

`gathering.py` collects what it shows (`losses.py`, `activations.py`, `attention.py`,
`embeddings.py`), `page.py` puts that and the files in `assets/` and `vendor/` into one document,
and `report.py` writes it.
"""

from .report import write_report
from .settings import ReportConfig

__all__ = ["ReportConfig", "write_report"]
