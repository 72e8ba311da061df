"""The text tower without padding against the padded one and OpenCLIP's, forward and backward.

Captions of 3 to 18 words through the text tower of CLIP's B/16 at 32 and 77 tokens, in float32. All sides have the same
weights and work in turn in one process on the same batches, round after round. Figures are captions/s; ratios are those
of a round, as median (smallest to largest), by wall clock and by processor time. On a busy machine the processor's
ratio is the one to look at. `passes` is another way to the same end: one pass of the tower for each bucket.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import open_clip
import torch
from support.pictures import captions
from torch import Tensor

from clipkit.config import set_values
from clipkit.interop.openclip import convert
from clipkit.model.clip import allocate, load_state
from clipkit.model.config import vit_b16
from clipkit.model.text_tower import length_buckets
from clipkit.text.tokenizer import Tokenizer

Side = Callable[[], Tensor]


def sides_of(theirs: torch.nn.Module, ids_BT: Tensor) -> dict[str, Side]:
    """Each side's way from the batch to its vectors [B, E]; prints the share of padding, and holds them to be equal."""
    tokens = ids_BT.shape[1]
    model = allocate(set_values(vit_b16(), [f"text.context_length={tokens}"]))
    load_state(model, convert(theirs.state_dict(), model.config))
    length_B = ids_BT.numpy().argmax(axis=1) + 1  # on the host, as the loader has them
    buckets = length_buckets(length_B)
    computed = sum(bucket.rows * bucket.tokens for bucket in buckets)
    print(
        f"{tokens} tokens, {len(ids_BT)} captions, the longest of {length_B.max()}: padding is "
        f"{1 - length_B.sum() / ids_BT.numel():.1%} of the padded tower's tokens, "
        f"{1 - length_B.sum() / computed:.1%} of those in {len(buckets)} buckets"
    )

    def passes() -> Tensor:
        order_B = ids_BT.argmax(dim=1).argsort(descending=True)
        parts = zip(ids_BT[order_B].split([bucket.rows for bucket in buckets]), buckets, strict=True)
        return torch.cat([model.encode_text(part[:, : bucket.tokens]) for part, bucket in parts])[order_B.argsort()]

    sides = {
        "clipkit": lambda: model.encode_text(ids_BT, buckets=buckets),
        "padded": lambda: model.encode_text(ids_BT),
        "openclip": lambda: theirs.encode_text(ids_BT, normalize=True),
        "passes": passes,
    }
    for side in sides.values():
        torch.testing.assert_close(side(), sides["padded"](), atol=1e-5, rtol=1e-5)
    return sides


def measure(sides: dict[str, Side], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the wall clock and of the processor, side by side and round by round, after one round to warm up."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            side().sum().backward()
            if number:
                found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return found


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds, forward and backward")
    for tokens in (32, 77):
        theirs = open_clip.create_model("ViT-B-16", force_context_length=tokens, load_weights=False)
        ids_BT = torch.from_numpy(Tokenizer()(captions(options.captions), tokens))
        found = measure(sides_of(theirs, ids_BT), options.rounds)
        for name, times in found.items():
            line = f"{name:12}{options.captions / statistics.median(wall for wall, _ in times):8.1f} captions/s"
            if name != "clipkit":
                for clock, what in enumerate(("by wall clock", "by processor")):
                    pairs = zip(times, found["clipkit"], strict=True)
                    line += f"   {spread([other[clock] / own[clock] for other, own in pairs])} {what}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
