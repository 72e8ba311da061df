"""The TPU path for real: XLA on the CPU, with one device and as a mesh of four, in the environment of the pinned pair.

`make test` builds that environment and names its Python in CLIPKIT_XLA_PYTHON.
"""

import json
import os
import socket
import subprocess
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from pod_side import HOSTS, pod_recipe
from xla_side import ROUNDED, emoji_task, last_stage, small

from clipkit.checkpoint import folder_of
from clipkit.config import set_values
from clipkit.log import read_metrics
from clipkit.storage.files import remove
from clipkit.train.checks import loader_config
from clipkit.train.loader.loader import batches
from clipkit.train.loop import train
from clipkit.train.sources.open import open_source

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def xla_python() -> str:
    path = os.environ.get("CLIPKIT_XLA_PYTHON", "")
    assert Path(path).is_file(), "CLIPKIT_XLA_PYTHON must name the Python of the XLA environment: run `make test`"
    return path


def losses_on_cpu(data, run, recipe):
    train(recipe, data, run, device_name="cpu", workers=1)
    return losses(run)


def losses(run):
    return [line["loss"] for line in read_metrics(run)]


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many XLA devices, which are the CPU's."""
    # The debug model is compiled in a third of the time without the compiler's optimisations.
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return os.environ | flags | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)}


def run_side(python, devices, *arguments):
    """What `xla_side` prints."""
    command = [python, str(SUPPORT / "xla_side.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(devices))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("xla")


@pytest.fixture(scope="module")
def on_four(xla_python, pairs_dataset, folder):
    """What `xla_side` finds on four devices."""
    return run_side(xla_python, 4, "four", pairs_dataset, folder)


@pytest.fixture(scope="module")
def on_one(xla_python, pairs_dataset, folder, on_four):
    """And on one, which goes on with the run of four from its last checkpoint but one."""
    (folder / "sharded").rename(folder / "whole")
    copytree(folder / "whole", folder / "sharded")
    remove(folder_of(folder / "sharded", 192))
    return run_side(xla_python, 1, "one", pairs_dataset, folder)


@pytest.mark.parametrize(("run", "devices", "settings", "most"), [("whole", 4, [ROUNDED], 72), ("parts", 1, [], 30)])
def test_training_on_xla_equals_training_on_the_cpu(
    on_four, on_one, folder, pairs_dataset, tmp_path, run, devices, settings, most
):
    expected = losses_on_cpu(pairs_dataset, tmp_path, set_values(small(), settings))
    assert len(expected) == 12
    assert losses(folder / run) == pytest.approx(expected, rel=1e-6)
    device = json.loads((folder / run / "config.json").read_text())["device"]
    assert (device["kind"], device["devices"]) == ("xla", devices)
    # Shapes are static and nothing that changes is a constant of the graph: after the first steps of each of the two
    # stages (with and without gradients' buffers; the initial weights) nothing is compiled again.
    compilations = (on_four if devices == 4 else on_one)["compilations"]
    assert compilations <= most, f"{compilations} compilations for 12 steps: a graph changes from step to step"


def test_one_device_goes_on_from_a_checkpoint_of_sharded_weights(on_one, folder):
    unbroken = losses(folder / "whole")
    assert losses(folder / "sharded") == pytest.approx(unbroken, rel=1e-6) and len(unbroken) == 12


def test_a_step_whose_shapes_change_after_the_first_ones_stops_the_run(on_four):
    assert "the training step was compiled again at 80 samples" in on_four["smaller_batches"]
    assert "PT_XLA_DEBUG_LEVEL=2" in on_four["smaller_batches"]


def test_whole_weights_on_several_devices_learn_what_the_cpu_learns(on_four, folder, pairs_dataset, tmp_path):
    on_cpu = losses_on_cpu(pairs_dataset, tmp_path, last_stage())
    assert losses(folder / "smaller") == pytest.approx(on_cpu[:5], rel=1e-6)


def test_all_matrices_and_their_moments_are_sharded_where_they_would_fill_a_chip(on_four):
    assert on_four["sharded_shares"] == [1.0, 1.0, 1.0]
    assert on_four["shards_by_itself"] == [False, True, False]  # of memory that isn't known, small, and large


def test_gradients_of_micro_batches_on_several_devices_are_those_of_the_whole_batch(on_four):
    assert on_four["micro_batch_error"] < 1e-5 * on_four["largest_gradient"]


def test_an_evaluation_on_several_devices_counts_what_the_cpu_counts(on_four):
    (found, expected) = (dict(on_four[name]) for name in ("counts", "counts_on_cpu"))
    assert found == pytest.approx(expected, rel=1e-6) and 0 < expected["emoji/top5"] < 1
    assert [found[f"emoji/{name}"] for name in ("top1", "top5")] == [
        expected[f"emoji/{name}"] for name in ("top1", "top5")
    ]


def test_the_hosts_of_a_pod_train_and_evaluate_together_as_one_process_does(xla_python, pairs_dataset, tmp_path):
    recipe, (stage,) = pod_recipe(), pod_recipe().stages
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    (tmp_path / "shared").mkdir()
    hosts = [
        subprocess.Popen(
            [xla_python, str(SUPPORT / "pod_side.py"), str(host), port, str(pairs_dataset), str(tmp_path / "shared")],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(HOSTS),
        )
        for host in range(HOSTS)
    ]
    errors = [host.communicate()[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0] * HOSTS, "".join(errors)

    train(recipe, pairs_dataset, tmp_path / "cpu", device_name="cpu", workers=0, task=emoji_task(tmp_path))
    found, expected = (read_metrics(tmp_path / run) for run in ("shared/run", "cpu"))
    names = ("samples_seen", "loss", "grad_norm", "accuracy_image_to_text", "emoji/top1", "emoji/top5")
    values = [[line[name] for line in lines for name in names if name in line] for lines in (found, expected)]
    assert values[0] == pytest.approx(values[1], rel=1e-5) and len(values[0]) == 15
    source = open_source(pairs_dataset, block_size=recipe.block_size).source()
    whole = [batch.ids_BT for batch in batches(source, loader_config(recipe, stage), 0, stage.samples, workers=0)]
    assert (np.load(tmp_path / "shared" / "ids.npy") == np.stack(whole)).all()
