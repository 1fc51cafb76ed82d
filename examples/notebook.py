"""The cells of a notebook: a job shows itself there, its progress while it runs and its pictures when it is done.

python examples/notebook.py [URL]
"""

# %% A job goes on by itself; the last line of a cell is what is shown
import sys

from ddpm_client import Client, Frame

client = Client((sys.argv[1:] or ["http://127.0.0.1:8000"])[0])
job = client.submit(seed=207, steps=30, n=4)
job  # noqa: B018

# %% The noisy picture every few steps
for event in job.watch():
    if isinstance(event, Frame) and event.index == 0:
        event.image  # noqa: B018
        print(event.step, event.t)

# %% All four, and the whole way as an animation
made = job.wait()
made.images  # noqa: B018
print(job, len(made), len(job.trajectory("gif")), "bytes of GIF")
