"""Makes one picture over plain HTTP, with httpx instead of the Python client.

python examples/plain_http.py SEED FILE [URL]
"""

import sys
from pathlib import Path

import httpx

seed, file, url = int(sys.argv[1]), Path(sys.argv[2]), (sys.argv[3:] or ["http://127.0.0.1:8000"])[0]
answer = httpx.post(f"{url}/generate", json={"label": 3, "seed": seed, "steps": 20}, timeout=60)
if answer.is_error:
    sys.exit(answer.json()["detail"])
file.write_bytes(answer.content)
print("job", answer.headers["x-job-id"], "seed", answer.headers["x-seed"])
