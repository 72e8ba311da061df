"""The README.md beside exported weights: what the model is, what it was trained on, what it scores."""

from pathlib import Path
from typing import Any

from clipkit import __version__
from clipkit.checkpoint import Checkpoint
from clipkit.export.parity import Parity
from clipkit.formatting import count, percent
from clipkit.model.flops import sample_cost, weight_count
from clipkit.storage.files import read_json, read_json_lines

LOADING = {
    "open_clip": 'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")\n'
    'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")',
    "hf": 'model = transformers.AutoModel.from_pretrained("FOLDER")\n'
    'processor = transformers.AutoProcessor.from_pretrained("FOLDER")',
    "timm": 'model = timm.create_model("local-dir:FOLDER", pretrained=True)  # the image tower and its projection',
    "onnx": 'session = onnxruntime.InferenceSession("FOLDER/image.onnx")  # and text.onnx; clipkit.json has the rest\n'
    'image_embedding = session.run(None, {"pixels": pixels})[0]',
}
LIBRARY = {"open_clip": "open_clip", "hf": "transformers", "timm": "timm", "onnx": "onnx"}


def model_card(loaded: Checkpoint, target: str, parity: Parity, ema: bool) -> str:
    """The whole page, in Markdown with Hugging Face's front matter."""
    run = loaded.path.parent.parent if loaded.path.parent.name == "checkpoints" else None
    config, recipe = loaded.model_config, loaded.config["recipe"]
    image, text = config.image, config.text
    cost = sample_cost(config)
    stages = recipe.get("stages") or []
    how = loaded.preprocess
    model_rows = [
        ("image tower", f"{image.name}, {image.image_size} px, pooling {image.pooling}, {image.act}"),
        ("text tower", f"width {text.width}, depth {text.depth}, {text.context_length} tokens, {text.tokenizer}"),
        ("embedding", f"{config.embed_dim} numbers"),
        ("weights", f"{weight_count(config):,}{', averaged over training' if ema else ''}"),
        ("FLOPs of a sample", f"{cost.flops / 3:.3g} to embed image and text, at full length"),
        (
            "preprocessing",
            f"{how.resize_mode} to {how.size} px, {how.interpolation}; mean {how.mean}, deviation {how.std}",
        ),
    ]
    training_rows = [
        ("recipe", recipe.get("name", "unknown")),
        ("samples seen", f"{loaded.samples_seen:,}"),
        *((f"stage {stage.get('name', number)}", stage_words(stage)) for number, stage in enumerate(stages, 1)),
        *data_rows(loaded, run),
    ]
    parts = [
        f"---\nlibrary_name: {LIBRARY[target]}\ntags: [clip, clipkit]\n---",
        f"# {recipe.get('name', 'CLIP')}, {loaded.samples_seen:,} samples seen",
        f"Exported by clipkit {__version__} for {target}; `parity.json` has how far it is from the original.",
        f"```python\n{LOADING[target]}\n```",
        "## Model",
        table(("", ""), model_rows),
        "## Training",
        table(("", ""), training_rows),
        "## Results",
        results(run, loaded, ema),
        "## Parity",
        f"```\n{parity.text_report()}\n```",
        "## Licence",
        "No licence is chosen here: it depends on the training data and on the weights that it began with. "
        "Say which one applies before you pass the model on.",
    ]
    return "\n\n".join(parts) + "\n"


def stage_words(stage: dict[str, Any]) -> str:
    """The sizes and the length of one stage of the recipe."""
    names = ("samples", "image_size", "image_keep", "context_length", "batch_size", "learning_rate")
    return ", ".join(f"{name} {stage[name]}" for name in names if stage.get(name) is not None)


def data_rows(loaded: Checkpoint, run: Path | None) -> list[tuple[str, str]]:
    """What the run says about its training data, and what it was computed with."""
    about: dict[str, Any] = dict(loaded.state.get("dataset") or {})
    settings = read_json(run / "config.json") if run is not None and (run / "config.json").is_file() else {}
    rows = [("training data", ", ".join(f"{name} {value}" for name, value in about.items()))] if about else []
    if settings.get("init"):
        rows.append(("began with", str(settings["init"])))
    if isinstance(settings.get("device"), dict):
        rows.append(("trained on", device_words(settings["device"])))
    if loaded.state.get("seconds"):
        rows.append(("hours", f"{loaded.state['seconds'] / 3600:.2f}"))
    return rows


def device_words(device: dict[str, Any]) -> str:
    """What a run's `config.json` says of its device: `8 × NVIDIA H100, in bfloat16`."""
    hardware, devices = device.get("hardware") or device.get("kind") or "unknown", device.get("devices", 1)
    words = f"{devices} × {hardware}" if devices > 1 else str(hardware)
    return f"{words}, in {device['arithmetic']}" if device.get("arithmetic") else words


def results(run: Path | None, loaded: Checkpoint, ema: bool) -> str:
    """The checkpoint's own lines of the run's `results.jsonl`, with their hashes."""
    lines = read_json_lines(run / "results.jsonl") if run is not None and (run / "results.jsonl").is_file() else []
    name = loaded.path.name
    # Checkpoints of other runs, whose results may lie here too, are named by their whole paths.
    own = [line for line in lines if isinstance(line, dict) and line.get("checkpoint") == f"checkpoints/{name}"]
    mine = [line for line in own if str(line.get("task")).startswith("ema/") == ema]
    if not mine and own:
        return f"None: those of the run are of {'the last weights' if ema else 'their averages (`export --ema`)'}."
    if not mine:
        return "None yet: `clipkit zeroshot` on the run writes them."
    rows = []
    for line in mine:
        show = count if line["metric"].endswith("_rank") else percent
        value, low, high = (show(line[end]) for end in ("value", "low", "high"))
        hashes = " ".join(f"{what} {digest}" for what, digest in line.get("hashes", {}).items())
        rows.append((f"{line['task']} {line['metric']}", f"{value} ({low} to {high}, n {line['n']:,})", hashes))
    return table(("what", "value, 95% interval", "hashes"), rows)


def table(head: tuple[str, ...], rows: list[Any]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)
