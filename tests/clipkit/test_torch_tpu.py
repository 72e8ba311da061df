"""TPUs by torch_tpu: what can be known of it without a chip, in an environment of its own.

`make test` builds that environment and names its Python in CLIPKIT_TORCH_TPU_PYTHON.
"""

import json
import os
import subprocess
from pathlib import Path

PYTHON = os.environ.get("CLIPKIT_TORCH_TPU_PYTHON", "")


def test_torch_tpu_registers_its_device_and_backend_and_is_picked_for_tpus():
    assert Path(PYTHON).is_file(), "CLIPKIT_TORCH_TPU_PYTHON must name torch_tpu's Python: run `make test`"
    script = Path(__file__).parents[1] / "support" / "torch_tpu_side.py"
    done = subprocess.run([PYTHON, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["without"].startswith("torch_tpu finds no TPU here: use --device cpu")
    assert (found["registered"], found["backend"]) == ("tpu", True)
    assert (found["kind"], found["device"]) == ("tpu", "tpu:0")
    assert found["autocast"] == "torch.bfloat16"
    before, inside = found["products"]
    assert inside == "high" != before == found["products_after"]
