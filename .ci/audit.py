"""Known vulnerabilities of the pinned dependencies, by pip-audit; `make audit`.

It needs a network. Where the tool or the database of advisories cannot be reached, it says so in
one line and does not fail.
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

TOOL = "pip-audit==2.10.1"
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv" / "audit"  # of its own, so that it changes no version that is tested


def main() -> int:
    """Audit `constraints.txt`; returns the exit status."""
    python = FOLDER / "bin" / "python"
    if not (FOLDER / "bin" / "pip-audit").is_file():
        venv.create(FOLDER, with_pip=True)
        install = ["-m", "pip", "install", "--quiet", "--retries", "0", "--timeout", "20", TOOL]
        if subprocess.run([python, *install], capture_output=True).returncode:
            print(f"audit: {TOOL} could not be installed, so nothing was audited.")
            return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [
            python, "-m", "pip_audit", "--requirement", ROOT / "constraints.txt", "--no-deps",
            "--disable-pip", "--progress-spinner", "off", "--format", "json", "--output", path,
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True)
        report = json.loads(path.read_text()) if path.is_file() else None
    status, lines = verdict(report, run.stderr)
    print("\n".join(lines))
    return status


def verdict(report: dict[str, Any] | None, errors: str = "") -> tuple[int, list[str]]:
    """Exit status, and what to print, for a report of pip-audit; None if it made none."""
    packages = (report or {}).get("dependencies", [])
    audited = [package for package in packages if "vulns" in package]
    found = [
        f"audit: {package['name']} {package['version']} has {vulnerability['id']}, mended in "
        f"{', '.join(vulnerability['fix_versions']) or 'no version yet'}."
        for package in audited
        for vulnerability in package["vulns"]
    ]
    if not audited:
        reason = "it knew none of the packages" if packages else errors.strip()[-200:]
        reason = reason.splitlines()[-1] if reason else "pip-audit made no report"
        return 0, [f"audit: the database was not reached ({reason}): nothing was audited."]
    left_out = [package["name"] for package in packages if package not in audited]
    lines = [*found, f"audit: {len(audited)} packages, {len(found)} known vulnerabilities."]
    if left_out:
        lines.append(f"audit: not audited, as unknown there: {', '.join(left_out)}.")
    return int(bool(found)), lines


if __name__ == "__main__":
    sys.exit(main())
