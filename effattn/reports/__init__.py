"""One place makes every report: tables, plots as inline SVG, the page, and files that are written
whole.
"""
