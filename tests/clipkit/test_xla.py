"""The TPU path for real: XLA on the CPU, with one device and as a mesh of four, in the environment of the pinned pair.

`make test` builds that environment and names its Python in CLIPKIT_XLA_PYTHON.
"""

import json
import os
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from pod_side import HOSTS, pod_recipe
from xla_side import emoji_task

from clipkit.checkpoint import folder_of
from clipkit.config import set_values
from clipkit.log import read_metrics
from clipkit.storage.files import remove
from clipkit.train.catalogue import debug
from clipkit.train.checks import loader_config
from clipkit.train.loader.loader import batches
from clipkit.train.loop import train
from clipkit.train.sources.open import open_source

# Runs the command in this very process and says how often XLA compiled.
COUNT_COMPILATIONS = """
import sys
from clipkit.cli.main import main
main(sys.argv[1:], standalone_mode=False)
import torch_xla.debug.metrics as metrics
print("compilations", metrics.metric_data("CompileTime")[0])
"""


@pytest.fixture(scope="module")
def xla_python() -> str:
    path = os.environ.get("CLIPKIT_XLA_PYTHON", "")
    assert Path(path).is_file(), "CLIPKIT_XLA_PYTHON must name the Python of the XLA environment: run `make test`"
    return path


ROUNDED = "optimizer.mu_dtype=bfloat16"


@pytest.fixture(scope="module")
def losses_on_cpu(pairs_dataset, tmp_path_factory):
    """By the settings that change what is learned."""
    found = {}
    for settings in ((), (ROUNDED,)):
        run = tmp_path_factory.mktemp("cpu")
        train(set_values(debug(), settings), pairs_dataset, run, device_name="cpu", workers=1)
        found[settings] = [line["loss"] for line in read_metrics(run)]
    return found


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many XLA devices, which are the CPU's."""
    # The debug model is compiled in a third of the time without the compiler's optimisations.
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return os.environ | flags | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)}


# torch's own way of computing activations again doesn't know XLA. Micro-batches are compiled by themselves: the cut,
# the features, the loss, and the first, the middle and the last one's gradients.
@pytest.mark.parametrize(
    ("devices", "settings", "most"),
    [(1, ["checkpoint_activations=true", "micro_batch=4"], 32), (4, ["shard_weights=true", ROUNDED], 80)],
)
def test_training_on_xla_equals_training_on_the_cpu(
    xla_python, pairs_dataset, losses_on_cpu, tmp_path, devices, settings, most
):
    cpu_losses = losses_on_cpu[tuple({ROUNDED} & set(settings))]
    command = [xla_python, "-c", COUNT_COMPILATIONS, "train", "--data", str(pairs_dataset), "--recipe", "debug"]
    command += ["--device", "tpu", "--workers", "1", "--out", str(tmp_path)]
    command += [f"--set={setting}" for setting in settings]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(devices))
    assert done.returncode == 0, done.stderr

    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert len(losses) == 20
    assert losses == pytest.approx(cpu_losses, rel=1e-6)

    device = json.loads((tmp_path / "config.json").read_text())["device"]
    assert (device["kind"], device["devices"]) == ("xla", devices)
    # Shapes are static and nothing that changes is a constant of the graph: after the first steps of each of the two
    # stages (with and without gradients' buffers; the initial weights) nothing is compiled again.
    compilations = int(done.stdout.split("compilations")[-1])
    assert compilations <= most, f"{compilations} compilations for 20 steps: a graph changes from step to step"

    if devices == 4:  # the checkpoint of sharded weights is whole: one device goes on from it
        remove(folder_of(tmp_path, 320))
        done = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment(1))
        assert done.returncode == 0, done.stderr
        assert [line["loss"] for line in read_metrics(tmp_path)] == pytest.approx(cpu_losses, rel=1e-6)


@pytest.fixture(scope="module")
def seen_inside(xla_python, pairs_dataset, tmp_path_factory):
    """What `xla_side` finds on four devices, and the losses of the run that it makes there."""
    script, out = Path(__file__).parents[1] / "support" / "xla_side.py", tmp_path_factory.mktemp("inside")
    command = [xla_python, str(script), str(pairs_dataset), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(4))
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in read_metrics(out / "smaller")]
    return json.loads(done.stdout.splitlines()[-1]) | {"losses": losses}


def test_a_step_whose_shapes_change_after_the_first_ones_stops_the_run(seen_inside):
    assert "the training step was compiled again at 304 samples" in seen_inside["smaller_batches"]
    assert "PT_XLA_DEBUG_LEVEL=2" in seen_inside["smaller_batches"]


def test_whole_weights_on_several_devices_learn_what_the_cpu_learns(seen_inside, losses_on_cpu):
    assert seen_inside["losses"] == pytest.approx(losses_on_cpu[()][:19], rel=1e-6)


def test_all_matrices_and_their_moments_are_sharded_where_they_would_fill_a_chip(seen_inside):
    assert seen_inside["sharded_shares"] == [1.0, 1.0, 1.0]
    assert seen_inside["shards_by_itself"] == [False, True, False]  # of memory that isn't known, small, and large


def test_gradients_of_micro_batches_on_several_devices_are_those_of_the_whole_batch(seen_inside):
    assert seen_inside["micro_batch_error"] < 1e-5 * seen_inside["largest_gradient"]


def test_an_evaluation_on_several_devices_counts_what_the_cpu_counts(seen_inside):
    (found, expected) = (dict(seen_inside[name]) for name in ("counts", "counts_on_cpu"))
    assert found == pytest.approx(expected, rel=1e-6) and 0 < expected["emoji/top5"] < 1
    assert [found[f"emoji/{name}"] for name in ("top1", "top5")] == [
        expected[f"emoji/{name}"] for name in ("top1", "top5")
    ]


def test_the_hosts_of_a_pod_train_and_evaluate_together_as_one_process_does(xla_python, pairs_dataset, tmp_path):
    recipe, (stage,) = pod_recipe(), pod_recipe().stages
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = Path(__file__).parents[1] / "support" / "pod_side.py"
    (tmp_path / "shared").mkdir()
    hosts = [
        subprocess.Popen(
            [xla_python, str(script), str(host), port, str(pairs_dataset), str(tmp_path / "shared")],
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
