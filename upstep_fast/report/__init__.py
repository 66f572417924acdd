"""What a run says and shows: logs, metrics, tables, report.html."""
