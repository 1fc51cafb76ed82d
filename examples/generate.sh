#!/bin/sh
# Asks a running server for sixteen digits on one sheet, and for one picture as JSON.
URL=${1:-http://127.0.0.1:8000}
curl -sf -X POST "$URL/generate" -H 'content-type: application/json' \
    -d '{"seed": 49, "n": 16, "steps": 25, "sampler": "ddim"}' -o sheet.png
curl -sf -X POST "$URL/generate" -H 'content-type: application/json' -H 'accept: application/json' \
    -d '{"seed": 207, "steps": 20}' | head -c 400
