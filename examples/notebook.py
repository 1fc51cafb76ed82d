"""The cells of a notebook, which displays a job: its progress while it runs, its pictures once it has ended.

python examples/notebook.py [URL]
"""

# %% Submit a job, which runs in the background. A notebook displays the last line of a cell
import sys

from ddpm_client import Client, Frame

client = Client((sys.argv[1:] or ["http://127.0.0.1:8000"])[0])
job = client.submit(label="random", seed=207, steps=30, n=4)
job  # noqa: B018

# %% Watch the noisy picture, step by step
for event in job.watch():
    if isinstance(event, Frame) and event.index == 0:
        event.image  # noqa: B018
        print(event.step, event.t)

# %% Get the four pictures, and the denoising as an animation
made = job.wait()
made.images  # noqa: B018
print(job, len(made), len(job.trajectory("gif")), "bytes of GIF")
