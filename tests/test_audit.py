"""What the audit of dependencies makes of pip-audit's report."""

import runpy
from pathlib import Path

import pytest

verdict = runpy.run_path(str(Path(__file__).parents[1] / ".ci" / "audit.py"))["verdict"]
FINE = {"name": "torch", "version": "2.13.0", "vulns": []}
UNKNOWN = {"name": "ours", "skip_reason": "Dependency not found on PyPI"}
BAD = {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}


@pytest.mark.parametrize(
    ("report", "status", "said"),
    [
        (None, 0, "nothing was audited"),
        ({"dependencies": [UNKNOWN]}, 0, "knew none of the packages): nothing was audited"),
        ({"dependencies": [FINE, UNKNOWN]}, 0, "unknown there: ours"),
        ({"dependencies": [FINE]}, 0, "1 packages, 0 known"),
        ({"dependencies": [FINE, BAD]}, 1, "a 1 has CVE-1, mended in 2"),
    ],
)
def test_only_what_is_known_to_be_vulnerable_fails(report, status, said):
    found, lines = verdict(report, "Traceback\nConnectionError: no route")
    assert found == status and said in "\n".join(lines)
    assert report is not None or "no route" in lines[0]
