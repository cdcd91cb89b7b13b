"""A planted circuit, its report, and pages of it in a real Chromium."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.viewer.report_data import ReportConfig, report_data
from tests.circuits.planted import (
    PLANTED_NODES,
    on_off_task,
    planted_circuit,
    planted_model,
    reference_ids,
    word_tokenizer,
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SMALL = ReportConfig(prompts=64, text_tokens=768, examples=3)


@pytest.fixture(scope="session")
def planted() -> tuple[Any, Any, Any, Circuit]:
    """Model, tokenizer, task and circuit; not to be changed."""
    model = planted_model()
    # A key beside the planted nodes, so that there is a head with a key and a value.
    nodes = {**PLANTED_NODES, "h.0.attn.k": [4]}
    circuit = planted_circuit(model, nodes=nodes)
    scores = {site: 0.0 * mean - 1 for site, mean in circuit.means.items()}
    for place, (site, ids) in enumerate(nodes.items()):
        scores[site][ids] = 1 - 0.1 * place
    return model, word_tokenizer(), on_off_task(), dataclasses.replace(circuit, scores=scores)


@pytest.fixture(scope="session")
def data(planted) -> dict[str, Any]:
    """What the page of the planted circuit shows; not to be changed."""
    model, tokenizer, task, circuit = planted
    return report_data(
        circuit, model, tokenizer, task=task, reference=reference_ids(), config=SMALL,
        progress=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def crowded() -> Any:
    """Model and circuit of five nodes and more at every site: many lines, most past other columns.

    Not to be changed.
    """
    model = planted_model(noise=0.1)
    sites = model.node_sites().items()
    nodes = {name: list(range(0, site.width, site.width // 5)) for name, site in sites}
    return model, planted_circuit(model, nodes=nodes)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium, spoken to over its DevTools protocol."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync"]
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield running
        running.close()


@pytest.fixture
def open_page(browser, tmp_path) -> Iterator[Callable[..., Any]]:
    """Opens a page's HTML; the test fails if the page logged anything or asked for anything."""
    contexts, complaints = [], []

    def open_it(html: str, **options: Any) -> Any:
        path = Path(tmp_path) / f"page{len(contexts)}.html"
        path.write_text(html, encoding="utf-8")
        options.setdefault("viewport", {"width": 1300, "height": 900})
        context = browser.new_context(reduced_motion="reduce", **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on(
            "request",
            lambda request: (
                request.url.startswith(("file:", "data:")) or complaints.append(request.url)
            ),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []
