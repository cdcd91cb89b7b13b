"""The page of a circuit: one HTML file that needs no network and no server; and its picture.

`report_data.py` collects what the page shows (`measurements.py`, `activations.py`), and `report.py`
puts that and the files in `assets/` and `vendor/` into one document. `layout.py` says what stands
where in the graph, `plot.py` draws it for print.
"""
