#!/usr/bin/env bash
# DuckDB 2.0.1 with Parquet files of pyarrow 26.0.1: the minimum and maximum that pyarrow stores for a row group leave NaN out.
# DuckDB, for which NaN is the largest value, takes them for bounds of all values: it skips the rows of NaN where they match,
# returns them where they do not (a condition that holds between the bounds is not tested), and gives another max().
# Seen: of the scores 0.5 and NaN, isnan(score) finds no row in the file and one in memory; score <= 0.5 two and one.
# Files without statistics are read right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet duckdb==2.0.1 pyarrow==26.0.1
cd "$folder"
venv/bin/python - <<'EOF'
import duckdb
import pyarrow
import pyarrow.parquet

scores = pyarrow.table({"path": ["good", "odd"], "score": [0.5, float("nan")]})
pyarrow.parquet.write_table(scores, "default.parquet")
pyarrow.parquet.write_table(scores, "bare.parquet", write_statistics=False)

def paths(source, condition):
    return [path for (path,) in duckdb.sql(f"select path from {source} where {condition} order by path").fetchall()]

expected = {"isnan(score)": [], "score > 0.9": [], "score <= 0.5": ["good", "odd"], "score != 0.5": []}
for condition, wrong in expected.items():
    memory, bare, file = (paths(source, condition) for source in ("scores", "'bare.parquet'", "'default.parquet'"))
    print(f"{condition}: in memory {memory}, without statistics {bare}, with pyarrow's statistics {file}")
    assert memory == bare == (["good"] if condition == "score <= 0.5" else ["odd"]) and file == wrong
largest = [duckdb.sql(f"select max(score) from {source}").fetchall()[0][0] for source in ("scores", "'default.parquet'")]
print("max(score) in memory and in the file:", largest)
assert largest[0] != largest[0] and largest[1] == 0.5
EOF
