"""Output of a run: log, metrics, progress line, tables and report.html."""
