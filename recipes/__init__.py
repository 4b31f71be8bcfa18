"""Scripts: parse, call, report. Each runs as `python recipes/NAME.py`."""
