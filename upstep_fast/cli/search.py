"""Output of the search command: lines, CSV, JSON and a page."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from upstep_fast.config.search import SearchConfig
from upstep_fast.data.loading.skipped_images import csv_cell
from upstep_fast.evaluation.run_search import Found, run_search
from upstep_fast.runtime.atomic_file import write_atomic, write_errors
from upstep_fast.runtime.progress import track
from upstep_fast.runtime.terminal import print_line

COLUMNS = ("query", "rank", "similarity", "path")


def run(config: SearchConfig) -> None:
    """Run the command and print what it found. Raises UpstepError."""
    with track("search"), write_errors("the results", "make room, or give another file"):
        found = run_search(config)
        if config.json is not None:
            write_atomic(Path(config.json), json.dumps(as_json(found), indent=1).encode())
        if config.out is not None:
            from upstep_fast.report.search_page import search_page

            write_atomic(Path(config.out), search_page(config, found).encode())
    if config.csv:
        write_csv(found)
        return
    for query, matches in zip(found.queries, found.matches, strict=True):
        print_line(f"similar to {query}")
        width = len(str(len(matches)))
        for rank, match in enumerate(matches, 1):
            print_line(f"{rank:>{width}}  {match.similarity:.4f}  {match.name}")
    print_line(f"searched: {found.searched}")
    if config.out is not None:
        print_line(f"page: {config.out}")


def as_json(found: Found) -> dict[str, object]:
    """Return the results as JSON values."""
    index = found.index
    return {
        "images": len(index),
        "features": index.facts,
        "exact": index.is_exact,
        "recall": index.recall,
        "queries": [
            {
                "query": query,
                "matches": [
                    {"rank": rank, "similarity": match.similarity, "path": match.name}
                    for rank, match in enumerate(matches, 1)
                ],
            }
            for query, matches in zip(found.queries, found.matches, strict=True)
        ],
    }


def write_csv(found: Found) -> None:
    """Print one row per match as CSV; names are made safe for spreadsheets and terminals."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    for query, matches in zip(found.queries, found.matches, strict=True):
        for rank, match in enumerate(matches, 1):
            writer.writerow((csv_cell(query), rank, f"{match.similarity:.6f}", csv_cell(match.name)))
