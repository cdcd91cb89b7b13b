"""`hf-circuit-sparsity view` as a person calls it, on a small model."""

import json

from hf_circuit_sparsity.cli import main


def test_the_page_is_written_beside_the_circuit(saved_circuit, corpus, capsys):
    assert main(["view", str(saved_circuit), "--corpus", str(corpus)]) == 0
    page = saved_circuit / "index.html"
    printed = capsys.readouterr().out
    assert str(page) in printed and "kB" in printed and "circuit.py" in printed
    text = page.read_text(encoding="utf-8")
    assert 'href="circuit.py"' in text
    data = text.split('id="data">', 1)[1].split("</script>", 1)[0]
    shown = json.loads(data)
    assert shown["task"] == "while_return_true" and shown["size"]["nodes"] == 4
    assert sorted(p.name for p in page.parent.iterdir()) == [
        "circuit.json", "circuit.npz", "circuit.py", "circuit.safetensors", "index.html",
    ]  # fmt: skip
