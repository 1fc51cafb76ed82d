"""What runs beside others: on any machine in the same company as in our tests.

diffusers imports some packages wherever they are installed, and cannot be imported where one of them fails. A U-Net
and its scheduler need none of them, and without them each process begins seconds sooner. OpenVINO reports to its makers
that it is used, where it finds the package for that.
"""

import sys

NOT_NEEDED = ("accelerate", "peft", "scipy", "torchvision", "transformers")
REPORTS = ("openvino_telemetry",)

for name in (*NOT_NEEDED, *REPORTS):
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # Python's word for what is not to be found
