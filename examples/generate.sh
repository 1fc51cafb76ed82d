#!/bin/sh
# Asks a running server for the ten digits on one sheet, and for one picture as JSON.
URL=${1:-http://127.0.0.1:8000}
curl -sf -X POST "$URL/generate" -H 'content-type: application/json' \
    -d '{"labels": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], "seed": 42, "n": 10, "steps": 20}' -o sheet.png
curl -sf -X POST "$URL/generate" -H 'content-type: application/json' -H 'accept: application/json' \
    -d '{"label": 3, "seed": 207, "steps": 20}' | head -c 400
